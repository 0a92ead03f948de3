// What matvec and matmul share: out = activation(x W^T + b) + residual.
#if NATIVE
enable f16;
#endif

struct Args {
    // Rows of x and of out.
    rows: u32,
    // Quads of a row of x and of W.
    quads: u32,
    // Rows of W: columns of out that this dispatch computes.
    columns: u32,
    // Quads from one row of out (and of the residual) to the next.
    out_stride: u32,
    // Quad of a row of out at which this dispatch begins.
    out_at: u32,
    // Quad of W (entry of the parameters) at which the biases begin, or NONE.
    bias_at: u32,
    activation: u32,
    // Workgroups that share the columns (of one W).
    column_groups: u32,
    // Quads from one output to the next where there are several.
    output_stride: u32,
#if PACKED
    // Groups of a row of W, and vectors of codes of a group.
    groups: u32,
    group_vectors: u32,
    // Entry of the parameters at which the zero points begin.
    zeros_at: u32,
#endif
}

const NONE: u32 = 0xffffffffu;

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> w: array<$QUAD>;
#if THREE
@group(0) @binding(4) var<storage, read> w1: array<$QUAD>;
@group(0) @binding(5) var<storage, read> w2: array<$QUAD>;
#endif
#if RESIDUAL
@group(0) @binding(4) var<storage, read> residual: array<vec4<f32>>;
#endif

#if PACKED
@group(0) @binding($PARAMETERS) var<storage, read> p: array<$ENTRY>;
#if THREE
@group(0) @binding(7) var<storage, read> p1: array<$ENTRY>;
@group(0) @binding(8) var<storage, read> p2: array<$ENTRY>;
#endif
#endif

#include activation

#if PACKED
#include packed

fn weight_bias(which: u32, quad: u32) -> vec4<f32> { return floats(which, args.bias_at, quad); }
#else
#include weights

fn unit(which: u32) -> f32 { return 1.0; }

fn weight(which: u32, i: u32) -> vec4<f32> {
#if THREE
    if (which == 1u) { return widen(w1[i]); }
    if (which == 2u) { return widen(w2[i]); }
#endif
    return widen(w[i]);
}

fn weight_bias(which: u32, quad: u32) -> vec4<f32> { return weight(which, args.bias_at + quad); }
#endif

// The biases of four columns.
fn bias(which: u32, quad: u32) -> vec4<f32> {
    if (args.bias_at == NONE) { return vec4<f32>(0.0); }
    return weight_bias(which, quad);
}

// Writes four columns of a row. Padding columns are zero, as everywhere.
fn finish(which: u32, row: u32, quad: u32, sum: vec4<f32>) {
    var v = activate(sum * unit(which) + bias(which, quad), args.activation);
    let column = 4u * quad;
    v = select(vec4<f32>(0.0), v, vec4<bool>(
        column < args.columns, column + 1u < args.columns, column + 2u < args.columns, column + 3u < args.columns));
    let at = row * args.out_stride + args.out_at + quad + which * args.output_stride;
#if RESIDUAL
    v += residual[at];
#endif
    out[at] = v;
}
