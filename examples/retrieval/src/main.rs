//! Finds passages by meaning in a folder of texts, and answers questions from them:
//!
//! ```text
//! cargo run --release -p opt-retrieval -- index docs --into docs.index
//! cargo run --release -p opt-retrieval -- query docs.index "how is a model fine-tuned?"
//! ```
//!
//! One file is one room: [`chunk`] cuts texts into passages, [`folder`] keeps an index whole on disk, [`store`] is
//! SQLite, [`ann`] the approximate index; the others are a command each.

mod ann;
mod answer;
mod chunk;
mod cluster;
mod folder;
mod indexing;
mod recall;
mod search;
mod store;

use clap::{Args, Parser, Subcommand, ValueEnum};
use folder::Folder;
use opt_core::{
    CancelToken, Error, ErrorKind, Opt, Result,
    embedding::{EmbedOptions, Embedder, Pooling},
};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Search a folder of texts by meaning, and answer questions from what is found.
#[derive(Debug, Parser)]
#[command(name = "retrieval", version)]
struct Cli {
    #[command(flatten)]
    model: ModelArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct ModelArgs {
    /// A model's folder, as Hugging Face ships it
    #[arg(long, global = true, default_value = "models/opt-novels")]
    model: PathBuf,
    /// Whose state makes the vectors: 0 is the embeddings, -1 the last layer [default: -1, or what the index has]
    #[arg(long, global = true, allow_negative_numbers = true)]
    layer: Option<i32>,
    /// How states become a vector [default: weighted-mean, or what the index has]
    #[arg(long, global = true)]
    pooling: Option<PoolingArg>,
}

/// Poolings that make one vector of a text, and not the same for all.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum PoolingArg {
    Mean,
    WeightedMean,
    Last,
    Max,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Index the .txt and .md files of a folder; an index that is there is replaced when the new one is whole
    Index(indexing::Index),
    /// Show the passages nearest to a question
    Query(search::Query),
    /// Answer a question with the nearest passages before the model's eyes
    Answer(answer::Answer),
    /// Measure what the approximate index finds of what an exact search finds, and how fast both are
    Recall(recall::Recall),
    /// Group the passages by k-means
    Clusters(cluster::Clusters),
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if error.kind() == ErrorKind::Cancelled { ExitCode::from(130) } else { ExitCode::FAILURE }
        }
    }
}

fn run(Cli { model, command }: Cli) -> Result<()> {
    match command {
        Command::Index(job) => job.run(&model.embedder()?, &catch_interrupts()?),
        Command::Query(job) => {
            let (folder, embedder) = model.open(&job.folder)?;
            job.run(&folder, &embedder)
        }
        Command::Answer(job) => {
            let (folder, embedder) = model.open(&job.folder)?;
            job.run(&folder, &embedder)
        }
        Command::Recall(job) => {
            let (folder, embedder) = model.open(&job.folder)?;
            job.run(&folder, &embedder, &catch_interrupts()?)
        }
        Command::Clusters(job) => {
            let (folder, embedder) = model.open(&job.folder)?;
            job.run(&folder, &embedder)
        }
    }
}

/// From here on the first Ctrl-C ends the work where nothing is left behind, and the second one at once.
fn catch_interrupts() -> Result<CancelToken> {
    let cancel = CancelToken::new();
    let pressed = cancel.clone();
    let caught = ctrlc::set_handler(move || {
        if pressed.is_cancelled() {
            std::process::exit(130);
        }
        pressed.cancel();
    });
    caught.map_err(|e| Error::because(ErrorKind::Io, "Ctrl-C cannot be caught", e))?;
    Ok(cancel)
}

impl ModelArgs {
    /// What makes the vectors of a new index. Of length 1, so that the cosine, the dot product and the distance of two
    /// of them put neighbours in the same order: k-means sees what the searches see.
    fn embedder(&self) -> Result<Embedder> {
        let pooling = match self.pooling {
            None | Some(PoolingArg::WeightedMean) => Pooling::WeightedMean,
            Some(PoolingArg::Mean) => Pooling::Mean,
            Some(PoolingArg::Last) => Pooling::LastToken,
            Some(PoolingArg::Max) => Pooling::Max,
        };
        let options =
            EmbedOptions::default().layer(self.layer.unwrap_or(-1)).pooling(pooling).normalize(true);
        Embedder::new(&Opt::open(&self.model)?, options)
    }

    /// An index and what makes vectors like those in it.
    fn open(mut self, path: &Path) -> Result<(Folder, Embedder)> {
        // First what is quick to refuse.
        let folder = Folder::open(path)?;
        let found = &folder.manifest.identity;
        self.layer = self.layer.or(i32::try_from(found.layer).ok());
        self.pooling = self.pooling.or(match found.pooling {
            Pooling::Mean => Some(PoolingArg::Mean),
            Pooling::LastToken => Some(PoolingArg::Last),
            Pooling::Max => Some(PoolingArg::Max),
            _ => None,
        });
        let made = |e: Error| e.at(format_args!("{}: made by another model or pooling", path.display()));
        let embedder = match self.embedder() {
            // A model with fewer layers.
            Err(e) if e.kind() == ErrorKind::Option => return Err(made(e)),
            other => other?,
        };
        found.check(&embedder.identity()?).map_err(made)?;
        Ok((folder, embedder))
    }
}

/// # Errors
/// [`ErrorKind::Option`] if more is asked for than there is.
fn at_most(k: usize, passages: usize) -> Result<()> {
    if k <= passages {
        return Ok(());
    }
    let message = format_args!("-k: expected at most {passages}, the number of passages, found {k}");
    Err(Error::new(ErrorKind::Option, message))
}
