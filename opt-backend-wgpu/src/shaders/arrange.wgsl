// The columns of x in the order in which a quantized W has them, with zeros where it has padding.

struct Args {
    rows: u32,
    // Elements of a row of x, padding included, and quads of a row of out.
    stride: u32,
    quads: u32,
}

const NONE: u32 = 0xffffffffu;

@group(0) @binding(0) var<uniform> args: Args;
// The column of x that each place reads, or NONE.
@group(0) @binding(1) var<storage, read> inputs: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> x: array<f32>;

fn input(row: u32, i: u32) -> f32 {
    if (i == NONE) { return 0.0; }
    return x[row * args.stride + i];
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + thread;
    let row = i / args.quads;
    if (row >= args.rows) { return; }
    let place = inputs[i % args.quads];
    out[i] = vec4<f32>(input(row, place.x), input(row, place.y), input(row, place.z), input(row, place.w));
}
