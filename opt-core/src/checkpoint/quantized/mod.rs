//! Quantized checkpoints: weights in few bits, as GPTQ, bitsandbytes, AWQ and this project's own layout store them.
//!
//! Which layout a checkpoint has is in the `quantization_config` of its config.json (or a file beside it). A weight is
//! taken to be quantized where the layout's tensors are there instead of its own; all others are read as ever. Every
//! layout is translated, without loss, to the one form of [`opt_backend::quant`].

mod awq;
mod bits;
mod bitsandbytes;
pub mod ggml;
mod gptq;
mod layouts;
mod native;
mod part;
mod write;

pub use write::{QuantLayout, write_quantized};

use super::{
    Checkpoint, Tensor,
    entry::{fail, shown},
    files, names,
};
use crate::{Error, ErrorKind, Result, config::held_bytes};
use opt_backend::{DType, quant::Quantized};
use part::{Part, Parts};
use serde_json::Value;
use std::{fmt, path::Path};

/// A weight `[out, in]` of a checkpoint, as its file has it.
#[derive(Debug)]
#[non_exhaustive]
#[allow(clippy::large_enum_variant)] // one at a time
pub enum Weight<'a> {
    /// Numbers in f32, f16 or bf16.
    Plain(Tensor<'a>),
    /// Codes and scales.
    Quantized(Quantized),
}

/// How a checkpoint's quantized weights are stored.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Quantization {
    scheme: Scheme,
}

#[derive(Debug, Clone, PartialEq)]
enum Scheme {
    Gptq(gptq::Gptq),
    Awq(awq::Awq),
    BitsAndBytes(bitsandbytes::BitsAndBytes),
    Native(native::Native),
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups = |f: &mut fmt::Formatter<'_>, size: Option<usize>| match size {
            Some(size) => write!(f, ", groups of {size}"),
            None => write!(f, ", one scale a row"),
        };
        match &self.scheme {
            Scheme::Gptq(gptq) => {
                write!(f, "GPTQ{}, {} bits", if gptq.v2 { " v2" } else { "" }, gptq.bits)?;
                groups(f, gptq.group_size)
            }
            Scheme::Awq(awq) => {
                write!(f, "AWQ, 4 bits")?;
                groups(f, awq.group_size)
            }
            Scheme::BitsAndBytes(bnb) => {
                write!(f, "bitsandbytes, {} bits", if bnb.eight_bits { 8 } else { 4 })
            }
            Scheme::Native(native) => native.fmt(f),
        }
    }
}

/// Files beside config.json in which the configuration stood before transformers had a place for it: AutoGPTQ's and
/// AutoAWQ's.
const FILES: [(&str, &str); 2] = [("quantize_config.json", "gptq"), ("quant_config.json", "awq")];

impl Quantization {
    /// What a directory's config.json or a file beside it says.
    pub(super) fn find(config: &str, directory: Option<&Path>) -> Result<Option<Self>> {
        let config: Value = serde_json::from_str(config.trim_start_matches('\u{feff}'))
            .map_err(|e| Error::because(ErrorKind::Config, "config.json is not usable", e))?;
        let place = "config.json: quantization_config";
        match config.get("quantization_config") {
            None | Some(Value::Null) => {}
            Some(found @ Value::Object(_)) => {
                return Self::parse(found, None).map(Some).map_err(|e| e.at(place));
            }
            Some(found) => {
                let message = format_args!("{place}: expected an object, found {}", brief(found));
                return Err(Error::new(ErrorKind::Config, message));
            }
        }
        let Some(directory) = directory else { return Ok(None) };
        for (name, method) in FILES {
            let path = directory.join(name);
            if path.is_file() {
                let text = files::small(&path)?;
                let found: Value = serde_json::from_str(&text).map_err(|e| {
                    Error::because(ErrorKind::Config, format_args!("{name} is not usable"), e)
                })?;
                return Self::parse(&found, Some(method)).map(Some).map_err(|e| e.at(name));
            }
        }
        Ok(None)
    }

    fn parse(config: &Value, assumed: Option<&str>) -> Result<Self> {
        let on = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(false);
        // transformers wrote no method before it had more than bitsandbytes.
        let old = (on("load_in_8bit") || on("load_in_4bit")).then_some("bitsandbytes");
        let method = match config.get("quant_method") {
            None | Some(Value::Null) => assumed.or(old),
            Some(found) => Some(found.as_str().unwrap_or_default()),
        };
        let scheme = match method {
            Some("gptq") => Scheme::Gptq(gptq::Gptq::parse(config)?),
            Some("awq") => Scheme::Awq(awq::Awq::parse(config)?),
            Some("bitsandbytes") => Scheme::BitsAndBytes(bitsandbytes::BitsAndBytes::parse(config)?),
            Some(write::NATIVE) => Scheme::Native(native::Native::parse(config)?),
            found => {
                let found = found.map_or("none".to_owned(), shown);
                let message = format_args!(
                    "quant_method: expected \"gptq\", \"bitsandbytes\", \"awq\" or \"{}\", found {found}",
                    write::NATIVE
                );
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
        };
        Ok(Self { scheme })
    }

    /// Whether a module's weight is stored in this layout.
    fn is_packed(&self, parts: &Parts<'_>) -> bool {
        match &self.scheme {
            Scheme::Gptq(_) | Scheme::Awq(_) => parts.has("qweight"),
            Scheme::BitsAndBytes(_) => bitsandbytes::is_packed(parts),
            Scheme::Native(native) => native.has(parts.module),
        }
    }

    fn parts(&self, parts: &Parts<'_>, shape: [usize; 2]) -> Result<Vec<Part>> {
        let misfit = match &self.scheme {
            Scheme::Gptq(_) => gptq::Gptq::misfit(shape),
            Scheme::Awq(_) => awq::Awq::misfit(shape),
            _ => None,
        };
        if let Some(message) = misfit {
            return fail(format_args!("{}.weight: {message}", parts.module));
        }
        match &self.scheme {
            Scheme::Gptq(gptq) => Ok(gptq.parts(shape)),
            Scheme::Awq(awq) => Ok(awq.parts(shape)),
            Scheme::BitsAndBytes(_) => bitsandbytes::parts(parts, shape),
            Scheme::Native(native) => native.parts(parts, shape),
        }
    }

    fn read(&self, parts: &Parts<'_>, shape: [usize; 2]) -> Result<Quantized> {
        match &self.scheme {
            Scheme::Gptq(gptq) => gptq.read(parts, shape),
            Scheme::Awq(awq) => awq.read(parts, shape),
            Scheme::BitsAndBytes(bnb) => bnb.read(parts, shape),
            Scheme::Native(native) => native.read(parts, shape),
        }
    }
}

impl Checkpoint {
    /// The weight `[out, in]` of this canonical name, packed or not: `layers.0.fc1.weight`, `embed_tokens.weight`.
    ///
    /// ```no_run
    /// use opt_core::checkpoint::{Checkpoint, Weight};
    ///
    /// let checkpoint = Checkpoint::open("opt-125m-GPTQ-4bit-g128")?;
    /// match checkpoint.weight("layers.0.fc1.weight", [3072, 768])? {
    ///     Weight::Quantized(weight) => println!("{:?}", weight.levels()),
    ///     Weight::Plain(tensor) => println!("{}", tensor.dtype()?),
    ///     _ => {}
    /// }
    /// # Ok::<(), opt_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is not there; [`ErrorKind::Checkpoint`] for another shape, and for packed tensors
    /// that do not fit each other.
    pub fn weight(&self, name: &str, shape: [usize; 2]) -> Result<Weight<'_>> {
        let Some((quantization, parts)) = self.packed(name) else {
            return self.tensor(name, &shape).map(Weight::Plain);
        };
        for part in quantization.parts(&parts, shape)? {
            if let Some(fault) = part.fault(self, parts.module) {
                return fail(fault);
            }
        }
        quantization.read(&parts, shape).map(Weight::Quantized)
    }

    /// How its quantized weights are stored, for people; `None` if it has none.
    pub fn quantization(&self) -> Option<String> {
        self.quantization.as_ref().map(ToString::to_string)
    }

    /// The memory that its weights take, in bytes: quantized ones as many as in the file, other matrices in `dtype`,
    /// biases and LayerNorms in f32.
    pub fn weight_bytes(&self, dtype: DType) -> u64 {
        let bytes = |(name, shape): (String, Vec<usize>)| {
            self.packed_bytes(&name, &shape).unwrap_or_else(|| held_bytes(&shape, dtype))
        };
        self.config.tensor_shapes().into_iter().map(bytes).fold(0, u64::saturating_add)
    }

    /// Bytes of the weight of this canonical name, if it is packed.
    pub(crate) fn packed_bytes(&self, name: &str, shape: &[usize]) -> Option<u64> {
        let &[out, input] = shape else { return None };
        let (quantization, parts) = self.packed(name)?;
        let expected = quantization.parts(&parts, [out, input]).ok()?;
        let bytes = |part: Part| {
            self.tensors.get(&format!("{}.{}", parts.module, part.suffix)).map(|i| i.bytes() as u64)
        };
        Some(expected.into_iter().filter_map(bytes).fold(0, u64::saturating_add))
    }

    /// The layout and the module of a weight, if it is packed.
    fn packed<'a>(&'a self, name: &'a str) -> Option<(&'a Quantization, Parts<'a>)> {
        let quantization = self.quantization.as_ref()?;
        let parts = Parts::new(self, name.strip_suffix(".weight")?);
        quantization.is_packed(&parts).then_some((quantization, parts))
    }

    /// What is wrong with a packed weight's tensors; `None` if it is not packed.
    pub(super) fn packed_faults(&self, name: &str, shape: &[usize]) -> Option<Vec<String>> {
        let (quantization, parts) = self.packed(name)?;
        let &[out, input] = shape else { return None };
        Some(match quantization.parts(&parts, [out, input]) {
            Ok(expected) => expected.iter().filter_map(|part| part.fault(self, parts.module)).collect(),
            Err(error) => vec![error.to_string()],
        })
    }

    /// The names of tensors that stand in for the weights that are packed, and of those weights.
    pub(super) fn packed_names(&self) -> Vec<String> {
        let names = |(name, shape): (String, Vec<usize>)| {
            let (quantization, parts) = self.packed(&name)?;
            let &[out, input] = &shape[..] else { return None };
            // What is wrong with them is for `faults` to say.
            let expected = quantization.parts(&parts, [out, input]).unwrap_or_default();
            let mut names: Vec<String> =
                expected.iter().map(|part| format!("{}.{}", parts.module, part.suffix)).collect();
            names.push(name);
            Some(names)
        };
        self.config.tensor_shapes().into_iter().filter_map(names).flatten().collect()
    }
}

/// A group size: `None` for -1, one scale a row.
fn group_size(config: &Value, key: &str) -> Result<Option<usize>> {
    match config.get(key).map(|found| (found.as_i64(), found)) {
        Some((Some(-1), _)) => Ok(None),
        Some((Some(size @ 1..=0x100_0000), _)) => Ok(Some(size as usize)),
        found => {
            let found = found.map_or("none".to_owned(), |(_, found)| brief(found));
            let message = format_args!("{key}: expected -1 or at least 1, found {found}");
            Err(Error::new(ErrorKind::Unsupported, message))
        }
    }
}

/// A value out of a file, for a message.
fn brief(value: &Value) -> String {
    match value {
        Value::String(text) => shown(text),
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        other => other.to_string(),
    }
}

/// The name under which a module's tensor is stored.
fn stored_name(module: &str, suffix: &str) -> String {
    names::full(&format!("{module}.{suffix}"))
}
