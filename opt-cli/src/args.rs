//! Flags that several subcommands share.

use crate::{model, out::Failure, progress::Console};
use clap::{Args, ValueEnum};
use opt_core::{
    CacheDType, DType, Load, Opt, adapter::Adapter, backends, prompt::Overflow, quantize::QuantSpec,
    tokenizer::Bos,
};
use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

/// Flags of every subcommand that runs a model.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// Hold the keys and values of the context in this number format.
    #[arg(long, value_name = "FORMAT", default_value = "f32", help_heading = "Model")]
    pub(crate) kv_dtype: KvFormat,

    /// Say what happens to a prompt longer than the context: an error, or its beginning or its end is cut off.
    #[arg(long, value_name = "HOW", default_value = "error", help_heading = "Input")]
    pub(crate) truncate: Truncate,

    /// Seed all draws with N, so that the run can be repeated.
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub(crate) seed: Option<u64>,

    #[command(flatten)]
    pub(crate) show: ShowArgs,
}

/// Which model, where and how.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    #[command(flatten)]
    pub(crate) place: PlaceArgs,

    /// Hold the weights in this number format, whatever the file has.
    #[arg(long, value_name = "FORMAT", default_value = "f32", help_heading = "Model")]
    pub(crate) dtype: Format,

    /// Quantize while loading: the linears of the layers, and for integers the token table in int8; what is left is
    /// held as --dtype says.
    #[arg(long, value_name = "FORMAT", help_heading = "Model")]
    pub(crate) quantize: Option<Quantized>,

    /// Let the model wear this adapter: a directory that PEFT saved (LoRA, prefix tuning, prompt tuning).
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) adapter: Option<PathBuf>,
}

/// Which model, and where.
#[derive(Debug, Args)]
pub(crate) struct PlaceArgs {
    /// Use this model: a directory in Hugging Face layout, a weights file beside its config.json, or a hub id such as
    /// facebook/opt-125m (in builds with the feature `hub`). [default: $OPT_MODEL, then models/opt-novels]
    #[arg(long, value_name = "MODEL", help_heading = "Model")]
    pub(crate) model: Option<PathBuf>,

    /// Run on this backend; `opt backends` lists those of this build.
    #[arg(long, value_name = "BACKEND", default_value = "cpu", help_heading = "Model")]
    pub(crate) backend: BackendName,

    /// Run on this device of the backend, such as cuda:0 or an adapter's name or index.
    #[arg(long, value_name = "DEVICE", help_heading = "Model")]
    pub(crate) device: Option<String>,

    /// Multiply by quantized weights with activations in this number format; from the fastest to the most exact: int8,
    /// int16, f32. On processors with fast instructions for bf16, the cpu backend also rounds activations to bf16 for
    /// weights of bf16; not with f32.
    #[arg(long, value_name = "FORMAT", default_value = "int16", help_heading = "Model")]
    pub(crate) compute: ComputeFormat,

    /// Compute with N threads. [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub(crate) threads: Option<NonZeroUsize>,
}

/// What is printed.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct ShowArgs {
    /// Print JSON lines on stdout and nothing else there.
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,

    /// Print nothing but errors on stderr: no progress, no summary, no warnings.
    #[arg(long, short, help_heading = "Output")]
    pub(crate) quiet: bool,
}

/// `--no-bos`.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct BosArgs {
    /// Do not put the beginning-of-text token before texts.
    #[arg(long, help_heading = "Input")]
    no_bos: bool,
}

impl BosArgs {
    pub(crate) fn rule(self) -> Bos {
        if self.no_bos { Bos::Never } else { Bos::Model }
    }
}

/// Names of backends, those of other builds included: asking for one is no usage error.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum BackendName {
    /// The pure-Rust engine.
    Cpu,
    /// LibTorch.
    Tch,
    /// candle.
    Candle,
    /// WebGPU compute shaders.
    Wgpu,
}

impl BackendName {
    fn name(self) -> &'static str {
        match self {
            BackendName::Cpu => "cpu",
            BackendName::Tch => "tch",
            BackendName::Candle => "candle",
            BackendName::Wgpu => "wgpu",
        }
    }
}

/// Number formats of activations as they meet quantized weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ComputeFormat {
    /// Activations are quantized to eight bits, per row and run of 32.
    Int8,
    /// Activations are quantized to fifteen bits and a sign, per row and run of 32.
    Int16,
    /// Activations stay in single precision.
    F32,
}

impl From<ComputeFormat> for backends::Compute {
    fn from(format: ComputeFormat) -> Self {
        match format {
            ComputeFormat::Int8 => backends::Compute::Int8,
            ComputeFormat::Int16 => backends::Compute::Int16,
            ComputeFormat::F32 => backends::Compute::F32,
        }
    }
}

/// Number formats of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Single precision.
    #[value(alias = "float32")]
    F32,
    /// bfloat16.
    #[value(alias = "bfloat16")]
    Bf16,
    /// Half precision.
    #[value(alias = "float16")]
    F16,
}

impl From<Format> for DType {
    fn from(format: Format) -> Self {
        match format {
            Format::F32 => DType::F32,
            Format::Bf16 => DType::BF16,
            Format::F16 => DType::F16,
        }
    }
}

/// What weights are rounded to while loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Quantized {
    /// Symmetric integers of 8 bits in groups of 32.
    Int8,
    /// Symmetric integers of 4 bits in groups of 32.
    Int4,
    /// 4-bit NormalFloat in blocks of 64.
    Nf4,
}

impl Quantized {
    pub(crate) fn spec(self) -> QuantSpec {
        match self {
            Quantized::Int8 => QuantSpec::int8(),
            Quantized::Int4 => QuantSpec::int4(),
            Quantized::Nf4 => QuantSpec::nf4(),
        }
    }
}

/// Number formats of the cache.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum KvFormat {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// One byte a number and one scale for each position and head.
    Int8,
}

impl From<KvFormat> for CacheDType {
    fn from(format: KvFormat) -> Self {
        match format {
            KvFormat::F32 => CacheDType::F32,
            KvFormat::F16 => CacheDType::F16,
            KvFormat::Int8 => CacheDType::Int8,
        }
    }
}

/// What happens to a prompt longer than the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Truncate {
    /// It is an error.
    Error,
    /// Its beginning is cut off; a beginning-of-text token stays.
    Left,
    /// Its end is cut off.
    Right,
}

impl From<Truncate> for Overflow {
    fn from(truncate: Truncate) -> Self {
        match truncate {
            Truncate::Error => Overflow::Error,
            Truncate::Left => Overflow::TruncateLeft,
            Truncate::Right => Overflow::TruncateRight,
        }
    }
}

impl PlaceArgs {
    /// The backend, ready to load a model on.
    pub(crate) fn choose(&self) -> Result<backends::Chosen, Failure> {
        let mut options = backends::BackendOptions::default();
        options.device = self.device.clone();
        options.threads = self.threads.map(NonZeroUsize::get);
        options.compute = self.compute.into();
        Ok(backends::choose(self.backend.name(), &options)?)
    }
}

impl ModelArgs {
    /// Loads the model that the flags name, with a progress bar; its warnings are printed.
    pub(crate) fn load(&self, console: &Console) -> Result<Opt, Failure> {
        let adapter = self.adapter.as_deref().map(Adapter::open).transpose()?;
        self.load_wearing(self.place.model.as_deref(), adapter, console)
    }

    /// [`ModelArgs::load`] for another model on the same kind of backend, without adapter.
    pub(crate) fn load_from(&self, name: Option<&Path>, console: &Console) -> Result<Opt, Failure> {
        self.load_wearing(name, None, console)
    }

    fn load_wearing(
        &self,
        name: Option<&Path>,
        adapter: Option<Adapter>,
        console: &Console,
    ) -> Result<Opt, Failure> {
        let worn = adapter.as_ref().map(|adapter| adapter.name().to_owned());
        let opt = self.place.load(name, self.dtype, self.quantize, adapter, console)?;
        Ok(worn.map_or(Ok(opt.clone()), |name| opt.adapted(&name))?)
    }
}

impl PlaceArgs {
    /// Loads a model with adapters beside it that nothing wears yet, with a progress bar; its warnings are printed.
    pub(crate) fn load(
        &self,
        name: Option<&Path>,
        dtype: Format,
        quantize: Option<Quantized>,
        adapters: impl IntoIterator<Item = Adapter>,
        console: &Console,
    ) -> Result<Opt, Failure> {
        // A wrong backend is told before a download begins.
        let backend = self.choose()?;
        let path = model::find(name, console)?;
        let bar = console.bar("loading");
        let mut progress = |at: opt_core::Progress<'_>| bar.show(at);
        let mut load =
            Load::with(backend).dtype(dtype.into()).cancel(console.cancel.clone()).progress(&mut progress);
        if let Some(format) = quantize {
            load = load.quantize(format.spec());
        }
        for adapter in adapters {
            load = load.adapter(adapter);
        }
        let opt = Opt::load(&path, load)?;
        drop(bar);
        opt.warnings().iter().for_each(|warning| console.warn(warning));
        if self.threads.is_some() && opt.info().threads == 0 {
            console.warn(&format!("--threads has no effect on backend {}", opt.info().name));
        }
        Ok(opt)
    }
}
