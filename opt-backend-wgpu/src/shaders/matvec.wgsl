// Few rows: a thread takes part in four columns of $ROWS rows. $LANES threads share the depth of the same columns, so
// that neighbours read neighbouring quads of a row of W, and every quad of W is read once for all rows. Of quantized W
// they read vectors of words.
#include product

#if SUBGROUPS
var<workgroup> partial: array<vec4<f32>, $PARTIALS>;
#else
#if SHARED
var<workgroup> partial: array<vec4<f32>, $PARTIALS>;
#endif
#endif

@compute @workgroup_size($THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
#if SUBGROUPS
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
#endif
) {
    let id = group.y * groups.x + group.x;
#if THREE
    let block = id / args.column_groups;
    let which = block % 3u;
    let first = block / 3u * $ROWSu;
#else
    let which = 0u;
    let first = id / args.column_groups * $ROWSu;
#endif
    if (first >= args.rows) { return; }
    let lane = thread % $LANESu;
    let quad = id % args.column_groups * $TEAMSu + thread / $LANESu;
    let last_quad = (args.columns + 3u) / 4u - 1u;

#repeat r $ROWS
    let x$r = min(first + $ru, args.rows - 1u) * args.quads;
    var sum$r = vec4<f32>(0.0);
#end
#if PACKED
#include packed_sums
#else
    let w_at = min(quad, last_quad) * 4u * args.quads;
    for (var k = lane; k < args.quads; k += $LANESu) {
        let wa = weight(which, w_at + k);
        let wb = weight(which, w_at + args.quads + k);
        let wc = weight(which, w_at + 2u * args.quads + k);
        let wd = weight(which, w_at + 3u * args.quads + k);
#repeat r $ROWS
        {
            let v = x[x$r + k];
            sum$r += vec4<f32>(dot(wa, v), dot(wb, v), dot(wc, v), dot(wd, v));
        }
#end
    }
#endif

#if SUBGROUPS
    // All threads share one quad of columns.
#repeat r $ROWS
    sum$r = subgroupAdd(sum$r);
#end
    if (subgroup_lane == 0u) {
#repeat r $ROWS
        partial[$ru * $SUBGROUPS_MOSTu + subgroup] = sum$r;
#end
    }
    workgroupBarrier();
    if (thread < $ROWSu && first + thread < args.rows) {
        var sum = partial[thread * $SUBGROUPS_MOSTu];
        for (var i = 1u; i < subgroups; i++) { sum += partial[thread * $SUBGROUPS_MOSTu + i]; }
        finish(which, first + thread, quad, sum);
    }
#else
#if SHARED
#repeat r $ROWS
    partial[$ru * $THREADSu + thread] = sum$r;
#end
    for (var half = $LANESu / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane < half) {
#repeat r $ROWS
            partial[$ru * $THREADSu + thread] += partial[$ru * $THREADSu + thread + half];
#end
        }
    }
    workgroupBarrier();
    if (quad <= last_quad) {
        for (var r = lane; r < $ROWSu; r += $LANESu) {
            if (first + r < args.rows) { finish(which, first + r, quad, partial[r * $THREADSu + thread - lane]); }
        }
    }
#else
    if (quad <= last_quad) {
#repeat r $ROWS
        if (first + $ru < args.rows) { finish(which, first + $ru, quad, sum$r); }
#end
    }
#endif
#endif
}
