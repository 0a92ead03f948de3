// The derivatives of the functions of `activation.wgsl`, which must be included before. 1 - t² of a tanh t is written
// so that it does not cancel; where a function has a corner the slope is what torch's autograd says.

fn density(z: f32) -> f32 { return 0.3989422804014327 * exp(-0.5 * min(z * z, 160.0)); }

fn gelu_slope(x: f32) -> f32 { return 0.5 * (1.0 + erf(x * 0.7071067811865476)) + x * density(x); }

// Of x sigmoid(k x).
fn gated_slope(x: f32, k: f32) -> f32 { return sigmoid(k * x) * (1.0 + k * x * sigmoid(-k * x)); }

// 1 - tanh(x)²
fn tanh_slope(x: f32) -> f32 {
    let e = exp(-2.0 * min(abs(x), 40.0));
    return 4.0 * e / ((1.0 + e) * (1.0 + e));
}

fn gelu_tanh_slope(x: f32) -> f32 {
    let k = 0.7978845608028654;
    let z = k * (x + 0.044715 * x * x * x);
    return 0.5 * (1.0 + tanh_of(z)) + 0.5 * x * tanh_slope(z) * k * (1.0 + 0.134145 * x * x);
}

// t + x (1 - t²) sigmoid(x), t = n / (n + 2)
fn mish_slope(x: f32) -> f32 {
    let e = exp(min(x, 20.0));
    let n = e * (e + 2.0);
    let inner = 4.0 * (n + 1.0) / ((n + 2.0) * (n + 2.0));
    return n / (n + 2.0) + select(x * inner * sigmoid(x), 0.0, x > 20.0);
}

fn slope_one(x: f32, kind: u32) -> f32 {
    switch kind {
        case 1u: { return select(0.0, 1.0, x > 0.0); }
        case 2u: { return gelu_slope(x); }
        case 3u: { return gelu_tanh_slope(clamp(x, -100.0, 100.0)); }
        case 4u: { return select(0.0, gelu_slope(x), abs(gelu(x)) <= 10.0); }
        case 5u: { return gated_slope(x, 1.702); }
        case 6u: { return gated_slope(x, 1.0); }
        case 7u: { return sigmoid(x) * sigmoid(-x); }
        case 8u: { return tanh_slope(x); }
        case 9u: { return select(0.0, 1.0, x > 0.0 && x < 6.0); }
        case 10u: { return 2.0 * max(x, 0.0); }
        case 11u: { return select(0.01, 1.0, x > 0.0); }
        case 12u: { return mish_slope(x); }
        case 13u: { return density((x - 0.707107) / 0.282095) / 0.282095; }
        default: { return 1.0; }
    }
}

fn slope(v: vec4<f32>, kind: u32) -> vec4<f32> {
    return vec4<f32>(slope_one(v.x, kind), slope_one(v.y, kind), slope_one(v.z, kind), slope_one(v.w, kind));
}
