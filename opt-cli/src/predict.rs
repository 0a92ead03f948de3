//! `opt predict`.

use crate::{
    args::{ModelArgs, ShowArgs},
    model,
    out::{Failure, Out},
    progress::Console,
};
use clap::Args;
use opt_core::{
    Load,
    adapter::Adapter,
    checkpoint::Checkpoint,
    heads::{AnswerOptions, Head, QuestionAnswerer, SequenceClassifier, Task},
};
use serde_json::json;

const HELP: &str = "\
Examples:
  opt predict --adapter classifier \"A fine book.\" \"I could not finish it.\"
  opt predict --model opt-sentiment --json \"A fine book.\"
  opt predict --adapter answers --context \"$(cat chapter.txt)\" \"Who came in?\"

The head is that of the model, or the one that `opt tune --task` trained
beside the adapter. Printed is for each text a line for each class or number,
likeliest first: the probability (or the number), a tab and the name; for
questions the answers and their probabilities.";

/// Tell the class of texts, numbers about them, or where in a text an answer stands, with a model that has a head.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Predict {
    /// The texts; for a head for answers, the questions.
    #[arg(value_name = "TEXT", required = true)]
    texts: Vec<String>,
    /// For a head for answers: the text to look in.
    #[arg(long, value_name = "TEXT", help_heading = "Input")]
    context: Option<String>,
    /// Print so many answers, or classes. [default: 1 answer, all classes]
    #[arg(long, value_name = "N", help_heading = "Output")]
    top_k: Option<usize>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    show: ShowArgs,
}

impl Predict {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let console = Console::new(self.show);
        let backend = self.model.place.choose()?;
        let path = model::find(self.model.place.model.as_deref(), &console)?;
        let checkpoint = Checkpoint::open(&path)?;
        let head = match &self.model.adapter {
            Some(adapter) => Some(Head::beside(&Adapter::open(adapter)?, adapter, &checkpoint)?),
            None => Head::of(&checkpoint)?,
        };
        let Some(head) = head else {
            return Err(Failure::failed(format!(
                "{}: expected a model with a head, or --adapter naming one that was tuned with --task",
                path.display()
            )));
        };
        console.catch_interrupts();
        let mut load = Load::with(backend).dtype(self.model.dtype.into()).cancel(console.cancel.clone());
        if let Some(format) = self.model.quantize {
            load = load.quantize(format.spec());
        }
        let adapter = self.model.adapter.as_deref();
        match (head.task(), &self.context) {
            (Task::Answer, Some(context)) => {
                let model = match adapter {
                    Some(adapter) => QuestionAnswerer::adapted(&path, adapter, load)?,
                    None => QuestionAnswerer::load(&path, load)?,
                };
                self.answer(&model, context)
            }
            (Task::Answer, None) => {
                Err(Failure::usage("expected --context, the text to look for answers in"))
            }
            (_, Some(_)) => {
                Err(Failure::usage("--context belongs to a head for answers; this one is for classes"))
            }
            (_, None) => {
                let model = match adapter {
                    Some(adapter) => SequenceClassifier::adapted(&path, adapter, load)?,
                    None => SequenceClassifier::load(&path, load)?,
                };
                self.classify(&model)
            }
        }
    }

    fn classify(&self, model: &SequenceClassifier) -> Result<(), Failure> {
        let mut out = Out::new();
        for text in &self.texts {
            let mut found = model.classify(text)?;
            found.truncate(self.top_k.unwrap_or(found.len()));
            if self.show.json {
                let found: Vec<_> =
                    found.iter().map(|p| json!({ "label": p.label, "score": p.score })).collect();
                out.json(&json!({ "text": text, "predictions": found }))?;
                continue;
            }
            for prediction in found {
                out.line(&format!("{:.4}\t{}", prediction.score, prediction.label))?;
            }
        }
        Ok(())
    }

    fn answer(&self, model: &QuestionAnswerer, context: &str) -> Result<(), Failure> {
        let options = AnswerOptions::default().top_k(self.top_k.unwrap_or(1));
        let mut out = Out::new();
        for question in &self.texts {
            let found = model.answer(question, context, options)?;
            if self.show.json {
                let found: Vec<_> = found
                    .iter()
                    .map(|a| json!({ "text": a.text, "start": a.bytes.start, "end": a.bytes.end, "score": a.score }))
                    .collect();
                out.json(&json!({ "question": question, "answers": found }))?;
                continue;
            }
            for answer in found {
                out.line(&format!("{:.4}\t{}", answer.score, answer.text))?;
            }
        }
        Ok(())
    }
}
