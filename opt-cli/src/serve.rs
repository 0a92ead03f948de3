//! `opt serve`.

use crate::{
    args::{Format, KvFormat, PlaceArgs, Quantized, ShowArgs},
    model,
    out::{Failure, Out},
    progress::Console,
};
use clap::Args;
use opt_core::{Opt, adapter::Adapter, batching::BatchOptions};
use opt_serve::{ServeOptions, Server};
use std::{
    fs,
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::net::TcpListener;

const HELP: &str = "\
Examples:
  opt serve
  opt serve --model opt-125m --quantize int8 --port 8000
  opt serve --model opt-125m --adapter poems --adapter recipes
  curl http://127.0.0.1:8080/v1/completions -H 'content-type: application/json' \\
    -d '{\"prompt\": \"The river\", \"max_tokens\": 20}'

When requests are taken, one line is printed on stdout:
  listening on http://127.0.0.1:8080
Ctrl-C or SIGTERM ends the server: what runs may go on for --shutdown-seconds.
A second one ends it at once.

Without API keys, whoever reaches the port may use the server, so that it
listens to this machine only unless --host says otherwise. Keys come from
$OPT_API_KEYS, separated by commas, or from --api-key-file, one a line; no flag
takes a key, for flags are seen in the list of processes.";

/// Serve a model over HTTP, by an API like OpenAI's.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Serve {
    #[command(flatten)]
    place: PlaceArgs,

    /// Hold the weights in this number format, whatever the file has.
    #[arg(long, value_name = "FORMAT", default_value = "f32", help_heading = "Model")]
    dtype: Format,

    /// Quantize while loading: the linears of the layers, and for integers the token table in int8; what is left is
    /// held as --dtype says.
    #[arg(long, value_name = "FORMAT", help_heading = "Model")]
    quantize: Option<Quantized>,

    /// Load this adapter beside the model (may be given several times). Requests name the adapter they want, by its
    /// directory's name, as their model.
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    adapter: Vec<PathBuf>,

    /// Hold the keys and values of the context in this number format.
    #[arg(long, value_name = "FORMAT", default_value = "f32", help_heading = "Model")]
    kv_dtype: KvFormat,

    /// Call the model by this name. [default: its directory's]
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    model_name: Option<String>,

    /// Listen on this address; 0.0.0.0 lets other machines in.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", help_heading = "Network")]
    host: IpAddr,

    /// Listen on this port; 0 takes any that is free.
    #[arg(long, value_name = "PORT", default_value_t = 8080, help_heading = "Network")]
    port: u16,

    /// Take only requests with one of the keys in this file, one a line.
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    api_key_file: Option<PathBuf>,

    /// Let pages of this origin call the server from browsers (may be given several times; * is all).
    #[arg(long, value_name = "ORIGIN", help_heading = "Network")]
    cors_origin: Vec<String>,

    /// Serve no page at /.
    #[arg(long, help_heading = "Network")]
    no_page: bool,

    /// Hold at most N connections.
    #[arg(long, value_name = "N", default_value = "1024", help_heading = "Limits")]
    max_connections: NonZeroUsize,

    /// Let at most N prompts wait or run; the next are answered with 429.
    #[arg(long, value_name = "N", default_value = "256", help_heading = "Limits")]
    queue: NonZeroUsize,

    /// Advance at most N sequences together.
    #[arg(long, value_name = "N", default_value = "64", help_heading = "Limits")]
    max_sequences: NonZeroUsize,

    /// Run at most N tokens in a step.
    #[arg(long, value_name = "N", default_value = "256", help_heading = "Limits")]
    max_rows: NonZeroUsize,

    /// Run what prompts begin with in common once for each of them: answers then say nothing of what others have sent.
    #[arg(long, help_heading = "Limits")]
    no_shared_prefixes: bool,

    /// Take at most N MiB for keys and values.
    #[arg(long, value_name = "N", default_value = "2048", help_heading = "Limits")]
    cache_mib: NonZeroUsize,

    /// Let a request ask for at most N tokens. [default: the context]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    max_tokens: Option<NonZeroUsize>,

    /// Let a request have at most N stop strings.
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Limits")]
    max_stops: usize,

    /// Tell at most N of the most probable tokens.
    #[arg(long, value_name = "N", default_value_t = 5, help_heading = "Limits")]
    max_logprobs: usize,

    /// Take bodies of at most N KiB.
    #[arg(long, value_name = "N", default_value = "8192", help_heading = "Limits")]
    max_body_kib: NonZeroUsize,

    /// Let all bodies that are being read have at most N KiB together; the next are answered with 429.
    #[arg(long, value_name = "N", default_value = "65536", help_heading = "Limits")]
    max_bodies_kib: NonZeroUsize,

    /// Say that the engine hangs, and take no requests, once a single step has taken this long.
    #[arg(long, value_name = "SECONDS", default_value = "120", help_heading = "Limits", value_parser = seconds)]
    stall_seconds: Duration,

    /// End a request that takes longer than this, waiting included.
    #[arg(long, value_name = "SECONDS", default_value = "600", help_heading = "Limits", value_parser = seconds)]
    timeout: Duration,

    /// Let what runs go on for so long when the server is to end.
    #[arg(long, value_name = "SECONDS", default_value = "30", help_heading = "Limits", value_parser = seconds)]
    shutdown_seconds: Duration,

    /// Write prompts and answers to the log.
    #[arg(long, help_heading = "Output")]
    log_prompts: bool,

    #[command(flatten)]
    show: ShowArgs,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().map_err(|error| error.to_string())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

impl Serve {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let console = Console::new(self.show);
        let keys = self.keys()?;
        // A port that is taken is to be known before a large model is loaded.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(|error| Failure::failed(format!("threads cannot be started: {error}")))?;
        let address = SocketAddr::new(self.host, self.port);
        let listener = runtime.block_on(TcpListener::bind(address)).map_err(|error| {
            Failure::failed(format!("{address}: cannot listen there: {error} (--port 0 takes a free port)"))
        })?;
        let address =
            listener.local_addr().map_err(|error| Failure::failed(format!("{address}: {error}")))?;
        console.catch_interrupts();
        let opt = self.load(&console)?;
        let options = self.options(keys, &console)?;
        let again = Arc::new(self);
        let reload = {
            let serve = Arc::clone(&again);
            move || {
                let quiet = ShowArgs { json: serve.show.json, quiet: true };
                serve.load(&Console::new(quiet)).map_err(Failure::into_error)
            }
        };
        let server = Server::with(opt, options)?.reload_with(reload);
        let mut out = Out::new();
        if again.show.json {
            out.json(&serde_json::json!({ "listening": format!("http://{address}") }))?;
        } else {
            out.line(&format!("listening on http://{address}"))?;
        }
        let cancel = console.cancel.clone();
        let asked = async move {
            while !cancel.is_cancelled() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        Ok(runtime.block_on(server.serve(listener, asked))?)
    }

    fn load(&self, console: &Console) -> Result<Opt, Failure> {
        let adapters = self.adapter.iter().map(Adapter::open).collect::<Result<Vec<_>, _>>()?;
        self.place.load(self.place.model.as_deref(), self.dtype, self.quantize, adapters, console)
    }

    fn keys(&self) -> Result<Vec<String>, Failure> {
        let mut keys = Vec::new();
        if let Some(list) = std::env::var_os("OPT_API_KEYS") {
            let list = list.to_str().unwrap_or_default();
            keys.extend(list.split(',').map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned));
            if keys.is_empty() {
                // A variable that another one was to fill does not mean that everybody may come in.
                let message =
                    "OPT_API_KEYS: expected keys with commas between them, found none: unset it to need none";
                return Err(Failure::failed(message.to_owned()));
            }
        }
        if let Some(file) = &self.api_key_file {
            let fail = |what: &dyn std::fmt::Display| Failure::failed(format!("{}: {what}", file.display()));
            let text = fs::read_to_string(file).map_err(|error| fail(&error))?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            let before = keys.len();
            keys.extend(lines.map(str::to_owned));
            if keys.len() == before {
                // Whoever names a file of keys does not mean that everybody may come in.
                return Err(fail(&"expected one API key a line, found none"));
            }
        }
        Ok(keys)
    }

    fn options(&self, keys: Vec<String>, console: &Console) -> Result<ServeOptions, Failure> {
        let path = model::find(self.place.model.as_deref(), console)?;
        let name = self.model_name.clone().unwrap_or_else(|| name(&path));
        let batch = BatchOptions::default()
            .rows(self.max_rows.get())
            .sequences(self.max_sequences.get())
            .cache_bytes((self.cache_mib.get() as u64) << 20)
            .share_prefixes(!self.no_shared_prefixes)
            .threads(self.place.threads.map(NonZeroUsize::get));
        Ok(ServeOptions::default()
            .model(name)
            .batch(batch)
            .cache_dtype(self.kv_dtype.into())
            .queue(self.queue.get())
            .max_tokens(self.max_tokens.map(NonZeroUsize::get))
            .stops(self.max_stops)
            .logprobs(self.max_logprobs)
            .body_bytes(self.max_body_kib.get() << 10)
            .bodies_bytes(self.max_bodies_kib.get() << 10)
            .timeout(self.timeout)
            .stall(self.stall_seconds)
            .connections(self.max_connections.get())
            .shutdown(self.shutdown_seconds)
            .api_keys(keys)
            .cors_origins(self.cors_origin.clone())
            .log_prompts(self.log_prompts)
            .page(!self.no_page))
    }
}

/// What a model is called if nothing else is said: its directory's name, without a file's.
fn name(path: &Path) -> String {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let dir = if path.is_file() { path.parent().unwrap_or(&path) } else { &path };
    dir.file_name().map_or_else(|| "opt".to_owned(), |name| name.to_string_lossy().into_owned())
}
