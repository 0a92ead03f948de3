//! `retrieval query`: the passages nearest to a question.

use crate::{
    ann::Ann,
    at_most, chunk,
    folder::{self, Folder},
    store::{Passage, Store},
};
use clap::Args;
use opt_core::{Result, embedding::Embedder};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct Query {
    /// The folder with the index
    pub(crate) folder: PathBuf,
    /// What to look for
    question: String,
    /// How many passages
    #[arg(short, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    k: u16,
    /// Compare with every passage, in SQLite, rather than with those that the approximate index suggests
    #[arg(long)]
    exact: bool,
}

impl Query {
    pub(crate) fn run(&self, folder: &Folder, embedder: &Embedder) -> Result<()> {
        let found = nearest(folder, embedder, &self.question, self.k.into(), self.exact)?;
        for (place, (score, Passage { path, start, end, text, .. })) in (1..).zip(found) {
            println!("{place}. {score:.3} {path}:{start}-{end}\n   {text}");
        }
        Ok(())
    }
}

/// The `k` passages nearest to a text, with the cosine of their vectors and that of the text, best first.
///
/// # Errors
/// [`ErrorKind::Option`](opt_core::ErrorKind::Option) if there are fewer, and those of the parts.
pub(crate) fn nearest(
    folder: &Folder,
    embedder: &Embedder,
    text: &str,
    k: usize,
    exact: bool,
) -> Result<Vec<(f32, Passage)>> {
    at_most(k, folder.manifest.passages)?;
    let query = embedder.embed(chunk::flat(text)).map_err(|e| e.at("the question"))?;
    let store = Store::open(&folder.path(folder::SQLITE))?;
    let hits = if exact {
        store.nearest(query.vector(), k)?
    } else {
        let mut found = Ann::open(&folder.path(folder::ANN))?.search(&[query.vector()], k)?;
        found.pop().unwrap_or_default()
    };
    hits.into_iter().map(|(id, score)| Ok((score, store.passage(id)?))).collect()
}
