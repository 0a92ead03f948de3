//! `opt convert`.

use crate::{
    args::{Format as NumberFormat, ShowArgs},
    model,
    out::{Failure, Out, bytes},
    progress::Console,
};
use clap::{Args, ValueEnum};
use opt_core::checkpoint::{ConvertOptions, Format, convert};
use serde_json::json;
use std::path::PathBuf;

const HELP: &str = "\
Examples:
  opt convert opt-125m/pytorch_model.bin opt-125m/model.safetensors
  opt convert opt-6.7b opt-6.7b-small-files --shard-size 2GB
  opt convert opt-125m opt-125m-bf16 --dtype bf16
  opt convert opt-125m opt-125m-pickle --format pickle

IN is a directory or a weights file: safetensors, PyTorch pickle or Flax
msgpack; for shards their directory. An OUT that ends in .safetensors or .bin
is written as one file, with config.json and the tokenizer beside it; any other
OUT is a directory in Hugging Face layout. OUT appears when it is whole.";

/// Write a model in another file format, number format or number of files.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Convert {
    /// The model to read.
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Where to write it; must not exist.
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Write numbers in this format. [default: as they are]
    #[arg(long, value_name = "FORMAT")]
    dtype: Option<NumberFormat>,
    /// Split the weights into files of at most this size, such as 500MB or 2GB. [default: one file]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    shard_size: Option<u64>,
    /// Write files of this format. [default: by the name of OUT, safetensors for a directory]
    #[arg(long, value_name = "FORMAT")]
    format: Option<FileFormat>,
    #[command(flatten)]
    show: ShowArgs,
}

/// File formats that can be written.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum FileFormat {
    Safetensors,
    /// PyTorch's.
    Pickle,
}

/// A number of bytes with an optional unit, as transformers' max_shard_size.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic() || c == ' ');
    let factor: u64 = match text[digits.len()..].trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "KB" => 1000,
        "MB" => 1000_u64.pow(2),
        "GB" => 1000_u64.pow(3),
        "KIB" => 1 << 10,
        "MIB" => 1 << 20,
        "GIB" => 1 << 30,
        _ => return Err("expected a size such as 500MB, 2GB or 1GiB".to_owned()),
    };
    let count = digits.parse::<f64>().ok().map(|count| count * factor as f64);
    match count.filter(|count| (1.0..1e18).contains(count)) {
        Some(count) => Ok(count as u64),
        None => Err("expected a size such as 500MB, 2GB or 1GiB".to_owned()),
    }
}

impl Convert {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let console = Console::new(self.show);
        console.catch_interrupts();
        let input = model::find(Some(&self.input), &console)?;
        let bar = console.byte_bar("converting");
        let mut options =
            ConvertOptions::default().cancel(console.cancel.clone()).progress(|at| bar.show(at));
        options.dtype = self.dtype.map(Into::into);
        options.shard_size = self.shard_size;
        options.format = self.format.map(|format| match format {
            FileFormat::Safetensors => Format::Safetensors,
            FileFormat::Pickle => Format::Pickle,
        });
        let done = convert(input, &self.output, options)?;
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

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("2GB"), Ok(2_000_000_000));
        assert_eq!(size("1.5 MiB"), Ok(1_572_864));
        assert_eq!(size("100"), Ok(100));
        for wrong in ["", "GB", "-1GB", "2TBx", "0", "1e99GB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
