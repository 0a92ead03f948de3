//! `retrieval clusters`: passages grouped by k-means.

use crate::{
    at_most,
    folder::{self, Folder},
    store::Store,
};
use clap::Args;
use opt_core::{
    Error, ErrorKind, Result,
    embedding::{Embedder, Index as Exact},
};
use std::path::PathBuf;

/// It is done when nothing changes any more, mostly after a few dozen.
const MOST_STEPS: usize = 200;

#[derive(Debug, Args)]
pub(crate) struct Clusters {
    /// The folder with the index
    pub(crate) folder: PathBuf,
    /// How many groups
    #[arg(short, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    k: u16,
    /// How many passages to show of each
    #[arg(long, default_value_t = 3)]
    show: usize,
}

impl Clusters {
    pub(crate) fn run(&self, folder: &Folder, embedder: &Embedder) -> Result<()> {
        at_most(self.k.into(), folder.manifest.passages)?;
        let store = Store::open(&folder.path(folder::SQLITE))?;
        let index = Exact::open(embedder, folder.path(folder::EXACT))?;
        let vector = |id: usize| {
            let missing = || {
                Error::new(ErrorKind::Checkpoint, format_args!("passage {id}: expected a vector, found none"))
            };
            index.vector(&id.to_string()).ok_or_else(missing)
        };
        let vectors: Vec<&[f32]> = (0..folder.manifest.passages).map(vector).collect::<Result<_>>()?;

        let found = clustering::kmeans(self.k.into(), &vectors, MOST_STEPS);
        // By number of the cluster: its passages and how far they are from its centre.
        let mut clusters: Vec<Vec<(f64, usize)>> = vec![Vec::new(); self.k.into()];
        for (id, (vector, cluster)) in vectors.iter().zip(&found.membership).enumerate() {
            let centre = found.centroids.get(*cluster).map_or(&[][..], |centre| &centre.0);
            let distance =
                vector.iter().zip(centre).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
            if let Some(members) = clusters.get_mut(*cluster) {
                members.push((distance, id));
            }
        }
        clusters.sort_by_key(|members| std::cmp::Reverse(members.len()));
        for (place, mut members) in (1..).zip(clusters) {
            println!("cluster {place}: {} passages", members.len());
            members.sort_by(|a, b| a.0.total_cmp(&b.0));
            for (distance, id) in members.into_iter().take(self.show) {
                let passage = store.passage(id)?;
                println!(
                    "  {distance:.3} {}:{}-{} {}",
                    passage.path, passage.start, passage.end, passage.text
                );
            }
        }
        Ok(())
    }
}
