//! Writes and prints what evaluations found.

use super::Eval;
use crate::{
    out::{Failure, Out},
    progress::Console,
};
use opt_core::config::OptConfig;
use opt_eval::{
    Evaluation, Report, compare, plot,
    published::Size,
    report::write_whole,
    samples::{self, SampleValues, SampleWriter},
    sensitivity,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// What an evaluation is compared with.
pub(super) enum Compared {
    /// Published results of a size of OPT.
    Published(Size),
    /// Another report, and the values of its samples where there are such beside it.
    Report(Box<Report>, SampleValues, String),
}

impl Compared {
    /// What `--compare` names, for a model that is not yet run.
    pub(super) fn named(name: &str, model: &str, config: &OptConfig) -> Result<Self, Failure> {
        if name == "published" {
            let size = Size::of_model(model, config.hidden_size, config.num_hidden_layers);
            return size.map(Self::Published).ok_or_else(|| {
                Failure::failed(
                    "--compare published: expected a model of a published size (125m to 66b), found another shape",
                )
            });
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
    for (task, cut) in report.opt_eval.iter().flat_map(|own| &own.truncated).filter(|(_, cut)| **cut > 0) {
        console.warn(&format!("{task}: {cut} prompts were longer than the context and lost their beginning"));
    }
    if let Some(output) = &eval.output {
        for (task, samples) in found.samples.iter().filter(|_| eval.log_samples) {
            let mut file = SampleWriter::create(samples::beside(output, task))?;
            samples.iter().try_for_each(|sample| file.write(sample))?;
            file.finish()?;
        }
        report.write(output)?;
    }
    let mut out = Out::new();
    if eval.run.show.json {
        out.json(report)?;
    } else {
        out.text(&report.markdown())?;
    }
    if let Some(file) = &eval.plot {
        let other = match compared {
            Some(Compared::Report(other, _, name)) => Some((&name[..], &**other)),
            _ => None,
        };
        plot::scores(file, &other.into_iter().chain([("this run", report)]).collect::<Vec<_>>())?;
    }
    let Some((text, json)) = compared.map(|compared| comparison(compared, found)).transpose()? else {
        return Ok(());
    };
    if eval.run.show.json {
        let line: Value = serde_json::from_str(&json).map_err(|e| Failure::failed(format!("JSON: {e}")))?;
        return out.json(&line);
    }
    out.text(&format!("\n{text}"))
}

/// A comparison as text and as JSON.
fn comparison(compared: &Compared, found: &Evaluation) -> Result<(String, String), Failure> {
    let report = &found.report;
    match compared {
        Compared::Published(size) => {
            let found = compare::with_published(report, *size)?;
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
        write_whole(output, &format!("{all:#}\n"))?;
    }
    let mut out = Out::new();
    if eval.run.show.json { out.json(&all) } else { out.text(&spread.markdown()) }
}
