// Quantized weights, expanded where they are used: W = scale * (code - zero), or scale * level[code] where TABLE is set.
//
// A row of codes is whole words, of eight codes or (BITS8) four, the first in the lowest bits. Beside the codes lie the
// parameters, in entries of four numbers, f16 where HALF is set and f32 otherwise:
// - an entry whose words are the f32 that all scales are multiples of, and the zero point where there is but one;
// - the levels in f32, where TABLE is set;
// - for every quad of rows and every group of codes four scales, and then, where ZEROS is set, as many zero points;
// - the biases in f32, and for tables in another order (PLACES) the place of each element in its row.

fn entry(which: u32, i: u32) -> $ENTRY {
#if THREE
    if (which == 1u) { return p1[i]; }
    if (which == 2u) { return p2[i]; }
#endif
    return p[i];
}

#if HALF
const ENTRY_WORDS: u32 = 2u;
fn numbers(e: $ENTRY) -> vec4<f32> { return vec4<f32>(unpack2x16float(e.x), unpack2x16float(e.y)); }
#else
const ENTRY_WORDS: u32 = 4u;
fn numbers(e: $ENTRY) -> vec4<f32> { return bitcast<vec4<f32>>(e); }
#endif

// The word `i` words after the entry `at`.
fn parameter(which: u32, at: u32, i: u32) -> u32 { return entry(which, at + i / ENTRY_WORDS)[i % ENTRY_WORDS]; }

// Four f32 after the entry `at`.
fn floats(which: u32, at: u32, i: u32) -> vec4<f32> {
#if HALF
    return bitcast<vec4<f32>>(vec4<u32>(entry(which, at + 2u * i), entry(which, at + 2u * i + 1u)));
#else
    return bitcast<vec4<f32>>(entry(which, at + i));
#endif
}

// What all scales are multiples of.
fn unit(which: u32) -> f32 { return bitcast<f32>(entry(which, 0u).x); }

// Of four rows, those of group `at`; in units.
fn scales(which: u32, at: u32) -> vec4<f32> { return numbers(entry(which, $HEADERu + at)); }

fn zeros(which: u32, at: u32) -> vec4<f32> {
#if ZEROS
    return numbers(entry(which, args.zeros_at + at));
#else
    return vec4<f32>(bitcast<f32>(entry(which, 0u).y));
#endif
}

#if TABLE
#if TREE
// Of the sixteen levels: one of two, of four and so on. Vectors of a CPU do that faster than they look things up.
var<private> levels: array<vec4<f32>, 4>;

fn set_levels(which: u32) {
#repeat i 4
    levels[$i] = floats(which, 1u, $iu);
#end
}

// Whether a bit of the word is set shows as a sign, which costs such vectors less than a comparison.
fn one_of(low: vec4<f32>, high: vec4<f32>, word: u32, shift: vec4<u32>) -> vec4<f32> {
    return select(low, high, bitcast<vec4<i32>>(vec4<u32>(word) << shift) < vec4<i32>(0));
}

// The values of the four codes in the lower half of a word, times one over PLACE.
fn values(word: u32) -> vec4<f32> {
    let bit0 = vec4<u32>(31u, 27u, 23u, 19u);
    let bit1 = vec4<u32>(30u, 26u, 22u, 18u);
    let bit2 = vec4<u32>(29u, 25u, 21u, 17u);
    let bit3 = vec4<u32>(28u, 24u, 20u, 16u);
#repeat i 4
    let even$i = one_of(vec4<f32>(levels[$i].x), vec4<f32>(levels[$i].y), word, bit0);
    let odd$i = one_of(vec4<f32>(levels[$i].z), vec4<f32>(levels[$i].w), word, bit0);
    let pair$i = one_of(even$i, odd$i, word, bit1);
#end
    return one_of(one_of(pair0, pair1, word, bit2), one_of(pair2, pair3, word, bit2), word, bit3);
}
#else
var<workgroup> levels: array<f32, 16>;

// Ends in a barrier.
fn set_levels(which: u32, thread: u32) {
    if (thread < 16u) { levels[thread] = bitcast<f32>(parameter(which, 1u, thread)); }
    workgroupBarrier();
}

fn values(word: u32) -> vec4<f32> {
    return vec4<f32>(
        levels[word & 15u], levels[(word >> 4u) & 15u], levels[(word >> 8u) & 15u], levels[(word >> 12u) & 15u]);
}
#endif
const PLACE = vec4<f32>(1.0);
#else
// Codes stay where they are in the word, that is multiplied by powers of two, and PLACE takes them back: a factor of x
// for all rows of W costs less than a shift for every code. Conversions are of signed integers: some CPUs have no other.
#if BITS8
fn values(word: u32) -> vec4<f32> {
    return vec4<f32>(vec4<i32>(vec4<u32>(word & 0xffu, word & 0xff00u, word & 0xff0000u, word >> 24u)));
}
const PLACE = vec4<f32>(1.0, 0.00390625, 0.0000152587890625, 1.0);
#else
fn values(word: u32) -> vec4<f32> {
    return vec4<f32>(vec4<i32>(vec4<u32>(word) & vec4<u32>(0xfu, 0xf0u, 0xf00u, 0xf000u)));
}
const PLACE = vec4<f32>(1.0, 0.0625, 0.00390625, 0.000244140625);
#endif
#endif

#if VECTORS
// Some words of W.
fn vector(which: u32, i: u32) -> $QUAD {
#if THREE
    if (which == 1u) { return w1[i]; }
    if (which == 2u) { return w2[i]; }
#endif
    return w[i];
}

#if ONE_WORD
fn word(v: $QUAD, j: u32) -> u32 { return v; }
#else
fn word(v: $QUAD, j: u32) -> u32 { return v[j]; }
#endif
#else
// Quad `quad` of row `row` of the first W, in units, where the words of W are bound one by one.
fn expanded(row: u32, quad: u32) -> vec4<f32> {
    let at = quad / $WORD_QUADSu;
    let word = w[row * args.groups * args.group_vectors + at];
    let group = row / 4u * args.groups + at / args.group_vectors;
    let v = values(word >> (16u * (quad % $WORD_QUADSu))) * PLACE;
#if TABLE
    return scales(0u, group)[row % 4u] * v;
#else
    return scales(0u, group)[row % 4u] * (v - zeros(0u, group)[row % 4u]);
#endif
}
#endif
