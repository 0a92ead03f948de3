// Rows of a table, or of a tensor, by id; added to x where ADD is set. Of a table in several parts, each dispatch
// writes the rows whose ids lie in its part.
#if NATIVE
enable f16;
#endif

struct Args {
    rows: u32,
    // Quads of a row.
    quads: u32,
    // Word of `data` at which the ids begin.
    ids_at: u32,
    // The entries of this part.
    first: u32,
    count: u32,
#if PACKED
    width: u32,
    // As in product.wgsl; vectors are words.
    groups: u32,
    group_vectors: u32,
    zeros_at: u32,
    // Entry of the parameters at which places begin.
    places_at: u32,
#endif
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read> data: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> w: array<$QUAD>;
#if ADD
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;
#endif

#if PACKED
@group(0) @binding($PARAMETERS) var<storage, read> p: array<$ENTRY>;

#include packed
#else
#include weights
#endif

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + thread;
    let row = i / args.quads;
    if (row >= args.rows) { return; }
    // Wraps to a large number for ids before this part.
    let row_of_table = data[args.ids_at + row] - args.first;
    if (row_of_table >= args.count) { return; }
#if PACKED
#if TABLE
    set_levels(0u);
#endif
#if PLACES
    var v = vec4<f32>(0.0);
    for (var c = 0u; c < 4u; c++) {
        let column = 4u * (i % args.quads) + c;
        if (column < args.width) {
            let place = parameter(0u, args.places_at, column);
            v[c] = expanded(row_of_table, place / 4u)[place % 4u];
        }
    }
#else
    var v = expanded(row_of_table, i % args.quads);
#endif
    v *= unit(0u);
#else
    var v = widen(w[row_of_table * args.quads + i % args.quads]);
#endif
#if ADD
    v += x[i];
#endif
    out[i] = v;
}
