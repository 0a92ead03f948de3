//! The values that metrics have on single documents, to compare two runs document by document.

use super::{Sample, SampleReader};
use crate::Result;
use serde_json::Value;
use std::{collections::BTreeMap, path::Path};

/// Metrics made of log-likelihoods: their values on documents are those, alone or before a length.
pub(crate) const OF_LOG_LIKELIHOODS: [&str; 4] =
    ["perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"];

#[derive(Debug, Clone, Copy, PartialEq)]
struct Item {
    /// Beginning of the document's hash; 0 without one.
    hash: u64,
    value: f64,
}

/// Metric and filter to documents' values by `doc_id`.
type Metrics = BTreeMap<(String, String), BTreeMap<u64, Item>>;

/// Values of metrics on documents, by task. Of a sample only numbers and truths count (1 and 0), and of the
/// perplexities the log-likelihood; what is no number on a document, such as BLEU's texts, is left out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SampleValues {
    tasks: BTreeMap<String, Metrics>,
}

/// The values of two runs on the documents that both have, in the documents' order.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Pairs {
    pub(crate) first: Vec<f64>,
    pub(crate) second: Vec<f64>,
}

/// Why values cannot be paired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unpaired {
    /// One of the runs has no values.
    NoValues,
    /// The runs have other documents, or others under the same numbers.
    Differ,
}

impl SampleValues {
    /// No values yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tasks.values().all(BTreeMap::is_empty)
    }

    /// Adds a sample's values.
    pub fn add(&mut self, task: &str, sample: &Sample) {
        let hash = sample.doc_hash.get(..16).and_then(|hash| u64::from_str_radix(hash, 16).ok()).unwrap_or(0);
        let metrics = self.tasks.entry(task.to_owned()).or_default();
        for (metric, value) in &sample.values {
            let Some(value) = scalar(metric, value) else { continue };
            let key = (metric.clone(), sample.filter.clone());
            metrics.entry(key).or_default().insert(sample.doc_id, Item { hash, value });
        }
    }

    /// Adds the values of a task's file.
    ///
    /// # Errors
    /// Those of [`SampleReader`].
    pub fn add_file(&mut self, task: &str, path: impl AsRef<Path>) -> Result<()> {
        for sample in SampleReader::open(path)? {
            self.add(task, &sample?);
        }
        Ok(())
    }

    /// The values in the files of samples that belong to a results file ([`super::beside`]), for those of `tasks` that
    /// have one.
    ///
    /// # Errors
    /// Those of [`SampleReader`].
    pub fn beside<'a>(results: &Path, tasks: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut values = Self::default();
        for task in tasks {
            let path = super::beside(results, task);
            if path.is_file() {
                values.add_file(task, path)?;
            }
        }
        Ok(values)
    }

    /// The values of two runs on a task, document by document.
    pub(crate) fn pair(
        &self,
        other: &Self,
        task: &str,
        metric: &str,
        filter: &str,
    ) -> std::result::Result<Pairs, Unpaired> {
        let key = (metric.to_owned(), filter.to_owned());
        let of = |values: &Self| values.tasks.get(task)?.get(&key).cloned();
        let (Some(first), Some(second)) = (of(self), of(other)) else { return Err(Unpaired::NoValues) };
        let same = |(a, b): ((&u64, &Item), (&u64, &Item))| {
            a.0 == b.0 && (a.1.hash == b.1.hash || a.1.hash == 0 || b.1.hash == 0)
        };
        if first.len() != second.len() || !first.iter().zip(&second).all(same) {
            return Err(Unpaired::Differ);
        }
        let list = |items: &BTreeMap<u64, Item>| items.values().map(|item| item.value).collect();
        Ok(Pairs { first: list(&first), second: list(&second) })
    }
}

fn scalar(metric: &str, value: &Value) -> Option<f64> {
    match value {
        Value::Bool(truth) => Some(f64::from(u8::from(*truth))),
        Value::Array(pair) if OF_LOG_LIKELIHOODS.contains(&metric) => match &pair[..] {
            [log_likelihood, length] if length.is_number() => log_likelihood.as_f64(),
            _ => None,
        },
        value => value.as_f64(),
    }
}
