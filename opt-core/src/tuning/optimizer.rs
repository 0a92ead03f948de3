//! What turns gradients into steps.

use super::{StepOptions, weights::Param};
use ndarray::{Array2, ArrayView2};
use opt_backend::{AdamW, Clip, Result, Sgd, Train};
use std::sync::Arc;

/// How parameters follow their gradients.
///
/// ```
/// use opt_core::tuning::Optimizer;
/// assert_eq!("adamw".parse::<Optimizer>()?, Optimizer::default());
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
    /// Gradient descent as `torch.optim.SGD`.
    Sgd {
        /// Decay of the velocity; 0 keeps none.
        momentum: f32,
    },
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
            "sgd" => Ok(Self::Sgd { momentum: 0.0 }),
            _ => {
                let message = format_args!("optimizer: expected adamw or sgd, found {name:?}");
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
}

/// The names of what is remembered, in order, for files.
pub(crate) fn memory_names(optimizer: Optimizer) -> &'static [&'static str] {
    match optimizer {
        Optimizer::AdamW { .. } => &["exp_avg", "exp_avg_sq"],
        Optimizer::Sgd { momentum } if momentum != 0.0 => &["momentum_buffer"],
        Optimizer::Sgd { .. } => &[],
    }
}

/// Whether weight decay applies, as transformers' `Trainer` has it: not to biases and LayerNorms.
pub(crate) fn decays(name: &str) -> bool {
    !(name.contains("layer_norm") || name.ends_with("bias"))
}

impl<T> Memory<T> {
    pub(crate) fn fresh<B: Train<Tensor = T>>(
        backend: &B,
        optimizer: Optimizer,
        shape: [usize; 2],
    ) -> Result<Self> {
        Ok(match optimizer {
            Optimizer::AdamW { .. } => Self::Moments([backend.zeros(shape)?, backend.zeros(shape)?]),
            Optimizer::Sgd { momentum } if momentum != 0.0 => Self::Velocity(backend.zeros(shape)?),
            Optimizer::Sgd { .. } => Self::Nothing,
        })
    }

    /// From what [`Memory::read`] gave.
    pub(crate) fn given<B: Train<Tensor = T>>(backend: &B, values: &[ArrayView2<'_, f32>]) -> Result<Self> {
        Ok(match values {
            [] => Self::Nothing,
            [velocity] => Self::Velocity(backend.upload(*velocity)?),
            [first, second, ..] => Self::Moments([backend.upload(*first)?, backend.upload(*second)?]),
        })
    }

    /// In the order of [`memory_names`].
    pub(crate) fn read<B: Train<Tensor = T>>(&self, backend: &B) -> Result<Vec<Array2<f32>>> {
        let values: &[T] = match self {
            Self::Nothing => &[],
            Self::Velocity(velocity) => std::slice::from_ref(velocity),
            Self::Moments(moments) => moments,
        };
        values.iter().map(|value| backend.block_on(backend.read(value))).collect()
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
            (Optimizer::AdamW { beta1, beta2, eps }, Self::Moments(moments)) => {
                let adam = AdamW { lr: options.lr, beta1, beta2, eps, weight_decay, step: options.step };
                backend.adamw(value, &gradient, moments, adam, clip)
            }
            (Optimizer::Sgd { momentum }, memory) => {
                let sgd = Sgd { lr: options.lr, momentum, weight_decay };
                let velocity = if let Self::Velocity(velocity) = memory { Some(velocity) } else { None };
                backend.sgd(value, &gradient, velocity, sgd, clip)
            }
            (Optimizer::AdamW { .. }, _) => {
                Err(opt_backend::Error::shape("adamw", "expected two moments of the parameter"))
            }
        }
    }
}
