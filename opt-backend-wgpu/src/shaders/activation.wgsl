// The activations of `opt_backend::Activation`, numbered as in `product.rs`. Arguments of exp are clamped: what
// overflows is not defined here. tanh and erf are written out, since drivers differ on large arguments.

fn sigmoid(x: f32) -> f32 { return 1.0 / (1.0 + exp(min(-x, 80.0))); }

fn tanh_of(x: f32) -> f32 {
    let e = exp(-2.0 * min(abs(x), 40.0));
    return sign(x) * (1.0 - e) / (1.0 + e);
}

// Abramowitz and Stegun 7.1.26: within 1.5e-7.
fn erf(x: f32) -> f32 {
    let z = min(abs(x), 9.0);
    let t = 1.0 / (1.0 + 0.3275911 * z);
    let p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    return sign(x) * (1.0 - p * exp(-z * z));
}

fn gelu(x: f32) -> f32 { return 0.5 * x * (1.0 + erf(x * 0.7071067811865476)); }

// x tanh(ln(1 + e)), e = exp(x), without the logarithm.
fn mish(x: f32) -> f32 {
    let e = exp(min(x, 30.0));
    let n = e * (e + 2.0);
    return select(x * (n / (n + 2.0)), x, x > 20.0);
}

fn activate_one(x: f32, kind: u32) -> f32 {
    switch kind {
        case 1u: { return max(x, 0.0); }
        case 2u: { return gelu(x); }
        case 3u: { return 0.5 * x * (1.0 + tanh_of(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
        case 4u: { return clamp(gelu(x), -10.0, 10.0); }
        case 5u: { return x * sigmoid(1.702 * x); }
        case 6u: { return x * sigmoid(x); }
        case 7u: { return sigmoid(x); }
        case 8u: { return tanh_of(x); }
        case 9u: { return clamp(x, 0.0, 6.0); }
        case 10u: { return max(x, 0.0) * max(x, 0.0); }
        case 11u: { return max(x, 0.0) + 0.01 * min(x, 0.0); }
        case 12u: { return mish(x); }
        case 13u: { return 0.5 * (1.0 + erf((x - 0.707107) / (0.282095 * 1.4142135623730951))); }
        default: { return x; }
    }
}

fn activate(v: vec4<f32>, kind: u32) -> vec4<f32> {
    if (kind == 0u) { return v; }
    if (kind == 1u) { return max(v, vec4<f32>(0.0)); }
    return vec4<f32>(activate_one(v.x, kind), activate_one(v.y, kind), activate_one(v.z, kind), activate_one(v.w, kind));
}
