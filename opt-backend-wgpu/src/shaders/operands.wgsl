// What the kernels of out = a b share. An operand lies ACROSS where each of its rows in memory is one step of the depth;
// otherwise its rows run along the depth. For tensors times weights, b is a weight as products hold it.
#if NATIVE
enable f16;
#endif

struct Args {
    // Rows and columns of out that this dispatch computes, and how deep it sums.
    rows: u32,
    columns: u32,
    depth: u32,
    // Quads from one row in memory to the next, and the quad of each row at which this dispatch begins.
    a_stride: u32,
    a_at: u32,
    b_stride: u32,
    out_stride: u32,
    out_at: u32,
    // Workgroups that share the columns.
    column_groups: u32,
    // Whether what out holds is added.
    add: u32,
#if PACKED
    // As in product.wgsl.
    groups: u32,
    group_vectors: u32,
    zeros_at: u32,
#endif
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> w: array<$QUAD>;
#if PACKED
@group(0) @binding($PARAMETERS) var<storage, read> p: array<$ENTRY>;

#include packed
#else
#include weights

fn unit(which: u32) -> f32 { return 1.0; }
#endif

fn columns_from(first: u32) -> vec4<u32> { return vec4<u32>(first) + vec4<u32>(0u, 1u, 2u, 3u); }

#if ACROSS_B
// Four columns of a step.
fn b_quad(step: u32, quad: u32) -> vec4<f32> {
#if PACKED
    return expanded(step, quad);
#else
    return widen(w[step * args.b_stride + quad]);
#endif
}
#endif

// Four columns of a row of out. Padding columns are zero, as everywhere.
fn finish(row: u32, quad: u32, sum: vec4<f32>) {
    let at = row * args.out_stride + args.out_at + quad;
    var v = select(vec4<f32>(0.0), sum * unit(0u), columns_from(4u * quad) < vec4<u32>(args.columns));
    if (args.add != 0u) { v += out[at]; }
    out[at] = v;
}
