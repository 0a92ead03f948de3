use crate::{Error, ErrorKind, Result};
use std::{
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;

/// A file that appears under its name when it is whole, in the place of what was there; until then, and if it is dropped
/// before, nothing of it is seen.
pub struct Whole {
    file: BufWriter<NamedTempFile>,
    path: PathBuf,
}

impl Whole {
    /// Begins a file beside its place.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if it cannot be written there.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        builder.prefix(".opt-embed-");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        match builder.tempfile_in(dir) {
            Ok(file) => Ok(Self { file: BufWriter::new(file), path }),
            Err(error) => Err(cannot_write(&path, error)),
        }
    }

    /// What to say of an error in writing.
    pub fn failed(&self, error: io::Error) -> Error {
        cannot_write(&self.path, error)
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn keep(self) -> Result<()> {
        let Self { file, path } = self;
        let keep = || -> io::Result<()> {
            let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            Ok(())
        };
        keep().map_err(|e| cannot_write(&path, e))
    }
}

impl Write for Whole {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn cannot_write(path: &Path, error: io::Error) -> Error {
    Error::because(ErrorKind::Io, format_args!("{}: cannot be written", path.display()), error)
}
