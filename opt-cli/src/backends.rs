//! `opt backends`.

use crate::{
    args::ShowArgs,
    out::{Failure, Out},
};
use clap::Args;
use opt_core::{
    Info, Result,
    backends::{self, BackendOptions},
};
use serde_json::{Map, Value, json};
use std::num::NonZeroUsize;

const HELP: &str = "\
Examples:
  opt backends
  opt backends --json

One line for each backend of this build: its name, device, threads, instruction
set or adapter, number formats and limits, or the reason why it cannot be used
here.";

/// List the backends of this build and what they found on this machine.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Backends {
    /// Say what is found with N threads. [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    #[command(flatten)]
    show: ShowArgs,
}

impl Backends {
    pub(crate) fn run(&self) -> std::result::Result<(), Failure> {
        let mut options = BackendOptions::default();
        options.threads = self.threads.map(NonZeroUsize::get);
        let mut out = Out::new();
        backends::list(&options).iter().try_for_each(|(name, found)| {
            if self.show.json { out.json(&as_json(name, found)) } else { out.line(&as_text(name, found)) }
        })
    }
}

fn as_text(name: &str, found: &Result<Info>) -> String {
    let info = match found {
        Ok(info) => info,
        Err(error) => return format!("{name}: not usable here: {error}"),
    };
    let mut parts = vec![info.device.clone()];
    if info.threads > 0 {
        parts.push(format!("{} threads", info.threads));
    }
    parts.extend(info.simd.clone());
    parts.push(dtypes(info).join("/"));
    parts.push(match info.max_binding {
        Some(limit) => format!("at most {} a binding", crate::out::bytes(limit)),
        None => "no limit".to_owned(),
    });
    if info.deterministic {
        parts.push("deterministic".to_owned());
    }
    parts.extend(info.details.iter().map(|(name, value)| format!("{name} {value}")));
    format!("{name}: {}", parts.join(", "))
}

fn as_json(name: &str, found: &Result<Info>) -> Value {
    match found {
        Ok(info) => json!({
            "name": name,
            "device": info.device,
            "threads": info.threads,
            "simd": info.simd,
            "dtypes": dtypes(info),
            "max_binding": info.max_binding,
            "deterministic": info.deterministic,
            "details": info.details.iter().cloned().map(|(k, v)| (k, v.into())).collect::<Map<_, Value>>(),
        }),
        Err(error) => json!({ "name": name, "error": error.to_string() }),
    }
}

fn dtypes(info: &Info) -> Vec<String> {
    info.dtypes.iter().map(ToString::to_string).collect()
}
