// One step of AdamW on parameters and both moments, in place.

struct Args {
    // Quads of all and of a row, and columns.
    count: u32,
    quads: u32,
    width: u32,
    // 1 - lr * weight decay
    keep: f32,
    beta1: f32,
    beta2: f32,
    step_size: f32,
    // The root of the second moment's correction.
    root: f32,
    eps: f32,
    max_norm: f32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read_write> param: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> first: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> second: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> gradient: array<vec4<f32>>;
#if CLIP
@group(0) @binding(5) var<storage, read> squares: array<f32>;
#endif

#include clip

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + thread;
    if (i >= args.count) { return; }
    let g = gradient[i] * clip_factor();
    let m = args.beta1 * first[i] + (1.0 - args.beta1) * g;
    let v = args.beta2 * second[i] + (1.0 - args.beta2) * g * g;
    first[i] = m;
    second[i] = v;
    let p = args.keep * param[i] - args.step_size * m / (sqrt(v) / args.root + args.eps);
    // 0 / 0 in what pads a row, if eps is 0.
    let column = vec4<u32>(4u * (i % args.quads)) + vec4<u32>(0u, 1u, 2u, 3u);
    param[i] = select(vec4<f32>(0.0), p, column < vec4<u32>(args.width));
}
