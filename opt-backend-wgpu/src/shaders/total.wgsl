// The sum of a list of numbers times a factor, by one workgroup and so always in the same order.

struct Args { count: u32, factor: f32 }

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> numbers: array<f32>;

#include reduce

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) thread: u32) {
    var sum = 0.0;
    for (var i = thread; i < args.count; i += 256u) { sum += numbers[i]; }
    let all = total(sum, thread);
    if (thread == 0u) { out[0] = vec4<f32>(all * args.factor, 0.0, 0.0, 0.0); }
}
