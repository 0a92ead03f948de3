// One step of gradient descent on parameters and, with VELOCITY set, their velocities, in place.

struct Args {
    // Quads.
    count: u32,
    lr: f32,
    momentum: f32,
    weight_decay: f32,
    max_norm: f32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read_write> param: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> gradient: array<vec4<f32>>;
#if VELOCITY
@group(0) @binding(3) var<storage, read_write> velocity: array<vec4<f32>>;
#endif
#if CLIP
@group(0) @binding($PARAMETERS) var<storage, read> squares: array<f32>;
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
    var step = gradient[i] * clip_factor() + args.weight_decay * param[i];
#if VELOCITY
    step += args.momentum * velocity[i];
    velocity[i] = step;
#endif
    param[i] -= args.lr * step;
}
