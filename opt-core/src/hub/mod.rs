//! Checkpoints from the Hugging Face hub, kept in the cache layout that Python's `huggingface_hub` uses, so that both
//! find each other's downloads.
//!
//! ```no_run
//! use opt_core::{CancelToken, hub::Hub};
//!
//! let hub = Hub::from_env()?;
//! let snapshot = hub.snapshot("facebook/opt-125m", &mut |_| std::ops::ControlFlow::Continue(()), &CancelToken::new())?;
//! println!("{}", snapshot.path.display()); // ~/.cache/huggingface/hub/models--facebook--opt-125m/snapshots/...
//! # Ok::<(), opt_core::Error>(())
//! ```

mod cache;
mod download;
mod http;
mod options;
mod select;

pub use options::HubOptions;

use crate::{CancelToken, Error, ErrorKind, ProgressFn, Result};
use cache::{Cache, is_commit};
use http::{Http, Refused, Repository};
use std::{fmt, path::PathBuf, str::FromStr};

/// A model's name on the hub: `name` or `org/name`, with `@revision` (a branch, tag or commit; default `main`).
///
/// ```
/// let id: opt_core::hub::ModelId = "facebook/opt-125m@refs/pr/3".parse()?;
/// assert_eq!((id.name(), id.revision()), ("facebook/opt-125m", "refs/pr/3"));
/// assert!("../opt-125m".parse::<opt_core::hub::ModelId>().is_err());
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelId {
    name: String,
    revision: String,
}

impl ModelId {
    /// `org/name` or `name`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The branch, tag or commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }
}

impl FromStr for ModelId {
    type Err = Error;

    fn from_str(id: &str) -> Result<Self> {
        let (name, revision) = id.split_once('@').unwrap_or((id, "main"));
        let part = |part: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            (1..=96).contains(&part.len())
                && part.chars().all(plain)
                && !part.starts_with(['.', '-'])
                && !part.ends_with(['.', '-'])
                && !part.contains("..")
                && !part.contains("--")
        };
        if !(name.split('/').count() <= 2 && name.split('/').all(part)) {
            return Err(Error::new(
                ErrorKind::Option,
                format_args!("{id:?} is not a model on the hub: expected org/name or org/name@revision"),
            ));
        }
        // A revision becomes a path under refs/.
        if !select::is_plain_path(revision) || revision.contains(['?', '#', '%', ' ']) {
            return Err(Error::new(
                ErrorKind::Option,
                format_args!("{id:?}: {revision:?} is not a revision"),
            ));
        }
        Ok(Self { name: name.to_owned(), revision: revision.to_owned() })
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.name),
            revision => write!(f, "{}@{revision}", self.name),
        }
    }
}

/// A checkpoint in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// A directory in Hugging Face layout.
    pub path: PathBuf,
    /// The commit that it holds.
    pub commit: String,
    /// Whether it came from the cache without asking the hub: offline, or because the hub was not reachable.
    pub unchecked: bool,
}

/// The hub and its local cache.
#[derive(Debug, Clone)]
pub struct Hub {
    options: HubOptions,
    http: Http,
}

impl Hub {
    /// A hub with these options.
    pub fn new(options: HubOptions) -> Self {
        Self { http: Http::new(&options), options }
    }

    /// A hub as the environment says; see [`HubOptions::from_env`].
    ///
    /// # Errors
    /// As [`HubOptions::from_env`].
    pub fn from_env() -> Result<Self> {
        HubOptions::from_env().map(Self::new)
    }

    /// The local directory of a model, downloading what is missing of it: config.json, generation_config.json, the
    /// tokenizer's files, and the weights as safetensors where the hub has them, else as PyTorch pickles, else as Flax
    /// msgpack; single or in shards. `id` is `org/name` or `org/name@revision`.
    ///
    /// A file appears under its name only when it is whole. A download that was broken off continues where it ended,
    /// in this call (a few times) or in a later one. When the hub is not reachable, or in offline mode, a snapshot that
    /// is complete in the cache is used instead.
    ///
    /// `progress` hears of every file in bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] when `id` cannot be a model; [`ErrorKind::NotFound`] when the hub (or, offline, the cache)
    /// does not have it; [`ErrorKind::Hub`] when access is refused, the hub is not reachable or silent for longer than
    /// the time-outs, or sends something else than it announced; [`ErrorKind::Io`] when the cache cannot be written;
    /// [`ErrorKind::Cancelled`].
    pub fn snapshot(
        &self,
        id: &str,
        progress: &mut ProgressFn<'_>,
        cancel: &CancelToken,
    ) -> Result<Snapshot> {
        let id: ModelId = id.parse()?;
        let cache = Cache::new(&self.options.cache, &id);
        let local = |commit: String| Snapshot { path: cache.snapshot(&commit), commit, unchecked: true };
        // A commit never changes, so a complete one needs no questions.
        if is_commit(id.revision()) && cache.is_complete(id.revision()) {
            return Ok(local(id.revision().to_owned()));
        }
        let cached = || cache.resolve(id.revision()).filter(|commit| cache.is_complete(commit));
        if self.options.offline {
            return cached().map(local).ok_or_else(|| {
                let message = format!(
                    "{id}: not in the cache {}, and offline mode is on",
                    self.options.cache.display()
                );
                Error::new(ErrorKind::NotFound, message)
            });
        }
        match self.download(&id, &cache, progress, cancel) {
            Ok(snapshot) => Ok(snapshot),
            Err(Refused { error, unreachable: true }) => match cached() {
                Some(commit) => {
                    tracing::warn!("{error}; using the cached snapshot {commit}");
                    Ok(local(commit))
                }
                None => Err(error),
            },
            Err(Refused { error, .. }) => Err(error),
        }
    }

    fn download(
        &self,
        id: &ModelId,
        cache: &Cache,
        progress: &mut ProgressFn<'_>,
        cancel: &CancelToken,
    ) -> std::result::Result<Snapshot, Refused> {
        let work = "the download";
        cancel.check(work)?;
        let Repository { commit, files } = self.http.repository(id)?;
        let job = download::Job {
            http: &self.http,
            cache,
            id,
            commit: &commit,
            cancel,
            retries: self.options.retries,
        };
        let wanted = select::choose(&files).map_err(|e| e.at(id))?;
        for name in wanted.first {
            job.fetch(&name, progress)?;
        }
        let weights = match wanted.weights {
            select::Weights::Single(name) => vec![name],
            select::Weights::Sharded(index) => {
                let path = job.fetch(&index, progress)?;
                select::shards(&path, &files).map_err(|e| e.at(id))?
            }
        };
        for name in weights {
            job.fetch(&name, progress)?;
        }
        // Last, so that a name in refs/ always leads to a whole snapshot.
        cache.write_ref(id.revision(), &commit)?;
        Ok(Snapshot { path: cache.snapshot(&commit), commit, unchecked: false })
    }
}
