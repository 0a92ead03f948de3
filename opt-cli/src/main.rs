//! The `opt` command. Results go to stdout, everything else to stderr.

mod args;
mod backends;
mod bench;
mod convert;
mod distill;
mod embed;
mod eval;
mod generate;
mod inspect;
mod merge;
mod model;
mod out;
mod plot;
mod predict;
mod progress;
mod prompts;
mod quantize;
mod score;
mod serve;
mod settings;
mod training;
mod tune;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Run OPT language models: continue texts, score them, convert and measure models.
#[derive(Debug, Parser)]
#[command(name = "opt", version, after_help = HELP, arg_required_else_help = true, allow_negative_numbers = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const HELP: &str = "\
Examples:
  opt generate \"The old house stood\"
  opt generate --do-sample --top-p 0.9 --seed 7 \"Once upon a time\"
  opt generate --model opt-125m --num-beams 4 \"Today is a beautiful day\"
  opt score --input lines.jsonl
  opt embed --input lines.txt --output vectors.npy
  opt eval --tasks lambada_openai --data DIR
  opt serve --model opt-125m --port 8080
  opt convert pytorch_model.bin model.safetensors
  opt quantize opt-125m --format int8 --output opt-125m-int8

Models:
  --model names one; without it $OPT_MODEL, then models/opt-novels here or
  beside the executable.
Output:
  Results go to stdout; progress, warnings and errors to stderr. $RUST_LOG
  asks for a log there as well.
Exit codes:
  0 done, 1 the work failed, 2 wrong usage (also an option's value out of
  range, and options that contradict each other), 130 ended by Ctrl-C. A
  reader that closes the pipe early is no failure.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Continue prompts.
    Generate(Box<generate::Generate>),
    /// Tell how probable a model finds given texts or tokens.
    Score(score::Score),
    /// Make vectors of texts.
    Embed(Box<embed::Embed>),
    /// Evaluate a model on tasks, or measure its perplexity.
    Eval(Box<eval::Eval>),
    /// Tell classes, numbers or answers, with a model that has a head.
    Predict(predict::Predict),
    /// Write a model in another file format, number format or number of files.
    Convert(convert::Convert),
    /// Write a model with its weights in few bits, and measure what that costs in accuracy.
    Quantize(Box<quantize::Quantize>),
    /// Adapt a model to texts: its weights, or an adapter beside them.
    Tune(Box<tune::Tune>),
    /// Let a smaller model learn from a larger one.
    Distill(Box<distill::Distill>),
    /// Write the model that a model and a LoRA adapter are together.
    Merge(merge::Merge),
    /// Serve a model over HTTP, by an API like OpenAI's.
    Serve(Box<serve::Serve>),
    /// Say what is in a model and what running it takes, without loading it.
    Inspect(inspect::Inspect),
    /// List the backends of this build and what they found on this machine.
    Backends(backends::Backends),
    /// Measure loading, prefill and decoding.
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    quiet_drivers();
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing_subscriber::filter::LevelFilter::OFF.into())
        .from_env_lossy();
    // Fails only where a subscriber is set already, and nobody else does.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
    let done = match cli.command {
        Command::Generate(generate) => generate.run(),
        Command::Score(score) => score.run(),
        Command::Embed(embed) => embed.run(),
        Command::Eval(eval) => eval.run(),
        Command::Predict(predict) => predict.run(),
        Command::Convert(convert) => convert.run(),
        Command::Quantize(quantize) => quantize.run(),
        Command::Tune(tune) => tune.run(),
        Command::Distill(distill) => distill.run(),
        Command::Merge(merge) => merge.run(),
        Command::Serve(serve) => serve.run(),
        Command::Inspect(inspect) => inspect.run(),
        Command::Backends(backends) => backends.run(),
        Command::Bench(bench) => bench.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// Keeps Mesa's layer for choosing among GPUs from looking for a desktop where there is none: it would complain on
/// stderr each time that Vulkan is started.
fn quiet_drivers() {
    if cfg!(all(feature = "wgpu", target_os = "linux")) && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: this is the only thread yet, so that nobody reads the environment meanwhile.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
}
