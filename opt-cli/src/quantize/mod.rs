//! `opt quantize`.

mod report;

use crate::{
    args::{PlaceArgs, ShowArgs},
    model,
    out::{Failure, Out},
    progress::Console,
    prompts,
};
use clap::{Args, ValueEnum};
use opt_core::{
    CacheDType, Load, Opt,
    checkpoint::{Checkpoint, QuantLayout, write_quantized},
    quantize::{
        Comparison, GptqOptions, LayerError, Method, QuantFormat, QuantSpec, QuantizeOptions,
        QuantizedWeights, TableFormat, calibration_sequences, compare, layer_errors, packed_bytes,
        quantize_weights, remove_work,
    },
    tokenizer::{Bos, Tokenizer},
};
use report::{CacheLine, Change, Eval, Report};
use serde_json::{Map, Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

const HELP: &str = "\
Examples:
  opt quantize opt-125m --format int8 --output opt-125m-int8
  opt quantize opt-125m --format nf4 --output opt-125m-nf4 --eval text.txt
  opt quantize opt-125m --format gptq --bits 4 --calibration text.txt
    --output opt-125m-gptq

Formats: int8 and int4 are written in a layout of this program's own, nf4 and
fp4 as bitsandbytes does, gptq (integers of --bits 2, 3, 4 or 8) as AutoGPTQ
does. Any of the integers can be made by either method: rtn rounds to nearest
and needs no text; gptq (arXiv 2210.17323) makes up for rounding errors, as far
as the inputs of a calibration text tell.
OUTPUT appears when it is whole. GPTQ keeps finished layers in OUTPUT.work; the
same command goes on behind them after it was interrupted.
The report goes to stdout and to report.json in OUTPUT: sizes; with --eval the
perplexity before and after and the Kullback-Leibler divergence from the model
in f32, also with keys and values in f16 and int8; with any text the relative error of each linear's output.";

/// Write a model with its weights in few bits, and measure what that costs in accuracy.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Quantize {
    /// The model to quantize, as for --model.
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    input: Option<PathBuf>,
    /// Write the directory DIR, which must not exist or be empty.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,

    /// What weights become, and the layout of the files.
    #[arg(long, value_name = "FORMAT", help_heading = "Format")]
    format: FormatName,
    /// How codes are chosen. [default: gptq for --format gptq or where there is a calibration text, else rtn]
    #[arg(long, value_name = "METHOD", help_heading = "Format")]
    method: Option<MethodName>,
    /// Bits of a code: 2, 3, 4 or 8. [default: 4 for gptq, else the format's]
    #[arg(long, value_name = "N", help_heading = "Format")]
    bits: Option<u32>,
    /// Inputs that share a scale; -1 for one scale a row. [default: 32 for int8 and int4, 64 for nf4 and fp4, 128 for
    /// gptq]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Format")]
    group_size: Option<i64>,
    /// Store a zero point beside each scale.
    #[arg(long, help_heading = "Format")]
    zero_points: bool,
    /// Codes lie symmetrically around 0, which is the default.
    #[arg(long, conflicts_with = "zero_points", help_heading = "Format")]
    sym: bool,
    /// Keep activations from this magnitude on as they are where others are rounded to int8, as LLM.int8 does (6.0
    /// there). For --format int8.
    #[arg(long, value_name = "THRESHOLD", help_heading = "Format")]
    outliers: Option<f32>,
    /// Round the scales of nf4 and fp4 as bitsandbytes' double quantization does.
    #[arg(long, help_heading = "Format")]
    double_quant: bool,
    /// What happens to the token table. [default: int8 for int8 and int4, else keep]
    #[arg(long, value_name = "HOW", help_heading = "Format")]
    table: Option<Table>,

    /// Calibrate GPTQ with this text, which also makes it the default method of integers; a .jsonl file has lines of {"text": "..."} or
    /// {"ids": [...]}.
    #[arg(long, value_name = "FILE", help_heading = "GPTQ")]
    calibration: Option<PathBuf>,
    /// Cut the calibration text into sequences of N tokens. [default: min(2048, context)]
    #[arg(long, value_name = "N", help_heading = "GPTQ")]
    calibration_tokens: Option<usize>,
    /// Take at most N sequences, spread over the text.
    #[arg(long, value_name = "N", default_value_t = 128, help_heading = "GPTQ")]
    calibration_sequences: usize,
    /// Quantize the columns whose inputs have the most energy first.
    #[arg(long, help_heading = "GPTQ")]
    desc_act: bool,
    /// Take the scales of groups from the weights as they were.
    #[arg(long, help_heading = "GPTQ")]
    static_groups: bool,
    /// Compute the inputs of a layer's later linears with its quantized earlier ones.
    #[arg(long, help_heading = "GPTQ")]
    true_sequential: bool,
    /// Add this share of its mean to the diagonal of the Hessian (0.01 is one percent).
    #[arg(long, value_name = "SHARE", default_value_t = 0.01, help_heading = "GPTQ")]
    damp_percent: f64,

    /// Measure on this text, a file as for --calibration.
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    eval: Option<PathBuf>,
    /// Measure on its first N tokens. [default: all]
    #[arg(long, value_name = "N", help_heading = "Report")]
    eval_tokens: Option<usize>,
    /// Write the report to this file. [default: report.json in DIR]
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    report: Option<PathBuf>,

    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    show: ShowArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FormatName {
    /// Integers of 8 bits.
    Int8,
    /// Integers of 4 bits.
    Int4,
    /// 4-bit NormalFloat.
    Nf4,
    /// 4-bit float.
    Fp4,
    /// Integers of --bits, as AutoGPTQ stores them.
    Gptq,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodName {
    /// Each weight becomes the nearest code.
    Rtn,
    /// Later columns make up for the rounding errors of earlier ones.
    Gptq,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Table {
    /// Integers of 8 bits.
    Int8,
    /// It stays as it is.
    Keep,
}

/// Tokens of the evaluation text at most that relative errors are measured on.
const ERROR_TOKENS: usize = 1 << 14;

impl Quantize {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let console = Console::new(self.show);
        let (spec, layout) = self.spec()?;
        let method = self.method();
        // What can be wrong is told before long work begins.
        self.place.choose()?;
        self.check_output()?;
        let name = self.input.as_deref().or(self.place.model.as_deref());
        let path = model::find(name, &console)?;
        let checkpoint = Checkpoint::open(&path)?;
        spec.check(checkpoint.config())?;
        layout.check(checkpoint.config())?;
        self.warn_of_idle_flags(&console);
        let texts = Texts { path: &path, bos: Bos::Model };
        let context = checkpoint.config().max_position_embeddings;
        let calibration = match &self.calibration {
            None => Vec::new(),
            Some(file) => {
                let length = self.calibration_tokens.unwrap_or(context.min(2048));
                if length == 0 || length > context {
                    return Err(Failure::usage(format!(
                        "--calibration-tokens: expected 1 to {context} (the context), found {length}"
                    )));
                }
                if self.calibration_sequences == 0 {
                    return Err(Failure::usage("--calibration-sequences: expected at least 1, found 0"));
                }
                let sequences = calibration_sequences(&texts.ids(file)?, length, self.calibration_sequences);
                sequences.map_err(|e| e.at(file.display()))?
            }
        };
        let mut eval = self.eval.as_deref().map(|file| texts.ids(file)).transpose()?;
        if let (Some(ids), Some(most)) = (&mut eval, self.eval_tokens) {
            ids.truncate(most);
        }
        if let (Some(ids), Some(file)) = (&eval, &self.eval)
            && ids.len() < 2
        {
            let message = format!("{}: expected at least 2 tokens, found {}", file.display(), ids.len());
            return Err(Failure::failed(message));
        }
        let vocabulary = checkpoint.config().vocab_size;
        let known = |file: &Option<PathBuf>, largest: Option<&u32>| match (file, largest) {
            (Some(file), Some(id)) if *id as usize >= vocabulary => Err(Failure::failed(format!(
                "{}: expected ids below {vocabulary}, found {id}",
                file.display()
            ))),
            _ => Ok(()),
        };
        known(&self.calibration, calibration.iter().flatten().max())?;
        known(&self.eval, eval.iter().flatten().max())?;
        console.catch_interrupts();

        let started = Instant::now();
        let work = self.work();
        let weights = {
            let bar = console.bar("quantizing");
            let mut options = QuantizeOptions::default()
                .method(method)
                .calibration(calibration.clone())
                .backend(self.place.choose()?)
                .cancel(console.cancel.clone())
                .progress(|at| bar.show(at));
            if matches!(method, Method::Gptq(_)) {
                options = options.work(&work);
            }
            quantize_weights(&checkpoint, &spec, options)?
        };
        let written = write_quantized(&self.output, &checkpoint, &weights, layout, &self.extra(method))?;
        if matches!(method, Method::Gptq(_)) {
            remove_work(&work)?;
        }
        written.warnings.iter().for_each(|warning| console.warn(&warning.to_string()));
        let seconds = started.elapsed().as_secs_f64();

        let after = Checkpoint::open(&self.output)?;
        let size = |checkpoint: &Checkpoint| checkpoint.files().map(|(_, bytes)| bytes as u64).sum();
        let mut report = Report {
            model: path.display().to_string(),
            output: self.output.display().to_string(),
            method: if method == Method::Rtn { "rtn" } else { "gptq" },
            layout: match layout {
                QuantLayout::Gptq => "gptq",
                QuantLayout::BitsAndBytes => "bitsandbytes",
                _ => "native",
            },
            spec,
            seconds,
            file_bytes: Change { before: size(&checkpoint), after: size(&after) },
            weight_bytes: Change {
                before: checkpoint.weight_bytes(opt_core::DType::F32),
                after: after.weight_bytes(opt_core::DType::F32),
            },
            bits_per_weight: bits_per_weight(&weights),
            layers: Vec::new(),
            eval: None,
        };
        // What is known now stays, should measuring be interrupted.
        let file = self.report.clone().unwrap_or_else(|| self.output.join("report.json"));
        report.save(&file)?;
        report.layers = self.errors(&checkpoint, &weights, eval.as_deref(), &calibration, &console)?;
        report.eval = eval.map(|ids| self.compare(&path, &ids, &console)).transpose()?;
        report.save(&file)?;
        let mut out = Out::new();
        if self.show.json { out.json(&report) } else { out.text(&report.text()) }
    }

    /// What weights become, and how files store it.
    fn spec(&self) -> Result<(QuantSpec, QuantLayout), Failure> {
        let (format, group, layout) = match self.format {
            FormatName::Int8 => (QuantFormat::Int8, 32, QuantLayout::Native),
            FormatName::Int4 => (QuantFormat::Int4, 32, QuantLayout::Native),
            FormatName::Nf4 => (QuantFormat::Nf4, 64, QuantLayout::BitsAndBytes),
            FormatName::Fp4 => (QuantFormat::Fp4, 64, QuantLayout::BitsAndBytes),
            FormatName::Gptq => {
                let format = QuantFormat::integer(self.bits.unwrap_or(4));
                (format.map_err(|e| e.at("--bits"))?, 128, QuantLayout::Gptq)
            }
        };
        if let Some(bits) = self.bits.filter(|bits| *bits != format.bits()) {
            return Err(Failure::usage(format!(
                "--bits: expected {} for this format, found {bits}; --format gptq has 2, 3, 4 and 8",
                format.bits()
            )));
        }
        let mut spec = QuantSpec::new(format).zero_points(self.zero_points).double_quant(self.double_quant);
        if let Some(threshold) = self.outliers {
            if layout != QuantLayout::Native {
                return Err(Failure::usage("--outliers: expected --format int8, whose layout holds it"));
            }
            spec = spec.outlier_threshold(threshold);
        }
        spec = match self.group_size {
            None => spec.group_size(group),
            Some(-1) => spec.per_row(),
            Some(size) => match usize::try_from(size) {
                Ok(size) if size > 0 => spec.group_size(size),
                _ => {
                    return Err(Failure::usage(format!(
                        "--group-size: expected -1 or at least 1, found {size}"
                    )));
                }
            },
        };
        let native = layout == QuantLayout::Native;
        spec = spec.table(match self.table {
            Some(Table::Int8) if !native => {
                return Err(Failure::usage(
                    "--table int8: expected --format int8 or int4, whose layout holds tables",
                ));
            }
            Some(Table::Int8) => TableFormat::Int8,
            None if native => TableFormat::Int8,
            _ => TableFormat::Keep,
        });
        spec.validate()?;
        if self.is_gptq() {
            if self.calibration.is_none() {
                return Err(Failure::usage("--method gptq needs a text: expected --calibration FILE"));
            }
            if !format.is_integer() {
                return Err(Failure::usage(format!(
                    "--method gptq: expected an integer format, found {format}"
                )));
            }
        }
        Ok((spec, layout))
    }

    fn is_gptq(&self) -> bool {
        match self.method {
            Some(method) => method == MethodName::Gptq,
            None => self.format == FormatName::Gptq || (self.calibration.is_some() && self.integers()),
        }
    }

    fn integers(&self) -> bool {
        !matches!(self.format, FormatName::Nf4 | FormatName::Fp4)
    }

    fn method(&self) -> Method {
        if !self.is_gptq() {
            return Method::Rtn;
        }
        Method::Gptq(
            GptqOptions::default()
                .desc_act(self.desc_act)
                .static_groups(self.static_groups)
                .true_sequential(self.true_sequential)
                .damping(self.damp_percent),
        )
    }

    /// Flags that this run has no use for.
    fn warn_of_idle_flags(&self, console: &Console) {
        let gptq = self.is_gptq();
        for (given, flag) in [
            (self.desc_act, "--desc-act"),
            (self.static_groups, "--static-groups"),
            (self.true_sequential, "--true-sequential"),
            (self.calibration.is_some(), "--calibration"),
            (self.calibration_tokens.is_some(), "--calibration-tokens"),
        ] {
            if given && !gptq {
                console.warn(&format!("{flag} has no effect without --method gptq"));
            }
        }
        if self.eval_tokens.is_some() && self.eval.is_none() {
            console.warn("--eval-tokens has no effect without --eval");
        }
    }

    /// Beside the output, so that it is on the same disk and easy to find.
    fn work(&self) -> PathBuf {
        let mut name = self.output.file_name().unwrap_or_default().to_owned();
        name.push(".work");
        self.output.with_file_name(name)
    }

    fn check_output(&self) -> Result<(), Failure> {
        let place = self.output.display();
        if let Some(file) = &self.report {
            let parent = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if parent != self.output {
                if !parent.is_dir() {
                    let message = format!("{}: no such directory to write --report into", parent.display());
                    return Err(Failure::failed(message));
                }
                report::probe(file)?;
            }
        }
        let is_empty = |dir: &Path| fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
        if self.output.symlink_metadata().is_ok() && !is_empty(&self.output) {
            return Err(Failure::usage(format!("{place}: exists already and is not overwritten")));
        }
        if self.output.file_name().is_none() {
            return Err(Failure::usage(format!("{place}: expected the name of a directory")));
        }
        let parent = self.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !parent.is_dir() {
            let message = format!("{}: no such directory to write into", parent.display());
            return Err(Failure::failed(message));
        }
        Ok(())
    }

    /// What config.json tells beside what can be seen in the tensors.
    fn extra(&self, method: Method) -> Map<String, Value> {
        let mut extra = Map::new();
        if let (Method::Gptq(options), FormatName::Gptq) = (method, self.format) {
            extra.insert("desc_act".to_owned(), json!(options.desc_act));
            extra.insert("static_groups".to_owned(), json!(options.static_groups));
            extra.insert("true_sequential".to_owned(), json!(options.true_sequential));
            extra.insert("damp_percent".to_owned(), json!(options.damping));
        }
        extra
    }

    fn errors(
        &self,
        checkpoint: &Checkpoint,
        weights: &QuantizedWeights,
        eval: Option<&[u32]>,
        calibration: &[Vec<u32>],
        console: &Console,
    ) -> Result<Vec<LayerError>, Failure> {
        let context = checkpoint.config().max_position_embeddings;
        let sequences: Vec<Vec<u32>> = match eval {
            Some(ids) => {
                ids.chunks(context).take(ERROR_TOKENS.div_ceil(context)).map(<[u32]>::to_vec).collect()
            }
            None => calibration.to_vec(),
        };
        if sequences.is_empty() {
            return Ok(Vec::new());
        }
        Ok(layer_errors(checkpoint, weights, &sequences, Some(self.place.choose()?), &console.cancel)?)
    }

    fn compare(&self, path: &Path, ids: &[u32], console: &Console) -> Result<Eval, Failure> {
        let load = |path: &Path| -> Result<Opt, Failure> {
            Ok(Opt::load(path, Load::with(self.place.choose()?).cancel(console.cancel.clone()))?)
        };
        let (base, quantized) = (load(path)?, load(&self.output)?);
        let window = base.config().max_position_embeddings.min(2048);
        let bar = console.bar("measuring");
        let measure =
            |cache| compare(&base, &quantized, cache, ids, window, &console.cancel, &mut |at| bar.show(at));
        let comparison = measure(CacheDType::F32)?;
        let config = base.config();
        // Keys and values, and for int8 a scale in f32 for each position and head.
        let bytes = |element: usize, scales: usize| {
            let row = config.hidden_size * element + config.num_attention_heads * scales;
            (2 * config.num_hidden_layers * row) as u64
        };
        let mut caches = Vec::new();
        for (kv_dtype, cache, bytes_per_token) in
            [("f16", CacheDType::F16, bytes(2, 0)), ("int8", CacheDType::Int8, bytes(1, 4))]
        {
            let Comparison { perplexity, kl, .. } = measure(cache)?;
            caches.push(CacheLine { kv_dtype, bytes_per_token, perplexity, kl });
        }
        let text = self.eval.as_deref().map(|file| file.display().to_string()).unwrap_or_default();
        Ok(Eval { text, window, comparison, caches })
    }
}

fn bits_per_weight(weights: &QuantizedWeights) -> f64 {
    let count: usize = weights.values().map(|weight| weight.shape().iter().product::<usize>()).sum();
    let bytes: u64 = weights.values().map(packed_bytes).sum();
    8.0 * bytes as f64 / count.max(1) as f64
}

/// Reads texts as tokens of a model.
struct Texts<'a> {
    path: &'a Path,
    bos: Bos,
}

impl Texts<'_> {
    fn ids(&self, file: &Path) -> Result<Vec<u32>, Failure> {
        if file.extension().is_none_or(|extension| extension != "jsonl") {
            return self.encode(&prompts::text_file(file)?);
        }
        let mut all = Vec::new();
        for line in prompts::json_lines(file)? {
            let expected = r#"expected {"text": "..."} or {"ids": [...]}"#;
            let Value::Object(map) = &line.value else {
                return Err(line.fail(format_args!("{expected}, found {}", prompts::short(&line.value))));
            };
            match (line.text(map, "text")?, line.ids(map)?) {
                (Some(text), None) => all.extend(self.encode(&text)?),
                (None, Some(ids)) => all.extend(ids),
                _ => return Err(line.fail(format_args!("{expected}, found {}", prompts::short(&line.value)))),
            }
        }
        Ok(all)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, Failure> {
        let dir = if self.path.is_dir() { self.path } else { self.path.parent().unwrap_or(Path::new("")) };
        Ok(Tokenizer::from_dir(dir)?.encode(text, self.bos)?)
    }
}
