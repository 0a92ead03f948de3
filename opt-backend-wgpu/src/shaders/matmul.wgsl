// Many rows: a workgroup computes a tile of 64 rows and 64 columns, a thread 4 by 4 of them, over a depth of four
// quads at a time that all threads have copied to workgroup memory. Rows there are five quads apart and columns are
// dealt out so that the threads of a subgroup read from different banks.
#include product

var<workgroup> x_tile: array<vec4<f32>, 320>;
var<workgroup> w_tile: array<vec4<f32>, 320>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let id = group.y * groups.x + group.x;
    let first_row = id / args.column_groups * 64u;
    let first_column = id % args.column_groups * 64u;
    if (first_row >= args.rows) { return; }

#if TABLE
    set_levels(0u, thread);
#endif

    let tx = thread % 16u;
    let ty = thread / 16u;
    // What this thread copies: one quad of x and one of W.
    let copied = thread / 4u;
    let depth = thread % 4u;
    let x_row = first_row + copied;
    let w_row = first_column + copied;
    let x_slot = copied * 5u + depth;
    let w_slot = (copied % 4u * 16u + copied / 4u) * 5u + depth;
    // W has whole quads of rows.
    let w_rows = (args.columns + 3u) / 4u * 4u;

#repeat r 4
    var sum$r = vec4<f32>(0.0);
#end
    for (var k = 0u; k < args.quads; k += 4u) {
        let inside = k + depth < args.quads;
        var xv = vec4<f32>(0.0);
        if (inside && x_row < args.rows) { xv = x[x_row * args.quads + k + depth]; }
        var wv = vec4<f32>(0.0);
#if PACKED
        if (inside && w_row < w_rows) { wv = expanded(w_row, k + depth); }
#else
        if (inside && w_row < w_rows) { wv = weight(0u, w_row * args.quads + k + depth); }
#endif
        x_tile[x_slot] = xv;
        w_tile[w_slot] = wv;
        workgroupBarrier();
#repeat d 4
        {
            let wa = w_tile[tx * 5u + $du];
            let wb = w_tile[(16u + tx) * 5u + $du];
            let wc = w_tile[(32u + tx) * 5u + $du];
            let wd = w_tile[(48u + tx) * 5u + $du];
            let v0 = x_tile[ty * 5u + $du];
            sum0 += vec4<f32>(dot(wa, v0), dot(wb, v0), dot(wc, v0), dot(wd, v0));
            let v1 = x_tile[(16u + ty) * 5u + $du];
            sum1 += vec4<f32>(dot(wa, v1), dot(wb, v1), dot(wc, v1), dot(wd, v1));
            let v2 = x_tile[(32u + ty) * 5u + $du];
            sum2 += vec4<f32>(dot(wa, v2), dot(wb, v2), dot(wc, v2), dot(wd, v2));
            let v3 = x_tile[(48u + ty) * 5u + $du];
            sum3 += vec4<f32>(dot(wa, v3), dot(wb, v3), dot(wc, v3), dot(wd, v3));
        }
#end
        workgroupBarrier();
    }

    let quad = first_column / 4u + tx;
    if (4u * quad >= args.columns) { return; }
#repeat r 4
    if (first_row + ty + 16u * $ru < args.rows) { finish(0u, first_row + ty + 16u * $ru, quad, sum$r); }
#end
}
