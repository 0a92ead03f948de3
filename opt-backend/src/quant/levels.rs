/// The levels of 4-bit NormalFloat (QLoRA, arXiv 2305.14314, appendix E), as bitsandbytes has them: quantiles of the
/// normal distribution, scaled to [-1, 1].
#[allow(clippy::excessive_precision)] // as published
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_800_998_687_7,
    -0.525_073_051_452_636_7,
    -0.394_917_488_098_144_5,
    -0.284_441_381_692_886_35,
    -0.184_773_430_228_233_34,
    -0.091_050_036_251_544_95,
    0.0,
    0.079_580_299_556_255_34,
    0.160_930_201_411_247_25,
    0.246_112_301_945_686_34,
    0.337_915_241_718_292_24,
    0.440_709_829_330_444_34,
    0.562_617_003_917_694_1,
    0.722_956_836_223_602_3,
    1.0,
];

/// The levels of bitsandbytes' 4-bit float, by code: sign, two bits of exponent, one of fraction.
#[allow(clippy::excessive_precision)] // as published
pub const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_333,
    0.666_666_67,
    1.0,
    0.333_333_33,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_333,
    -0.666_666_67,
    -1.0,
    -0.333_333_33,
    -0.5,
    -0.166_666_67,
    -0.25,
];
