//! An index on disk: a folder whose one file `current.json` names the subfolder that everything else is in. A new index
//! is written to a subfolder of its own, and takes the place of the old one by renaming that one file: readers find the
//! old one whole or the new one whole.

use opt_core::{Error, ErrorKind, Result, embedding::Identity};
use serde::{Deserialize, Serialize};
use std::{
    fmt::Display,
    fs,
    io::Write,
    path::{Path, PathBuf},
};
use tempfile::{NamedTempFile, TempDir};

/// Vectors and texts for other programs.
pub(crate) const PARQUET: &str = "passages.parquet";
/// Texts, metadata and vectors.
pub(crate) const SQLITE: &str = "passages.sqlite";
/// The vectors again, for an exact search in memory.
pub(crate) const EXACT: &str = "exact.safetensors";
/// The approximate index.
pub(crate) const ANN: &str = "ann";

const MANIFEST: &str = "current.json";
const FORMAT: &str = "opt-retrieval-1";
const PREFIX: &str = "index-";

/// What `current.json` says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    format: String,
    /// The subfolder.
    folder: String,
    /// What made the vectors.
    pub(crate) identity: Identity,
    /// How many there are.
    pub(crate) passages: usize,
}

/// An index that is there.
#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) manifest: Manifest,
    files: PathBuf,
}

impl Folder {
    /// # Errors
    /// [`ErrorKind::NotFound`] for a folder without an index, [`ErrorKind::Checkpoint`] for one that is damaged.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let manifest = path.join(MANIFEST);
        let text = fs::read_to_string(&manifest).map_err(|e| {
            let message = format_args!(
                "{}: not an index (`retrieval index` makes one): {MANIFEST}: {e}",
                path.display()
            );
            Error::new(ErrorKind::NotFound, message)
        })?;
        let damaged = |what: &dyn Display| {
            Error::new(
                ErrorKind::Checkpoint,
                format_args!("{}: not a usable index: {what}", manifest.display()),
            )
        };
        let manifest: Manifest = serde_json::from_str(&text).map_err(|e| damaged(&e))?;
        if manifest.format != FORMAT {
            let message = format_args!("expected format {FORMAT:?}, found {:?}", manifest.format);
            return Err(damaged(&message));
        }
        // It will be deleted one day: nothing outside of this folder may be named.
        if !manifest.folder.starts_with(PREFIX) || manifest.folder.contains(['/', '\\']) {
            return Err(damaged(&format_args!("folder: expected {PREFIX}..., found {:?}", manifest.folder)));
        }
        let files = path.join(&manifest.folder);
        Ok(Self { manifest, files })
    }

    /// Where something of it is.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.files.join(name)
    }
}

/// An index on its way; dropped before it is kept, it leaves nothing behind.
pub(crate) struct Draft {
    path: PathBuf,
    before: Option<Folder>,
    files: TempDir,
}

impl Draft {
    /// Begins an index that is to be at `path`.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a folder with something else in it, [`ErrorKind::Io`].
    pub(crate) fn begin(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).map_err(|e| cannot_write(path, e))?;
        let mut names =
            fs::read_dir(path).map_err(|e| cannot_write(path, e))?.flatten().map(|file| file.file_name());
        let before = Folder::open(path).ok();
        if before.is_none() && names.any(|name| !name.to_string_lossy().starts_with(PREFIX)) {
            let message =
                format_args!("{}: expected an index or an empty folder, found other files", path.display());
            return Err(Error::new(ErrorKind::Option, message));
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(PREFIX);
        // Not for this user alone, but as the umask says.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let files = builder.tempdir_in(path).map_err(|e| cannot_write(path, e))?;
        Ok(Self { path: path.to_owned(), before, files })
    }

    /// Where something of it is to be.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// The index is whole: puts it in the place of what was there.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub(crate) fn keep(self, identity: Identity, passages: usize) -> Result<()> {
        let Self { path, before, files } = self;
        let folder = files.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let manifest = Manifest { format: FORMAT.to_owned(), folder, identity, passages };
        let swap = || -> std::io::Result<()> {
            sync(files.path())?;
            let mut file = NamedTempFile::with_prefix_in(PREFIX, &path)?;
            file.write_all(&serde_json::to_vec_pretty(&manifest)?)?;
            file.as_file().sync_all()?;
            file.persist(path.join(MANIFEST))?;
            Ok(())
        };
        swap().map_err(|e| cannot_write(&path, e))?;
        let _ = files.keep();
        // Whatever cannot be deleted is only in the way of nothing.
        if let Some(before) = before {
            let _ = fs::remove_dir_all(before.files);
        }
        Ok(())
    }
}

/// Waits until all files of a folder are on the disk.
fn sync(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sync(&path)?;
        } else {
            fs::OpenOptions::new().write(true).open(path)?.sync_all()?;
        }
    }
    Ok(())
}

fn cannot_write(path: &Path, error: std::io::Error) -> Error {
    Error::because(ErrorKind::Io, format_args!("{}: cannot be written", path.display()), error)
}
