// Weights in quads: four consecutive elements of one row. Rows are padded to whole quads with zeros, and the biases, held
// like the weights, follow the last row.

#if NATIVE
// Loaded as f16: naga 30 gives a bitcast to vec2<f16> the wrong type.
fn widen(quad: vec4<f16>) -> vec4<f32> { return vec4<f32>(quad); }
#else
#if F32
fn widen(quad: vec4<f32>) -> vec4<f32> { return quad; }
#endif
#if F16
fn widen(quad: vec2<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(quad.x), unpack2x16float(quad.y));
}
#endif
#if BF16
// bfloat16 is the upper half of an f32.
fn widen(quad: vec2<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(quad.x << 16u, quad.x & 0xffff0000u, quad.y << 16u, quad.y & 0xffff0000u));
}
#endif
#endif
