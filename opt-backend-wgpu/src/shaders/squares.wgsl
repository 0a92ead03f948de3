// The sum of the squares of some quads of x, one number a workgroup.

struct Args {
    // Quads of x, those that a workgroup takes, and the number of the first workgroup.
    count: u32,
    share: u32,
    first: u32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;

#include reduce

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let id = group.y * groups.x + group.x;
    // There may be a few more workgroups than were asked for.
    if (id * args.share >= args.count) { return; }
    let end = min(args.count, (id + 1u) * args.share);
    var sum = 0.0;
    for (var i = id * args.share + thread; i < end; i += 256u) { sum += dot(x[i], x[i]); }
    let all = total(sum, thread);
    if (thread == 0u) { out[args.first + id] = all; }
}
