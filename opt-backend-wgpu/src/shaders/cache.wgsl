// How keys and values lie in a slab: pages of PAGE positions, first the keys of all positions, then the values; of a
// position, its heads one after another; of a head, quads of four elements (zero beyond head_dim), and in Int8 then
// the f32 scale.

const PAGE: u32 = $PAGEu;
const QUADS: u32 = $HEAD_QUADSu;
#if Int8
const HEAD: u32 = QUADS + 1u;
#else
const HEAD: u32 = QUADS;
#endif

#if F32
fn kv(at: u32, quad: u32) -> vec4<f32> { return slab[at + quad]; }
#endif
#if F16
fn kv(at: u32, quad: u32) -> vec4<f32> {
    let v = slab[at + quad];
    return vec4<f32>(unpack2x16float(v.x), unpack2x16float(v.y));
}
#endif
#if Int8
fn kv(at: u32, quad: u32) -> vec4<f32> {
    return vec4<f32>(unpack4xI8(slab[at + quad])) * bitcast<f32>(slab[at + QUADS]);
}
#endif

// Where a head's keys (part 0) or values (part 1) of a position begin.
fn place(page: u32, part: u32, slot: u32, head: u32, heads: u32) -> u32 {
    return (((page * 2u + part) * PAGE + slot) * heads + head) * HEAD;
}
