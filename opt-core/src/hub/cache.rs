//! The cache's layout: `models--org--name/` with `blobs/ETAG` (contents), `snapshots/COMMIT/FILE` (links to blobs) and
//! `refs/REVISION` (the commit a branch or tag stood at).

use super::{ModelId, select};
use crate::{Error, ErrorKind, Result};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

#[derive(Debug, Clone)]
pub(super) struct Cache {
    /// `models--org--name`
    repository: PathBuf,
    /// `.locks/models--org--name`
    locks: PathBuf,
}

/// Whether a revision is a whole commit hash.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

pub(super) fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |e| Error::because(ErrorKind::Io, path.display(), e)
}

impl Cache {
    pub(super) fn new(root: &Path, id: &ModelId) -> Self {
        let folder = format!("models--{}", id.name().replace('/', "--"));
        Self { repository: root.join(&folder), locks: root.join(".locks").join(folder) }
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.repository.join("snapshots").join(commit)
    }

    pub(super) fn is_complete(&self, commit: &str) -> bool {
        select::is_complete(&self.snapshot(commit))
    }

    /// The commit that a revision stood at when it was last asked for.
    pub(super) fn resolve(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.repository.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) {
            return Ok(());
        }
        let path = self.repository.join("refs").join(revision);
        let dir = parent(&path);
        fs::create_dir_all(dir).map_err(io_error(dir))?;
        whole(&path, |temporary| fs::write(temporary, commit)).map_err(io_error(&path))
    }

    /// Where the content with this etag lies, or will.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.repository.join("blobs").join(etag)
    }

    /// The lock that whoever downloads this content holds; `huggingface_hub` uses the same one.
    pub(super) fn lock_path(&self, etag: &str) -> PathBuf {
        self.locks.join(format!("{etag}.lock"))
    }

    /// Makes `name` of a snapshot lead to a blob.
    pub(super) fn link(&self, commit: &str, name: &str, etag: &str) -> Result<PathBuf> {
        let link = self.snapshot(commit).join(name);
        if link.is_file() {
            return Ok(link);
        }
        let dir = parent(&link);
        fs::create_dir_all(dir).map_err(io_error(dir))?;
        // From snapshots/COMMIT/FILE two up, and one more for every directory in FILE.
        let up = "../".repeat(2 + name.matches('/').count());
        let target = format!("{up}blobs/{etag}");
        match symlink(&target, &link) {
            Ok(()) => Ok(link),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                // It leads nowhere (its blob was deleted), or another process was faster.
                if !link.is_file() {
                    fs::remove_file(&link).map_err(io_error(&link))?;
                    symlink(&target, &link).map_err(io_error(&link))?;
                }
                Ok(link)
            }
            // Without links (Windows without the right to make them) the snapshot holds the content itself.
            Err(_) => {
                whole(&link, |temporary| fs::copy(self.blob(etag), temporary).map(drop))
                    .map_err(io_error(&link))?;
                Ok(link)
            }
        }
    }
}

/// Writes a file that is seen under its name only when it is whole.
fn whole(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    // A name of its own for each writer: other processes, and threads of this one, may be at the same file.
    static WRITERS: AtomicU64 = AtomicU64::new(0);
    let number = WRITERS.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_added_extension(format!("{}-{number}.tmp", std::process::id()));
    let done = write(&temporary).and_then(|()| fs::rename(&temporary, path));
    if done.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    done
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

#[cfg(unix)]
fn symlink(target: &str, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &str, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target.replace('/', "\\"), link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &str, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_may_write_one_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("main");
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        whole(&path, |temporary| fs::write(temporary, "whole")).expect("written");
                        assert_eq!(fs::read_to_string(&path).expect("there"), "whole");
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1);
    }
}
