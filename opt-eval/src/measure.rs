//! From what a model said to what is measured of it: one value a row and metric, and one number of all values.

use crate::{
    requests::LogLikelihood,
    task::{Answer, Document, MetricSpec, TaskKind},
};
use opt_core::{Error, ErrorKind, Result};
use opt_metrics::{
    bleu::{Bleu, BleuStatistics},
    calibration,
    chrf::{Chrf, ChrfStatistics},
    diversity,
    labels::{self, argmax},
    rouge::{Rouge, RougeKind},
    statistics::{self, StderrRule, stderr_rule},
    ter::{Ter, TerStatistics},
    text,
};
use serde::{Deserialize, Serialize};

pub use opt_metrics::statistics::Aggregation;

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Kind {
    /// Its name.
    pub name: &'static str,
    /// Whether more of it is better.
    pub higher_is_better: bool,
    /// How one number is made of all values.
    aggregate: Aggregate,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Aggregate {
    /// As in the harness.
    Harness(Aggregation),
    /// Expected calibration error, of the probability of the choice that was taken.
    Calibration,
    /// Distinct n-grams of all texts, part of all n-grams.
    Distinct(usize),
}

use Aggregate::{Calibration, Distinct, Harness};
use Aggregation as A;

const fn metric(name: &'static str, higher_is_better: bool, aggregate: Aggregate) -> Kind {
    Kind { name, higher_is_better, aggregate }
}

const CHOICE: [Kind; 9] = [
    metric("acc", true, Harness(A::Mean)),
    metric("acc_norm", true, Harness(A::Mean)),
    metric("acc_bytes", true, Harness(A::Mean)),
    metric("acc_mutual_info", true, Harness(A::Mean)),
    metric("exact_match", true, Harness(A::Mean)),
    metric("f1", true, Harness(A::F1)),
    metric("mcc", true, Harness(A::MatthewsCorrcoef)),
    metric("brier_score", false, Harness(A::BrierScore)),
    metric("ece", false, Calibration),
];
const LIKELIHOOD: [Kind; 2] =
    [metric("perplexity", false, Harness(A::Perplexity)), metric("acc", true, Harness(A::Mean))];
const ROLLING: [Kind; 3] = [
    metric("word_perplexity", false, Harness(A::WeightedPerplexity)),
    metric("byte_perplexity", false, Harness(A::WeightedPerplexity)),
    metric("bits_per_byte", false, Harness(A::BitsPerByte)),
];
const TEXT: [Kind; 13] = [
    metric("exact_match", true, Harness(A::Mean)),
    metric("bleu", true, Harness(A::Bleu)),
    metric("chrf", true, Harness(A::Chrf)),
    metric("chrf++", true, Harness(A::ChrfPlusPlus)),
    metric("ter", false, Harness(A::Ter)),
    metric("rouge1", true, Harness(A::Mean)),
    metric("rouge2", true, Harness(A::Mean)),
    metric("rougeL", true, Harness(A::Mean)),
    metric("rougeLsum", true, Harness(A::Mean)),
    metric("token_f1", true, Harness(A::Mean)),
    metric("distinct_1", true, Distinct(1)),
    metric("distinct_2", true, Distinct(2)),
    metric("repetition", false, Harness(A::Mean)),
];

/// The metrics that a kind of task can have.
pub fn kinds(kind: TaskKind) -> &'static [Kind] {
    match kind {
        TaskKind::MultipleChoice => &CHOICE,
        TaskKind::Loglikelihood => &LIKELIHOOD,
        TaskKind::LoglikelihoodRolling => &ROLLING,
        TaskKind::GenerateUntil => &TEXT,
    }
}

/// # Errors
/// [`ErrorKind::Config`] for a metric that a kind of task does not have, with those that it has.
pub(crate) fn check(kind: TaskKind, name: &str) -> Result<Kind> {
    let known = kinds(kind);
    known.iter().find(|known| known.name == name).copied().ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|known| known.name).collect();
        let message = format_args!(
            "metrics: {name:?} is none of {}: expected one of {}",
            kind.name(),
            names.join(", ")
        );
        Error::new(ErrorKind::Config, message)
    })
}

/// What a model said to one row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    /// Of each argument.
    Likelihoods(Vec<LogLikelihood>),
    /// Of the text as a whole, in nats.
    Whole(f64),
    /// What it wrote.
    Text(String),
}

/// What a metric is of one row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    /// A number.
    Number(f64),
    /// A number and what it counts.
    Weighted(f64, f64),
    /// The right label and the one that was taken.
    Labels(i64, i64),
    /// The right label and the probability of each.
    Probabilities(usize, Vec<f64>),
    /// What should have been written, and what was.
    Texts(Vec<String>, String),
}

/// Computes a metric of one row.
pub(crate) fn of_row(spec: &MetricSpec, document: &Document, reply: &Reply) -> Result<Option<Value>> {
    let name = &spec.metric[..];
    Ok(match (reply, &document.answer) {
        (Reply::Likelihoods(all), Answer::Choice(gold)) => of_choices(name, document, all, *gold),
        (Reply::Likelihoods(all), _) => all.first().and_then(|one| match name {
            "perplexity" => Some(Value::Number(one.log_prob)),
            "acc" => Some(truth(one.greedy)),
            _ => None,
        }),
        (Reply::Whole(log_prob), Answer::Counts { words, bytes }) => match name {
            "word_perplexity" => Some(Value::Weighted(*log_prob, *words as f64)),
            "byte_perplexity" | "bits_per_byte" => Some(Value::Weighted(*log_prob, *bytes as f64)),
            _ => None,
        },
        (Reply::Text(text), Answer::Texts(references)) => Some(of_text(spec, text, references)?),
        _ => None,
    })
}

fn truth(is: bool) -> Value {
    Value::Number(f64::from(u8::from(is)))
}

fn of_choices(name: &str, document: &Document, all: &[LogLikelihood], gold: usize) -> Option<Value> {
    let count = document.choices.len();
    let (conditional, alone) = all.split_at_checked(count)?;
    let log_probs: Vec<f64> = conditional.iter().map(|found| found.log_prob).collect();
    let over = |length: fn(&str) -> usize| -> Vec<f64> {
        log_probs.iter().zip(&document.choices).map(|(p, choice)| p / length(choice) as f64).collect()
    };
    let chosen = |scores: &[f64]| truth(argmax(scores) == Some(gold));
    Some(match name {
        "acc" => chosen(&log_probs),
        "acc_norm" => chosen(&over(|choice| choice.chars().count())),
        "acc_bytes" => chosen(&over(str::len)),
        "acc_mutual_info" => {
            let gained: Vec<f64> = log_probs.iter().zip(alone).map(|(p, alone)| p - alone.log_prob).collect();
            chosen(&gained)
        }
        "exact_match" => truth(conditional.get(gold)?.greedy),
        "f1" | "mcc" => Value::Labels(gold as i64, argmax(&log_probs)? as i64),
        "brier_score" | "ece" => Value::Probabilities(gold, softmax(&log_probs)),
        _ => return None,
    })
}

fn softmax(log_probs: &[f64]) -> Vec<f64> {
    let most = log_probs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let parts: Vec<f64> = log_probs.iter().map(|p| (p - most).exp()).collect();
    let sum: f64 = parts.iter().sum();
    parts.iter().map(|part| part / sum).collect()
}

fn of_text(spec: &MetricSpec, written: &str, references: &[String]) -> Result<Value> {
    Ok(match &spec.metric[..] {
        "exact_match" => {
            let mut options = text::ExactMatchOptions::default();
            options.ignore_case = spec.ignore_case;
            options.ignore_punctuation = spec.ignore_punctuation;
            options.ignore_numbers = spec.ignore_numbers;
            options.regexes_to_ignore.clone_from(&spec.regexes_to_ignore);
            let matcher = text::ExactMatch::new(options).map_err(in_metrics)?;
            truth(matcher.matches_any(written, references).map_err(in_metrics)?)
        }
        "token_f1" => Value::Number(text::best_of(references, written, text::squad_f1)),
        // Of a text without four words nothing is repeated.
        "repetition" => Value::Number(diversity::repetition(&words(written), 4).unwrap_or(0.0)),
        name => match RougeKind::from_name(name) {
            Some(kind) => {
                let rouge = Rouge::new(&[kind], false).map_err(in_metrics)?;
                let scores = rouge.score_multi(references, written).map_err(in_metrics)?;
                Value::Number(scores.first().map_or(0.0, |score| score.f_measure))
            }
            None => Value::Texts(references.to_vec(), written.to_owned()),
        },
    })
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

/// One number of all values, and its standard error where the harness has one.
pub(crate) fn aggregate(kind: Kind, values: &[Value], bootstrap_iters: usize) -> Result<(f64, Option<f64>)> {
    let aggregation = match kind.aggregate {
        Harness(aggregation) => aggregation,
        Calibration => return Ok((calibration_error(values)?, None)),
        Distinct(n) => {
            let texts = values
                .iter()
                .filter_map(|v| if let Value::Texts(_, text) = v { Some(words(text)) } else { None });
            let texts: Vec<Vec<&str>> = texts.collect();
            // Texts without a word are all the same.
            return Ok((diversity::distinct_n(&texts, n).unwrap_or(0.0), None));
        }
    };
    let nothing = |value: &Value| matches!(value, Value::Weighted(_, weight) if *weight == 0.0);
    if !values.is_empty() && values.iter().all(nothing) {
        return Err(Error::new(ErrorKind::Config, "expected words or bytes to count, found none in any row"));
    }
    let all: Vec<usize> = (0..values.len()).collect();
    let statistic = statistic(aggregation, values)?;
    let value = statistic(&all).map_err(in_metrics)?;
    let stderr = match stderr_rule(kind.name, aggregation, values.len(), bootstrap_iters) {
        StderrRule::Mean => Some(statistics::mean_stderr(&numbers(values)).map_err(in_metrics)?),
        StderrRule::Bootstrap { iterations } => Some(
            statistics::bootstrap_stderr(values.len(), iterations, |drawn| statistic(drawn))
                .map_err(in_metrics)?,
        ),
        _ => None,
    };
    Ok((value, stderr))
}

type Statistic<'a> = Box<dyn Fn(&[usize]) -> opt_metrics::Result<f64> + 'a>;

fn numbers(values: &[Value]) -> Vec<f64> {
    values
        .iter()
        .filter_map(|value| if let Value::Number(number) = value { Some(*number) } else { None })
        .collect()
}

/// An aggregate as a function of which values it is of.
fn statistic(aggregation: Aggregation, values: &[Value]) -> Result<Statistic<'_>> {
    fn pick<T: Clone>(all: &[T], drawn: &[usize]) -> Vec<T> {
        drawn.iter().filter_map(|index| all.get(*index).cloned()).collect()
    }
    let numbers = numbers(values);
    let pairs = || -> Vec<(f64, f64)> {
        values
            .iter()
            .filter_map(|v| if let Value::Weighted(sum, weight) = v { Some((*sum, *weight)) } else { None })
            .collect()
    };
    let both = || -> (Vec<i64>, Vec<i64>) {
        values
            .iter()
            .filter_map(|v| if let Value::Labels(gold, taken) = v { Some((*gold, *taken)) } else { None })
            .unzip()
    };
    // Counts of single texts are enough for the score of any resample.
    fn counts<T>(
        values: &[Value],
        count: impl Fn(&str, &[String]) -> opt_metrics::Result<T>,
    ) -> Result<Vec<T>> {
        let texts = || {
            values.iter().filter_map(|v| {
                if let Value::Texts(right, written) = v { Some((written, right)) } else { None }
            })
        };
        // As many references of each as all have, as in the harness.
        let common = texts().map(|(_, right)| right.len()).min().unwrap_or(0);
        texts()
            .map(|(written, right)| count(written, right.get(..common).unwrap_or(right)).map_err(in_metrics))
            .collect()
    }
    fn total<T: Default + for<'a> std::ops::AddAssign<&'a T>>(counts: &[T], drawn: &[usize]) -> T {
        let mut total = T::default();
        drawn.iter().filter_map(|index| counts.get(*index)).for_each(|one| total += one);
        total
    }
    Ok(match aggregation {
        A::Mean => Box::new(move |drawn| statistics::mean(&pick(&numbers, drawn))),
        A::Perplexity => Box::new(move |drawn| statistics::perplexity(&pick(&numbers, drawn))),
        A::WeightedPerplexity => {
            let pairs = pairs();
            Box::new(move |drawn| statistics::weighted_perplexity(&pick(&pairs, drawn)))
        }
        A::BitsPerByte => {
            let pairs = pairs();
            Box::new(move |drawn| statistics::bits_per_byte(&pick(&pairs, drawn)))
        }
        A::F1 | A::MatthewsCorrcoef => {
            let (gold, taken) = both();
            Box::new(move |drawn| {
                let (gold, taken) = (pick(&gold, drawn), pick(&taken, drawn));
                if aggregation == A::F1 {
                    labels::f1_binary(&gold, &taken, &1)
                } else {
                    labels::matthews_corrcoef(&gold, &taken)
                }
            })
        }
        A::BrierScore => {
            let all: Vec<(usize, Vec<f64>)> = values
                .iter()
                .filter_map(|v| {
                    if let Value::Probabilities(gold, p) = v { Some((*gold, p.clone())) } else { None }
                })
                .collect();
            Box::new(move |drawn| {
                let (gold, probabilities): (Vec<usize>, Vec<Vec<f64>>) =
                    pick(&all, drawn).into_iter().unzip();
                calibration::brier_score(&gold, &probabilities)
            })
        }
        A::Bleu => {
            let bleu = Bleu::default();
            let counts = counts(values, |written, right| bleu.statistics(written, right))?;
            Box::new(move |drawn| Ok(bleu.score(&total::<BleuStatistics>(&counts, drawn)).score))
        }
        A::Chrf | A::ChrfPlusPlus => {
            let mut options = opt_metrics::chrf::ChrfOptions::default();
            options.word_order = if aggregation == A::ChrfPlusPlus { 2 } else { 0 };
            let chrf = Chrf::new(options).map_err(in_metrics)?;
            let counts = counts(values, |written, right| chrf.statistics(written, right))?;
            Box::new(move |drawn| Ok(chrf.score(&total::<ChrfStatistics>(&counts, drawn)).score))
        }
        A::Ter => {
            let ter = Ter::new(Default::default());
            let counts = counts(values, |written, right| ter.statistics(written, right))?;
            Box::new(move |drawn| Ok(ter.score(&total::<TerStatistics>(&counts, drawn)).score))
        }
        other => {
            let message = format_args!("aggregation {}: not one of a task's metrics", other.name());
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
    })
}

fn calibration_error(values: &[Value]) -> Result<f64> {
    let taken = values.iter().filter_map(|value| {
        let Value::Probabilities(gold, probabilities) = value else { return None };
        let best = argmax(probabilities)?;
        Some((probabilities.get(best).copied()?, best == *gold))
    });
    let (confidence, right): (Vec<f64>, Vec<bool>) = taken.unzip();
    Ok(calibration::calibration(&confidence, &right, 15).map_err(in_metrics)?.expected_error)
}

fn in_metrics(error: opt_metrics::Error) -> Error {
    Error::new(ErrorKind::Option, error)
}
