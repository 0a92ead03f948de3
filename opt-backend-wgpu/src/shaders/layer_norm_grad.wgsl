// The gradient of LayerNorm with respect to its input: a workgroup a row. With STATS set only mean and 1 / deviation of
// each row, from which `columns.wgsl` makes the gradients of the parameters.

struct Args {
    rows: u32,
    width: u32,
    // Quads of a row.
    quads: u32,
    eps: f32,
    // Row of the statistics at which this dispatch begins.
    first: u32,
}

@group(0) @binding(0) var<uniform> args: Args;
#if STATS
@group(0) @binding(1) var<storage, read_write> out: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;
#else
@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;
// The scales, then the shifts.
@group(0) @binding(3) var<storage, read> norm: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> dy: array<vec4<f32>>;
#endif

#include reduce

fn inside(k: u32) -> vec4<bool> {
    return vec4<u32>(4u * k) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(args.width);
}

@compute @workgroup_size($THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.y * groups.x + group.x;
    if (row >= args.rows) { return; }
    let at = row * args.quads;
    let width = f32(args.width);
    var sum = 0.0;
    for (var k = thread; k < args.quads; k += $THREADSu) { sum += dot(x[at + k], vec4<f32>(1.0)); }
    let mean = total(sum, thread) / width;
    var squares = 0.0;
    for (var k = thread; k < args.quads; k += $THREADSu) {
        let v = select(vec4<f32>(0.0), x[at + k] - mean, inside(k));
        squares += dot(v, v);
    }
    let scale = 1.0 / sqrt(total(squares, thread) / width + args.eps);
#if STATS
    if (thread == 0u) { out[args.first + row] = vec2<f32>(mean, scale); }
#else
    // Of the gradient of the normalised values: its mean, and that of its product with them.
    var inner = 0.0;
    var product = 0.0;
    for (var k = thread; k < args.quads; k += $THREADSu) {
        let g = select(vec4<f32>(0.0), dy[at + k] * norm[k], inside(k));
        inner += dot(g, vec4<f32>(1.0));
        product += dot(g, (x[at + k] - mean) * scale);
    }
    let mean_inner = total(inner, thread) / width;
    let mean_product = total(product, thread) / width;
    for (var k = thread; k < args.quads; k += $THREADSu) {
        let normal = (x[at + k] - mean) * scale;
        let v = scale * (dy[at + k] * norm[k] - mean_inner - normal * mean_product);
        out[at + k] = select(vec4<f32>(0.0), v, inside(k));
    }
#endif
}
