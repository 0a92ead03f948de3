//! `opt generate`.

use crate::{
    args::{BosArgs, RunArgs},
    out::{Failure, Out},
    progress::{Console, duration},
    prompts::{self, Line, short},
    settings::Settings,
};
use clap::Args;
use opt_core::{
    Generated, GeneratedSequence, Opt, Prompt, Request, StreamToken, TokenStream,
    generation::{Alternative, FinishReason},
};
use serde::Serialize;
use serde_json::Value;
use std::{
    collections::HashMap,
    io::{self, IsTerminal},
    path::PathBuf,
    time::{Duration, Instant},
};

const HELP: &str = "\
Examples:
  opt generate \"The old house stood\" --max-new-tokens 100
  opt generate --do-sample --top-p 0.9 --seed 7 \"The old house stood\"
  opt generate --num-beams 4 --no-repeat-ngram-size 3 \"The old house stood\"
  opt generate --prompts prompts.jsonl --json > continued.jsonl
  echo \"The old house stood\" | opt generate

A line of --prompts is a JSON string, {\"prompt\": \"...\"} or {\"ids\": [...]};
ids are used exactly as given. With --json there is one line for each prompt:
  {\"prompt_ids\": [...], \"sequences\": [{\"ids\": [...], \"text\": \"...\",
   \"logprobs\": [...], \"score\": null, \"finish_reason\": \"length\"}]}
- logprobs are of the model's own distribution, before temperature and other
  settings; score is a beam's; finish_reason is eos, length or stop.
- text is null for a model without tokenizer.
- --top-alternatives adds \"alternatives\", for each token a list of
  {\"id\", \"text\", \"logprob\"}, the most probable first.
- --stream puts a line before for each token when it is made:
  {\"prompt\": 0, \"sequence\": 0, \"id\": 5, \"text\": \"...\", \"logprob\": -1.5}

Settings that only matter for sampling do nothing without --do-sample, and a
warning says so.";

/// Continue prompts.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Generate {
    /// Texts to continue, as one batch; without any, the text on stdin.
    #[arg(value_name = "PROMPT", conflicts_with = "prompts")]
    texts: Vec<String>,
    /// Continue the prompts in this file of JSON lines, as one batch; - is stdin.
    #[arg(long, value_name = "FILE.jsonl", help_heading = "Input")]
    prompts: Option<PathBuf>,
    #[command(flatten)]
    bos: BosArgs,
    #[command(flatten)]
    settings: Settings,
    /// Faster, same result: let this smaller model with the same tokenizer guess ahead.
    #[arg(long, value_name = "DIR", help_heading = "Other ways of generating")]
    assistant_model: Option<PathBuf>,
    /// Also report the K most probable tokens at each place (with --json).
    #[arg(long, value_name = "K", default_value_t = 0, help_heading = "Output")]
    top_alternatives: usize,
    /// Print each token when it is made. Text is printed so anyway; with --json this adds a line for each token.
    #[arg(long, help_heading = "Output")]
    stream: bool,
    #[command(flatten)]
    run: RunArgs,
}

impl Generate {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let show = self.run.show;
        let console = Console::new(show);
        let prompts = self.read_prompts()?;
        let config = self.settings.config(self.run.seed)?;
        console.catch_interrupts();

        let opt = self.run.model.load(&console)?;
        let assistant = match &self.assistant_model {
            Some(path) => Some(self.run.model.load_from(Some(path), &console)?),
            None => None,
        };
        let config = self.settings.texts(&opt, config)?;
        let constraint = self.settings.constraint(&opt)?;
        let returns = config.clone().over(opt.generation_config()).num_return_sequences.unwrap_or(1);
        let shown: Vec<String> =
            prompts.iter().map(|prompt| as_text(&opt, prompt)).collect::<Result<_, _>>()?;
        let requests = prompts.into_iter().map(|prompt| {
            let mut request = Request::new(prompt)
                .config(config.clone())
                .bos(self.bos.rule())
                .overflow(self.run.truncate.into())
                .top_alternatives(self.top_alternatives)
                .cache_dtype(self.run.kv_dtype.into())
                .cancel(console.cancel.clone());
            request.assistant = assistant.clone();
            if let Some(constraint) = &constraint {
                request = request.constrain(constraint);
            }
            request
        });
        let mut clock = Clock::start();
        let mut stream = opt.stream_batch(requests)?;
        let mut told: Vec<&str> = stream.warnings().collect();
        told.dedup();
        told.iter().enumerate().filter(|(i, w)| !told[..*i].contains(*w)).for_each(|(_, w)| console.warn(w));

        let mut out = Out::new();
        let mut prose = (!show.json).then(|| Prose::new(shown, returns, opt.tokenizer().is_some()));
        let result = self.print_tokens(&mut stream, &mut out, prose.as_mut(), &mut clock, &console);
        if let Some(prose) = &mut prose {
            prose.close(&mut out)?;
        }
        result?;
        let all = stream.collect_all()?;
        if show.json {
            all.iter().try_for_each(|generated| out.json(&Printed::new(&opt, generated)?))?;
        }
        console.say(&clock.summary(&all, config.over(opt.generation_config()).do_sample == Some(true)));
        Ok(())
    }

    fn read_prompts(&self) -> Result<Vec<Prompt>, Failure> {
        if let Some(path) = &self.prompts {
            return prompts::json_lines(path)?.iter().map(prompt).collect();
        }
        if !self.texts.is_empty() {
            return Ok(self.texts.iter().map(Prompt::from).collect());
        }
        if io::stdin().is_terminal() {
            return Err(Failure::usage("no prompt: expected PROMPT, --prompts FILE.jsonl or text on stdin"));
        }
        Ok(vec![Prompt::from(prompts::stdin_text()?)])
    }

    /// Prints tokens as they are made, in the form that was asked for.
    fn print_tokens(
        &self,
        stream: &mut TokenStream,
        out: &mut Out,
        mut prose: Option<&mut Prose>,
        clock: &mut Clock,
        console: &Console,
    ) -> Result<(), Failure> {
        let prefill = console.bar("reading the prompt");
        // Tokens on the screen are progress enough.
        let on_screen = out.is_terminal() && (prose.is_some() || self.stream);
        let count = (!on_screen).then(|| console.counter("generating"));
        while let Some(token) = stream.next_watched(&mut |at| prefill.show(at)) {
            let token = token?;
            prefill.hide();
            clock.tick();
            if let Some(count) = &count {
                count.tick();
            }
            match &mut prose {
                Some(prose) => prose.take(token, out)?,
                None if self.stream => out.json(&PrintedToken::from(&token))?,
                None => {}
            }
        }
        Ok(())
    }
}

/// The prompt that a line of `--prompts` holds.
fn prompt(line: &Line) -> Result<Prompt, Failure> {
    let expected = "expected a string, {\"prompt\": \"...\"} or {\"ids\": [...]}";
    match &line.value {
        Value::String(text) => Ok(Prompt::from(text)),
        Value::Object(map) => match (line.text(map, "prompt")?, line.ids(map)?) {
            (Some(text), None) => Ok(Prompt::from(text)),
            (None, Some(ids)) => Ok(Prompt::from(ids)),
            (Some(_), Some(_)) => Err(line.fail(format_args!("{expected}, found both prompt and ids"))),
            (None, None) => Err(line.fail(format_args!("{expected}, found neither prompt nor ids"))),
        },
        other => Err(line.fail(format_args!("{expected}, found {}", short(other)))),
    }
}

/// A prompt as people read it.
fn as_text(opt: &Opt, prompt: &Prompt) -> Result<String, Failure> {
    Ok(match (prompt, opt.tokenizer()) {
        (Prompt::Text(text), _) => text.clone(),
        (Prompt::Ids(ids), Some(tokenizer)) => tokenizer.decode(ids, true)?,
        (Prompt::Ids(ids), None) => ids.iter().map(|id| format!("{id} ")).collect(),
        _ => String::new(),
    })
}

/// Prints sequences as text, one after the other: the one whose turn it is as it grows, later ones when it has ended.
struct Prose {
    prompts: Vec<String>,
    /// Sequences of each prompt.
    returns: usize,
    has_text: bool,
    /// Prompt and sequence whose turn it is.
    turn: (usize, usize),
    /// Whether its beginning is printed.
    begun: bool,
    waiting: HashMap<(usize, usize), Vec<StreamToken>>,
}

impl Prose {
    fn new(prompts: Vec<String>, returns: usize, has_text: bool) -> Self {
        Self {
            prompts,
            returns: returns.max(1),
            has_text,
            turn: (0, 0),
            begun: false,
            waiting: HashMap::new(),
        }
    }

    fn take(&mut self, token: StreamToken, out: &mut Out) -> Result<(), Failure> {
        self.waiting.entry((token.request, token.sequence)).or_default().push(token);
        while let Some(tokens) = self.waiting.remove(&self.turn) {
            let ended = tokens.iter().any(|token| token.finish.is_some());
            let mut text = if self.begun { String::new() } else { self.head() };
            self.begun = true;
            for token in &tokens {
                match self.has_text {
                    true => text.push_str(&token.text),
                    false => text.push_str(&format!("{} ", token.id)),
                }
            }
            out.text(&text)?;
            if !ended {
                break;
            }
            self.close(out)?;
            self.turn.1 += 1;
            if self.turn.1 == self.returns {
                self.turn = (self.turn.0 + 1, 0);
            }
        }
        Ok(())
    }

    /// What stands before a continuation: its prompt, and its name where there are several.
    fn head(&self) -> String {
        let (prompt, sequence) = self.turn;
        let text = self.prompts.get(prompt).map_or("", String::as_str);
        match (self.prompts.len(), self.returns) {
            (..=1, ..=1) => text.to_owned(),
            (_, ..=1) => format!("=== prompt {} ===\n{text}", prompt + 1),
            _ => format!("=== prompt {}, sequence {} ===\n{text}", prompt + 1, sequence + 1),
        }
    }

    /// Ends the line of a sequence of which something is printed.
    fn close(&mut self, out: &mut Out) -> Result<(), Failure> {
        if std::mem::take(&mut self.begun) { out.text("\n") } else { Ok(()) }
    }
}

/// A prompt's line of JSON.
#[derive(Serialize)]
struct Printed<'a> {
    prompt_ids: &'a [u32],
    sequences: Vec<PrintedSequence<'a>>,
}

#[derive(Serialize)]
struct PrintedSequence<'a> {
    ids: &'a [u32],
    text: Option<&'a str>,
    logprobs: &'a [f32],
    score: Option<f32>,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    alternatives: Option<Vec<Vec<PrintedAlternative>>>,
}

#[derive(Serialize)]
struct PrintedAlternative {
    id: u32,
    text: Option<String>,
    logprob: f32,
}

/// A token's line of JSON.
#[derive(Serialize)]
struct PrintedToken<'a> {
    prompt: usize,
    sequence: usize,
    id: u32,
    text: &'a str,
    logprob: f32,
}

impl<'a> From<&'a StreamToken> for PrintedToken<'a> {
    fn from(token: &'a StreamToken) -> Self {
        let &StreamToken { request, sequence, id, log_prob, .. } = token;
        Self { prompt: request, sequence, id, text: &token.text, logprob: log_prob }
    }
}

impl<'a> Printed<'a> {
    fn new(opt: &Opt, generated: &'a Generated) -> Result<Self, Failure> {
        let sequences = generated.sequences.iter().map(|sequence| PrintedSequence::new(opt, sequence));
        Ok(Self { prompt_ids: &generated.prompt_ids, sequences: sequences.collect::<Result<_, _>>()? })
    }
}

impl<'a> PrintedSequence<'a> {
    fn new(opt: &Opt, sequence: &'a GeneratedSequence) -> Result<Self, Failure> {
        let alternative = |one: &Alternative| {
            let text = opt.tokenizer().map(|tokenizer| tokenizer.decode(&[one.id], false)).transpose()?;
            Ok::<_, Failure>(PrintedAlternative { id: one.id, text, logprob: one.log_prob })
        };
        let place = |place: &Vec<Alternative>| place.iter().map(alternative).collect();
        let alternatives = match &sequence.alternatives[..] {
            [] => None,
            places => Some(places.iter().map(place).collect::<Result<_, _>>()?),
        };
        let finish_reason = match sequence.finish {
            FinishReason::Eos => "eos",
            FinishReason::Stop => "stop",
            _ => "length",
        };
        Ok(Self {
            ids: &sequence.ids,
            text: sequence.text.as_deref(),
            logprobs: &sequence.log_probs,
            score: sequence.score,
            finish_reason,
            alternatives,
        })
    }
}

/// Measures a run.
struct Clock {
    started: Instant,
    first: Option<Duration>,
}

impl Clock {
    fn start() -> Self {
        Self { started: Instant::now(), first: None }
    }

    fn tick(&mut self) {
        self.first.get_or_insert_with(|| self.started.elapsed());
    }

    /// Tokens, tokens/s, time to first token; and the seed where there were draws.
    fn summary(&self, all: &[Generated], sampled: bool) -> String {
        let time = self.started.elapsed();
        let tokens: usize =
            all.iter().flat_map(|one| &one.sequences).map(|sequence| sequence.ids.len()).sum();
        let rate = tokens as f64 / time.as_secs_f64().max(1e-9);
        let mut line = format!("{tokens} tokens in {}, {rate:.1} tokens/s", duration(time));
        if let Some(first) = self.first {
            line.push_str(&format!(", first token after {}", duration(first)));
        }
        if let Some(one) = all.first().filter(|_| sampled) {
            line.push_str(&format!(", seed {}", one.seed));
        }
        line
    }
}
