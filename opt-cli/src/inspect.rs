//! `opt inspect`.

use crate::{
    args::ShowArgs,
    model,
    out::{Failure, Out, bytes},
    progress::Console,
};
use clap::Args;
use opt_core::{
    DType,
    backends::{self, BackendOptions},
    checkpoint::{Inspection, MemoryNeed, inspect},
};
use serde::Serialize;
use std::path::PathBuf;

const HELP: &str = "\
Examples:
  opt inspect
  opt inspect opt-125m --tensors
  opt inspect opt-125m --json | jq .memory

Only the headers of the files are read. Memory is what the weights, and the
keys and values of one sequence, would take in each number format on the
backends of this build; add some scratch memory. The exit code is 1 if
something keeps the model from running.";

/// Say what is in a model and what running it takes, without loading it.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Inspect {
    /// The model: a directory, a weights file beside its config.json, or a hub id (in builds with the feature `hub`).
    /// [default: $OPT_MODEL, then models/opt-novels]
    #[arg(value_name = "MODEL")]
    place: Option<PathBuf>,
    /// The same as MODEL.
    #[arg(long = "model", value_name = "MODEL", conflicts_with = "place")]
    model: Option<PathBuf>,
    /// List every tensor.
    #[arg(long, help_heading = "Output")]
    tensors: bool,
    #[command(flatten)]
    show: ShowArgs,
}

/// What an inspection says, with the backends that could run it.
#[derive(Serialize)]
struct Printed<'a> {
    #[serde(flatten)]
    found: &'a Inspection,
    /// For each backend of this build that works here, what each of its number formats takes.
    backends: Vec<PrintedBackend>,
}

#[derive(Serialize)]
struct PrintedBackend {
    name: String,
    device: String,
    memory: Vec<MemoryNeed>,
}

impl Inspect {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let console = Console::new(self.show);
        let path = model::find(self.place.as_deref().or(self.model.as_deref()), &console)?;
        let found = inspect(path)?;
        let infos = backends::list(&BackendOptions::default()).into_iter().filter_map(|(_, info)| info.ok());
        // What the inspection says knows of quantized weights.
        let need = |&dtype: &DType| {
            let known = found.memory.iter().find(|need| need.dtype == dtype).copied();
            known.unwrap_or_else(|| MemoryNeed::of(&found.config, dtype))
        };
        let backends = infos.map(|info| PrintedBackend {
            memory: info.dtypes.iter().map(need).collect(),
            name: info.name,
            device: info.device,
        });
        let printed = Printed { found: &found, backends: backends.collect() };
        let mut out = Out::new();
        if self.show.json {
            out.json(&printed)?;
        } else {
            out.text(&self.text(&printed))?;
        }
        match &found.faults[..] {
            [] => Ok(()),
            [first, rest @ ..] => {
                let more =
                    if rest.is_empty() { String::new() } else { format!(" (and {} more)", rest.len()) };
                Err(Failure::failed(format!("{}: cannot run: {first}{more}", found.path.display())))
            }
        }
    }

    fn text(&self, printed: &Printed<'_>) -> String {
        let Inspection { path, format, config: c, parameters, files, tensors, warnings, faults, .. } =
            printed.found;
        let mut rows: Vec<(&str, String)> = vec![
            ("model", path.display().to_string()),
            ("parameters", parameters.to_string()),
            (
                "layers",
                format!(
                    "{}, {} wide, {} heads of {}",
                    c.num_hidden_layers,
                    c.hidden_size,
                    c.num_attention_heads,
                    c.head_dim()
                ),
            ),
            ("feed-forward", format!("{} wide, {}", c.ffn_dim, c.activation_function)),
            (
                "embeddings",
                format!(
                    "{} tokens, {} wide, {} LM head",
                    c.vocab_size,
                    c.word_embed_proj_dim,
                    if c.tie_word_embeddings { "tied" } else { "its own" }
                ),
            ),
            ("LayerNorm", format!("{} each block", if c.do_layer_norm_before { "before" } else { "after" })),
            ("context", format!("{} tokens", c.max_position_embeddings)),
            ("files", format!("{format}, {} tensors", tensors.len())),
        ];
        rows.extend(files.iter().map(|file| ("", format!("{}, {}", file.name, bytes(file.bytes)))));
        rows.extend(printed.found.quantization.iter().map(|layout| ("quantized", layout.clone())));
        for backend in &printed.backends {
            rows.push(("memory", format!("backend {}, {}", backend.name, backend.device)));
            rows.extend(backend.memory.iter().map(|need| {
                let (weights, token) = (bytes(need.weights), bytes(need.cache_per_token));
                let full = bytes(need.cache_at_full_context);
                (
                    "",
                    format!(
                        "{:4} weights {weights}, cache {token} a token, {full} for a full context",
                        need.dtype.to_string()
                    ),
                )
            }));
        }
        if self.tensors {
            rows.push(("tensors", String::new()));
            rows.extend(
                tensors
                    .iter()
                    .map(|t| ("", format!("{} {:?} {} in {}", t.stored_name, t.shape, t.dtype, t.file))),
            );
        }
        rows.extend(warnings.iter().map(|warning| ("warning", warning.clone())));
        rows.extend(faults.iter().map(|fault| ("fault", fault.clone())));
        rows.iter().map(|(name, value)| format!("{name:12}  {value}").trim_end().to_owned() + "\n").collect()
    }
}
