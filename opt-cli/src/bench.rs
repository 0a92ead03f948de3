//! `opt bench`.

use crate::{
    args::RunArgs,
    out::{Failure, Out},
    progress::{Bar, Console},
};
use clap::Args;
use opt_core::{
    CacheDType, Opt, Progress,
    engine::{Forward, KvCache, Sequence, Want},
};
use serde::Serialize;
use std::time::Instant;

const HELP: &str = "\
Examples:
  opt bench --model opt-125m
  opt bench --prompt-tokens 128,512 --batch 1,8 --gen-tokens 64 --json

Prefill runs one prompt of random tokens and asks for the logits of its last
row, or of every row with --all-logits. Decode runs 32 tokens a row, then
measures --gen-tokens greedy steps of all rows together; the 32 are not counted.
Each figure is the median of three runs after one to warm up. First token is
the first run after loading, of 32 tokens. Peak memory is that of the process
(VmHWM, in MiB) after loading and the runs of one row; null where the system
does not say. Backends with a device of their own also tell how many kernels
and submissions a decoded token of one row costs, and the most device memory
that was held (MiB).";

/// Tokens of each row before decoding is measured.
const DECODE_PROMPT: usize = 32;
/// Random tokens at most; further rows use the same ones again.
const MOST_IDS: usize = 1 << 20;
/// Runs of which the median is taken.
const RUNS: usize = 3;

/// Measure loading, prefill and decoding.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Bench {
    /// Measure prefill with prompts of these lengths.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "512", value_parser = at_least_one, help_heading = "Work")]
    prompt_tokens: Vec<usize>,
    /// Measure decoding over this many tokens a row.
    #[arg(long, value_name = "N", default_value = "64", value_parser = at_least_one, help_heading = "Work")]
    gen_tokens: usize,
    /// Measure decoding with these numbers of rows.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,8", value_parser = at_least_one, help_heading = "Work")]
    batch: Vec<usize>,
    /// Ask for the logits of every row of a prompt, not only of its last one.
    #[arg(long, help_heading = "Work")]
    all_logits: bool,
    #[command(flatten)]
    run: RunArgs,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a number of at least 1".to_owned())
}

/// What is printed.
#[derive(Serialize)]
struct Report {
    backend: String,
    device: String,
    weights: String,
    load_s: f64,
    first_token_s: f64,
    prefill: Vec<Prefill>,
    decode: Vec<Decode>,
    peak_rss_mb: Option<f64>,
    #[serde(flatten)]
    device_work: Option<DeviceWork>,
}

/// What decoding costs on a device of its own.
#[derive(Serialize)]
struct DeviceWork {
    /// Kernels per decoded token of one row.
    dispatches: f64,
    /// Submissions per decoded token of one row.
    submissions: f64,
    /// The most memory that was held, MiB.
    device_mb: f64,
}

#[derive(Serialize)]
struct Prefill {
    tokens: usize,
    tok_s: f64,
}

#[derive(Serialize)]
struct Decode {
    batch: usize,
    tok_s: f64,
}

impl Bench {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let console = Console::new(self.run.show);
        console.catch_interrupts();
        let started = Instant::now();
        let opt = self.run.model.load(&console)?;
        let load_s = started.elapsed().as_secs_f64();
        self.check(&opt)?;

        let longest = self.prompt_tokens.iter().copied().max().unwrap_or(0).max(DECODE_PROMPT);
        let rows = self.batch.iter().copied().max().unwrap_or(0);
        let ids = longest.saturating_add(rows.saturating_mul(DECODE_PROMPT)).min(MOST_IDS);
        let bar = console.bar("measuring");
        let work = Work {
            opt: &opt,
            cache: self.run.kv_dtype.into(),
            all_logits: self.all_logits,
            ids: random_ids(self.run.seed.unwrap_or(0), opt.config().vocab_size, ids),
            console: &console,
            bar: &bar,
            total: (1 + RUNS) * (self.prompt_tokens.len() + self.batch.len()),
            done: Default::default(),
        };
        let started = Instant::now();
        work.decode(1, 0)?;
        let first_token_s = started.elapsed().as_secs_f64();
        let mut prefill = Vec::new();
        for &tokens in &self.prompt_tokens {
            let seconds = work.median(|| work.prefill(tokens))?;
            prefill.push(Prefill { tokens, tok_s: tokens as f64 / seconds });
        }
        // One row first, whatever the order asked for: memory is read before there are more.
        let mut batches = self.batch.clone();
        batches.sort_by_key(|rows| *rows > 1);
        let mut peak_rss_mb = None;
        let mut decode = Vec::new();
        let per_token = work.per_token()?;
        for batch in batches {
            if batch > 1 && peak_rss_mb.is_none() {
                peak_rss_mb = peak_memory();
            }
            let seconds = work.median(|| work.decode(batch, self.gen_tokens))?;
            decode.push(Decode { batch, tok_s: (batch * self.gen_tokens) as f64 / seconds });
        }
        decode.sort_by_key(|row| self.batch.iter().position(|batch| *batch == row.batch));
        drop(bar);
        let info = opt.info();
        let report = Report {
            backend: info.name,
            device: info.device,
            weights: opt.weights().to_owned(),
            load_s,
            first_token_s,
            prefill,
            decode,
            peak_rss_mb: peak_rss_mb.or_else(peak_memory),
            device_work: per_token.map(|[dispatches, submissions]| DeviceWork {
                dispatches,
                submissions,
                device_mb: opt.engine().counts().device_peak as f64 / f64::from(1 << 20),
            }),
        };
        let mut out = Out::new();
        if self.run.show.json { out.json(&report) } else { out.text(&report.text()) }
    }

    fn check(&self, opt: &Opt) -> Result<(), Failure> {
        let context = opt.context();
        if let Some(tokens) = self.prompt_tokens.iter().find(|tokens| **tokens > context) {
            return Err(Failure::usage(format!(
                "--prompt-tokens: expected at most {context} (the context), found {tokens}"
            )));
        }
        let most = context.saturating_sub(DECODE_PROMPT);
        if self.gen_tokens > most {
            let found = self.gen_tokens;
            return Err(Failure::usage(format!(
                "--gen-tokens: expected at most {most} (the context of {context} less {DECODE_PROMPT}), found {found}"
            )));
        }
        Ok(())
    }
}

/// What is measured.
struct Work<'a> {
    opt: &'a Opt,
    cache: CacheDType,
    all_logits: bool,
    /// Random tokens, at least as many as the longest prompt takes.
    ids: Vec<u32>,
    console: &'a Console,
    bar: &'a Bar,
    total: usize,
    done: std::cell::Cell<usize>,
}

impl Work<'_> {
    /// The median of [`RUNS`] runs after one that is not counted. A run returns its own seconds.
    fn median(&self, run: impl Fn() -> Result<f64, Failure>) -> Result<f64, Failure> {
        let mut seconds = Vec::new();
        for index in 0..=RUNS {
            let time = run()?;
            if index > 0 {
                seconds.push(time);
            }
            self.done.set(self.done.get() + 1);
            let _ = self.bar.show(Progress::new("", self.done.get() as u64, self.total as u64));
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[RUNS / 2])
    }

    /// Runs one prompt.
    fn prefill(&self, tokens: usize) -> Result<f64, Failure> {
        let rows = if self.all_logits { tokens } else { 1 };
        let mut cache = self.opt.engine().new_cache(self.cache)?;
        let started = Instant::now();
        let sequence = Sequence::new(self.prompt(0, tokens)).want(Want::Logits { rows });
        self.forward(vec![with_cache(sequence, &mut cache)])?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Runs `batch` prompts of [`DECODE_PROMPT`] tokens, then `steps` steps of all rows together, which are measured.
    fn decode(&self, batch: usize, steps: usize) -> Result<f64, Failure> {
        let engine = self.opt.engine();
        let mut caches: Vec<KvCache> =
            (0..batch).map(|_| engine.new_cache(self.cache)).collect::<Result<_, _>>()?;
        let prompts = caches
            .iter_mut()
            .enumerate()
            .map(|(row, cache)| with_cache(Sequence::new(self.prompt(row, DECODE_PROMPT)).want(BEST), cache));
        let mut next = self.forward(prompts.collect())?;
        let started = Instant::now();
        for _ in 0..steps {
            let rows = caches
                .iter_mut()
                .zip(&next)
                .map(|(cache, id)| with_cache(Sequence::new(std::slice::from_ref(id)).want(BEST), cache));
            let best = self.forward(rows.collect())?;
            next = best;
        }
        Ok(started.elapsed().as_secs_f64())
    }

    /// Kernels and submissions per decoded token of one row, where the backend counts them.
    fn per_token(&self) -> Result<Option<[f64; 2]>, Failure> {
        const STEPS: usize = 8;
        // The first token has been made: a backend that counts has counted.
        if self.opt.engine().counts().dispatches == 0 {
            return Ok(None);
        }
        let counts = |steps| {
            let before = self.opt.engine().counts();
            self.decode(1, steps).map(|_| self.opt.engine().counts().since(&before))
        };
        // The prompt is in both.
        let room = self.opt.context().saturating_sub(DECODE_PROMPT);
        let steps = STEPS.min(room);
        let (prompt, both) = (counts(0)?, counts(steps)?);
        let per_token = |both: u64, prompt: u64| both.saturating_sub(prompt) as f64 / steps.max(1) as f64;
        Ok(Some([
            per_token(both.dispatches, prompt.dispatches),
            per_token(both.submissions, prompt.submissions),
        ]))
    }

    /// One batch; the most probable next tokens where they were asked for.
    fn forward<'a>(&'a self, sequences: Vec<Sequence<'a>>) -> Result<Vec<u32>, Failure> {
        let sequences = sequences.into_iter().map(|sequence| sequence.adapter(self.opt.adapter())).collect();
        let batch = Forward { sequences, cancel: Some(&self.console.cancel), watch: None };
        let outputs = self.opt.engine().forward_blocking(batch)?;
        let best = outputs.iter().map(|output| output.top_k.first().and_then(|top| top.ids.first().copied()));
        Ok(best.map(Option::unwrap_or_default).collect())
    }

    /// Random tokens, other ones for each row.
    fn prompt(&self, row: usize, tokens: usize) -> &[u32] {
        let start = (row * DECODE_PROMPT) % (self.ids.len() - tokens + 1);
        &self.ids[start..start + tokens]
    }
}

/// The most probable next token.
const BEST: Want<'static> = Want::TopK { rows: 1, k: 1 };

fn with_cache<'a>(mut sequence: Sequence<'a>, cache: &'a mut KvCache) -> Sequence<'a> {
    sequence.cache = Some(cache);
    sequence
}

/// Tokens of the vocabulary without the first few, which are special, from a linear congruential generator (Knuth's
/// MMIX constants): good enough to look tokens up by.
fn random_ids(seed: u64, vocab_size: usize, count: usize) -> Vec<u32> {
    let first = if vocab_size > 8 { 4 } else { 0 };
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (first + (state >> 33) % (vocab_size as u64 - first)) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// Largest resident memory of this process so far, MiB.
fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024.0)
}

impl Report {
    fn text(&self) -> String {
        let mut text = format!("{} on {}, weights {}\n", self.backend, self.device, self.weights);
        text.push_str(&format!(
            "load         {:>10.3} s\nfirst token  {:>10.3} s\n",
            self.load_s, self.first_token_s
        ));
        for Prefill { tokens, tok_s } in &self.prefill {
            text.push_str(&format!("prefill      {tok_s:>10.1} tokens/s  ({tokens} tokens)\n"));
        }
        for Decode { batch, tok_s } in &self.decode {
            text.push_str(&format!("decode       {tok_s:>10.1} tokens/s  (batch {batch})\n"));
        }
        if let Some(mib) = self.peak_rss_mb {
            text.push_str(&format!("peak memory  {mib:>10.1} MiB\n"));
        }
        if let Some(DeviceWork { dispatches, submissions, device_mb }) = &self.device_work {
            text.push_str(&format!("dispatches   {dispatches:>10.1} a token\n"));
            text.push_str(&format!("submissions  {submissions:>10.1} a token\n"));
            text.push_str(&format!("on device    {device_mb:>10.1} MiB\n"));
        }
        text
    }
}
