//! `opt score`.

use crate::{
    args::{BosArgs, RunArgs},
    out::{Failure, Out},
    progress::Console,
    prompts::{self, Line, short},
};
use clap::Args;
use opt_core::{
    Opt, ScoreInput, Scored,
    prompt::{Overflow, fit},
};
use serde::Serialize;
use serde_json::Value;
use std::path::PathBuf;

const HELP: &str = "\
Examples:
  opt score --input lines.jsonl > scores.jsonl
  echo '{\"context\": \"He opened the\", \"continuation\": \" door\"}' |
    opt score --input -

A line of input is one of
  {\"ids\": [...]}
  {\"text\": \"...\"}
  {\"context\": \"...\", \"continuation\": \"...\"}
and for each there is one line of output, in order:
  {\"ids\": [...], \"logprobs\": [...], \"logprob\": -12.5, \"greedy\": false}
logprobs[i] is log p(ids[i + 1] | ids[..=i]) in nats; with a context, those of
the continuation's tokens only. logprob is their sum, and greedy says whether
each of them is the most probable token at its place.";

/// Tell how probable a model finds given texts or tokens.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Score {
    /// Score the lines of this file of JSON lines; - is stdin.
    #[arg(long, value_name = "FILE.jsonl", help_heading = "Input")]
    input: PathBuf,
    #[command(flatten)]
    bos: BosArgs,
    #[command(flatten)]
    run: RunArgs,
}

/// A line of output.
#[derive(Serialize)]
struct Printed<'a> {
    ids: &'a [u32],
    logprobs: &'a [f32],
    logprob: f64,
    greedy: bool,
}

impl Score {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let console = Console::new(self.run.show);
        let lines = prompts::json_lines(&self.input)?;
        let inputs: Vec<Input> = lines.iter().map(Input::of).collect::<Result<_, _>>()?;
        console.catch_interrupts();
        let opt = self.run.model.load(&console)?;
        let inputs = lines
            .iter()
            .zip(inputs)
            .map(|(line, input)| self.tokens(&opt, input).map_err(|failure| failure.at(&line.place)));
        let inputs: Vec<ScoreInput> = inputs.collect::<Result<_, _>>()?;
        let bar = console.bar("scoring");
        let scored = opt.score_with(&inputs, &console.cancel, &mut |at| bar.show(at))?;
        drop(bar);
        let mut out = Out::new();
        scored.iter().try_for_each(|scored| {
            let Scored { ids, log_probs, log_prob, greedy, .. } = scored;
            out.json(&Printed { ids, logprobs: log_probs, logprob: *log_prob, greedy: *greedy })
        })
    }

    /// The tokens to score, checked, so that a message can name their line.
    fn tokens(&self, opt: &Opt, input: Input) -> Result<ScoreInput, Failure> {
        let bos = self.bos.rule();
        let ScoreInput { ids, from } = match input {
            Input::Ids(ids) => ScoreInput::all(ids),
            Input::Text(text) => ScoreInput::all(opt.require_tokenizer()?.encode(&text, bos)?),
            Input::Pair(context, continuation) => ScoreInput::pair(opt, &context, &continuation, bos)?,
        };
        let vocab_size = opt.config().vocab_size;
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size) {
            return Err(Failure::failed(format!(
                "expected token ids below the vocabulary of {vocab_size}, found {id}"
            )));
        }
        // The last token is scored but not run.
        let limit = opt.context() + 1;
        let front = opt.tokenizer().filter(|t| t.adds_bos()).and_then(|t| t.bos_id());
        let overflow: Overflow = self.run.truncate.into();
        let fitted = fit(ids, limit, overflow, front)?;
        // Cut at the end, the rest stands where it stood.
        let before = if overflow == Overflow::TruncateRight { 0 } else { fitted.cut };
        if before >= from && from > 1 || from >= fitted.ids.len() && fitted.cut > 0 {
            return Err(Failure::failed(format!(
                "expected a continuation that fits into the context of {} tokens",
                limit - 1
            )));
        }
        Ok(ScoreInput { ids: fitted.ids, from: from.saturating_sub(before).max(1) })
    }
}

/// What a line asks about.
enum Input {
    Ids(Vec<u32>),
    Text(String),
    Pair(String, String),
}

impl Input {
    fn of(line: &Line) -> Result<Self, Failure> {
        let expected =
            r#"expected {"ids": [...]}, {"text": "..."} or {"context": "...", "continuation": "..."}"#;
        let Value::Object(map) = &line.value else {
            return Err(line.fail(format_args!("{expected}, found {}", short(&line.value))));
        };
        let (ids, text) = (line.ids(map)?, line.text(map, "text")?);
        match (ids, text, line.text(map, "context")?, line.text(map, "continuation")?) {
            (Some(ids), None, None, None) => Ok(Input::Ids(ids)),
            (None, Some(text), None, None) => Ok(Input::Text(text)),
            (None, None, Some(context), Some(continuation)) => Ok(Input::Pair(context, continuation)),
            _ => Err(line.fail(format_args!("{expected}, found {}", short(&line.value)))),
        }
    }
}
