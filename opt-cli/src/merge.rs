//! `opt merge`.

use crate::{
    args::ShowArgs,
    model,
    out::{Failure, Out, bytes},
    progress::Console,
};
use clap::Args;
use opt_core::{
    adapter::{Adapter, MergeOptions, merge},
    checkpoint::Checkpoint,
};
use serde_json::json;
use std::path::PathBuf;

const HELP: &str = "\
Examples:
  opt merge --model opt-125m --adapter my-lora --output opt-125m-mine

The output is a directory in Hugging Face layout that runs without the adapter,
here and in transformers. Numbers have the format they have in the model. A
prefix or a prompt cannot be merged, nor can anything into quantized weights.";

/// Write the model that a model and a LoRA adapter are together.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Merge {
    /// The model: a directory in Hugging Face layout, a weights file beside its config.json, or a hub id (in builds
    /// with the feature `hub`). [default: $OPT_MODEL, then models/opt-novels]
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// The adapter: a directory that PEFT saved.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Where to write the merged model; must not exist.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    show: ShowArgs,
}

impl Merge {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let console = Console::new(self.show);
        let adapter = Adapter::open(&self.adapter)?;
        console.catch_interrupts();
        let checkpoint = Checkpoint::open(model::find(self.model.as_deref(), &console)?)?;
        let bar = console.byte_bar("merging");
        let options = MergeOptions::default().cancel(console.cancel.clone()).progress(|at| bar.show(at));
        let done = merge(&checkpoint, &adapter, &self.output, options)?;
        drop(bar);
        done.warnings.iter().for_each(|warning| console.warn(&warning.to_string()));
        let mut out = Out::new();
        if self.show.json {
            return out.json(&json!({ "files": done.files, "bytes": done.bytes, "tensors": done.tensors }));
        }
        console.say(&format!("{} tensors, {}", done.tensors, bytes(done.bytes)));
        done.files.iter().try_for_each(|file| out.line(&file.display().to_string()))
    }
}
