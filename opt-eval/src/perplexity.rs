//! Perplexity of a text, by windows.

use crate::requests::{Asker, Encoded};
use opt_core::{Error, ErrorKind, ProgressFn, Result};
use serde::Serialize;

/// How a text is cut into windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PerplexityOptions {
    /// Tokens of a window.
    pub window: usize,
    /// Tokens from one window's beginning to the next's; `None` is the window, so that none overlap.
    pub stride: Option<usize>,
}

impl PerplexityOptions {
    /// Windows that do not overlap.
    pub fn new(window: usize) -> Self {
        Self { window, stride: None }
    }

    /// Sets [`PerplexityOptions::stride`].
    #[must_use]
    pub fn stride(self, stride: usize) -> Self {
        Self { stride: Some(stride), ..self }
    }
}

/// How well a model predicts a text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Perplexity {
    /// exp of the mean of -log p over the predicted tokens.
    pub perplexity: f64,
    /// The sum of -log p, in nats.
    pub nll: f64,
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Windows.
    pub windows: usize,
    /// Tokens of the text, BOS included.
    pub text_tokens: usize,
    /// Bits for each byte of the text that was predicted.
    pub bits_per_byte: f64,
    /// Tokens of a window.
    pub window: usize,
    /// Tokens from one window's beginning to the next's.
    pub stride: usize,
    /// Whether the text began with BOS.
    pub bos: bool,
}

/// The perplexity of a text.
///
/// Without a stride it is that of the GPTQ paper (arXiv 2210.17323) and those after it: the text is tokenized as one,
/// with BOS once at its beginning, and cut into windows; each window's first token is not predicted, and what is left
/// at the end and fills no window is not used (unless it is all there is).
///
/// With a stride windows overlap, and each predicts what none before it did, as in the documentation of transformers:
/// each token but the text's first is predicted once, after at least `window - stride` others as soon as there are so
/// many.
///
/// ```
/// use opt_core::Opt;
/// use opt_eval::{Asker, PerplexityOptions, perplexity};
///
/// let opt = Opt::open("../models/opt-novels")?;
/// let text = "The old house stood on the hill, and nobody had lived in it for years.";
/// let found = perplexity(&Asker::new(&opt), text, PerplexityOptions::new(512), &mut |_| std::ops::ControlFlow::Continue(()))?;
/// assert!(found.perplexity < 1000.0);
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Option`] for a window below 2 or longer than the context and for a stride of 0 or longer than the
/// window, [`ErrorKind::Prompt`] for a text of less than two tokens, [`ErrorKind::Tokenizer`],
/// [`ErrorKind::Cancelled`], [`ErrorKind::Backend`].
pub fn perplexity(
    asker: &Asker<'_>,
    text: &str,
    options: PerplexityOptions,
    progress: &mut ProgressFn<'_>,
) -> Result<Perplexity> {
    let fail = |kind, message: String| Err(Error::new(kind, message));
    let (window, context) = (options.window, asker.opt().context());
    if window < 2 || window > context {
        return fail(
            ErrorKind::Option,
            format!("window: expected 2 to {context} (the context), found {window}"),
        );
    }
    if let Some(stride) = options.stride.filter(|stride| *stride == 0 || *stride > window) {
        return fail(
            ErrorKind::Option,
            format!("stride: expected 1 to {window} (the window), found {stride}"),
        );
    }
    let tokenizer = asker.opt().require_tokenizer()?;
    let ids = tokenizer.encode(text, asker.bos_rule())?;
    if ids.len() < 2 {
        return fail(ErrorKind::Prompt, format!("expected a text of at least 2 tokens, found {}", ids.len()));
    }
    let windows = match options.stride {
        None => disjoint(&ids, window),
        Some(stride) => overlapping(&ids, window, stride),
    };
    let found = asker.log_likelihoods(&windows, progress)?;
    let tokens: usize = windows.iter().map(|window| window.ids.len() - window.from).sum();
    let nll = -found.iter().map(|found| found.log_prob).sum::<f64>();
    let mean = nll / tokens as f64;
    let used: usize =
        if options.stride.is_some() { ids.len() } else { windows.iter().map(|w| w.ids.len()).sum() };
    let bytes = tokenizer.decode(ids.get(..used).unwrap_or_default(), true)?.len();
    Ok(Perplexity {
        perplexity: mean.exp(),
        nll,
        tokens,
        windows: windows.len(),
        text_tokens: ids.len(),
        bits_per_byte: nll / std::f64::consts::LN_2 / bytes.max(1) as f64,
        window,
        stride: options.stride.unwrap_or(window),
        bos: tokenizer.bos_id().is_some_and(|bos| ids.first() == Some(&bos)),
    })
}

fn disjoint(ids: &[u32], window: usize) -> Vec<Encoded> {
    let whole = |ids: &[u32]| Encoded { ids: ids.to_vec(), from: 1, cut: 0 };
    if ids.len() < window {
        return vec![whole(ids)];
    }
    ids.chunks_exact(window).map(whole).collect()
}

fn overlapping(ids: &[u32], window: usize, stride: usize) -> Vec<Encoded> {
    let mut windows = Vec::new();
    // The first token follows nothing.
    let mut predicted = 1;
    for begin in (0..ids.len()).step_by(stride) {
        let end = ids.len().min(begin + window);
        let from = predicted.max(begin + 1);
        if let Some(tokens) = ids.get(begin..end).filter(|_| from < end) {
            windows.push(Encoded { ids: tokens.to_vec(), from: from - begin, cut: 0 });
            predicted = end;
        }
        if end == ids.len() {
            break;
        }
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_windows_predict_each_token_once() {
        let ids: Vec<u32> = (0..53).collect();
        for window in 2..20 {
            for stride in 1..window {
                let windows = overlapping(&ids, window, stride);
                let predicted: Vec<u32> = windows.iter().flat_map(|w| w.ids[w.from..].to_vec()).collect();
                assert_eq!(predicted, ids[1..], "{window} {stride}");
            }
        }
        assert_eq!(disjoint(&ids, 20).len(), 2);
        assert_eq!(disjoint(&ids, 60).len(), 1);
    }
}
