//! `retrieval recall`: what the approximate index finds of what an exact search finds, and how fast both are.

use crate::{
    ann::Ann,
    at_most, chunk,
    folder::{self, Folder},
    store::{Passage, Store},
};
use clap::Args;
use opt_core::{
    CancelToken, Error, ErrorKind, Prompt, Result,
    embedding::{Embedder, Embedding, Index as Exact},
};
use std::{ops::ControlFlow, path::PathBuf, time::Instant};

#[derive(Debug, Args)]
pub(crate) struct Recall {
    /// The folder with the index
    pub(crate) folder: PathBuf,
    /// How many neighbours
    #[arg(short, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    k: u16,
    /// Most queries, from passages spread over all of them
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    queries: u32,
}

impl Recall {
    pub(crate) fn run(&self, folder: &Folder, embedder: &Embedder, cancel: &CancelToken) -> Result<()> {
        let k = usize::from(self.k);
        at_most(k, folder.manifest.passages)?;
        let store = Store::open(&folder.path(folder::SQLITE))?;
        let exact = Exact::open(embedder, folder.path(folder::EXACT))?;
        let ann = Ann::open(&folder.path(folder::ANN))?;

        // Queries that are not in the index, and of which is known where they are from.
        let passages = store.passages()?;
        let every = passages.len().div_ceil(self.queries as usize).max(1);
        let asked = passages.iter().enumerate().step_by(every);
        let asked: Vec<(usize, &str)> = asked.filter_map(|(id, p)| Some((id, part(p)?))).collect();
        if asked.is_empty() {
            let message = "expected passages of several words, to ask for some of them, found none";
            return Err(Error::new(ErrorKind::Option, message));
        }
        let prompts: Vec<Prompt> = asked.iter().map(|(_, text)| (*text).into()).collect();
        let begun = Instant::now();
        let vectors = embedder.embed_with(&prompts, cancel, &mut |_| ControlFlow::Continue(()))?;
        let embedding = begun.elapsed().as_secs_f64();
        let queries: Vec<&[f32]> = vectors.iter().map(Embedding::vector).collect();

        let (by_exact, exact_rate) = timed(&queries, || {
            let search = |query: &&[f32]| -> Result<Vec<usize>> {
                let hits = exact.search(query, k)?;
                Ok(hits.iter().filter_map(|hit| hit.id.parse().ok()).collect())
            };
            queries.iter().map(search).collect()
        })?;
        let ids = |hits: Vec<(usize, f32)>| hits.into_iter().map(|(id, _)| id).collect();
        let (by_sqlite, sqlite_rate) =
            timed(&queries, || queries.iter().map(|query| store.nearest(query, k).map(ids)).collect())?;
        let (by_ann, ann_rate) =
            timed(&queries, || Ok(ann.search(&queries, k)?.into_iter().map(ids).collect()))?;

        let count = queries.len();
        println!("{count} queries, each a part of a passage, embedded in {embedding:.1} s");
        println!("index                      recall@{k}   own passage@{k}   queries/s");
        for (name, found, rate) in [
            ("exact, opt-core in memory", &by_exact, exact_rate),
            ("exact, sqlite-vec", &by_sqlite, sqlite_rate),
            ("approximate, arroy", &by_ann, ann_rate),
        ] {
            let alike =
                by_exact.iter().zip(found).map(|(expected, found)| share(expected, found)).sum::<f64>();
            let own = asked.iter().zip(found).filter(|((id, _), found)| found.contains(id)).count();
            let (alike, own) = (alike / count as f64, own as f64 / count as f64);
            println!("{name:27}{alike:<12.3}{own:<18.3}{rate:.0}");
        }
        Ok(())
    }
}

/// The numbers of what was found for each query.
type Found = Vec<Vec<usize>>;

/// What comes of a search for all queries, and how many a second it was.
fn timed(queries: &[&[f32]], search: impl FnOnce() -> Result<Found>) -> Result<(Found, f64)> {
    let begun = Instant::now();
    let found = search()?;
    Ok((found, queries.len() as f64 / begun.elapsed().as_secs_f64().max(1e-9)))
}

/// How much of `expected` was found.
fn share(expected: &[usize], found: &[usize]) -> f64 {
    let hits = expected.iter().filter(|id| found.contains(id)).count();
    hits as f64 / expected.len().max(1) as f64
}

/// The middle one of several sentences, or else the second half of the only one.
fn part(passage: &Passage) -> Option<&str> {
    let text = &passage.text;
    let found = chunk::sentences(text, 0..text.len());
    if found.len() > 1 {
        return text.get(found.get(found.len() / 2)?.clone());
    }
    let gaps: Vec<usize> = text.match_indices(' ').map(|(at, _)| at + 1).collect();
    text.get(*gaps.get(gaps.len() / 2)?..)
}
