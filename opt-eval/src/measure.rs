//! From what a model said to what is measured of it: one value a row and metric, and one number of all values.

use crate::{
    requests::LogLikelihood,
    task::{Answer, Document, MetricSpec, TaskKind},
};
use opt_core::{Error, ErrorKind, Result};
use opt_metrics::{
    bleu::Bleu,
    calibration,
    chrf::Chrf,
    diversity, labels,
    rouge::Rouge,
    statistics::{self, StderrRule, stderr_rule},
    ter::Ter,
    text,
};

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
        let message = format_args!("metrics: {name:?} is none of {}: expected one of {}", kind.name(), names.join(", "));
        Error::new(ErrorKind::Config, message)
    })
}

/// What a model said to one row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Reply {
    /// Of each argument.
    Likelihoods(Vec<LogLikelihood>),
    /// Of the text as a whole, in nats.
    Whole(f64),
    /// What it wrote, after a filter.
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

/// The first of the largest; what is no number is larger than all, as for numpy.
fn argmax(scores: &[f64]) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (index, &score) in scores.iter().enumerate() {
        if score.is_nan() {
            return Some(index);
        }
        if best.is_none_or(|(_, most)| score > most) {
            best = Some((index, score));
        }
    }
    best.map(|(index, _)| index)
}

fn softmax(log_probs: &[f64]) -> Vec<f64> {
    let most = log_probs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let parts: Vec<f64> = log_probs.iter().map(|p| (p - most).exp()).collect();
    let sum: f64 = parts.iter().sum();
    parts.iter().map(|part| part / sum).collect()
}

fn of_text(spec: &MetricSpec, written: &str, references: &[String]) -> Result<Value> {
    let best = |score: &mut dyn FnMut(&str) -> Result<f64>| -> Result<Value> {
        let scores: Vec<f64> = references.iter().map(|reference| score(reference)).collect::<Result<_>>()?;
        Ok(Value::Number(scores.into_iter().fold(0.0, f64::max)))
    };
    let rouge = |kind: &str, reference: &str| -> Result<f64> {
        let rouge = Rouge::named(&[kind], false).map_err(in_metrics)?;
        Ok(rouge.score(reference, written).first().map_or(0.0, |score| score.f_measure))
    };
    match &spec.metric[..] {
        "exact_match" => {
            let options = text::ExactMatchOptions {
                ignore_case: spec.ignore_case,
                ignore_punctuation: spec.ignore_punctuation,
                ignore_numbers: spec.ignore_numbers,
                regexes_to_ignore: spec.regexes_to_ignore.clone(),
                ..Default::default()
            };
            let matcher = text::ExactMatch::new(options).map_err(in_metrics)?;
            best(&mut |reference| Ok(f64::from(u8::from(matcher.matches(written, reference)))))
        }
        kind @ ("rouge1" | "rouge2" | "rougeL" | "rougeLsum") => best(&mut |reference| rouge(kind, reference)),
        "token_f1" => best(&mut |reference| Ok(text::token_f1(written, reference))),
        "repetition" => Ok(Value::Number(diversity::seq_rep_n(written, 4))),
        _ => Ok(Value::Texts(references.to_vec(), written.to_owned())),
    }
}

/// One number of all values, and its standard error where the harness has one.
pub(crate) fn aggregate(kind: Kind, values: &[Value], bootstrap_iters: usize) -> Result<(f64, Option<f64>)> {
    let aggregation = match kind.aggregate {
        Harness(aggregation) => aggregation,
        Calibration => return Ok((calibration_error(values)?, None)),
        Distinct(n) => {
            let texts: Vec<&str> = values.iter().filter_map(|value| if let Value::Texts(_, text) = value { Some(&text[..]) } else { None }).collect();
            return Ok((diversity::distinct_n(&texts, n), None));
        }
    };
    let all: Vec<usize> = (0..values.len()).collect();
    let statistic = statistic(aggregation, values)?;
    let value = statistic(&all).map_err(in_metrics)?;
    let stderr = match stderr_rule(kind.name, aggregation, values.len(), bootstrap_iters) {
        StderrRule::Mean => Some(statistics::mean_stderr(&numbers(values)).map_err(in_metrics)?),
        StderrRule::Bootstrap { iterations } => {
            Some(statistics::bootstrap_stderr(values.len(), iterations, |drawn| statistic(drawn)).map_err(in_metrics)?)
        }
        _ => None,
    };
    Ok((value, stderr))
}

type Statistic<'a> = Box<dyn Fn(&[usize]) -> opt_metrics::Result<f64> + 'a>;

fn numbers(values: &[Value]) -> Vec<f64> {
    values.iter().filter_map(|value| if let Value::Number(number) = value { Some(*number) } else { None }).collect()
}

/// An aggregate as a function of which values it is of.
fn statistic(aggregation: Aggregation, values: &[Value]) -> Result<Statistic<'_>> {
    fn pick<T: Clone>(all: &[T], drawn: &[usize]) -> Vec<T> {
        drawn.iter().filter_map(|index| all.get(*index).cloned()).collect()
    }
    let numbers = numbers(values);
    let pairs = || -> Vec<(f64, f64)> {
        values.iter().filter_map(|v| if let Value::Weighted(sum, weight) = v { Some((*sum, *weight)) } else { None }).collect()
    };
    let both = || -> (Vec<i64>, Vec<i64>) {
        values.iter().filter_map(|v| if let Value::Labels(gold, taken) = v { Some((*gold, *taken)) } else { None }).unzip()
    };
    let texts = || -> (Vec<String>, Vec<Vec<String>>) {
        values.iter().filter_map(|v| if let Value::Texts(right, written) = v { Some((written.clone(), right.clone())) } else { None }).unzip()
    };
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
                if aggregation == A::F1 { labels::f1_binary(&gold, &taken) } else { labels::matthews_corrcoef(&gold, &taken) }
            })
        }
        A::BrierScore => {
            let all: Vec<(usize, Vec<f64>)> = values
                .iter()
                .filter_map(|v| if let Value::Probabilities(gold, p) = v { Some((*gold, p.clone())) } else { None })
                .collect();
            Box::new(move |drawn| {
                let (gold, probabilities): (Vec<usize>, Vec<Vec<f64>>) = pick(&all, drawn).into_iter().unzip();
                calibration::brier_score(&gold, &probabilities)
            })
        }
        A::Bleu => {
            let bleu = Bleu::new(Default::default()).map_err(in_metrics)?;
            let (written, right) = texts();
            Box::new(move |drawn| Ok(bleu.corpus(&pick(&written, drawn), &pick(&right, drawn))?.score))
        }
        A::Chrf | A::ChrfPlusPlus => {
            let mut options = opt_metrics::chrf::ChrfOptions::default();
            options.word_order = if aggregation == A::ChrfPlusPlus { 2 } else { 0 };
            let chrf = Chrf::new(options).map_err(in_metrics)?;
            let (written, right) = texts();
            Box::new(move |drawn| Ok(chrf.corpus(&pick(&written, drawn), &pick(&right, drawn))?.score))
        }
        A::Ter => {
            let ter = Ter::new(Default::default());
            let (written, right) = texts();
            Box::new(move |drawn| Ok(ter.corpus(&pick(&written, drawn), &pick(&right, drawn))?.score))
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
    calibration::expected_calibration_error(&confidence, &right, 10).map_err(in_metrics)
}

fn in_metrics(error: opt_metrics::Error) -> Error {
    Error::new(ErrorKind::Option, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_and_nans_are_numpys() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), Some(1));
        assert_eq!(argmax(&[1.0, f64::NAN, 3.0]), Some(1));
        assert_eq!(argmax(&[f64::NEG_INFINITY; 2]), Some(0));
        assert_eq!(argmax(&[]), None);
    }
}
