//! Writes and prints what evaluations found.

use super::Eval;
use crate::{
    out::{Failure, Out},
    progress::Console,
};
use opt_eval::{
    Evaluation, Report, compare, plot,
    published::Size,
    samples::{SampleValues, SampleWriter},
    sensitivity,
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// What an evaluation is compared with.
pub(super) enum Compared {
    /// Published results.
    Published,
    /// Another report, and the values of its samples where there are such beside it.
    Report(Box<Report>, SampleValues, String),
}

impl Compared {
    pub(super) fn named(name: &str) -> Result<Self, Failure> {
        if name == "published" {
            return Ok(Self::Published);
        }
        let path = Path::new(name);
        let report = Report::from_file(path)?;
        let values = SampleValues::beside(path, report.results.keys().map(String::as_str))?;
        Ok(Self::Report(Box::new(report), values, name.to_owned()))
    }
}

pub(super) fn finish(
    eval: &Eval,
    found: &Evaluation,
    compared: Option<&Compared>,
    console: &Console,
) -> Result<(), Failure> {
    let report = &found.report;
    if let Some(output) = &eval.output {
        for (task, samples) in found.samples.iter().filter(|_| eval.log_samples) {
            let mut file = SampleWriter::create(samples_path(output, task))?;
            samples.iter().try_for_each(|sample| file.write(sample))?;
            file.finish()?;
        }
        report.write(output)?;
    }
    if let Some(file) = &eval.plot {
        let other = match compared {
            Some(Compared::Report(other, _, name)) => Some((&name[..], &**other)),
            _ => None,
        };
        plot::scores(file, &other.into_iter().chain([("this run", report)]).collect::<Vec<_>>())?;
    }
    let mut out = Out::new();
    if eval.run.show.json {
        out.json(report)?;
    } else {
        out.text(&report.markdown())?;
    }
    let Some((text, json)) = compared.map(|compared| comparison(compared, found)).transpose()? else {
        return Ok(());
    };
    if eval.run.show.json {
        let line: Value = serde_json::from_str(&json).map_err(|e| Failure::failed(format!("JSON: {e}")))?;
        return out.json(&line);
    }
    // The table of results ends with a line break of its own.
    drop(out);
    let _ = console;
    Out::new().text(&format!("\n{text}"))
}

/// Beside the report; with its date if that has one in its name, by which the harness' tools find them.
fn samples_path(output: &Path, task: &str) -> PathBuf {
    let stem = output.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let date = stem.strip_prefix("results_").filter(|date| date.starts_with(|c: char| c.is_ascii_digit()));
    let date = date.map(|date| format!("_{date}")).unwrap_or_default();
    output.with_file_name(format!("samples_{task}{date}.jsonl"))
}

/// A comparison as text and as JSON.
fn comparison(compared: &Compared, found: &Evaluation) -> Result<(String, String), Failure> {
    let report = &found.report;
    match compared {
        Compared::Published => {
            let size = Size::of(report).ok_or_else(|| {
                Failure::failed("--compare published: expected a model of a published size (125m to 66b), found another shape")
            })?;
            let found = compare::with_published(report, size)?;
            Ok((found.markdown(), found.to_json()))
        }
        Compared::Report(other, values, _) => {
            let mut ours = SampleValues::new();
            for (task, samples) in &found.samples {
                samples.iter().for_each(|sample| ours.add(task, sample));
            }
            let found = compare::runs(other, report, Some((values, &ours)), &compare::Options::default())?;
            Ok((found.markdown(), found.to_json()))
        }
    }
}

/// Several variants of one evaluation: their reports, and how far they lie apart.
pub(super) fn spread(eval: &Eval, variants: &[(String, Evaluation, Option<PathBuf>)]) -> Result<(), Failure> {
    let runs: Vec<(&str, &Report)> =
        variants.iter().map(|(label, found, _)| (&label[..], &found.report)).collect();
    let spread = sensitivity::spread(&runs, None)?;
    let reports: serde_json::Map<String, Value> =
        runs.iter().map(|(label, report)| ((*label).to_owned(), json!(report))).collect();
    let all = json!({ "variants": reports, "spread": spread });
    if let Some(output) = &eval.output {
        write(output, &format!("{all:#}\n"))?;
    }
    let mut out = Out::new();
    if eval.run.show.json { out.json(&all) } else { out.text(&spread.markdown()) }
}

/// Writes a file that appears under its name when it is whole.
pub(super) fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(dir)?;
        let file = tempfile::NamedTempFile::new_in(dir)?;
        fs::write(file.path(), text)?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(|e| Failure::failed(format!("{}: cannot be written: {e}", path.display())))
}
