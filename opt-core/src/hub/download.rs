//! One file from the hub into the cache.

use super::{
    ModelId,
    cache::{Cache, io_error},
    http::{Announced, Http},
};
use crate::{CancelToken, Error, ErrorKind, Progress, ProgressFn, Result};
use sha2::{Digest, Sha256};
use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

const CHUNK: usize = 256 << 10;

pub(super) struct Job<'a> {
    pub(super) http: &'a Http,
    pub(super) cache: &'a Cache,
    pub(super) id: &'a ModelId,
    pub(super) commit: &'a str,
    pub(super) cancel: &'a CancelToken,
    pub(super) retries: u32,
}

/// What became of one attempt.
enum Attempt {
    Whole,
    /// Asking again may help.
    Broken(Error),
}

impl Job<'_> {
    /// Makes `name` present in the snapshot and returns its path there.
    pub(super) fn fetch(&self, name: &str, progress: &mut ProgressFn<'_>) -> Result<PathBuf> {
        self.cancel.check("the download")?;
        let path = self.cache.snapshot(self.commit).join(name);
        if let Ok(file) = fs::metadata(&path) {
            self.report(name, file.len(), Some(file.len()), progress)?;
            return Ok(path);
        }
        let announced = self.http.announced(self.id, self.commit, name)?;
        let blob = self.cache.blob(&announced.etag);
        let _lock = self.lock(&announced.etag)?;
        if !blob.is_file() {
            let partial = blob.with_added_extension("incomplete");
            create_parent(&partial)?;
            self.download(name, &announced, &partial, progress)?;
            fs::rename(&partial, &blob).map_err(io_error(&blob))?;
        }
        self.cache.link(self.commit, name, &announced.etag)
    }

    /// Fills `partial` until it is what was announced.
    fn download(
        &self,
        name: &str,
        announced: &Announced,
        partial: &Path,
        progress: &mut ProgressFn<'_>,
    ) -> Result<()> {
        let mut failures = 0;
        loop {
            let error = match self.attempt(name, announced.size, partial, progress)? {
                Attempt::Whole => match self.check_sum(name, announced, partial)? {
                    None => return Ok(()),
                    Some(error) => {
                        // Nobody knows which part is wrong.
                        fs::remove_file(partial).map_err(io_error(partial))?;
                        error
                    }
                },
                Attempt::Broken(error) => error,
            };
            if failures == self.retries {
                return Err(error);
            }
            failures += 1;
            tracing::warn!("{error}; continuing, attempt {failures} of {}", self.retries);
            self.wait(Duration::from_millis(100 << failures.min(6)))?;
        }
    }

    fn attempt(
        &self,
        name: &str,
        size: Option<u64>,
        partial: &Path,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Attempt> {
        let mut file =
            OpenOptions::new().create(true).append(true).open(partial).map_err(io_error(partial))?;
        let mut have = file.metadata().map_err(io_error(partial))?.len();
        if size.is_some_and(|size| have > size) {
            have = restart(&file).map_err(io_error(partial))?;
        }
        if have > 0 && Some(have) == size {
            return Ok(Attempt::Whole);
        }
        let broken = |message: String| Ok(Attempt::Broken(Error::new(ErrorKind::Hub, message)));
        let mut content = match self.http.content(self.id, self.commit, name, have) {
            Ok(Some(content)) => content,
            Ok(None) => {
                restart(&file).map_err(io_error(partial))?;
                return broken(format!("{}: {name}: nothing to continue after {have} bytes", self.id));
            }
            Err(refused) if refused.unreachable => return Ok(Attempt::Broken(refused.error)),
            Err(refused) => return Err(refused.error),
        };
        if content.start == 0 && have > 0 {
            have = restart(&file).map_err(io_error(partial))?;
        }
        let mut buffer = vec![0; CHUNK];
        loop {
            self.report(name, have, size, progress)?;
            let read = match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(e) if e.timed_out => return Err(e.error.at(format_args!("{}: {name}", self.id))),
                Err(e) => return Ok(Attempt::Broken(e.error.at(format_args!("{}: {name}", self.id)))),
            };
            have += read as u64;
            if size.is_some_and(|size| have > size) {
                restart(&file).map_err(io_error(partial))?;
                return broken(self.wrong_size(name, size, &format!("more than {}", have - read as u64)));
            }
            file.write_all(buffer.get(..read).unwrap_or_default()).map_err(io_error(partial))?;
        }
        if size.is_some_and(|size| have != size) {
            return broken(self.wrong_size(name, size, &have.to_string()));
        }
        file.sync_all().map_err(io_error(partial))?;
        Ok(Attempt::Whole)
    }

    fn wrong_size(&self, name: &str, size: Option<u64>, found: &str) -> String {
        format!("{}: {name}: expected {} bytes, found {found}", self.id, size.unwrap_or_default())
    }

    /// Large files are named by their SHA-256: what came must have it.
    fn check_sum(&self, name: &str, announced: &Announced, partial: &Path) -> Result<Option<Error>> {
        let expected = &announced.etag;
        if !(expected.len() == 64 && expected.bytes().all(|b| b.is_ascii_hexdigit())) {
            return Ok(None);
        }
        let mut file = File::open(partial).map_err(io_error(partial))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; CHUNK];
        loop {
            self.cancel.check("the download")?;
            match file.read(&mut buffer).map_err(io_error(partial))? {
                0 => break,
                read => hash.update(buffer.get(..read).unwrap_or_default()),
            }
        }
        let found = hash.finalize().iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        Ok((!found.eq_ignore_ascii_case(expected)).then(|| {
            let message = format!("{}: {name}: expected the SHA-256 {expected}, found {found}", self.id);
            Error::new(ErrorKind::Hub, message)
        }))
    }

    /// Waits until nobody else downloads the same content. The lock ends with the file.
    fn lock(&self, etag: &str) -> Result<File> {
        let path = self.cache.lock_path(etag);
        create_parent(&path)?;
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(io_error(&path))?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => self.wait(Duration::from_millis(200))?,
                // Some network file systems have no locks: two downloads of one file then meet in the renaming.
                Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => return Ok(file),
                Err(TryLockError::Error(e)) => return Err(io_error(&path)(e)),
            }
        }
    }

    fn wait(&self, time: Duration) -> Result<()> {
        let step = Duration::from_millis(50);
        let mut left = time;
        while !left.is_zero() {
            self.cancel.check("the download")?;
            thread::sleep(left.min(step));
            left = left.saturating_sub(step);
        }
        self.cancel.check("the download")
    }

    fn report(&self, name: &str, done: u64, size: Option<u64>, progress: &mut ProgressFn<'_>) -> Result<()> {
        self.cancel.check("the download")?;
        if progress(Progress::new(name, done, size.unwrap_or(0))).is_break() {
            return Err(Error::new(ErrorKind::Cancelled, "the download was cancelled"));
        }
        Ok(())
    }
}

/// Empties a file that is written by appending.
fn restart(file: &File) -> io::Result<u64> {
    file.set_len(0).map(|()| 0)
}

fn create_parent(path: &Path) -> Result<()> {
    let dir = path.parent().unwrap_or(path);
    fs::create_dir_all(dir).map_err(io_error(dir))
}
