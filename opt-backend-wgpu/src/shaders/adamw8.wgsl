// One step of AdamW with moments in eight bits, in place: a workgroup takes a block, a thread one of its elements.
// A pack holds the codes of three elements, the first one's lowest. Moments are pairs: of the first, of the second.

struct Args {
    blocks: u32,
    // The first block's number among the bound rows of the moments.
    block: u32,
    // Its first element's among those of the bound rows of the parameters, and the elements from there on.
    element: u32,
    count: u32,
    // Columns, and what a row takes.
    width: u32,
    stride: u32,
    // 1 - lr * weight decay
    keep: f32,
    beta1: f32,
    beta2: f32,
    step_size: f32,
    // The root of the second moment's correction.
    root: f32,
    eps: f32,
    max_norm: f32,
}

@group(0) @binding(0) var<uniform> args: Args;
@group(0) @binding(1) var<storage, read_write> param: array<f32>;
@group(0) @binding(2) var<storage, read_write> first: array<f32>;
@group(0) @binding(3) var<storage, read_write> second: array<f32>;
@group(0) @binding(4) var<storage, read_write> scales: array<f32>;
@group(0) @binding(5) var<storage, read> gradient: array<f32>;
#if CLIP
@group(0) @binding(6) var<storage, read> squares: array<f32>;
#endif

#include clip

// What rows of packs and of scales take.
const CODES: u32 = 88u;
const SCALES: u32 = 4u;
const PACKED: u32 = 86u;

var<workgroup> levels: array<vec2<f32>, 256>;
var<workgroup> most: array<vec2<f32>, 256>;
// With two that no element has.
var<workgroup> codes: array<vec2<u32>, 258>;

// The level of a decade, of the parts that 0.1 to 1 is cut into; the highest bit of n says how many, the others which.
fn level(n: u32, decade: u32) -> f32 {
    var sizes = array<f32, 7>(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0);
    let parts = 1u << firstLeadingBit(n);
    return sizes[decade] * (0.1 + 0.9 * ((f32(n - parts) + 0.5) / f32(parts)));
}

// The levels of a code in both maps.
fn levels_of(code: u32) -> vec2<f32> {
    if (code == 255u) { return vec2<f32>(1.0); }
    var of_code = vec2<f32>(0.0);
    if (code > 127u) {
        let n = code - 127u;
        of_code.x = level(n, firstLeadingBit(n));
    } else if (code < 127u) {
        let n = 127u - code;
        of_code.x = -level(n, firstLeadingBit(n));
    }
    if (code > 0u) {
        let n = code + 1u;
        of_code.y = level(n, firstLeadingBit(n) - 1u);
    }
    return of_code;
}

// How many middles between neighbouring levels are below each of x.
fn codes_of(x: vec2<f32>) -> vec2<u32> {
    var found = vec2<u32>(0u);
    for (var jump = 128u; jump > 0u; jump >>= 1u) {
        let i = found + vec2<u32>(jump - 1u);
        let middle = 0.5 * vec2<f32>(
            levels[i.x].x + levels[i.x + 1u].x,
            levels[i.y].y + levels[i.y + 1u].y,
        );
        found += select(vec2<u32>(0u), vec2<u32>(jump), x > middle);
    }
    return found;
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let id = group.y * groups.x + group.x;
    // There may be a few more workgroups than were asked for.
    if (id >= args.blocks) { return; }
    levels[thread] = levels_of(thread);
    if (thread < 2u) { codes[256u + thread] = vec2<u32>(0u); }
    workgroupBarrier();

    let block = args.block + id;
    let element = id * 256u + thread;
    let present = element < args.count;
    var moments = vec2<f32>(0.0);
    if (present) {
        let pack = block * CODES + thread / 3u;
        let shift = 8u * (thread % 3u);
        let a = (u32(first[pack]) >> shift) & 255u;
        let b = (u32(second[pack]) >> shift) & 255u;
        let held = vec2<f32>(
            levels[a].x * scales[block * SCALES],
            levels[b].y * scales[block * SCALES + 1u],
        );
        let place = args.element + element;
        let at = place / args.width * args.stride + place % args.width;
        let g = gradient[at] * clip_factor();
        let m = args.beta1 * held.x + (1.0 - args.beta1) * g;
        let v = args.beta2 * held.y + (1.0 - args.beta2) * g * g;
        param[at] = args.keep * param[at] - args.step_size * m / (sqrt(v) / args.root + args.eps);
        moments = vec2<f32>(m, v);
    }

    most[thread] = abs(moments);
    // All have read what is written below.
    storageBarrier();
    workgroupBarrier();
    for (var apart = 128u; apart > 0u; apart >>= 1u) {
        if (thread < apart) { most[thread] = max(most[thread], most[thread + apart]); }
        workgroupBarrier();
    }
    let scale = most[0];
    // The smallest normal number, for blocks of zeros.
    let inverse = 1.0 / max(scale, vec2<f32>(1.1754944e-38));
    codes[thread] = select(vec2<u32>(0u), codes_of(moments * inverse), present);
    workgroupBarrier();
    if (thread < PACKED) {
        let i = 3u * thread;
        let packed = codes[i] | (codes[i + 1u] << vec2<u32>(8u)) | (codes[i + 2u] << vec2<u32>(16u));
        first[block * CODES + thread] = f32(packed.x);
        second[block * CODES + thread] = f32(packed.y);
    }
    if (thread == 0u) {
        scales[block * SCALES] = scale.x;
        scales[block * SCALES + 1u] = scale.y;
    }
}
