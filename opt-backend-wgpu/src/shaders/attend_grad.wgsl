// The gradients of causal attention within spans. With ROWS set, a workgroup takes a row and a head: it computes the
// statistics of the row's softmax, the mean of the weights' gradients and the gradient of the query. Without, it takes a
// position and a head and adds up what the rows that see it say of its key and value, from those statistics. Each sum
// belongs to one workgroup, so that its order is always the same.
//
// A unit is a quad of a head's elements, or one element where heads are no whole quads. The threads score a tile of rows,
// one each; then they share out the sums, some the units and some the rows.

struct Args {
    rows: u32,
    heads: u32,
    // Units from one row to the next.
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
@group(0) @binding(3) var<storage, read_write> dq: array<$UNIT>;
@group(0) @binding(4) var<storage, read> q: array<$UNIT>;
@group(0) @binding(5) var<storage, read> keys: array<$UNIT>;
@group(0) @binding(6) var<storage, read> values: array<$UNIT>;
@group(0) @binding(7) var<storage, read> dy: array<$UNIT>;
#else
@group(0) @binding(2) var<storage, read> stats: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> dk: array<$UNIT>;
@group(0) @binding(4) var<storage, read_write> dv: array<$UNIT>;
@group(0) @binding(5) var<storage, read> q: array<$UNIT>;
@group(0) @binding(6) var<storage, read> keys: array<$UNIT>;
@group(0) @binding(7) var<storage, read> values: array<$UNIT>;
@group(0) @binding(8) var<storage, read> dy: array<$UNIT>;
#endif

#include reduce

const LOWEST: f32 = -3.402823e38;
// Units of a head, and threads that share the rows of a unit's sum.
const HEAD: u32 = $HEADu;
const SHARES: u32 = $SHARESu;
// What belongs to this workgroup's row: query and gradient, or key and value.
var<workgroup> mine: array<$UNIT, $HEAD>;
var<workgroup> beside: array<$UNIT, $HEAD>;
var<workgroup> sums: array<$UNIT, $SUMS>;
var<workgroup> slopes: array<f32, $THREADS>;
#if ROWS
#else
var<workgroup> other_sums: array<$UNIT, $SUMS>;
var<workgroup> weights: array<f32, $THREADS>;
#endif

#if QUADS
fn inner(a: vec4<f32>, b: vec4<f32>) -> f32 { return dot(a, b); }
#else
fn inner(a: f32, b: f32) -> f32 { return a * b; }
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
    let column = head * HEAD;
    let own = row * args.stride + column;
    for (var d = thread; d < HEAD; d += $THREADSu) {
#if ROWS
        mine[d] = q[own + d];
        beside[d] = dy[own + d];
#else
        mine[d] = keys[own + d];
        beside[d] = values[own + d];
#endif
    }
    for (var i = thread; i < HEAD * SHARES; i += $THREADSu) {
        sums[i] = $UNIT();
#if ROWS
#else
        other_sums[i] = $UNIT();
#endif
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
        for (var d = 0u; d < HEAD; d++) {
            score += inner(mine[d], keys[at + d]);
            gain += inner(beside[d], values[at + d]);
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
            for (var d = 0u; d < HEAD; d++) {
                score += inner(mine[d], keys[at + d]);
                gain += inner(beside[d], values[at + d]);
            }
            slope = exp(score * args.scale - most) * inverse * (gain - mean) * args.scale;
        }
        slopes[thread] = slope;
        workgroupBarrier();
        let count = min($THREADSu, seen - tile);
        for (var slot = thread; slot < HEAD * SHARES; slot += $THREADSu) {
            let at = tile * args.stride + column + slot % HEAD;
            var v = sums[slot];
            for (var i = slot / HEAD; i < count; i += SHARES) { v += slopes[i] * keys[at + i * args.stride]; }
            sums[slot] = v;
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
            for (var d = 0u; d < HEAD; d++) {
                score += inner(mine[d], q[at + d]);
                gain += inner(beside[d], dy[at + d]);
            }
            let of_row = stats[(tile + thread) * args.heads + head];
            w = exp(score * args.scale - of_row.x) * of_row.y;
            slope = w * (gain - of_row.z) * args.scale;
        }
        weights[thread] = w;
        slopes[thread] = slope;
        workgroupBarrier();
        let count = min($THREADSu, end - tile);
        for (var slot = thread; slot < HEAD * SHARES; slot += $THREADSu) {
            let at = tile * args.stride + column + slot % HEAD;
            var k = sums[slot];
            var v = other_sums[slot];
            for (var i = slot / HEAD; i < count; i += SHARES) {
                k += slopes[i] * q[at + i * args.stride];
                v += weights[i] * dy[at + i * args.stride];
            }
            sums[slot] = k;
            other_sums[slot] = v;
        }
        workgroupBarrier();
    }
#endif

    for (var d = thread; d < HEAD; d += $THREADSu) {
        var v = sums[d];
        for (var i = 1u; i < SHARES; i++) { v += sums[d + i * HEAD]; }
#if ROWS
        dq[own + d] = v;
#else
        dk[own + d] = v;
        v = other_sums[d];
        for (var i = 1u; i < SHARES; i++) { v += other_sums[d + i * HEAD]; }
        dv[own + d] = v;
#endif
    }
    // What pads the row.
    let width = args.heads * HEAD;
    if (head == 0u && width + thread < args.stride) {
        let at = row * args.stride + width + thread;
#if ROWS
        dq[at] = $UNIT();
#else
        dk[at] = $UNIT();
        dv[at] = $UNIT();
#endif
    }
}
