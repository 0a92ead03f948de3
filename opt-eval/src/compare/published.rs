//! A run beside what others published of the same model.

use super::{json, maybe, reasons, signed};
use crate::{
    Error, ErrorKind, Result,
    published::{self, Published, Size},
    report::{Bos, Report, markdown_table, number},
};
use serde::Serialize;

/// What the difference of a score from a published one says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Verdict {
    /// At most two standard errors apart.
    Within,
    /// More than two standard errors above.
    Above,
    /// More than two standard errors below.
    Below,
    /// Neither has a standard error.
    Unknown,
    /// The two do not measure the same; the reasons say why.
    NotComparable,
}

impl Verdict {
    fn words(self) -> &'static str {
        match self {
            Self::Within => "within 2 SE",
            Self::Above => "above",
            Self::Below => "below",
            Self::Unknown => "no SE",
            Self::NotComparable => "not comparable",
        }
    }
}

/// A score beside a published one.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PublishedRow {
    /// The task.
    pub task: String,
    /// The metric.
    pub metric: String,
    /// The filter of the run's score.
    pub filter: String,
    /// The run's value.
    pub ours: f64,
    /// Its standard error.
    pub ours_stderr: Option<f64>,
    /// Examples before each question, in the run.
    pub ours_shots: Option<u64>,
    /// The published score.
    pub theirs: Published,
    /// Ours less theirs.
    pub difference: f64,
    /// The difference's standard error, √(s₁² + s₂²); where one of them is not known, the other alone.
    pub stderr: Option<f64>,
    /// Difference over standard error.
    pub z: Option<f64>,
    /// What that says.
    pub verdict: Verdict,
    /// Why the scores are not comparable, a line each.
    pub reasons: Vec<String>,
    /// What else a reader should know, a line each.
    pub notes: Vec<String>,
}

/// A run beside published scores of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PublishedComparison {
    /// What the run is of.
    pub title: String,
    /// The model whose scores were published.
    pub size: Size,
    /// A row for each published score that the run has too.
    pub rows: Vec<PublishedRow>,
}

/// Sets a report beside all that was published of a model.
///
/// Both measured the same documents, so the difference of two runs of one model is mostly smaller than their standard
/// errors, taken as independent here, make it look: a verdict other than [`Verdict::Within`] means that something was
/// done differently. `Above` and `Below` speak of the value, whether more of it is better or not.
///
/// # Errors
/// [`ErrorKind::NotFound`] if the report has nothing that was published of the model.
pub fn with_published(report: &Report, size: Size) -> Result<PublishedComparison> {
    let mut rows = Vec::new();
    for theirs in published::of(size) {
        let Some(scores) = report.results.get(theirs.task) else { continue };
        let ours =
            scores.metrics.iter().filter(|score| score.metric == theirs.metric && score.value.is_finite());
        for score in ours {
            let reasons = obstacles(report, &theirs);
            let difference = score.value - theirs.value;
            let (stderr, mut notes) = match (score.stderr, theirs.stderr) {
                (Some(a), Some(b)) => (Some(a.hypot(b)), Vec::new()),
                (a, b) => (a.or(b), vec![only(a.is_some(), b.is_some()).to_owned()]),
            };
            if report.bos().is_none() {
                notes.push("the report does not say whether texts began with BOS".to_owned());
            }
            let stderr = stderr.filter(|stderr| *stderr > 0.0);
            let z = stderr.map(|stderr| difference / stderr);
            let verdict = match z {
                _ if !reasons.is_empty() => Verdict::NotComparable,
                None => Verdict::Unknown,
                Some(z) if z > 2.0 => Verdict::Above,
                Some(z) if z < -2.0 => Verdict::Below,
                Some(_) => Verdict::Within,
            };
            rows.push(PublishedRow {
                task: theirs.task.to_owned(),
                metric: theirs.metric.to_owned(),
                filter: score.filter.clone(),
                ours: score.value,
                ours_stderr: score.stderr,
                ours_shots: report.shots(theirs.task),
                theirs: theirs.clone(),
                difference,
                stderr,
                z,
                verdict,
                reasons,
                notes,
            });
        }
    }
    if rows.is_empty() {
        let tasks: Vec<&str> = report.results.keys().map(String::as_str).collect();
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("nothing was published of {size} on the report's tasks: {}", tasks.join(", ")),
        ));
    }
    rows.sort_by(|a, b| (&a.task, &a.metric, &a.filter).cmp(&(&b.task, &b.metric, &b.filter)));
    Ok(PublishedComparison { title: report.title(), size, rows })
}

fn only(ours: bool, theirs: bool) -> &'static str {
    match (ours, theirs) {
        (true, _) => "theirs has no standard error: ours alone",
        (_, true) => "ours has no standard error: theirs alone",
        _ => "neither has a standard error",
    }
}

/// Why a report's score is no measurement of what was published.
fn obstacles(report: &Report, theirs: &Published) -> Vec<String> {
    let mut lines = Vec::new();
    match report.shots(theirs.task) {
        Some(shots) if shots != theirs.shots => lines.push(format!("{shots} shots, theirs {}", theirs.shots)),
        None if theirs.shots > 0 => lines.push(format!("shots unknown, theirs {}", theirs.shots)),
        _ => {}
    }
    match report.bos() {
        Some(bos) if bos != theirs.bos => lines.push(format!("texts {bos}, theirs {}", theirs.bos)),
        _ => {}
    }
    if report.limited(theirs.task) {
        lines.push("only some of the documents".to_owned());
    }
    if let Some(differs) = theirs.differs {
        lines.push(format!("theirs by {differs}"));
    }
    if theirs.macro_mean && report.groups.contains_key(theirs.task) {
        lines.push("ours counts each document alike, theirs each task".to_owned());
    }
    lines
}

impl PublishedComparison {
    /// The rows as a Markdown table, with what is not comparable and why beneath.
    pub fn markdown(&self) -> String {
        let headers = [
            "Task",
            "Metric",
            "Filter",
            "Shots",
            "Ours",
            "Theirs",
            "Difference",
            "SE",
            "z",
            "Verdict",
            "Source",
        ];
        let rows: Vec<[String; 11]> = self
            .rows
            .iter()
            .map(|row| {
                [
                    row.task.clone(),
                    row.metric.clone(),
                    row.filter.clone(),
                    row.theirs.shots.to_string(),
                    number(row.ours),
                    number(row.theirs.value),
                    signed(row.difference),
                    maybe(row.stderr, number),
                    maybe(row.z, |z| format!("{z:+.2}")),
                    row.verdict.words().to_owned(),
                    row.theirs.source.to_owned(),
                ]
            })
            .collect();
        let mut text = format!("{} beside published scores of {}\n\n", self.title, self.size);
        text += &markdown_table(&headers, &rows);
        let bos: Vec<Bos> = self.rows.iter().map(|row| row.theirs.bos).collect();
        if bos.iter().all(|bos| *bos == Bos::Without) {
            text += "\nAll published scores are of texts without BOS.\n";
        }
        let why = reasons(self.rows.iter().map(|row| (row.task.as_str(), row.reasons.as_slice())));
        if !why.is_empty() {
            text += &format!("\nNot comparable:\n\n{why}");
        }
        let notes = reasons(self.rows.iter().map(|row| (row.task.as_str(), row.notes.as_slice())));
        if !notes.is_empty() {
            text += &format!("\nNotes:\n\n{notes}");
        }
        text
    }

    /// The same as JSON.
    pub fn to_json(&self) -> String {
        json(self)
    }

    /// Whether all that is comparable lies within two standard errors.
    pub fn agrees(&self) -> bool {
        !self.rows.iter().any(|row| matches!(row.verdict, Verdict::Above | Verdict::Below))
    }
}
