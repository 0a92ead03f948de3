// Writing one quad of keys or values to a slab. `largest` is the largest magnitude of the whole head.

#if F32
fn encode(v: vec4<f32>, largest: f32) -> $UNIT { return v; }
#endif
#if F16
// Rounds to nearest, ties to even; pack2x16float may round either way.
fn half(v: f32) -> u32 {
    let bits = bitcast<u32>(v);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    // Below the smallest normal half: adding 0.5 leaves the fraction, rounded, in the lowest bits.
    let small = bitcast<u32>(bitcast<f32>(magnitude) + 0.5) - 0x3f000000u;
    let rounded = (magnitude + 0xfffu + ((magnitude >> 13u) & 1u) - 0x38000000u) >> 13u;
    var result = select(rounded, small, magnitude < 0x38800000u);
    // Past the largest half: infinity; NaN stays NaN.
    result = select(result, 0x7c00u, magnitude >= 0x477ff000u);
    result = select(result, 0x7e00u, magnitude > 0x7f800000u);
    return sign | result;
}

fn encode(v: vec4<f32>, largest: f32) -> $UNIT {
    return vec2<u32>(half(v.x) | (half(v.y) << 16u), half(v.z) | (half(v.w) << 16u));
}
#endif
#if Int8
fn encode(v: vec4<f32>, largest: f32) -> $UNIT {
    let scale = largest / 127.0;
    if (scale == 0.0) { return 0u; }
    return pack4xI8(vec4<i32>(clamp(round(v / scale), vec4<f32>(-127.0), vec4<f32>(127.0))));
}
#endif
