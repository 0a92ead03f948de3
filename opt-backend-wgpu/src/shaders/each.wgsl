// One op on each element of x, in place; what pads its rows is zero afterwards, whatever comes out there.

struct Args {
    // Quads of x and of a row, and columns.
    count: u32,
    quads: u32,
    width: u32,
    // Number of an activation.
    kind: u32,
    factor: f32,
    // Of dropout: elements whose hash is below are dropped; what the hash begins with, and the first row.
    threshold: u32,
    seed_low: u32,
    seed_high: u32,
    first_row: u32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read_write> x: array<vec4<f32>>;
#if OPERAND
@group(0) @binding(2) var<storage, read> y: array<vec4<f32>>;
#endif

#if ACTIVATE
#include activation
#endif
#if ACTIVATE_GRAD
#include activation
#include slope
#endif

#if DROPOUT
// The hash of `opt_backend::Dropout`, of four elements.
fn mix_bits(v: vec4<u32>) -> vec4<u32> {
    var x = v ^ (v >> vec4<u32>(16u));
    x *= 0x7feb352du;
    x ^= x >> vec4<u32>(15u);
    x *= 0x846ca68bu;
    return x ^ (x >> vec4<u32>(16u));
}
#endif

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + thread;
    if (i >= args.count) { return; }
    let quad = i % args.quads;
    let column = vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u);
#if ZERO
    var v = vec4<f32>(0.0);
#else
    var v = x[i];
#endif
#if ACTIVATE
    v = activate(v, args.kind);
#endif
#if ACTIVATE_GRAD
    v *= slope(y[i], args.kind);
#endif
#if ADD_ROW
    v += y[quad];
#endif
#if MUL_ROW
    v *= y[quad];
#endif
#if MUL
    v *= y[i];
#endif
#if SCALE
    v *= args.factor;
#endif
#if DROPOUT
    let element = vec4<u32>((args.first_row + i / args.quads) * args.width) + column;
    let hash = mix_bits(mix_bits(element ^ vec4<u32>(args.seed_low)) ^ vec4<u32>(args.seed_high));
    v = select(vec4<f32>(0.0), v * args.factor, hash >= vec4<u32>(args.threshold));
#endif
    x[i] = select(vec4<f32>(0.0), v, column < vec4<u32>(args.width));
}
