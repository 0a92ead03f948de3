use std::{f64::consts, fmt, str::FromStr};

/// The function between the two linears of the feed-forward block, named as in transformers' `ACT2FN`.
///
/// Formulas: transformers 4.57.6 `activations.py`. The tanh approximations of GELU (`gelu_new`, `gelu_fast`,
/// `gelu_pytorch_tanh`, `gelu_accurate`, `gelu_python_tanh`) are the same function and share one name here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// max(x, 0)
    Relu,
    /// x Φ(x), with the error function
    Gelu,
    /// x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))
    GeluTanh,
    /// [`Activation::Gelu`] clipped to [-10, 10]
    Gelu10,
    /// x σ(1.702 x)
    QuickGelu,
    /// x σ(x)
    Silu,
    /// σ(x)
    Sigmoid,
    /// tanh x
    Tanh,
    /// min(max(x, 0), 6)
    Relu6,
    /// max(x, 0)²
    Relu2,
    /// x, or 0.01 x below zero
    LeakyRelu,
    /// x tanh(ln(1 + eˣ))
    Mish,
    /// Φ with mean 0.707107 and deviation 0.282095 (MEGA)
    Laplace,
    /// x
    Linear,
}

/// (accepted name, function); the first name of a function is the one it is printed by.
const NAMES: [(&str, Activation); 21] = [
    ("relu", Activation::Relu),
    ("gelu", Activation::Gelu),
    ("gelu_python", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_python_tanh", Activation::GeluTanh),
    ("gelu_accurate", Activation::GeluTanh),
    ("gelu_10", Activation::Gelu10),
    ("quick_gelu", Activation::QuickGelu),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("sigmoid", Activation::Sigmoid),
    ("tanh", Activation::Tanh),
    ("relu6", Activation::Relu6),
    ("relu2", Activation::Relu2),
    ("leaky_relu", Activation::LeakyRelu),
    ("mish", Activation::Mish),
    ("laplace", Activation::Laplace),
    ("linear", Activation::Linear),
    ("identity", Activation::Linear),
];

impl Activation {
    /// Every function, once.
    pub fn all() -> impl Iterator<Item = Activation> {
        NAMES
            .iter()
            .enumerate()
            .filter(|(i, (_, a))| NAMES[..*i].iter().all(|(_, b)| b != a))
            .map(|(_, (_, a))| *a)
    }

    /// The value at `x`, in double precision: the reference that kernels are compared to.
    // Laplace is defined with six digits, not with 1/√2.
    #[allow(clippy::approx_constant)]
    pub fn apply(self, x: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match self {
            Activation::Relu => x.max(0.0),
            Activation::Gelu => 0.5 * x * (1.0 + libm::erf(x * consts::FRAC_1_SQRT_2)),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
            }
            Activation::Gelu10 => Activation::Gelu.apply(x).clamp(-10.0, 10.0),
            Activation::QuickGelu => x * sigmoid(1.702 * x),
            Activation::Silu => x * sigmoid(x),
            Activation::Sigmoid => sigmoid(x),
            Activation::Tanh => x.tanh(),
            Activation::Relu6 => x.clamp(0.0, 6.0),
            Activation::Relu2 => x.max(0.0) * x.max(0.0),
            Activation::LeakyRelu => x.max(0.0) + 0.01 * x.min(0.0),
            Activation::Mish => x * x.exp().ln_1p().min(f64::MAX).tanh(),
            #[allow(clippy::approx_constant)] // MEGA rounds its constants
            Activation::Laplace => 0.5 * (1.0 + libm::erf((x - 0.707107) / (0.282095 * consts::SQRT_2))),
            Activation::Linear => x,
        }
    }

    /// The derivative at `x`, in double precision. Where there is none it is what torch's autograd says.
    #[allow(clippy::approx_constant)] // as in `apply`
    pub fn slope(self, x: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        // Of x σ(k x).
        let gated = |k: f64| sigmoid(k * x) * (1.0 + k * x * (1.0 - sigmoid(k * x)));
        let density = |z: f64| (-0.5 * z * z).exp() / consts::TAU.sqrt();
        let inside = |holds: bool| f64::from(u8::from(holds));
        match self {
            Activation::Relu => inside(x > 0.0),
            Activation::Gelu => 0.5 * (1.0 + libm::erf(x * consts::FRAC_1_SQRT_2)) + x * density(x),
            Activation::GeluTanh => {
                let k = (2.0 / consts::PI).sqrt();
                let t = (k * (x + 0.044715 * x * x * x)).tanh();
                0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * k * (1.0 + 3.0 * 0.044715 * x * x)
            }
            Activation::Gelu10 => {
                let y = Activation::Gelu.apply(x);
                inside((-10.0..=10.0).contains(&y)) * Activation::Gelu.slope(x)
            }
            Activation::QuickGelu => gated(1.702),
            Activation::Silu => gated(1.0),
            Activation::Sigmoid => sigmoid(x) * (1.0 - sigmoid(x)),
            Activation::Tanh => 1.0 - x.tanh() * x.tanh(),
            Activation::Relu6 => inside(x > 0.0 && x < 6.0),
            Activation::Relu2 => 2.0 * x.max(0.0),
            Activation::LeakyRelu => {
                if x > 0.0 {
                    1.0
                } else {
                    0.01
                }
            }
            Activation::Mish => {
                let t = x.exp().ln_1p().min(f64::MAX).tanh();
                t + x * (1.0 - t * t) * sigmoid(x)
            }
            Activation::Laplace => density((x - 0.707107) / 0.282095) / 0.282095,
            Activation::Linear => 1.0,
        }
    }
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(_, a)| a == self).map_or("?", |(name, _)| name);
        f.write_str(name)
    }
}

impl FromStr for Activation {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, a)| *a).ok_or_else(|| {
            let known: Vec<&str> = NAMES.iter().map(|(known, _)| *known).collect();
            format!("unknown activation {name:?}; expected one of {}", known.join(", "))
        })
    }
}
