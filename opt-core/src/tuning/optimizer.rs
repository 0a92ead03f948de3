//! What turns gradients into steps.

use super::{StepOptions, weights::Param};
use ndarray::{Array2, ArrayView2};
use opt_backend::{AdamW, Clip, Moments8, Result, Sgd, Train};
use std::sync::Arc;

/// How parameters follow their gradients.
///
/// ```
/// use opt_core::tuning::Optimizer;
/// assert_eq!("adamw".parse::<Optimizer>()?, Optimizer::default());
/// assert_eq!("adamw8bit".parse::<Optimizer>()?, Optimizer::adamw_8bit());
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Optimizer {
    /// AdamW (arXiv 1711.05101) as `torch.optim.AdamW`.
    #[serde(rename = "adamw")]
    AdamW {
        /// Decay of the first moment.
        beta1: f32,
        /// Decay of the second moment.
        beta2: f32,
        /// Added to the root of the second moment.
        eps: f32,
    },
    /// AdamW whose moments are held in eight bits (arXiv 2110.02861), as bitsandbytes' `AdamW8bit` and transformers'
    /// `adamw_bnb_8bit`: 2.7 bytes a parameter in the place of 8. Embeddings, whose gradients are too uneven for it, and
    /// tensors of fewer than 4096 elements keep theirs in f32.
    #[serde(rename = "adamw8bit")]
    AdamW8bit {
        /// Decay of the first moment.
        beta1: f32,
        /// Decay of the second moment.
        beta2: f32,
        /// Added to the root of the second moment.
        eps: f32,
    },
    /// Gradient descent as `torch.optim.SGD`.
    Sgd {
        /// Decay of the velocity; 0 keeps none.
        momentum: f32,
    },
}

impl Optimizer {
    /// [`Optimizer::AdamW8bit`] with the decays of the default.
    #[must_use]
    pub fn adamw_8bit() -> Self {
        Self::AdamW8bit { beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

impl Default for Optimizer {
    fn default() -> Self {
        Self::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

impl std::str::FromStr for Optimizer {
    type Err = crate::Error;

    fn from_str(name: &str) -> crate::Result<Self> {
        match name {
            "adamw" | "adamw_torch" => Ok(Self::default()),
            "adamw8bit" | "adamw_8bit" | "adamw_bnb_8bit" => Ok(Self::adamw_8bit()),
            "sgd" => Ok(Self::Sgd { momentum: 0.0 }),
            _ => {
                let message = format_args!("optimizer: expected adamw, adamw8bit or sgd, found {name:?}");
                Err(crate::Error::new(crate::ErrorKind::Option, message))
            }
        }
    }
}

/// What an optimizer remembers of a parameter.
pub(crate) enum Memory<T> {
    Nothing,
    Velocity(T),
    /// First and second.
    Moments([T; 2]),
    Moments8(Moments8<T>),
}

/// Elements from which on a tensor's moments are held in eight bits: bitsandbytes' `min_8bit_size`.
const LEAST_8BIT: usize = 4096;

/// Whether a parameter's moments are held in eight bits, where any are: not those of small tensors, as bitsandbytes has
/// it, nor those of embeddings, as transformers' `Trainer` has it.
fn in_eight_bits(name: &str, [rows, width]: [usize; 2]) -> bool {
    let tables = ["embed_tokens.weight", "embed_positions.weight", "prompt_embeddings"];
    // The last is what a projected prefix starts from.
    let embedding = tables.iter().any(|table| name.ends_with(table)) || name == "embedding.weight";
    !embedding && rows * width >= LEAST_8BIT
}

/// What is remembered of a parameter, in order: names, for files, and shapes.
pub(crate) fn remembered(
    optimizer: Optimizer,
    name: &str,
    shape: [usize; 2],
) -> Vec<(&'static str, [usize; 2])> {
    match optimizer {
        Optimizer::AdamW8bit { .. } if in_eight_bits(name, shape) => {
            let shapes = Moments8::shapes(shape);
            vec![
                ("exp_avg_codes", shapes.first),
                ("exp_avg_sq_codes", shapes.second),
                ("absmax", shapes.scales),
            ]
        }
        Optimizer::AdamW { .. } | Optimizer::AdamW8bit { .. } => {
            vec![("exp_avg", shape), ("exp_avg_sq", shape)]
        }
        Optimizer::Sgd { momentum } if momentum != 0.0 => vec![("momentum_buffer", shape)],
        Optimizer::Sgd { .. } => Vec::new(),
    }
}

/// A number that no optimizer remembers, among parts as [`remembered`] lists them: three are codes, which devices look
/// up without asking, and scales.
pub(crate) fn misfit(parts: &[ArrayView2<'_, f32>]) -> Option<f32> {
    let [first, second, scales] = parts else { return None };
    let is_code = |x: f32| (0.0..16_777_216.0).contains(&x) && x.fract() == 0.0;
    let codes = first.iter().chain(second).copied().find(|x| !is_code(*x));
    codes.or_else(|| scales.iter().copied().find(|x| !(x.is_finite() && *x >= 0.0)))
}

/// Whether weight decay applies, as transformers' `Trainer` has it: not to biases and LayerNorms.
pub(crate) fn decays(name: &str) -> bool {
    !(name.contains("layer_norm") || name.ends_with("bias"))
}

impl<T> Memory<T> {
    /// Of what has not been moved yet: zeros.
    pub(crate) fn fresh<B: Train<Tensor = T>>(
        backend: &B,
        optimizer: Optimizer,
        name: &str,
        shape: [usize; 2],
    ) -> Result<Self> {
        let parts = remembered(optimizer, name, shape);
        Ok(Self::of(parts.into_iter().map(|(_, shape)| backend.zeros(shape)).collect::<Result<_>>()?))
    }

    /// From what [`Memory::read`] gave.
    pub(crate) fn given<B: Train<Tensor = T>>(backend: &B, values: &[ArrayView2<'_, f32>]) -> Result<Self> {
        Ok(Self::of(values.iter().map(|value| backend.upload(*value)).collect::<Result<_>>()?))
    }

    /// From tensors as [`remembered`] lists them.
    fn of(parts: Vec<T>) -> Self {
        let mut parts = parts.into_iter();
        match (parts.next(), parts.next(), parts.next()) {
            (Some(first), Some(second), Some(scales)) => Self::Moments8(Moments8 { first, second, scales }),
            (Some(first), Some(second), None) => Self::Moments([first, second]),
            (Some(velocity), ..) => Self::Velocity(velocity),
            (None, ..) => Self::Nothing,
        }
    }

    /// In the order of [`remembered`].
    pub(crate) fn read<B: Train<Tensor = T>>(&self, backend: &B) -> Result<Vec<Array2<f32>>> {
        let values: Vec<&T> = match self {
            Self::Nothing => Vec::new(),
            Self::Velocity(velocity) => vec![velocity],
            Self::Moments(moments) => moments.iter().collect(),
            Self::Moments8(moments) => moments.parts().to_vec(),
        };
        values.into_iter().map(|value| backend.block_on(backend.read(value))).collect()
    }

    /// Moves a parameter, whose gradient is used up.
    pub(crate) fn step<B: Train<Tensor = T>>(
        &mut self,
        backend: &B,
        param: &mut Param<B>,
        sum_squares: &T,
        options: &StepOptions,
    ) -> Result<()> {
        let Some(gradient) = param.gradient.take() else { return Ok(()) };
        if Arc::get_mut(&mut param.value).is_none() {
            param.value = Arc::new(backend.copy(&param.value)?);
        }
        let Some(value) = Arc::get_mut(&mut param.value) else { return Ok(()) };
        let weight_decay = if decays(&param.name) { options.weight_decay } else { 0.0 };
        let clip = options.clip.map(|max_norm| Clip { sum_squares, max_norm });
        match (options.optimizer, self) {
            (
                Optimizer::AdamW { beta1, beta2, eps } | Optimizer::AdamW8bit { beta1, beta2, eps },
                memory @ (Self::Moments(_) | Self::Moments8(_)),
            ) => {
                let adam = AdamW { lr: options.lr, beta1, beta2, eps, weight_decay, step: options.step };
                match memory {
                    Self::Moments8(moments) => backend.adamw8(value, &gradient, moments, adam, clip),
                    Self::Moments(moments) => backend.adamw(value, &gradient, moments, adam, clip),
                    _ => Ok(()),
                }
            }
            (Optimizer::Sgd { momentum }, memory) => {
                let sgd = Sgd { lr: options.lr, momentum, weight_decay };
                let velocity = if let Self::Velocity(velocity) = memory { Some(velocity) } else { None };
                backend.sgd(value, &gradient, velocity, sgd, clip)
            }
            (Optimizer::AdamW { .. } | Optimizer::AdamW8bit { .. }, _) => {
                Err(opt_backend::Error::shape("adamw", "expected two moments of the parameter"))
            }
        }
    }
}
