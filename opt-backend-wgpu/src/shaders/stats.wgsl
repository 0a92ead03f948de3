// Of a part of a row of logits: the largest, the lowest id that has it, and the sum of exp(logit - largest). The host
// joins the parts. With TARGETS also the logit of the row's target.

struct Args {
    rows: u32,
    width: u32,
    // Quads of a row.
    quads: u32,
    // Quads of a part, and parts of a row.
    part: u32,
    parts: u32,
    // Word of `data` at which the targets begin.
    targets_at: u32,
    // Record at which this dispatch begins.
    out_at: u32,
}

struct Stats { key: u32, id: u32, largest: f32, sum: f32, target_logit: f32, unused_a: u32, unused_b: u32, unused_c: u32 }

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read> data: array<u32>;
@group(0) @binding(2) var<storage, read> logits: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> out: array<Stats>;

#include keys

const NONE: u32 = 0xffffffffu;
const LOWEST: f32 = -3.402823e38;
var<workgroup> best_keys: array<u32, 256>;
var<workgroup> best_ids: array<u32, 256>;
var<workgroup> numbers: array<f32, 256>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let job = group.y * groups.x + group.x;
    let row = job / args.parts;
    if (row >= args.rows) { return; }
    let begin = job % args.parts * args.part;
    let end = min(begin + args.part, args.quads);
    let at = row * args.quads;

    var key = 0u;
    var id = NONE;
    var largest = LOWEST;
    for (var k = begin + thread; k < end; k += 256u) {
        let v = logits[at + k];
        for (var c = 0u; c < 4u; c++) {
            let column = 4u * k + c;
            if (column < args.width) {
                let found = sort_key(v[c]);
                // Ids ascend within a thread, so that the first of equals stays.
                if (found > key || id == NONE) {
                    key = found;
                    id = column;
                }
                if (found != 0u) { largest = max(largest, v[c]); }
            }
        }
    }
    best_keys[thread] = key;
    best_ids[thread] = id;
    numbers[thread] = largest;
    for (var half = 128u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) {
            let other_key = best_keys[thread + half];
            let other_id = best_ids[thread + half];
            let better = other_key > best_keys[thread]
                || (other_key == best_keys[thread] && other_id < best_ids[thread]);
            if (better) {
                best_keys[thread] = other_key;
                best_ids[thread] = other_id;
            }
            numbers[thread] = max(numbers[thread], numbers[thread + half]);
        }
    }
    workgroupBarrier();
    largest = numbers[0];
    workgroupBarrier();

    var sum = 0.0;
    for (var k = begin + thread; k < end; k += 256u) {
        let v = exp(logits[at + k] - largest);
        let column = vec4<u32>(4u * k) + vec4<u32>(0u, 1u, 2u, 3u);
        sum += dot(select(vec4<f32>(0.0), v, column < vec4<u32>(args.width)), vec4<f32>(1.0));
    }
    numbers[thread] = sum;
    for (var half = 128u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) { numbers[thread] += numbers[thread + half]; }
    }
    workgroupBarrier();
    if (thread == 0u) {
        var target_logit = 0.0;
#if TARGETS
        let target_id = data[args.targets_at + row];
        target_logit = logits[at + target_id / 4u][target_id % 4u];
#endif
        out[args.out_at + job] = Stats(best_keys[0], best_ids[0], largest, numbers[0], target_logit, 0u, 0u, 0u);
    }
}
