//! Scores of groups of tasks, computed as the harness computes them.

use super::{Report, Score, Scores};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// A metric that a group takes the mean of.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct GroupMetric {
    /// The metric.
    pub name: String,
    /// The filters; none for all that the tasks have for the metric.
    pub filters: Option<Vec<String>>,
    /// Whether each task counts by its documents (micro average) or as one (macro average).
    pub weight_by_size: bool,
}

/// A group of tasks.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct GroupResult {
    /// The group's name.
    pub name: String,
    /// What tables call it; the name unless given.
    pub alias: Option<String>,
    /// Version of the group's definition; `N/A` unless given.
    pub version: Option<String>,
    /// The tasks and groups in it.
    pub subtasks: Vec<String>,
    /// The metrics it has; without any it only stands above its tasks in the table.
    pub metrics: Vec<GroupMetric>,
}

impl GroupResult {
    /// A group without metrics yet.
    pub fn new<S: Into<String>>(name: impl Into<String>, subtasks: impl IntoIterator<Item = S>) -> Self {
        Self {
            name: name.into(),
            alias: None,
            version: None,
            subtasks: subtasks.into_iter().map(Into::into).collect(),
            metrics: Vec::new(),
        }
    }

    /// Adds the mean of a metric over all documents of the tasks, for all filters.
    #[must_use]
    pub fn mean_of(mut self, metric: impl Into<String>) -> Self {
        self.metrics.push(GroupMetric { name: metric.into(), filters: None, weight_by_size: true });
        self
    }
}

impl Report {
    /// Adds a group and computes its scores from the tasks in it, which have to be there already, as have the groups
    /// in it. Subtasks are added to those that tasks named for the group. A metric that some tasks lack is the mean
    /// over the others, with a note; its standard error is missing if one of theirs is.
    ///
    /// With sizes n and standard errors s of k tasks, by size: mean Σnv/Σn, standard error
    /// √(Σn(n−1)s² / (Σn−k) / Σn); else Σv/k and √Σs²/k (`pooled_sample_stderr` and `unweighted_mean_stderr` of
    /// lm-evaluation-harness).
    pub fn add_group(&mut self, group: GroupResult) {
        let GroupResult { name, alias, version, subtasks, metrics } = group;
        let members = self.group_subtasks.entry(name.clone()).or_default();
        for task in subtasks {
            if !members.contains(&task) {
                members.push(task);
            }
        }
        let members = members.clone();
        let leaves = self.leaves(&name);
        let mut scores = Scores::new(&name, alias.as_deref().unwrap_or(&name));
        let mut notes = Vec::new();
        if !metrics.is_empty() {
            let sizes = leaves.iter().filter_map(|task| self.results.get(task)?.sample_len);
            scores.sample_len = Some(sizes.sum());
        }
        for metric in &metrics {
            let filters = metric.filters.clone().unwrap_or_else(|| self.filters_of(&leaves, &metric.name));
            if filters.is_empty() {
                notes.push(format!("group {name}: none of its tasks has the metric {}", metric.name));
            }
            for filter in filters {
                let parts: Vec<Part> =
                    leaves.iter().filter_map(|task| self.part(task, &metric.name, &filter)).collect();
                let key = format!("{},{filter}", metric.name);
                if parts.len() < leaves.len() {
                    let missing = leaves.len() - parts.len();
                    notes.push(format!("group {name}: {missing} of {} tasks lack {key}", leaves.len()));
                }
                let Some((value, stderr)) = mean(&parts, metric.weight_by_size) else { continue };
                scores.sample_count.insert(key, parts.iter().map(|part| part.size).sum());
                scores.metrics.push(Score { metric: metric.name.clone(), filter, value, stderr });
            }
        }
        scores.sort();
        self.inherit(&name, &members);
        self.versions.insert(name.clone(), Value::String(version.unwrap_or_else(|| "N/A".to_owned())));
        if !metrics.is_empty() {
            self.groups.insert(name.clone(), scores.clone());
        }
        self.results.insert(name, scores);
        for note in notes {
            self.note(note);
        }
    }

    /// The tasks in a group and in the groups in it. A circle of groups ends where it closes.
    pub(crate) fn leaves(&self, group: &str) -> Vec<String> {
        fn visit(report: &Report, name: &str, seen: &mut BTreeSet<String>, found: &mut Vec<String>) {
            match report.group_subtasks.get(name) {
                // Older releases list tasks there too, with nothing in them.
                Some(children) if children.is_empty() => found.push(name.to_owned()),
                Some(children) if seen.insert(name.to_owned()) => {
                    for child in children {
                        visit(report, child, seen, found);
                    }
                }
                Some(_) => {}
                None => found.push(name.to_owned()),
            }
        }
        let mut found = Vec::new();
        visit(self, group, &mut BTreeSet::new(), &mut found);
        found
    }

    /// Whether a name is a group's: it has scores of one, or tasks in it.
    pub(crate) fn is_group(&self, name: &str) -> bool {
        self.groups.contains_key(name) || self.group_subtasks.get(name).is_some_and(|tasks| !tasks.is_empty())
    }

    fn filters_of(&self, tasks: &[String], metric: &str) -> Vec<String> {
        let scores = tasks.iter().filter_map(|task| self.results.get(task));
        let found: BTreeSet<&str> = scores
            .flat_map(|scores| &scores.metrics)
            .filter(|score| score.metric == metric)
            .map(|score| score.filter.as_str())
            .collect();
        found.into_iter().map(str::to_owned).collect()
    }

    fn part(&self, task: &str, metric: &str, filter: &str) -> Option<Part> {
        let scores = self.results.get(task)?;
        let score = scores.metrics.iter().find(|s| s.metric == metric && s.filter == filter)?;
        Some(Part { value: score.value, stderr: score.stderr, size: scores.sample_len.unwrap_or(0) })
    }

    /// Shots and directions that all of a group's members agree on are the group's.
    fn inherit(&mut self, group: &str, members: &[String]) {
        let mut shots: Vec<&Value> = members.iter().filter_map(|m| self.n_shot.get(m)).collect();
        shots.dedup();
        if let [shots] = shots[..] {
            let shots = shots.clone();
            self.n_shot.insert(group.to_owned(), shots);
        }
        let mut directions: BTreeMap<String, Option<bool>> = BTreeMap::new();
        for member in members.iter().filter_map(|m| self.higher_is_better.get(m)) {
            for (metric, higher) in member {
                let known = directions.entry(metric.clone()).or_insert(*higher);
                if known != higher {
                    *known = None;
                }
            }
        }
        if !directions.is_empty() {
            self.higher_is_better.insert(group.to_owned(), directions);
        }
    }
}

/// A task's share in a group's score.
struct Part {
    value: f64,
    stderr: Option<f64>,
    size: usize,
}

/// Mean and standard error over tasks; none without any, or where none has a document.
fn mean(parts: &[Part], by_size: bool) -> Option<(f64, Option<f64>)> {
    let weight = |part: &Part| if by_size { part.size as f64 } else { 1.0 };
    let total: f64 = parts.iter().map(weight).sum();
    if total == 0.0 {
        return None;
    }
    let value = parts.iter().map(|part| part.value * weight(part)).sum::<f64>() / total;
    let count = parts.len() as f64;
    let errors: Option<Vec<f64>> = parts.iter().map(|part| part.stderr).collect();
    let stderr = errors.map(|errors| {
        if by_size {
            let squares = parts.iter().zip(&errors).map(|(part, error)| {
                let n = part.size as f64;
                (n - 1.0) * error.powi(2) * n
            });
            (squares.sum::<f64>() / (total - count) / total).sqrt()
        } else {
            errors.iter().map(|error| error.powi(2)).sum::<f64>().sqrt() / count
        }
    });
    Some((value, stderr.filter(|stderr| stderr.is_finite())))
}
