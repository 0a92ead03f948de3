//! Metrics of generated and scored text, equal to the tools that papers use.
//!
//! | Module | What | Equal to |
//! |---|---|---|
//! | [`bleu`], [`chrf`], [`ter`] | scores of translations | sacrebleu 2.6.0 |
//! | [`rouge`] | scores of summaries | rouge_score 0.1.2 with NLTK's stemmer |
//! | [`text`], [`labels`] | exact match, token F1, F1 and correlation of labels | lm-evaluation-harness 0.4.13, SQuAD's script, scikit-learn |
//! | [`calibration`], [`diversity`] | expected calibration error, Brier score, distinct-n, repetition | the papers named there |
//! | [`statistics`] | aggregates, standard errors, paired tests | lm-evaluation-harness 0.4.13, SciPy |
//! | [`random`] | samples drawn again | CPython 3.11, NumPy's legacy generator |
//!
//! Nothing here runs a model, reads a file or panics on what it is given. Scores are sums of small counts, so they
//! agree with the originals to rounding, 10⁻⁹ in the tests. Upper and lower case and classes of characters are those of
//! the Unicode version that Rust and its crates have, later than Python's.
//!
//! ```
//! use opt_metrics::{bleu::Bleu, statistics::bootstrap_stderr};
//! let hypotheses = ["the cat sat on the mat", "it rains all day"];
//! let references = [["the cat sat on a mat"], ["it rained all day"]];
//!
//! // Counts of single sentences are enough for the score of any resample.
//! let bleu = Bleu::default();
//! let counts = hypotheses
//!     .iter()
//!     .zip(&references)
//!     .map(|(hypothesis, references)| bleu.statistics(hypothesis, references))
//!     .collect::<Result<Vec<_>, _>>()?;
//! let of = |drawn: &[usize]| {
//!     let mut total = opt_metrics::bleu::BleuStatistics::default();
//!     drawn.iter().for_each(|&i| total += &counts[i]);
//!     bleu.score(&total).score
//! };
//! assert_eq!(of(&[0, 1]), bleu.corpus(&hypotheses, &references)?.score);
//! let stderr = bootstrap_stderr(counts.len(), 100, |drawn| Ok(of(drawn)))?;
//! # assert!(stderr > 0.0);
//! # Ok::<(), opt_metrics::Error>(())
//! ```

pub mod bleu;
pub mod calibration;
pub mod chrf;
pub mod diversity;
mod error;
pub mod labels;
mod python;
pub mod random;
mod references;
pub mod rouge;
pub mod statistics;
pub mod ter;
pub mod text;

pub use error::{Error, Result};
pub use references::{common_references, reference_count};
