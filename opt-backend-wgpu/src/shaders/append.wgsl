// Appends rows of keys and values to pages, and copies positions of a page that is shared. A workgroup handles one
// head of one position's keys or values.

struct Args {
    heads: u32,
    head_dim: u32,
    // Elements from one row of keys and values to the next.
    stride: u32,
    // Word of `data` at which the items begin, and their number.
    items_at: u32,
    items: u32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read> data: array<u32>;
@group(0) @binding(2) var<storage, read_write> slab: array<$UNIT>;
@group(0) @binding(3) var<storage, read> keys: array<f32>;
@group(0) @binding(4) var<storage, read> values: array<f32>;

#include cache
#include encode

fn element(part: u32, i: u32) -> f32 {
    if (part == 0u) { return keys[i]; }
    return values[i];
}

@compute @workgroup_size(32)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let id = group.y * groups.x + group.x;
    let head = id % args.heads;
    let part = id / args.heads % 2u;
    let item = id / args.heads / 2u;
    if (item >= args.items) { return; }
    // Row, or page to copy from; page and slot written; whether to copy.
    let at = args.items_at + 4u * item;
    let source = data[at];
    let slot = data[at + 2u];
    let target_at = place(data[at + 1u], part, slot, head, args.heads);
    if (data[at + 3u] != 0u) {
        let source_at = place(source, part, slot, head, args.heads);
        for (var i = thread; i < HEAD; i += 32u) { slab[target_at + i] = slab[source_at + i]; }
        return;
    }
    let from_at = source * args.stride + head * args.head_dim;
    var largest = 0.0;
#if Int8
    for (var d = 0u; d < args.head_dim; d++) { largest = max(largest, abs(element(part, from_at + d))); }
    if (thread == 0u) { slab[target_at + QUADS] = bitcast<u32>(largest / 127.0); }
#endif
    for (var i = thread; i < QUADS; i += 32u) {
        var v = vec4<f32>(0.0);
        for (var c = 0u; c < 4u; c++) {
            if (4u * i + c < args.head_dim) { v[c] = element(part, from_at + 4u * i + c); }
        }
        slab[target_at + i] = encode(v, largest);
    }
}
