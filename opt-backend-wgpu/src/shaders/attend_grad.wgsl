// The gradients of causal attention within spans. With ROWS set, a workgroup takes a row and a head: it computes the
// statistics of the row's softmax, the mean of the weights' gradients and the gradient of the query. Without, it takes a
// position and a head and adds up what the rows that see it say of its key and value, from those statistics. Each sum
// belongs to one workgroup, so that its order is always the same.

struct Args {
    rows: u32,
    heads: u32,
    head_dim: u32,
    // Elements from one row to the next.
    stride: u32,
    // Word of `data` at which the spans of the rows begin: first row and end, equal for rows of no span.
    spans_at: u32,
    // 1 / sqrt(head_dim)
    scale: f32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read> data: array<u32>;
#if ROWS
// Of each row and head the largest score, one over the sum of exp(score - largest), and the mean.
@group(0) @binding(2) var<storage, read_write> stats: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> dq: array<f32>;
@group(0) @binding(4) var<storage, read> q: array<f32>;
@group(0) @binding(5) var<storage, read> keys: array<f32>;
@group(0) @binding(6) var<storage, read> values: array<f32>;
@group(0) @binding(7) var<storage, read> dy: array<f32>;
#else
@group(0) @binding(2) var<storage, read> stats: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> dk: array<f32>;
@group(0) @binding(4) var<storage, read_write> dv: array<f32>;
@group(0) @binding(5) var<storage, read> q: array<f32>;
@group(0) @binding(6) var<storage, read> keys: array<f32>;
@group(0) @binding(7) var<storage, read> values: array<f32>;
@group(0) @binding(8) var<storage, read> dy: array<f32>;
#endif

#include reduce

const LOWEST: f32 = -3.402823e38;
// What belongs to this workgroup's row: query and gradient, or key and value; and the sums.
var<workgroup> mine: array<f32, $HEAD>;
var<workgroup> beside: array<f32, $HEAD>;
var<workgroup> sums: array<f32, $HEAD>;
var<workgroup> slopes: array<f32, $THREADS>;
#if ROWS
#else
var<workgroup> other_sums: array<f32, $HEAD>;
var<workgroup> weights: array<f32, $THREADS>;
#endif

@compute @workgroup_size($THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let id = group.y * groups.x + group.x;
    let head = id % args.heads;
    let row = id / args.heads;
    if (row >= args.rows) { return; }
    let begin = data[args.spans_at + 2u * row];
    let end = data[args.spans_at + 2u * row + 1u];
    let column = head * args.head_dim;
    let own = row * args.stride + column;
    for (var d = thread; d < args.head_dim; d += $THREADSu) {
#if ROWS
        mine[d] = q[own + d];
        beside[d] = dy[own + d];
#else
        mine[d] = keys[own + d];
        beside[d] = values[own + d];
        other_sums[d] = 0.0;
#endif
        sums[d] = 0.0;
    }
    workgroupBarrier();

#if ROWS
    // Positions up to its own.
    let seen = select(begin, row + 1u, end > begin);
    var largest = LOWEST;
    var sum = 0.0;
    var mean = 0.0;
    for (var position = begin + thread; position < seen; position += $THREADSu) {
        let at = position * args.stride + column;
        var score = 0.0;
        var gain = 0.0;
        for (var d = 0u; d < args.head_dim; d++) {
            score += mine[d] * keys[at + d];
            gain += beside[d] * values[at + d];
        }
        score *= args.scale;
        let most = max(largest, score);
        let shrink = exp(largest - most);
        let w = exp(score - most);
        sum = sum * shrink + w;
        mean = mean * shrink + w * gain;
        largest = most;
    }
    slopes[thread] = largest;
    for (var half = $THREADSu / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) { slopes[thread] = max(slopes[thread], slopes[thread + half]); }
    }
    workgroupBarrier();
    let most = slopes[0];
    let share = exp(largest - most);
    let weight = total(sum * share, thread);
    let inverse = select(0.0, 1.0 / weight, weight > 0.0);
    mean = total(mean * share, thread) * inverse;
    if (thread == 0u) { stats[row * args.heads + head] = vec4<f32>(most, inverse, mean, 0.0); }

    for (var tile = begin; tile < seen; tile += $THREADSu) {
        var slope = 0.0;
        if (tile + thread < seen) {
            let at = (tile + thread) * args.stride + column;
            var score = 0.0;
            var gain = 0.0;
            for (var d = 0u; d < args.head_dim; d++) {
                score += mine[d] * keys[at + d];
                gain += beside[d] * values[at + d];
            }
            slope = exp(score * args.scale - most) * inverse * (gain - mean) * args.scale;
        }
        slopes[thread] = slope;
        workgroupBarrier();
        let count = min($THREADSu, seen - tile);
        for (var d = thread; d < args.head_dim; d += $THREADSu) {
            var v = sums[d];
            for (var i = 0u; i < count; i++) { v += slopes[i] * keys[(tile + i) * args.stride + column + d]; }
            sums[d] = v;
        }
        workgroupBarrier();
    }
#else
    // Rows from its own on.
    for (var tile = row; tile < end; tile += $THREADSu) {
        var w = 0.0;
        var slope = 0.0;
        if (tile + thread < end) {
            let at = (tile + thread) * args.stride + column;
            var score = 0.0;
            var gain = 0.0;
            for (var d = 0u; d < args.head_dim; d++) {
                score += mine[d] * q[at + d];
                gain += beside[d] * dy[at + d];
            }
            let of_row = stats[(tile + thread) * args.heads + head];
            w = exp(score * args.scale - of_row.x) * of_row.y;
            slope = w * (gain - of_row.z) * args.scale;
        }
        weights[thread] = w;
        slopes[thread] = slope;
        workgroupBarrier();
        let count = min($THREADSu, end - tile);
        for (var d = thread; d < args.head_dim; d += $THREADSu) {
            var k = sums[d];
            var v = other_sums[d];
            for (var i = 0u; i < count; i++) {
                let at = (tile + i) * args.stride + column + d;
                k += slopes[i] * q[at];
                v += weights[i] * dy[at];
            }
            sums[d] = k;
            other_sums[d] = v;
        }
        workgroupBarrier();
    }
#endif

    for (var d = thread; d < args.head_dim; d += $THREADSu) {
#if ROWS
        dq[own + d] = sums[d];
#else
        dk[own + d] = sums[d];
        dv[own + d] = other_sums[d];
#endif
    }
    // What pads the row.
    let width = args.heads * args.head_dim;
    if (head == 0u && width + thread < args.stride) {
#if ROWS
        dq[row * args.stride + width + thread] = 0.0;
#else
        dk[row * args.stride + width + thread] = 0.0;
        dv[row * args.stride + width + thread] = 0.0;
#endif
    }
}
