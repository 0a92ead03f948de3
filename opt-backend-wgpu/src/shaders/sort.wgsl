// The largest `keep` of each 1024 candidates, in order: a bitonic sort in workgroup memory (Batcher 1968). The
// candidates are logits, or with MERGE the pairs that an earlier pass kept.

struct Args {
    rows: u32,
    // Logits, or pairs, of a row.
    width: u32,
    // Elements (logits or pairs) from one row to the next.
    stride: u32,
    // Workgroups of a row.
    parts: u32,
    keep: u32,
    // Pair at which this dispatch begins to write.
    out_at: u32,
}

@group(0) @binding(0) var<uniform> args: Args;
#if MERGE
@group(0) @binding(1) var<storage, read> candidates: array<vec2<u32>>;
#else
@group(0) @binding(1) var<storage, read> candidates: array<f32>;
#endif
// Pairs of key and id.
@group(0) @binding(2) var<storage, read_write> out: array<vec2<u32>>;

#include keys

const NONE: u32 = 0xffffffffu;
var<workgroup> pairs: array<vec2<u32>, 1024>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let job = group.y * groups.x + group.x;
    let row = job / args.parts;
    if (row >= args.rows) { return; }
    let begin = job % args.parts * 1024u;
    for (var i = thread; i < 1024u; i += 256u) {
        var pair = vec2<u32>(0u, NONE);
        if (begin + i < args.width) {
#if MERGE
            pair = candidates[row * args.stride + begin + i];
#else
            pair = vec2<u32>(sort_key(candidates[row * args.stride + begin + i]), begin + i);
#endif
        }
        pairs[i] = pair;
    }
    for (var size = 2u; size <= 1024u; size *= 2u) {
        for (var gap = size / 2u; gap > 0u; gap /= 2u) {
            workgroupBarrier();
            for (var i = thread; i < 512u; i += 256u) {
                let low = i / gap * 2u * gap + i % gap;
                let high = low + gap;
                let a = pairs[low];
                let b = pairs[high];
                let ordered = a.x > b.x || (a.x == b.x && a.y <= b.y);
                // Runs of `size` alternate in direction.
                if (ordered == ((low & size) != 0u)) {
                    pairs[low] = b;
                    pairs[high] = a;
                }
            }
        }
    }
    workgroupBarrier();
    for (var i = thread; i < args.keep; i += 256u) {
        out[args.out_at + job * args.keep + i] = pairs[i];
    }
}
