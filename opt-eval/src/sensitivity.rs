//! How much a score depends on what should not matter: phrasings of the prompt, orders and draws of examples.
//!
//! ```
//! use opt_eval::{report::Report, sensitivity};
//!
//! let run = |acc: f64| Report::from_json(&format!(r#"{{"results": {{"piqa": {{"acc,none": {acc}, "acc_stderr,none": 0.01}}}},
//!     "higher_is_better": {{"piqa": {{"acc": true}}}}}}"#));
//! let (question, plain) = (run(0.60)?, run(0.64)?);
//! let found = sensitivity::spread(&[("question", &question), ("plain", &plain)], None)?;
//! let row = &found.rows[0];
//! assert_eq!(row.best.as_deref(), Some("plain"));
//! assert!((row.range_in_stderr.unwrap() - 4.0).abs() < 1e-9);
//! # Ok::<(), opt_eval::Error>(())
//! ```

use crate::{
    Error, ErrorKind, Result,
    report::{Report, Score, Scores, markdown_table, number},
};
use serde::Serialize;

/// One variant's score.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Variant {
    /// The variant's label.
    pub label: String,
    /// Its value.
    pub value: f64,
    /// The value's standard error.
    pub stderr: Option<f64>,
    /// Examples before each question.
    pub shots: Option<u64>,
}

/// The spread of one metric over variants.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct SpreadRow {
    /// The task; of variants that are tasks of their own, the first's.
    pub task: String,
    /// The metric.
    pub metric: String,
    /// The filter.
    pub filter: String,
    /// Smallest value.
    pub min: f64,
    /// Largest value.
    pub max: f64,
    /// Mean.
    pub mean: f64,
    /// Standard deviation of the sample of variants (n − 1 below).
    pub deviation: f64,
    /// The range, max − min, over the root mean square of the variants' standard errors: around 1 to 2 it is no more
    /// than other documents would do. None without standard errors.
    pub range_in_stderr: Option<f64>,
    /// Label of the best, where it is known whether more is better.
    pub best: Option<String>,
    /// Label of the worst.
    pub worst: Option<String>,
    /// The variants in the order given.
    pub variants: Vec<Variant>,
}

/// The spread of a task's metrics over variants.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Spread {
    /// A row for each metric that all variants have.
    pub rows: Vec<SpreadRow>,
    /// What a reader should know, a line each.
    pub notes: Vec<String>,
}

/// Sets labelled reports of one task side by side. Without `task`, each report's only task is taken, whatever its name;
/// reports of several tasks are compared on all tasks that all have.
///
/// # Errors
/// [`ErrorKind::Option`] for less than two reports or labels that repeat; [`ErrorKind::NotFound`] if they have no score
/// in common.
pub fn spread<L: AsRef<str>>(runs: &[(L, &Report)], task: Option<&str>) -> Result<Spread> {
    let Some((_, first)) = runs.first().filter(|_| runs.len() > 1) else {
        let message = format!("a spread is over at least 2 reports, {} given", runs.len());
        return Err(Error::new(ErrorKind::Option, message));
    };
    let mut labels: Vec<&str> = runs.iter().map(|(label, _)| label.as_ref()).collect();
    labels.sort_unstable();
    if let Some([twice, _]) = labels.array_windows().find(|[a, b]| a == b) {
        return Err(Error::new(ErrorKind::Option, format!("two reports have the label {twice:?}")));
    }
    let single = task.is_none() && runs.iter().all(|(_, report)| report.results.len() == 1);
    let mut rows = Vec::new();
    let wanted = first.results.iter().filter(|(name, _)| task.is_none_or(|task| task == *name));
    for (name, scores) in wanted {
        for score in &scores.metrics {
            let of = |(label, report): &(L, &Report)| {
                let (task, scores): (&String, &Scores) = match single {
                    true => report.results.first_key_value()?,
                    false => report.results.get_key_value(name)?,
                };
                let same = |other: &&Score| other.metric == score.metric && other.filter == score.filter;
                let found = scores.metrics.iter().find(same).filter(|other| other.value.is_finite())?;
                let label = label.as_ref().to_owned();
                Some(Variant { label, value: found.value, stderr: found.stderr, shots: report.shots(task) })
            };
            let Some(variants) = runs.iter().map(of).collect::<Option<Vec<_>>>() else { continue };
            rows.extend(row(name, score.metric.clone(), score.filter.clone(), variants, first));
        }
    }
    if rows.is_empty() {
        let what = task.map_or_else(|| "any task".to_owned(), |task| format!("the task {task}"));
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("the reports have no score in common on {what}"),
        ));
    }
    let mut notes = Vec::new();
    let mut models: Vec<String> = runs.iter().map(|(_, report)| report.title()).collect();
    models.dedup();
    if models.len() > 1 {
        notes.push(format!("the reports are not of one model: {}", models.join("; ")));
    }
    Ok(Spread { rows, notes })
}

fn row(
    task: &str,
    metric: String,
    filter: String,
    variants: Vec<Variant>,
    report: &Report,
) -> Option<SpreadRow> {
    let by_value = |a: &&Variant, b: &&Variant| a.value.total_cmp(&b.value);
    let (low, high) = (variants.iter().min_by(by_value)?, variants.iter().max_by(by_value)?);
    let count = variants.len() as f64;
    let mean = variants.iter().map(|v| v.value).sum::<f64>() / count;
    let squares: f64 = variants.iter().map(|v| (v.value - mean).powi(2)).sum();
    let errors: Option<Vec<f64>> = variants.iter().map(|v| v.stderr).collect();
    let error = errors.map(|errors| (errors.iter().map(|e| e * e).sum::<f64>() / count).sqrt());
    let (min, max) = (low.value, high.value);
    let (best, worst) = match report.higher_is_better(task, &metric) {
        _ if min == max => (None, None),
        Some(true) => (Some(high.label.clone()), Some(low.label.clone())),
        Some(false) => (Some(low.label.clone()), Some(high.label.clone())),
        None => (None, None),
    };
    Some(SpreadRow {
        task: task.to_owned(),
        metric,
        filter,
        min,
        max,
        mean,
        deviation: (squares / (count - 1.0)).sqrt(),
        range_in_stderr: error.filter(|error| *error > 0.0).map(|error| (max - min) / error),
        best,
        worst,
        variants,
    })
}

impl Spread {
    /// The spread as a Markdown table, and a second with each variant's values.
    pub fn markdown(&self) -> String {
        let text = |label: &Option<String>| label.clone().unwrap_or_default();
        let rows: Vec<[String; 11]> = self
            .rows
            .iter()
            .map(|row| {
                [
                    row.task.clone(),
                    row.metric.clone(),
                    row.filter.clone(),
                    row.variants.len().to_string(),
                    number(row.min),
                    number(row.max),
                    number(row.mean),
                    number(row.deviation),
                    row.range_in_stderr.map_or_else(String::new, |range| format!("{range:.1}")),
                    text(&row.best),
                    text(&row.worst),
                ]
            })
            .collect();
        let headers =
            ["Task", "Metric", "Filter", "Variants", "Min", "Max", "Mean", "SD", "Range/SE", "Best", "Worst"];
        let each: Vec<[String; 6]> = self
            .rows
            .iter()
            .flat_map(|row| {
                row.variants.iter().map(|variant| {
                    [
                        variant.label.clone(),
                        variant.shots.map_or_else(String::new, |shots| shots.to_string()),
                        row.metric.clone(),
                        row.filter.clone(),
                        number(variant.value),
                        variant.stderr.map_or_else(|| "N/A".to_owned(), number),
                    ]
                })
            })
            .collect();
        let mut out = markdown_table(&headers, &rows);
        out += "\n";
        out += &markdown_table(&["Variant", "n-shot", "Metric", "Filter", "Value", "Stderr"], &each);
        if !self.notes.is_empty() {
            out += "\n";
            out.extend(self.notes.iter().map(|note| format!("- {note}\n")));
        }
        out
    }

    /// The same as JSON.
    pub fn to_json(&self) -> String {
        crate::compare::json(self)
    }
}
