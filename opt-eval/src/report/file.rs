//! Reports as files: this crate's, the harness', and those of its releases up to 0.3.

use super::{Report, Scores};
use crate::{Error, ErrorKind, Result};
use serde_json::{Map, Value};
use std::{io::Write, path::Path};

impl Report {
    /// Reads a results file: of this crate, of lm-evaluation-harness, or of its releases up to 0.3, whose keys are
    /// without filters.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] and [`ErrorKind::Io`] if it cannot be read; [`ErrorKind::Config`] if it is no results
    /// file, ends in the middle or has no scores.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|e| {
            let kind = match e.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Io,
            };
            Error::because(kind, format!("{}: cannot be read", path.display()), e)
        })?;
        Self::from_json(&text).map_err(|e| e.at(path.display()))
    }

    /// Reads the text of a results file.
    ///
    /// ```
    /// # use opt_eval::report::Report;
    /// let old = r#"{"results": {"piqa": {"acc": 0.63, "acc_stderr": 0.0113}}, "versions": {"piqa": 0},
    ///     "config": {"model_args": "pretrained=facebook/opt-125m", "num_fewshot": 0}}"#;
    /// let report = Report::from_json(old)?;
    /// assert_eq!(report.score("piqa", "acc", "none").map(|score| score.value), Some(0.63));
    /// assert_eq!(report.model_name.as_deref(), Some("facebook/opt-125m"));
    /// # Ok::<(), opt_eval::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if it is no results file, ends in the middle or has no scores.
    pub fn from_json(text: &str) -> Result<Self> {
        let bad = |message: &str| Error::new(ErrorKind::Config, message);
        let value: Value = serde_json::from_str(&without_nan(text)).map_err(|e| match e.classify() {
            serde_json::error::Category::Eof => {
                bad("an unfinished results file: its JSON ends in the middle")
            }
            _ => Error::because(ErrorKind::Config, "no results file: it is not JSON", e),
        })?;
        let Value::Object(object) = value else { return Err(bad("no results file: its JSON is no object")) };
        match object.get("results") {
            Some(Value::Object(results)) if results.is_empty() => {
                return Err(bad("a results file without results: no task was finished"));
            }
            Some(Value::Object(results)) if results.values().all(Value::is_object) => {}
            Some(_) => return Err(bad("no results file: \"results\" is no object of objects")),
            None => return Err(bad("no results file: it has no \"results\"")),
        }
        let old = is_old(&object);
        let mut report: Self = serde_json::from_value(Value::Object(object))
            .map_err(|e| Error::because(ErrorKind::Config, "no results file", e))?;
        for (name, scores) in report.results.iter_mut().chain(&mut report.groups) {
            complete(name, scores);
        }
        if report.results.values().all(|scores| scores.metrics.is_empty()) {
            return Err(bad("a results file without scores"));
        }
        if old {
            report.complete_old();
        }
        Ok(report)
    }

    /// The text of the results file.
    pub fn to_json(&self) -> String {
        // Maps with string keys and numbers always serialize.
        serde_json::to_value(self).map(|value| format!("{value:#}\n")).unwrap_or_default()
    }

    /// Writes the results file; what was there stands until the new one is complete.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        write_whole(path.as_ref(), &self.to_json())
    }

    /// The name the harness gives a results file: `results_`, the run's beginning in UTC, `.json`. Its tools find a
    /// report and the samples that belong to it by these names.
    ///
    /// ```
    /// # use opt_eval::report::{Report, RunInfo};
    /// let mut info = RunInfo::new("facebook/opt-125m");
    /// info.date = Some(951_782_400.25);
    /// let report = Report::new(info);
    /// assert_eq!(report.file_name(), "results_2000-02-29T00-00-00.250000.json");
    /// assert_eq!(report.samples_name("piqa"), "samples_piqa_2000-02-29T00-00-00.250000.jsonl");
    /// ```
    pub fn file_name(&self) -> String {
        format!("results_{}.json", timestamp(self.date.unwrap_or(0.0)))
    }

    /// The name the harness gives the file of a task's samples; what no file name can have is replaced.
    pub fn samples_name(&self, task: &str) -> String {
        let task = super::sanitized(task);
        format!("samples_{task}_{}.jsonl", timestamp(self.date.unwrap_or(0.0)))
    }

    /// What files up to 0.3 leave to be known, the shots of all tasks and the model's name, and today's name of a metric.
    /// Tasks keep theirs: where the name changed, so did the prompts.
    fn complete_old(&mut self) {
        if let Some(shots) = self.config.get("num_fewshot").filter(|shots| shots.is_u64()) {
            self.n_shot = self.results.keys().map(|task| (task.clone(), shots.clone())).collect();
        }
        if self.model_name.is_none() {
            let named = self.config.get("model_args").and_then(Value::as_str).and_then(|arguments| {
                arguments.split(',').find_map(|pair| pair.trim().strip_prefix("pretrained="))
            });
            self.model_name = named.map(str::to_owned);
        }
        for scores in self.results.values_mut() {
            for score in scores.metrics.iter_mut().filter(|score| score.metric == "ppl") {
                "perplexity".clone_into(&mut score.metric);
            }
            scores.sort();
        }
        self.other.entry("lm_eval_version").or_insert_with(|| "0.3.0".into());
    }
}

/// Files up to 0.3 have no filters in their keys, and nothing but results, versions and config.
fn is_old(object: &Map<String, Value>) -> bool {
    let keyed =
        |scores: &Value| scores.as_object().is_some_and(|map| map.keys().any(|key| key.contains(',')));
    object.get("n-shot").is_none()
        && object.get("results").and_then(Value::as_object).is_some_and(|tasks| !tasks.values().any(keyed))
}

fn complete(name: &str, scores: &mut Scores) {
    if scores.name.is_empty() {
        name.clone_into(&mut scores.name);
    }
    if scores.alias.is_empty() {
        name.clone_into(&mut scores.alias);
    }
}

/// Python writes `NaN` and `Infinity` where JSON has no word; here they become null.
pub(crate) fn without_nan(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let (mut inside, mut escaped) = (false, false);
    while let Some(c) = rest.chars().next() {
        let word = ["NaN", "Infinity", "-Infinity"].into_iter().find(|w| !inside && rest.starts_with(w));
        if let Some(after) = word.and_then(|word| rest.strip_prefix(word)) {
            out.push_str("null");
            rest = after;
            continue;
        }
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = inside,
            '"' => inside = !inside,
            _ => {}
        }
        out.push(c);
        rest = rest.get(c.len_utf8()..).unwrap_or_default();
    }
    out
}

/// Seconds since 1970 as `2000-02-29T00-00-00.250000`, in UTC. Times before 1970 are its beginning.
fn timestamp(seconds: f64) -> String {
    // Up to the year 9999; float casts saturate.
    let micros = (seconds.clamp(0.0, 253_402_300_799.0) * 1e6).round() as u64;
    let (total, micros) = (micros / 1_000_000, micros % 1_000_000);
    let (mut days, second) = (total / 86_400, total % 86_400);
    let is_leap =
        |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{:02}T{hour:02}-{minute:02}-{second:02}.{micros:06}", days + 1)
}

/// Writes a text to a file under a temporary name, then renames it. Folders on the way are made.
/// Writes a file that appears under its name when it is whole. Folders on the way are made.
///
/// # Errors
/// [`ErrorKind::Io`].
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    let fail = |e| Error::because(ErrorKind::Io, format!("{}: cannot be written", path.display()), e);
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(fail)?;
    let mut file = tempfile::Builder::new().prefix(".report").tempfile_in(folder).map_err(fail)?;
    file.write_all(text.as_bytes()).map_err(fail)?;
    file.persist(path).map_err(|e| fail(e.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    // datetime.fromtimestamp(t, timezone.utc).isoformat() with its colons replaced.
    #[test]
    fn times_are_those_of_python() {
        for (seconds, expected) in [
            (0.0, "1970-01-01T00-00-00.000000"),
            (1735787045.5, "2025-01-02T03-04-05.500000"),
            (4107542399.999999, "2100-02-28T23-59-59.999999"),
            (4107542400.0, "2100-03-01T00-00-00.000000"),
            (1704067199.0, "2023-12-31T23-59-59.000000"),
        ] {
            assert_eq!(timestamp(seconds), expected);
        }
        assert_eq!(timestamp(f64::NAN), "1970-01-01T00-00-00.000000");
        assert!(timestamp(f64::INFINITY).starts_with("9999-12-31"));
    }

    #[test]
    fn what_python_writes_for_no_number_is_none() {
        let text = r#"{"results": {"t": {"a,none": NaN, "a_stderr,none": Infinity, "b,none": 1}}, "x": "NaN \" NaN"}"#;
        let report = Report::from_json(text).expect("it reads");
        let score = report.score("t", "a", "none").expect("it is there");
        assert!(score.value.is_nan() && score.stderr.is_none());
        assert_eq!(report.other.get("x"), Some(&Value::from("NaN \" NaN")));
    }
}
