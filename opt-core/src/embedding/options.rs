use super::Pooling;
use crate::{Error, ErrorKind, Result, driver::MAX_ROWS, prompt::Overflow, tokenizer::Bos};
use ndarray::Array2;
use opt_backend::half::f16;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The number format of embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Precision {
    /// Single precision.
    #[default]
    F32,
    /// Half precision: numbers are rounded to it, and written as it. In memory they stay f32.
    F16,
}

impl Precision {
    /// Bytes of a number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        })
    }
}

/// How texts become vectors.
///
/// ```
/// use opt_core::embedding::{EmbedOptions, Pooling};
///
/// // Half-way through a model of twelve layers, and the last token's.
/// let options = EmbedOptions::default().layer(6).pooling(Pooling::LastToken).normalize(true);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EmbedOptions {
    /// Whose state: 0 is the embeddings, i the output of layer i, and the last (the number of layers) what the LM head
    /// sees, behind the final LayerNorm and `project_out`, which in OPT-350m is narrower than all others. Negative
    /// ones count from the end: -1, the default, is the last. These are the indices of transformers' `hidden_states`.
    pub layer: i32,
    /// How the states of a text become one vector. Default: [`Pooling::Mean`], as in sentence-transformers.
    pub pooling: Pooling,
    /// Whether vectors are scaled to length 1 (each by itself without pooling). Default: no.
    pub normalize: bool,
    /// The number format of the result.
    pub precision: Precision,
    /// Whether BOS is put in front of a text.
    pub bos: Bos,
    /// What happens to a text longer than the limit. Default: an error. sentence-transformers cuts its end off:
    /// [`Overflow::TruncateRight`].
    pub overflow: Overflow,
    /// Most tokens of a text; `None` is the context.
    pub max_tokens: Option<usize>,
    /// Most tokens of one pass. Inputs are run together up to it, and a longer one alone. It changes the time and
    /// memory that are taken, not the result.
    pub batch_tokens: usize,
}

impl Default for EmbedOptions {
    fn default() -> Self {
        Self {
            layer: -1,
            pooling: Pooling::default(),
            normalize: false,
            precision: Precision::default(),
            bos: Bos::default(),
            overflow: Overflow::default(),
            max_tokens: None,
            batch_tokens: MAX_ROWS,
        }
    }
}

impl EmbedOptions {
    /// Sets [`EmbedOptions::layer`].
    #[must_use]
    pub fn layer(self, layer: i32) -> Self {
        Self { layer, ..self }
    }

    /// Sets [`EmbedOptions::pooling`].
    #[must_use]
    pub fn pooling(self, pooling: Pooling) -> Self {
        Self { pooling, ..self }
    }

    /// Sets [`EmbedOptions::normalize`].
    #[must_use]
    pub fn normalize(self, normalize: bool) -> Self {
        Self { normalize, ..self }
    }

    /// Sets [`EmbedOptions::precision`].
    #[must_use]
    pub fn precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// Sets [`EmbedOptions::bos`].
    #[must_use]
    pub fn bos(self, bos: Bos) -> Self {
        Self { bos, ..self }
    }

    /// Sets [`EmbedOptions::overflow`].
    #[must_use]
    pub fn overflow(self, overflow: Overflow) -> Self {
        Self { overflow, ..self }
    }

    /// Sets [`EmbedOptions::max_tokens`].
    #[must_use]
    pub fn max_tokens(self, max_tokens: usize) -> Self {
        Self { max_tokens: Some(max_tokens), ..self }
    }

    /// Sets [`EmbedOptions::batch_tokens`].
    #[must_use]
    pub fn batch_tokens(self, batch_tokens: usize) -> Self {
        Self { batch_tokens, ..self }
    }

    /// The index of the state in a model of so many layers.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a layer that is not there, and limits of 0.
    pub(crate) fn resolve(&self, layers: usize) -> Result<usize> {
        for (name, limit) in [("max_tokens", self.max_tokens), ("batch_tokens", Some(self.batch_tokens))] {
            if limit == Some(0) {
                let message = format_args!("{name}: expected at least 1, found 0");
                return Err(Error::new(ErrorKind::Option, message));
            }
        }
        let states = layers as i64 + 1;
        let layer = i64::from(self.layer);
        let index = if layer < 0 { layer + states } else { layer };
        usize::try_from(index).ok().filter(|index| *index <= layers).ok_or_else(|| {
            let message = format_args!("layer: expected {} to {layers}, found {layer}", -states);
            Error::new(ErrorKind::Option, message)
        })
    }

    /// What is left to do with pooled states `[vectors, width]`.
    ///
    /// # Errors
    /// [`ErrorKind::Backend`] for numbers that are none, [`ErrorKind::Option`] for those that do not fit the format.
    pub(crate) fn finish(&self, mut states: Array2<f32>) -> Result<Array2<f32>> {
        if let Some(found) = states.iter().find(|value| !value.is_finite()) {
            let message = format_args!("hidden states: expected finite numbers, found {found}");
            return Err(Error::new(ErrorKind::Backend, message));
        }
        if self.normalize {
            for mut row in states.outer_iter_mut() {
                let length = row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
                // As torch's normalize: a vector of zeros stays one.
                let length = length.max(1e-12);
                row.mapv_inplace(|value| (f64::from(value) / length) as f32);
            }
        }
        if self.precision == Precision::F16 {
            for value in &mut states {
                let rounded = f16::from_f32(*value);
                if !rounded.is_finite() {
                    let message = format_args!(
                        "f16: expected numbers of at most 65504, found {value}: take f32, or normalize"
                    );
                    return Err(Error::new(ErrorKind::Option, message));
                }
                *value = rounded.to_f32();
            }
        }
        Ok(states)
    }
}
