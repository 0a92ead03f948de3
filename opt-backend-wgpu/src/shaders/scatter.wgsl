// Adds rows of dy to rows of out. What goes to one row is listed together, in the order in which it is added: a thread
// walks the list for a quad of columns.

struct Args {
    // Rows that something is added to.
    targets: u32,
    // Quads of a row.
    quads: u32,
    // Word of `data` at which the lists begin (row of out, then begin and end among the rows of dy), and the rows.
    lists_at: u32,
    rows_at: u32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read> data: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> dy: array<vec4<f32>>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + thread;
    let list = i / args.quads;
    if (list >= args.targets) { return; }
    let quad = i % args.quads;
    let at = args.lists_at + 3u * list;
    let end = data[at + 2u];
    let to = data[at] * args.quads + quad;
    var sum = out[to];
    for (var j = data[at + 1u]; j < end; j++) { sum += dy[data[args.rows_at + j] * args.quads + quad]; }
    out[to] = sum;
}
