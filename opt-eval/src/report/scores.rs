//! The scores of one task, and the flat object in which the harness writes them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

use super::NO_FILTER;

/// One number.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Score {
    /// The metric.
    pub metric: String,
    /// The filter its answers went through.
    pub filter: String,
    /// The value; NaN where a file has none.
    pub value: f64,
    /// Its standard error, if it has one.
    pub stderr: Option<f64>,
}

impl Score {
    /// The key under which the harness writes it, such as `acc,none`.
    pub fn key(&self) -> String {
        format!("{},{}", self.metric, self.filter)
    }
}

/// The scores of a task or group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(from = "Map<String, Value>", into = "Map<String, Value>")]
pub struct Scores {
    /// The task's name; empty where a file does not repeat it.
    pub name: String,
    /// What tables call it; empty where a file does not say.
    pub alias: String,
    /// Documents evaluated.
    pub sample_len: Option<usize>,
    /// Of groups: documents behind each metric, by its key.
    pub sample_count: BTreeMap<String, usize>,
    /// The numbers, sorted by key.
    pub metrics: Vec<Score>,
    /// Further entries of a file.
    pub other: Map<String, Value>,
}

impl Scores {
    pub(crate) fn new(name: &str, alias: &str) -> Self {
        Self {
            name: name.to_owned(),
            alias: alias.to_owned(),
            sample_len: None,
            sample_count: BTreeMap::new(),
            metrics: Vec::new(),
            other: Map::new(),
        }
    }

    pub(crate) fn sort(&mut self) {
        self.metrics.sort_by_key(Score::key);
    }
}

/// Where a key with `_stderr` belongs: `acc_stderr,none` to `acc,none`, the old layout's `acc_stderr` to `acc`.
fn of_stderr(key: &str) -> Option<String> {
    let (metric, filter) = split(key);
    metric.strip_suffix("_stderr").map(|metric| format!("{metric},{filter}"))
}

fn split(key: &str) -> (&str, &str) {
    key.split_once(',').unwrap_or((key, NO_FILTER))
}

impl From<Map<String, Value>> for Scores {
    fn from(map: Map<String, Value>) -> Self {
        let mut scores = Self::new("", "");
        let mut errors = BTreeMap::new();
        for (key, value) in map {
            match (key.as_str(), &value) {
                ("name", Value::String(name)) => scores.name.clone_from(name),
                // Releases before 0.4.9 wrote the indentation of the table into the alias.
                ("alias", Value::String(alias)) => {
                    alias.trim_start_matches([' ', '-']).clone_into(&mut scores.alias);
                }
                ("sample_len" | "samples", Value::Number(n)) => {
                    scores.sample_len = n.as_u64().and_then(|n| usize::try_from(n).ok());
                }
                ("sample_count", Value::Object(counts)) => {
                    scores.sample_count = counts
                        .iter()
                        .filter_map(|(key, n)| Some((key.clone(), usize::try_from(n.as_u64()?).ok()?)))
                        .collect();
                }
                (_, Value::Number(_) | Value::Null) => {
                    let number = value.as_f64();
                    if let Some(of) = of_stderr(&key) {
                        errors.insert(of, number);
                    } else {
                        let (metric, filter) = split(&key);
                        scores.metrics.push(Score {
                            metric: metric.to_owned(),
                            filter: filter.to_owned(),
                            value: number.unwrap_or(f64::NAN),
                            stderr: None,
                        });
                    }
                }
                // "N/A": a metric without standard error.
                (_, Value::String(_)) if of_stderr(&key).is_some() => {}
                _ => {
                    scores.other.insert(key, value);
                }
            }
        }
        for score in &mut scores.metrics {
            score.stderr = errors.get(&score.key()).copied().flatten();
        }
        scores.sort();
        scores
    }
}

impl From<Scores> for Map<String, Value> {
    fn from(scores: Scores) -> Self {
        let mut map = scores.other;
        if !scores.name.is_empty() {
            map.insert("name".into(), scores.name.into());
        }
        if !scores.alias.is_empty() {
            map.insert("alias".into(), scores.alias.into());
        }
        if let Some(n) = scores.sample_len {
            map.insert("sample_len".into(), n.into());
        }
        if !scores.sample_count.is_empty() {
            map.insert("sample_count".into(), scores.sample_count.into_iter().collect::<Value>());
        }
        for score in scores.metrics {
            let error = score.stderr.map_or_else(|| "N/A".into(), Value::from);
            map.insert(format!("{}_stderr,{}", score.metric, score.filter), error);
            map.insert(score.key(), score.value.into());
        }
        map
    }
}
