//! The approximate index: arroy, a forest of random splits (Annoy's method) in an LMDB file that is mapped into memory,
//! so that a large one is opened in no time.

use arroy::{Database, Reader, Writer, distances::Cosine};
use heed::{CommitOrAbort, Env, EnvOpenOptions};
use opt_core::{CancelToken, Error, ErrorKind, Result};
use rand::{SeedableRng, rngs::StdRng};
use std::{convert::Infallible, fs, num::NonZeroUsize, path::Path};

/// More of them find more, and take longer to build and more space.
const TREES: usize = 16;
/// Most vectors of a leaf.
const LEAF: usize = 32;
/// How many vectors are looked at for each neighbour that is asked for and each of ten more, some of them several times,
/// since they are in every tree. More of them find more, and take longer.
const LOOKED_AT: usize = 100;

/// An approximate index of vectors numbered from 0.
pub(crate) struct Ann {
    env: Env,
    vectors: Database<'static, Cosine>,
}

impl Ann {
    /// Builds the index of some vectors of one width into a new folder.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], [`ErrorKind::Cancelled`].
    pub(crate) fn create<'a>(
        folder: &Path,
        width: usize,
        vectors: impl ExactSizeIterator<Item = &'a [f32]>,
        cancel: &CancelToken,
    ) -> Result<()> {
        fs::create_dir(folder).map_err(|e| failed(folder, e))?;
        // The most that the file may grow to: several times what was ever seen. Only Windows takes it from the start.
        let size = (vectors.len() * (4 * width + 4096) * 4 + (16 << 20)).next_multiple_of(1 << 20);
        let build = || -> arroy::Result<()> {
            let env = open(folder, Some(size))?;
            let all = env.write_txn()?;
            let CommitOrAbort::Commit(vectors_in) = env.create_databases_and_commit(
                all,
                |made, all| -> heed::Result<CommitOrAbort<_, Infallible>> {
                    made.create_database(all, None).map(CommitOrAbort::Commit)
                },
            )?;
            let mut all = env.write_txn()?;
            let writer = Writer::<Cosine>::new(vectors_in, 0, width);
            for (id, vector) in (0u32..).zip(vectors) {
                writer.add_item(&mut all, id, vector)?;
            }
            // Always the same trees of the same vectors.
            let mut rng = StdRng::seed_from_u64(0);
            let mut builder = writer.builder(&mut rng);
            builder.n_trees(TREES).split_after(LEAF).cancel(|| cancel.is_cancelled()).build(&mut all)?;
            all.commit()?;
            Ok(())
        };
        build().map_err(|e| match e {
            arroy::Error::BuildCancelled => Error::new(ErrorKind::Cancelled, "indexing was cancelled"),
            other => failed(folder, other),
        })
    }

    /// # Errors
    /// [`ErrorKind::Io`] if there is none.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let find = || -> heed::Result<Option<Self>> {
            let env = open(folder, None)?;
            let all = env.read_txn()?;
            let CommitOrAbort::Commit(found) = env.open_databases_and_commit(
                all,
                |made, all| -> heed::Result<CommitOrAbort<_, Infallible>> {
                    made.open_database(all, None).map(CommitOrAbort::Commit)
                },
            )?;
            Ok(found.map(|vectors| Self { env, vectors }))
        };
        let missing = || Error::new(ErrorKind::Io, format_args!("{}: no vectors", folder.display()));
        find().map_err(|e| failed(folder, e))?.ok_or_else(missing)
    }

    /// The `k` vectors most like each query, as number and cosine, best first; most of them, at least.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub(crate) fn search(&self, queries: &[&[f32]], k: usize) -> Result<Vec<Vec<(usize, f32)>>> {
        let find = || -> arroy::Result<Vec<Vec<(usize, f32)>>> {
            let all = self.env.read_txn()?;
            let reader = Reader::open(&all, 0, self.vectors)?;
            let mut search = reader.nns(k);
            if let Some(count) = NonZeroUsize::new((k + 10) * LOOKED_AT) {
                search.search_k(count);
            }
            let one = |query: &&[f32]| -> arroy::Result<Vec<(usize, f32)>> {
                let hits = search.by_vector(&all, query)?;
                // arroy's distance is 0 for vectors of one direction, 1 for those of opposite ones.
                Ok(hits.into_iter().map(|(id, distance)| (id as usize, 1.0 - 2.0 * distance)).collect())
            };
            queries.iter().map(one).collect()
        };
        find().map_err(|e| failed(self.env.path(), e))
    }
}

/// Opens the file in a folder, with room to grow to `size`.
fn open(folder: &Path, size: Option<usize>) -> heed::Result<Env> {
    let mut options = EnvOpenOptions::new();
    if let Some(size) = size {
        options.map_size(size);
    }
    // SAFETY: a file that is mapped must not be changed but through LMDB. This one is built under a name that nobody
    // else knows, is never written again, and stays mapped while it is deleted.
    unsafe { options.open(folder) }
}

fn failed(folder: &Path, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::because(ErrorKind::Io, format_args!("{}", folder.display()), error)
}
