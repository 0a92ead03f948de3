// LayerNorm: a workgroup a row. The variance is taken around the mean, in a second pass: computed as the difference
// of two large sums it would cancel.

struct Args {
    rows: u32,
    width: u32,
    // Quads of a row.
    quads: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;
// The scales, then the shifts; both zero in the padding.
@group(0) @binding(3) var<storage, read> norm: array<vec4<f32>>;

#include reduce

@compute @workgroup_size($THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
#if SUBGROUPS
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
#endif
) {
    let row = group.y * groups.x + group.x;
    if (row >= args.rows) { return; }
    let at = row * args.quads;
    var sum = 0.0;
    for (var k = thread; k < args.quads; k += $THREADSu) {
        sum += dot(x[at + k], vec4<f32>(1.0));
    }
    let width = f32(args.width);
#if SUBGROUPS
    let mean = total(sum, thread, lane, subgroup, subgroups) / width;
#else
    let mean = total(sum, thread) / width;
#endif
    var squares = 0.0;
    for (var k = thread; k < args.quads; k += $THREADSu) {
        let column = vec4<u32>(4u * k) + vec4<u32>(0u, 1u, 2u, 3u);
        let v = select(vec4<f32>(0.0), x[at + k] - mean, column < vec4<u32>(args.width));
        squares += dot(v, v);
    }
#if SUBGROUPS
    let variance = total(squares, thread, lane, subgroup, subgroups) / width;
#else
    let variance = total(squares, thread) / width;
#endif
    let scale = 1.0 / sqrt(variance + args.eps);
    for (var k = thread; k < args.quads; k += $THREADSu) {
        out[at + k] = (x[at + k] - mean) * scale * norm[k] + norm[args.quads + k];
    }
}
