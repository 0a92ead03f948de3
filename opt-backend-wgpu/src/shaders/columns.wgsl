// The sum of each column, or plus that: sixteen threads share the rows of a quad of columns. With NORM set, of the
// gradients of LayerNorm's parameters.

struct Args {
    rows: u32,
    width: u32,
    // Quads of a row.
    quads: u32,
    // Whether what out holds is added.
    add: u32,
    // Row of the statistics at which this dispatch begins.
    first: u32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;
#if NORM
@group(0) @binding(2) var<storage, read_write> d_weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> dy: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;
// Mean and 1 / deviation of each row.
@group(0) @binding(5) var<storage, read> stats: array<vec2<f32>>;
#else
@group(0) @binding(2) var<storage, read> dy: array<vec4<f32>>;
#endif

var<workgroup> sums: array<vec4<f32>, 256>;

// The sum over the threads of one quad; thread 0 to 15 have it.
fn over_rows(v: vec4<f32>, thread: u32) -> vec4<f32> {
    workgroupBarrier();
    sums[thread] = v;
    for (var half = 128u; half >= 16u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) { sums[thread] += sums[thread + half]; }
    }
    return sums[thread];
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let quad = (group.y * groups.x + group.x) * 16u + thread % 16u;
    var sum = vec4<f32>(0.0);
    var product = vec4<f32>(0.0);
    if (quad < args.quads) {
        for (var row = thread / 16u; row < args.rows; row += 16u) {
            let g = dy[row * args.quads + quad];
            sum += g;
#if NORM
            let of_row = stats[args.first + row];
            product += g * (x[row * args.quads + quad] - of_row.x) * of_row.y;
#endif
        }
    }
    let inside = vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(args.width);
    let writes = thread < 16u && quad < args.quads;
    var all = select(vec4<f32>(0.0), over_rows(sum, thread), inside);
    if (writes) {
        if (args.add != 0u) { all += out[quad]; }
        out[quad] = all;
    }
#if NORM
    all = select(vec4<f32>(0.0), over_rows(product, thread), inside);
    if (writes) {
        if (args.add != 0u) { all += d_weight[quad]; }
        d_weight[quad] = all;
    }
#endif
}
