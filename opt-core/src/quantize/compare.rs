use crate::{
    CancelToken, Error, ErrorKind, Opt, Progress, ProgressFn, Result,
    engine::{Forward, KvCache, Sequence, Want},
};
use ndarray::{ArcArray2, ArrayView1};
use opt_backend::CacheDType;
use serde::Serialize;

/// Two models on one text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Comparison {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Perplexity of the first model: exp of the mean of -log p(token | those before it in its window), in nats.
    pub base_perplexity: f64,
    /// Perplexity of the second model.
    pub perplexity: f64,
    /// Mean over the tokens of the Kullback-Leibler divergence of the second model's prediction from the first one's,
    /// Σ p log(p / q), in nats.
    pub kl: f64,
}

/// Rows of logits in memory at a time, of each model.
const ROWS: usize = 128;

/// `compare`, awaited.
///
/// # Errors
/// Those of `compare`, which is not there on wasm32: [`ErrorKind::Option`], [`ErrorKind::Prompt`],
/// [`ErrorKind::Cancelled`], [`ErrorKind::Backend`].
pub async fn compare_async(
    base: &Opt,
    other: &Opt,
    cache: CacheDType,
    ids: &[u32],
    window: usize,
    cancel: &CancelToken,
    progress: &mut ProgressFn<'_>,
) -> Result<Comparison> {
    let fail = |kind, message: String| Err(Error::new(kind, message));
    let [first, second] = [base, other].map(|opt| opt.config());
    if first.vocab_size != second.vocab_size {
        let message = format!("expected a vocabulary of {}, found {}", first.vocab_size, second.vocab_size);
        return fail(ErrorKind::Option, message);
    }
    let context = base.context().min(other.context());
    if window < 2 || window > context {
        let message = format!("window: expected 2 to {context} (the context), found {window}");
        return fail(ErrorKind::Option, message);
    }
    if ids.len() < 2 {
        let message = format!("expected a text of at least 2 tokens, found {}", ids.len());
        return fail(ErrorKind::Prompt, message);
    }
    let mut sums = Sums::default();
    let mut done = 0;
    for window in ids.chunks(window) {
        let mut caches = [base.engine().new_cache(CacheDType::F32)?, other.engine().new_cache(cache)?];
        // The last token is only predicted.
        let run = window.len() - 1;
        for start in (0..run).step_by(ROWS) {
            let end = run.min(start + ROWS);
            let (Some(rows), Some(targets)) = (window.get(start..end), window.get(start + 1..end + 1)) else {
                continue;
            };
            let [first_cache, second_cache] = &mut caches;
            let p = logits(base, rows, first_cache, cancel).await?;
            let q = logits(other, rows, second_cache, cancel).await?;
            for ((p, q), target) in p.outer_iter().zip(q.outer_iter()).zip(targets) {
                sums.add(p, q, *target as usize);
            }
        }
        done += window.len();
        if progress(Progress::new("tokens", done as u64, ids.len() as u64)).is_break() {
            return fail(ErrorKind::Cancelled, "comparing was cancelled".to_owned());
        }
    }
    let mean = |sum: f64| sum / sums.tokens.max(1) as f64;
    Ok(Comparison {
        tokens: sums.tokens,
        base_perplexity: mean(sums.base).exp(),
        perplexity: mean(sums.other).exp(),
        kl: mean(sums.kl),
    })
}

/// Compares the predictions of a model, such as a quantized one, to those of `base` over windows of `window` tokens
/// that do not overlap; `cache` is how it holds keys and values, which `base` has in f32. The first token of a window is not predicted; log-probabilities are those of [`Opt::score`].
///
/// # Errors
/// [`ErrorKind::Option`] for models of another vocabulary, a window below 2 or longer than a context;
/// [`ErrorKind::Prompt`] for less than two tokens or ids outside the vocabulary; [`ErrorKind::Cancelled`];
/// [`ErrorKind::Backend`].
#[cfg(not(target_arch = "wasm32"))]
pub fn compare(
    base: &Opt,
    other: &Opt,
    cache: CacheDType,
    ids: &[u32],
    window: usize,
    cancel: &CancelToken,
    progress: &mut ProgressFn<'_>,
) -> Result<Comparison> {
    opt_backend::block_on(compare_async(base, other, cache, ids, window, cancel, progress))
}

async fn logits(opt: &Opt, ids: &[u32], cache: &mut KvCache, cancel: &CancelToken) -> Result<ArcArray2<f32>> {
    let mut sequence = Sequence::new(ids).want(Want::Logits { rows: ids.len() }).adapter(opt.adapter());
    sequence.cache = Some(cache);
    let batch = Forward { sequences: vec![sequence], cancel: Some(cancel), watch: None };
    let logits = opt.engine().forward(batch).await?.pop().and_then(|output| output.logits);
    logits.ok_or_else(|| Error::new(ErrorKind::Backend, "expected logits, found none"))
}

#[derive(Default)]
struct Sums {
    tokens: usize,
    base: f64,
    other: f64,
    kl: f64,
}

impl Sums {
    fn add(&mut self, p: ArrayView1<'_, f32>, q: ArrayView1<'_, f32>, target: usize) {
        let [p_total, q_total] = [p, q].map(log_sum_exp);
        let log_prob = |logits: &ArrayView1<'_, f32>, total: f64| {
            f64::from(logits.get(target).copied().unwrap_or(f32::NEG_INFINITY)) - total
        };
        self.tokens += 1;
        self.base -= log_prob(&p, p_total);
        self.other -= log_prob(&q, q_total);
        let divergence = |(&p, &q): (&f32, &f32)| {
            let (p, q) = (f64::from(p) - p_total, f64::from(q) - q_total);
            if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - q) }
        };
        self.kl += p.iter().zip(q).map(divergence).sum::<f64>();
    }
}

fn log_sum_exp(logits: ArrayView1<'_, f32>) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    most + logits.iter().map(|&x| (f64::from(x) - most).exp()).sum::<f64>().ln()
}
