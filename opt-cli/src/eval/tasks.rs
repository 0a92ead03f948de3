//! Runs tasks, once or in variants.

use super::{
    Eval,
    results::{self, Compared},
};
use crate::{model, out::Failure, progress::Console};
use opt_core::{ErrorKind, Opt, Progress, checkpoint::Checkpoint};
use opt_eval::{EvalOptions, Evaluation, Prepared, Selection};
use std::{
    num::NonZeroUsize,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// One way of asking.
struct Variant {
    label: String,
    options: EvalOptions,
    selection: Selection,
}

impl Eval {
    pub(super) fn evaluate(&self, selection: &Selection, console: &Console) -> Result<(), Failure> {
        let data = self
            .data
            .as_deref()
            .ok_or_else(|| Failure::usage("expected --data, the folder of the tasks' rows"))?;
        for (flag, file) in [("--output", &self.output), ("--plot", &self.plot)] {
            if let Some(file) = file.as_ref().filter(|file| file.is_dir()) {
                return Err(Failure::usage(format!(
                    "{flag}: expected a file, found the folder {}",
                    file.display()
                )));
            }
        }
        if let Some(file) = self.plot.as_ref().filter(|file| file.extension().is_none_or(|e| e != "svg")) {
            return Err(Failure::usage(format!(
                "--plot: expected a name that ends in .svg, found {}",
                file.display()
            )));
        }
        let place = model::find(self.run.model.place.model.as_deref(), console)?;
        let variants = self.variants(selection, &place, console)?;
        // What cannot be read is told before a model is loaded.
        let prepared: Vec<Prepared> = variants
            .iter()
            .map(|variant| Prepared::load(&variant.selection, data, &variant.options))
            .collect::<opt_core::Result<_>>()?;
        let compared = self.compare.as_deref().map(|name| {
            let checkpoint = Checkpoint::open(&place)?;
            Compared::named(name, &place.display().to_string(), checkpoint.config())
        });
        let compared = compared.transpose()?;
        console.catch_interrupts();
        let opt = self.run.model.load(console)?;
        let mut done = Vec::new();
        for (variant, prepared) in variants.into_iter().zip(prepared) {
            let found = self.run_one(&opt, &variant, &prepared, console)?;
            done.push((variant.label, found, variant.options.journal));
        }
        match &mut done[..] {
            [(_, found, _)] => results::finish(self, found, compared.as_ref(), console)?,
            several => results::spread(self, several)?,
        }
        for journal in done.into_iter().filter_map(|(.., journal)| journal) {
            // All is written; if a journal cannot be removed it only stays.
            let _ = std::fs::remove_file(journal);
        }
        Ok(())
    }

    /// What is to be run: one variant, or one for each combination of what is varied.
    fn variants(
        &self,
        selection: &Selection,
        place: &Path,
        console: &Console,
    ) -> Result<Vec<Variant>, Failure> {
        let mut options = EvalOptions::default();
        options.task.num_fewshot = self.num_fewshot;
        options.task.fewshot_seed = self.fewshot_seed;
        options.task.first_n = self.fewshot_first;
        options.task.limit = self.limit.map(NonZeroUsize::get);
        options.max_gen_toks = self.max_gen_toks.map(NonZeroUsize::get);
        options.bos = self.bos_rule();
        options.share = !self.no_share;
        options.bootstrap_iters = self.bootstrap_iters;
        // A comparison pairs the values of rows.
        options.keep_samples = self.log_samples || self.compare.is_some();
        options.resume = self.resume;
        options.cancel = console.cancel.clone();
        options.model_name = place.display().to_string();
        options.weights_mark = mark(place);
        options.cache = self.run.kv_dtype.into();
        options.seed = self.run.seed.unwrap_or(0);
        let phrasings: Vec<(Option<&str>, Selection)> = if self.phrasings {
            let of = |task: &opt_eval::TaskSpec| {
                let mut one = Selection::default();
                one.tasks.push(task.clone());
                one
            };
            selection.tasks.iter().map(|task| (Some(&task.name[..]), of(task))).collect()
        } else {
            vec![(None, selection.clone())]
        };
        let [shots, seeds, orders] =
            [&self.vary_shots, &self.vary_seeds, &self.vary_orders].map(|varied| -> Vec<Option<u64>> {
                if varied.is_empty() { vec![None] } else { varied.iter().copied().map(Some).collect() }
            });
        let mut variants: Vec<Variant> = Vec::new();
        for (phrasing, selection) in &phrasings {
            for ((shots, seed), order) in shots
                .iter()
                .flat_map(|a| seeds.iter().map(move |b| (a, b)))
                .flat_map(|ab| orders.iter().map(move |c| (ab, c)))
            {
                let mut options = options.clone();
                options.task.num_fewshot = shots.map(|shots| shots as usize).or(options.task.num_fewshot);
                options.task.fewshot_seed = seed.unwrap_or(options.task.fewshot_seed);
                options.task.fewshot_order = *order;
                let parts = [
                    phrasing.map(str::to_owned),
                    shots.map(|shots| format!("{shots}-shot")),
                    seed.map(|seed| format!("seed {seed}")),
                    order.map(|order| format!("order {order}")),
                ];
                let label = parts.into_iter().flatten().collect::<Vec<_>>().join(", ");
                if variants.iter().any(|other| other.label == label) {
                    return Err(Failure::usage(format!("a variant twice: {label}")));
                }
                options.journal = self.output.as_deref().map(|output| journal(output, &label));
                variants.push(Variant { label, options, selection: selection.clone() });
            }
        }
        let varied = !self.vary_seeds.is_empty() || !self.vary_orders.is_empty();
        let no_examples = |variant: &Variant| {
            variant
                .selection
                .tasks
                .iter()
                .all(|task| variant.options.task.num_fewshot.unwrap_or(task.num_fewshot) == 0)
        };
        if varied && variants.iter().all(no_examples) {
            return Err(Failure::usage(
                "--vary-seeds and --vary-orders are of examples: expected --num-fewshot or --vary-shots",
            ));
        }
        if !self.vary_seeds.is_empty() && self.fewshot_first {
            return Err(Failure::usage("--vary-seeds draws examples, --fewshot-first takes the first ones"));
        }
        if variants.len() > 1 && (self.compare.is_some() || self.plot.is_some() || self.log_samples) {
            return Err(Failure::usage(
                "--compare, --plot and --log-samples are for one evaluation, not for variants of it",
            ));
        }
        if self.phrasings && phrasings.len() < 2 {
            return Err(Failure::usage("--phrasings: expected at least two tasks, found one"));
        }
        Ok(variants)
    }

    fn run_one(
        &self,
        opt: &Opt,
        variant: &Variant,
        prepared: &Prepared,
        console: &Console,
    ) -> Result<Evaluation, Failure> {
        let bar = console.steps("evaluating");
        let begun = Instant::now();
        let mut show = |at: Progress<'_>| -> ControlFlow<()> {
            let label = if variant.label.is_empty() { at.item } else { &variant.label };
            bar.at(at.done, at.total, &format!("{label} {}", left(begun.elapsed(), at.done, at.total)));
            ControlFlow::Continue(())
        };
        let done = prepared.run(opt, &variant.options, &mut show);
        bar.hide();
        if let (Err(error), Some(output)) = (&done, &self.output)
            && error.kind() == ErrorKind::Cancelled
        {
            console.say(&format!(
                "what was answered is kept: --resume with --output {} goes on",
                output.display()
            ));
        }
        Ok(done?)
    }
}

/// Sizes and dates of a model's weights.
fn mark(place: &Path) -> String {
    let files = if place.is_dir() {
        let entries = std::fs::read_dir(place).into_iter().flatten().flatten().map(|entry| entry.path());
        let weights = |path: &PathBuf| {
            path.extension()
                .and_then(|e| e.to_str())
                .is_some_and(|e| ["safetensors", "bin", "msgpack"].contains(&e))
        };
        let mut files: Vec<PathBuf> = entries.filter(weights).collect();
        files.sort();
        files
    } else {
        vec![place.to_owned()]
    };
    let of = |file: &PathBuf| {
        let about = std::fs::metadata(file).ok()?;
        let since = about.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
        Some(format!("{}@{}", about.len(), since.as_secs()))
    };
    files.iter().filter_map(of).collect::<Vec<_>>().join(",")
}

/// Where answers are written down while an evaluation runs.
fn journal(output: &Path, label: &str) -> PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_owned();
    if !label.is_empty() {
        let plain: String = label.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        name.push(format!(".{plain}"));
    }
    name.push(".journal");
    output.with_file_name(name)
}

/// What is left of the time, if it goes on as it did.
fn left(elapsed: Duration, done: u64, total: u64) -> String {
    if done == 0 {
        return String::new();
    }
    let seconds = (elapsed.as_secs_f64() * total.saturating_sub(done) as f64 / done as f64) as u64;
    match (seconds / 3600, seconds / 60 % 60) {
        (0, 0) => format!("{seconds} s left"),
        (0, minutes) => format!("{minutes}:{:02} left", seconds % 60),
        (hours, minutes) => format!("{hours} h {minutes} min left"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_in_its_units() {
        let left = |done| left(Duration::from_secs(100), done, 1000);
        assert_eq!(left(0), "");
        assert_eq!(left(999), "0 s left");
        assert_eq!(left(500), "1:40 left");
        assert_eq!(left(5), "5 h 31 min left");
    }
}
