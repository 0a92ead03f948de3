// Causal attention over the pages of a cache, with online softmax: a workgroup takes $QUERIES consecutive rows of one
// sequence and one head, and walks the positions they see in tiles of $THREADS. In a tile each thread scores one
// position; then the threads share out the values, some the columns and some the positions.
//
// With NEW set each workgroup has one row, whose keys and values are not in the cache yet: it writes them there
// itself, and copies the shared page before them if there is one. No other workgroup touches this head of this
// sequence, so one dispatch does both.

struct Args {
    heads: u32,
    head_dim: u32,
    // Elements from one row of queries, keys, values and outputs to the next.
    stride: u32,
    jobs: u32,
    // Word of `data` at which the jobs begin.
    jobs_at: u32,
    // 1 / sqrt(head_dim)
    scale: f32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read> data: array<u32>;
@group(0) @binding(2) var<storage, read> q: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
#if NEW
@group(0) @binding(4) var<storage, read_write> slab: array<$UNIT>;
@group(0) @binding(5) var<storage, read> keys: array<f32>;
@group(0) @binding(6) var<storage, read> values: array<f32>;
#else
@group(0) @binding(4) var<storage, read> slab: array<$UNIT>;
#endif

#include cache

const TILE: u32 = $THREADSu;
const QUERIES: u32 = $QUERIESu;
// Threads that take the same column, and so share the positions.
const SHARES: u32 = $SHARESu;
// Less than any score.
const LOWEST: f32 = -3.402823e38;

var<workgroup> query: array<vec4<f32>, $QUERY_QUADS>;
// Weights of a tile, later one vec4 a thread.
var<workgroup> scores: array<f32, $SCORES>;
var<workgroup> partial: array<f32, $PARTIALS>;
var<workgroup> pages: array<u32, $TILE_PAGES>;
#if NEW
var<workgroup> new_key: array<vec4<f32>, $HEAD_QUADS>;
var<workgroup> new_value: array<vec4<f32>, $HEAD_QUADS>;
#endif

@compute @workgroup_size($THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let id = group.y * groups.x + group.x;
    let head = id % args.heads;
    let job = id / args.heads;
    if (job >= args.jobs) { return; }
    // First row, number of rows, positions seen by the first, where its page table begins.
    let job_at = args.jobs_at + $JOB_WORDSu * job;
    let first = data[job_at];
    let rows = data[job_at + 1u];
    let seen = data[job_at + 2u];
    let table_at = data[job_at + 3u];

    for (var i = thread; i < QUERIES * QUADS; i += $THREADSu) {
        let row = min(i / QUADS, rows - 1u);
        let from_at = (first + row) * args.stride + head * args.head_dim;
        var v = vec4<f32>(0.0);
        for (var c = 0u; c < 4u; c++) {
            let d = i % QUADS * 4u + c;
            if (d < args.head_dim) { v[c] = q[from_at + d]; }
        }
        query[i] = v;
    }
#if NEW
    // The page and slot of the new position, and the page that held the positions before it, if it was shared.
    let new_page = data[job_at + 4u];
    let new_slot = (seen - 1u) % PAGE;
    let shared_page = data[job_at + 5u];
    if (thread < QUADS) {
        let from_at = first * args.stride + head * args.head_dim;
        var k = vec4<f32>(0.0);
        var v = vec4<f32>(0.0);
        for (var c = 0u; c < 4u; c++) {
            let d = thread * 4u + c;
            if (d < args.head_dim) {
                k[c] = keys[from_at + d];
                v[c] = values[from_at + d];
            }
        }
        new_key[thread] = k;
        new_value[thread] = v;
        slab[place(new_page, 0u, new_slot, head, args.heads) + thread] = k;
        slab[place(new_page, 1u, new_slot, head, args.heads) + thread] = v;
    }
    if (shared_page != new_page) {
        for (var i = thread; i < new_slot * 2u * QUADS; i += $THREADSu) {
            let slot = i / (2u * QUADS);
            let part = i / QUADS % 2u;
            let quad = i % QUADS;
            slab[place(new_page, part, slot, head, args.heads) + quad] =
                slab[place(shared_page, part, slot, head, args.heads) + quad];
        }
    }
    // Positions in the cache; the new one comes last.
    let held = seen - 1u;
#else
    let held = seen + rows - 1u;
#endif

#repeat b $QUERIES
    var largest$b = LOWEST;
    var weight$b = 0.0;
    var mixed$b = vec4<f32>(0.0);
#end
    let column = thread % QUADS;
    let share = thread / QUADS;

    for (var tile = 0u; tile < seen + rows - 1u; tile += TILE) {
        if (thread < $TILE_PAGESu && tile + thread * PAGE < held) {
            pages[thread] = data[table_at + tile / PAGE + thread];
        }
        workgroupBarrier();
        let position = tile + thread;
#repeat b $QUERIES
        var score$b = 0.0;
#end
        if (position < held) {
            let at = place(pages[thread / PAGE], 0u, position % PAGE, head, args.heads);
            for (var i = 0u; i < QUADS; i++) {
                let k = kv(at, i);
#repeat b $QUERIES
                score$b += dot(query[$bu * QUADS + i], k);
#end
            }
        }
#if NEW
        if (position == held) {
            for (var i = 0u; i < QUADS; i++) { score0 += dot(query[i], new_key[i]); }
        }
#endif
#repeat b $QUERIES
        score$b = select(LOWEST, score$b * args.scale, position < seen + $bu);
        scores[$bu * TILE + thread] = score$b;
#end
        workgroupBarrier();
        if (thread < QUERIES * 16u) {
            let at = thread / 16u * TILE + thread % 16u;
            var most = scores[at];
            for (var i = 16u; i < TILE; i += 16u) { most = max(most, scores[at + i]); }
            partial[thread] = most;
        }
        workgroupBarrier();
#repeat b $QUERIES
        {
            var most = largest$b;
            for (var i = 0u; i < 16u; i++) { most = max(most, partial[$bu * 16u + i]); }
            let shrink = exp(largest$b - most);
            let w = select(0.0, exp(score$b - most), position < seen + $bu);
            scores[$bu * TILE + thread] = w;
            weight$b = weight$b * shrink + w;
            mixed$b *= shrink;
            largest$b = most;
        }
#end
        workgroupBarrier();
        if (share < SHARES) {
            let end = min(TILE, seen + rows - 1u - tile);
            for (var p = share; p < end; p += SHARES) {
#if NEW
                var v = new_value[column];
                if (tile + p < held) {
                    v = kv(place(pages[p / PAGE], 1u, p % PAGE, head, args.heads), column);
                }
#else
                let v = kv(place(pages[p / PAGE], 1u, p % PAGE, head, args.heads), column);
#endif
#repeat b $QUERIES
                mixed$b += scores[$bu * TILE + p] * v;
#end
            }
        }
        workgroupBarrier();
    }

    // Sums over threads: of the weights, then of the shares of each column.
#repeat b $QUERIES
    scores[$bu * TILE + thread] = weight$b;
#end
    workgroupBarrier();
    if (thread < QUERIES * 16u) {
        let at = thread / 16u * TILE + thread % 16u;
        var sum = scores[at];
        for (var i = 16u; i < TILE; i += 16u) { sum += scores[at + i]; }
        partial[thread] = sum;
    }
    workgroupBarrier();
#repeat b $QUERIES
    {
        scores[4u * thread] = mixed$b.x;
        scores[4u * thread + 1u] = mixed$b.y;
        scores[4u * thread + 2u] = mixed$b.z;
        scores[4u * thread + 3u] = mixed$b.w;
        workgroupBarrier();
        if ($bu < rows) {
            var sum = 0.0;
            for (var i = 0u; i < 16u; i++) { sum += partial[$bu * 16u + i]; }
            let row_at = (first + $bu) * args.stride;
            for (var d = thread; d < args.head_dim; d += $THREADSu) {
                var v = 0.0;
                for (var i = 0u; i < SHARES; i++) { v += scores[4u * QUADS * i + d]; }
                out[row_at + head * args.head_dim + d] = select(0.0, v / sum, sum > 0.0);
            }
            let width = args.heads * args.head_dim;
            if (head == 0u && width + thread < args.stride) { out[row_at + width + thread] = 0.0; }
        }
        workgroupBarrier();
    }
#end
}
