//! Two runs on the same tasks: two models, backends or quantizations.

use super::{holm, json, maybe, normal_two_sided, reasons, signed};
use crate::{
    Error, ErrorKind, Result,
    report::{Report, Score, markdown_table, number},
    samples::{OF_LOG_LIKELIHOODS, Pairs, SampleValues, Unpaired},
};
use opt_metrics::statistics;
use serde::Serialize;

/// How a difference was tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Test {
    /// McNemar's exact test of the documents that one run has right and the other wrong.
    Mcnemar,
    /// Student's paired test of the documents' values (of perplexities, their log-likelihoods).
    Paired,
    /// z of two values with independent standard errors: without values of single documents.
    Unpaired,
    /// None: a value without standard error.
    None,
}

impl Test {
    fn words(self) -> &'static str {
        match self {
            Self::Mcnemar => "McNemar",
            Self::Paired => "paired t",
            Self::Unpaired => "unpaired z",
            Self::None => "none",
        }
    }
}

/// Further computations of a comparison.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Resamples of the paired bootstrap of means; none without a number. 1000 are usual.
    pub bootstrap: Option<usize>,
    /// Its seed.
    pub seed: u64,
}

/// A score of two runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RunRow {
    /// The task or group.
    pub task: String,
    /// Whether it is a group.
    pub group: bool,
    /// The metric.
    pub metric: String,
    /// The filter.
    pub filter: String,
    /// The first run's value.
    pub first: f64,
    /// The second run's value.
    pub second: f64,
    /// Second less first.
    pub difference: f64,
    /// The difference's standard error; none where the test has none for the difference itself (perplexities).
    pub stderr: Option<f64>,
    /// z or t; for McNemar's test none.
    pub statistic: Option<f64>,
    /// Two-sided p-value.
    pub p: Option<f64>,
    /// The same corrected by Holm for all rows of tasks; groups, which repeat their tasks, have none.
    pub p_holm: Option<f64>,
    /// By which test.
    pub test: Test,
    /// Documents that were paired.
    pub pairs: Option<usize>,
    /// For right-or-wrong metrics: documents that only the first has right, and only the second.
    pub discordant: Option<(u64, u64)>,
    /// The paired bootstrap's middle 95 % of differences, second less first, if asked for.
    pub interval: Option<(f64, f64)>,
    /// Its two-sided p-value.
    pub p_bootstrap: Option<f64>,
    /// Whether more is better, if either report says.
    pub higher_is_better: Option<bool>,
    /// What else differs, and why values were not paired, a line each.
    pub notes: Vec<String>,
}

/// Two runs on the tasks they have in common.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RunComparison {
    /// What the first run is of.
    pub first: String,
    /// What the second run is of.
    pub second: String,
    /// A row for each score of both.
    pub rows: Vec<RunRow>,
    /// Tasks that only one of them has.
    pub only_one: Vec<String>,
}

/// Compares two reports, document by document where there are values of samples, else by their standard errors. Values of
/// a group are those of its tasks one after another, if the group's score is their mean.
///
/// The difference of two runs on the same documents is far more certain than their standard errors say, since the same
/// documents are hard for both; so give the samples if there are any.
///
/// # Errors
/// [`ErrorKind::NotFound`] if the reports have no score in common, [`ErrorKind::Option`] for less than two resamples.
pub fn runs(
    first: &Report,
    second: &Report,
    samples: Option<(&SampleValues, &SampleValues)>,
    options: &Options,
) -> Result<RunComparison> {
    let mut rows = Vec::new();
    for (task, scores) in &first.results {
        let Some(others) = second.results.get(task) else { continue };
        for score in &scores.metrics {
            let same = |other: &&Score| other.metric == score.metric && other.filter == score.filter;
            let Some(other) = others.metrics.iter().find(same) else { continue };
            if score.value.is_finite() && other.value.is_finite() {
                rows.push(Pairing { first, second, samples, options }.row(task, score, other)?);
            }
        }
    }
    if rows.is_empty() {
        let names = |report: &Report| report.results.keys().cloned().collect::<Vec<_>>().join(", ");
        let message = format!("no score in common: {} and {}", names(first), names(second));
        return Err(Error::new(ErrorKind::NotFound, message));
    }
    let counted = |row: &&mut RunRow| !row.group && row.p.is_some();
    let p_values: Vec<f64> = rows.iter().filter(|row| !row.group).filter_map(|row| row.p).collect();
    for (row, p) in rows.iter_mut().filter(counted).zip(holm(&p_values)) {
        row.p_holm = Some(p);
    }
    let lacks = |a: &Report, b: &Report| -> Vec<String> {
        a.results.keys().filter(|task| !b.results.contains_key(*task)).cloned().collect()
    };
    let only_one = [lacks(first, second), lacks(second, first)].concat();
    Ok(RunComparison { first: first.title(), second: second.title(), rows, only_one })
}

struct Pairing<'a> {
    first: &'a Report,
    second: &'a Report,
    samples: Option<(&'a SampleValues, &'a SampleValues)>,
    options: &'a Options,
}

impl Pairing<'_> {
    fn row(&self, task: &str, score: &Score, other: &Score) -> Result<RunRow> {
        let mut row = RunRow {
            task: task.to_owned(),
            group: self.first.is_group(task) || self.second.is_group(task),
            metric: score.metric.clone(),
            filter: score.filter.clone(),
            first: score.value,
            second: other.value,
            difference: other.value - score.value,
            stderr: None,
            statistic: None,
            p: None,
            p_holm: None,
            test: Test::None,
            pairs: None,
            discordant: None,
            interval: None,
            p_bootstrap: None,
            higher_is_better: self
                .first
                .higher_is_better(task, &score.metric)
                .or_else(|| self.second.higher_is_better(task, &score.metric)),
            notes: self.differences(task),
        };
        let pairs = self.samples.map(|(a, b)| self.pairs(a, b, &row));
        match pairs {
            Some(Ok(pairs)) if pairs.first.len() >= 2 => self.paired(&mut row, &pairs)?,
            Some(Err(Unpaired::Differ)) => {
                row.notes.push("the runs' samples are of other documents: not paired".to_owned());
                unpaired(&mut row, score, other);
            }
            Some(_) => {
                row.notes.push("no values of single documents: not paired".to_owned());
                unpaired(&mut row, score, other);
            }
            None => unpaired(&mut row, score, other),
        }
        Ok(row)
    }

    /// Settings that differ and bear on scores. They may be what is compared.
    fn differences(&self, task: &str) -> Vec<String> {
        let mut lines = Vec::new();
        if let (Some(a), Some(b)) = (self.first.shots(task), self.second.shots(task))
            && a != b
        {
            lines.push(format!("{a} shots and {b} shots"));
        }
        if let (Some(a), Some(b)) = (self.first.bos(), self.second.bos())
            && a != b
        {
            lines.push(format!("texts {a} and {b}"));
        }
        if let (Some(a), Some(b)) = (self.first.n_samples.get(task), self.second.n_samples.get(task))
            && a.effective != b.effective
        {
            lines.push(format!("{} documents and {}", a.effective, b.effective));
        }
        if let (Some(a), Some(b)) = (self.first.versions.get(task), self.second.versions.get(task))
            && a != b
            && a.as_f64() != b.as_f64()
        {
            lines.push(format!("versions {a} and {b} of the task"));
        }
        lines
    }

    fn pairs(
        &self,
        a: &SampleValues,
        b: &SampleValues,
        row: &RunRow,
    ) -> std::result::Result<Pairs, Unpaired> {
        if !row.group {
            return a.pair(b, &row.task, &row.metric, &row.filter);
        }
        let tasks = self.first.leaves(&row.task);
        if tasks != self.second.leaves(&row.task) {
            return Err(Unpaired::Differ);
        }
        let mut all = Pairs::default();
        for task in &tasks {
            let pairs = a.pair(b, task, &row.metric, &row.filter)?;
            all.first.extend(pairs.first);
            all.second.extend(pairs.second);
        }
        // A group may be the mean over its tasks instead.
        let near = |values: &[f64], score: f64| {
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            (mean - score).abs() <= 1e-6 * score.abs().max(1.0)
        };
        if near(&all.first, row.first) && near(&all.second, row.second) {
            Ok(all)
        } else {
            Err(Unpaired::NoValues)
        }
    }

    fn paired(&self, row: &mut RunRow, pairs: &Pairs) -> Result<()> {
        let Pairs { first, second } = pairs;
        row.pairs = Some(first.len());
        // A perplexity falls where log-likelihoods rise, and is no mean that an error in nats belongs to.
        let of_log_likelihoods = OF_LOG_LIKELIHOODS.contains(&row.metric.as_str());
        let found = statistics::paired_difference(second, first).map_err(failed)?;
        if !of_log_likelihoods {
            row.stderr = Some(found.stderr);
        }
        let truths = |values: &[f64]| values.iter().all(|v| *v == 0.0 || *v == 1.0);
        if !of_log_likelihoods && truths(first) && truths(second) {
            let right = |values: &[f64]| values.iter().map(|v| *v == 1.0).collect::<Vec<_>>();
            let mcnemar = statistics::mcnemar(&right(first), &right(second)).map_err(failed)?;
            row.test = Test::Mcnemar;
            row.p = Some(mcnemar.p_value);
            row.discordant = Some((mcnemar.only_first, mcnemar.only_second));
        } else {
            row.test = Test::Paired;
            row.p = Some(found.p_student);
            row.statistic = Some(if of_log_likelihoods { -found.statistic } else { found.statistic });
        }
        if let Some(resamples) = self.options.bootstrap.filter(|_| !of_log_likelihoods) {
            let differences: Vec<f64> = second.iter().zip(first).map(|(b, a)| b - a).collect();
            let items = differences.len();
            let mean = |drawn: &[usize]| {
                let sum: f64 = drawn.iter().filter_map(|i| differences.get(*i)).sum();
                Ok(sum / items as f64)
            };
            let found =
                statistics::paired_bootstrap(items, resamples, self.options.seed, mean).map_err(failed)?;
            row.interval = Some(found.interval);
            row.p_bootstrap = Some(found.p_value);
        }
        Ok(())
    }
}

fn unpaired(row: &mut RunRow, score: &Score, other: &Score) {
    let (Some(a), Some(b)) = (score.stderr, other.stderr) else { return };
    let stderr = a.hypot(b);
    row.stderr = Some(stderr);
    row.test = Test::Unpaired;
    // Two values without spread differ or they do not.
    let z = if row.difference == 0.0 { 0.0 } else { row.difference / stderr };
    row.statistic = Some(z);
    row.p = Some(normal_two_sided(z));
}

fn failed(e: opt_metrics::Error) -> Error {
    Error::because(ErrorKind::Option, "a comparison of two runs", e)
}

impl RunComparison {
    /// The rows as a Markdown table. `p (Holm)` is corrected for all rows of tasks together.
    pub fn markdown(&self) -> String {
        let headers = [
            "Task",
            "Metric",
            "Filter",
            "",
            "First",
            "Second",
            "Difference",
            "SE",
            "Test",
            "z or t",
            "p",
            "p (Holm)",
        ];
        let p = |p: f64| if p < 1e-4 { "<0.0001".to_owned() } else { number(p) };
        let rows: Vec<[String; 12]> = self
            .rows
            .iter()
            .map(|row| {
                let arrow = match row.higher_is_better {
                    Some(true) => "↑",
                    Some(false) => "↓",
                    None => "",
                };
                [
                    if row.group { format!("{} (group)", row.task) } else { row.task.clone() },
                    row.metric.clone(),
                    row.filter.clone(),
                    arrow.to_owned(),
                    number(row.first),
                    number(row.second),
                    signed(row.difference),
                    maybe(row.stderr, number),
                    row.test.words().to_owned(),
                    match (row.statistic, row.discordant) {
                        (Some(statistic), _) => format!("{statistic:+.2}"),
                        (None, Some((first, second))) => format!("{first}:{second}"),
                        _ => String::new(),
                    },
                    maybe(row.p, p),
                    maybe(row.p_holm, p),
                ]
            })
            .collect();
        let mut text = format!("First: {}\nSecond: {}\n\n", self.first, self.second);
        text += &markdown_table(&headers, &rows);
        if self.rows.iter().any(|row| row.test == Test::Unpaired) {
            text += "\nUnpaired: the two errors are taken as independent, which hides differences on the same documents.\n";
        }
        if self.rows.iter().any(|row| row.test == Test::Mcnemar) {
            text += "\nMcNemar: documents that only the first has right : only the second.\n";
        }
        let notes = reasons(self.rows.iter().map(|row| (row.task.as_str(), row.notes.as_slice())));
        if !notes.is_empty() {
            text += &format!("\nNotes:\n\n{notes}");
        }
        if !self.only_one.is_empty() {
            text += &format!("\nOnly in one of them: {}\n", self.only_one.join(", "));
        }
        text
    }

    /// The same as JSON.
    pub fn to_json(&self) -> String {
        json(self)
    }
}
