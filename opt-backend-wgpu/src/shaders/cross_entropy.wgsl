// The cross-entropy of each row's target, and its gradient in the place of the logits: a workgroup a row.

struct Args {
    rows: u32,
    width: u32,
    // Quads of a row.
    quads: u32,
    // Word of `data` at which the targets begin.
    targets_at: u32,
    // Row of the losses at which this dispatch begins.
    first: u32,
    scale: f32,
    epsilon: f32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read> data: array<u32>;
@group(0) @binding(2) var<storage, read_write> logits: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> losses: array<f32>;

#include reduce
#include softmax

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.y * groups.x + group.x;
    if (row >= args.rows) { return; }
    let at = row * args.quads;
    let wanted = data[args.targets_at + row];
    let wanted_logit = logits[at + wanted / 4u][wanted % 4u];
    var part = Part(LOWEST, 0.0);
    var all = 0.0;
    for (var k = thread; k < args.quads; k += 256u) {
        let v = logits[at + k];
        part = with_quad(part, v, k);
        // What pads a row is zero.
        all += dot(v, vec4<f32>(1.0));
    }
    let whole = joined(part, thread);
    let mean = total(all, thread) / f32(args.width);
    let log_sum = log(whole.sum);
    if (thread == 0u) {
        var loss = (1.0 - args.epsilon) * (whole.largest - wanted_logit + log_sum);
        if (args.epsilon > 0.0) { loss += args.epsilon * (whole.largest - mean + log_sum); }
        losses[args.first + row] = loss;
    }
    // All have read what is overwritten.
    storageBarrier();
    let smooth_share = args.epsilon / f32(args.width);
    for (var k = thread; k < args.quads; k += 256u) {
        var d = exp(logits[at + k] - whole.largest) / whole.sum - smooth_share;
        d -= select(vec4<f32>(0.0), vec4<f32>(1.0 - args.epsilon), columns_of(k) == vec4<u32>(wanted));
        logits[at + k] = select(vec4<f32>(0.0), args.scale * d, columns_of(k) < vec4<u32>(args.width));
    }
}
