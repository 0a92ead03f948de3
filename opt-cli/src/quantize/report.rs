//! What `opt quantize` tells of its result.

use crate::out::{Failure, bytes};
use opt_core::quantize::{Comparison, LayerError, QuantSpec};
use serde::Serialize;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The report, as report.json has it.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) model: String,
    pub(crate) output: String,
    pub(crate) method: &'static str,
    /// How the files store it: `native`, `gptq`, `bitsandbytes`.
    pub(crate) layout: &'static str,
    pub(crate) spec: QuantSpec,
    pub(crate) seconds: f64,
    pub(crate) file_bytes: Change<u64>,
    /// Weights in memory; what is not quantized is held in f32.
    pub(crate) weight_bytes: Change<u64>,
    /// Bits that a quantized weight takes with its scales and zero points, on average.
    pub(crate) bits_per_weight: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) eval: Option<Eval>,
    /// ‖W x - Ŵ x‖² / ‖W x‖² of each linear, on inputs of the evaluation text or else of the calibration text.
    pub(crate) layers: Vec<LayerError>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Change<T> {
    pub(crate) before: T,
    pub(crate) after: T,
}

#[derive(Debug, Serialize)]
pub(crate) struct Eval {
    pub(crate) text: String,
    pub(crate) window: usize,
    #[serde(flatten)]
    pub(crate) comparison: Comparison,
    /// The same with keys and values in fewer bits as well.
    pub(crate) caches: Vec<CacheLine>,
}

/// What a format of keys and values takes and costs, on top of the quantized weights.
#[derive(Debug, Serialize)]
pub(crate) struct CacheLine {
    pub(crate) kv_dtype: &'static str,
    /// Keys and values of one position, all layers.
    pub(crate) bytes_per_token: u64,
    pub(crate) perplexity: f64,
    pub(crate) kl: f64,
}

impl Report {
    /// Writes it under another name and renames it then.
    pub(crate) fn save(&self, file: &Path) -> Result<(), Failure> {
        let json = serde_json::to_string_pretty(self)
            .map_err(|e| Failure::failed(format!("{}: {e}", file.display())))?;
        let part = part(file);
        fs::write(&part, json + "\n").and_then(|()| fs::rename(&part, file)).map_err(|e| {
            let _ = fs::remove_file(&part);
            unwritable(file, &e)
        })
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let Self { spec, method, layout, .. } = self;
        let groups = spec.group_size.map_or("one scale a row".to_owned(), |size| format!("groups of {size}"));
        let zeros = match (spec.format.is_integer(), spec.zero_points) {
            (true, true) => ", zero points",
            (true, false) => ", symmetric",
            _ => "",
        };
        let mut text =
            format!("format           {} ({groups}{zeros}), {method}, {layout} layout\n", spec.format);
        let change = |what: &str, change: &Change<u64>| {
            let share = 100.0 * change.after as f64 / change.before.max(1) as f64;
            format!("{what} {} -> {} ({share:.1} %)\n", bytes(change.before), bytes(change.after))
        };
        text.push_str(&change("file            ", &self.file_bytes));
        text.push_str(&change("weights, memory ", &self.weight_bytes));
        text.push_str(&format!("bits a weight    {:.2}\n", self.bits_per_weight));
        if let Some(Eval { comparison, caches, .. }) = &self.eval {
            let Comparison { tokens, base_perplexity, perplexity, kl, .. } = comparison;
            let loss = 100.0 * (perplexity / base_perplexity - 1.0);
            text.push_str(&format!(
                "perplexity       {base_perplexity:.3} -> {perplexity:.3} ({loss:+.2} %, {tokens} tokens)\n"
            ));
            text.push_str(&format!("KL(base || this) {kl:.6} nats a token\n"));
            for CacheLine { kv_dtype, bytes_per_token, perplexity, kl } in caches {
                let loss = 100.0 * (perplexity / base_perplexity - 1.0);
                text.push_str(&format!(
                    "with --kv-dtype {kv_dtype:5} {perplexity:.3} ({loss:+.2} %), KL {kl:.6}, {} a token\n",
                    bytes(*bytes_per_token)
                ));
            }
        }
        if !self.layers.is_empty() {
            text.push_str("relative error of each linear's output, in percent:\n");
            text.push_str(&self.layer_table());
        }
        text
    }

    /// One row a layer, one column a linear.
    fn layer_table(&self) -> String {
        const COLUMNS: [&str; 6] = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"];
        let mut table = format!("layer{}\n", COLUMNS.map(|name| format!("{name:>10}")).concat());
        for layer in self.layers.chunks(COLUMNS.len()) {
            let number = layer.first().and_then(|e| e.tensor.split('.').nth(1)).unwrap_or_default();
            let cells: String = layer.iter().map(|e| format!("{:>10.4}", 100.0 * e.relative_error)).collect();
            table.push_str(&format!("{number:>5}{cells}\n"));
        }
        let mean =
            self.layers.iter().map(|e| e.relative_error).sum::<f64>() / self.layers.len().max(1) as f64;
        table.push_str(&format!(" mean{:>10.4}\n", 100.0 * mean));
        table
    }
}

/// What a report is called until it is whole.
fn part(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    file.with_file_name(name)
}

fn unwritable(file: &Path, error: &std::io::Error) -> Failure {
    Failure::failed(format!("{}: the report cannot be written: {error}", file.display()))
}

/// Whether a report could be saved as `file`.
pub(crate) fn probe(file: &Path) -> Result<(), Failure> {
    if file.is_dir() {
        return Err(Failure::usage(format!(
            "--report: expected a file, found the directory {}",
            file.display()
        )));
    }
    let part = part(file);
    fs::write(&part, "").and_then(|()| fs::remove_file(&part)).map_err(|e| unwritable(file, &e))
}
