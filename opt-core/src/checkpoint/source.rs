use crate::{Error, ErrorKind, Result};
use memmap2::Mmap;
use std::{fs::File, ops::Range, path::Path};

/// The bytes of one file, mapped or in memory, and what to call it in messages.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) name: String,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Memory(Vec<u8>),
}

impl Source {
    /// Maps the file at `path`.
    pub(super) fn map(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let file = open(path)?;
        let length = file.metadata().map_err(|e| io("cannot read", path, e))?.len();
        if length == 0 {
            // An empty mapping is an error on some systems; an empty file gets its message from the format's reader.
            return Ok(Self { name, bytes: Bytes::Memory(Vec::new()) });
        }
        // SAFETY: the map is only read. That nobody shortens the file while it is mapped is a condition that every
        // reader of checkpoints by mapping has; `Checkpoint::open` states it.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| io("cannot map", path, e))?;
        Ok(Self { name, bytes: Bytes::Mapped(map) })
    }

    pub(super) fn memory(name: String, bytes: Vec<u8>) -> Self {
        Self { name, bytes: Bytes::Memory(bytes) }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Memory(bytes) => bytes,
        }
    }

    /// Gives the pages of `range` back to the system, so that a loaded model does not count twice.
    pub(super) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Bytes::Mapped(map) = &self.bytes {
            let length = range.end.min(map.len()).saturating_sub(range.start);
            if length > 0 {
                // SAFETY: the map is a shared, read-only view of a file: dropped pages hold nothing that the file
                // does not, and whoever still looks at them faults them in again. A refusal costs only memory.
                let _ = unsafe {
                    map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, length)
                };
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

fn open(path: &Path) -> Result<File> {
    let is_file = path.metadata().map_err(|e| io("cannot open", path, e))?.is_file();
    if !is_file {
        let message = format_args!("{}: expected a file, found something else", path.display());
        return Err(Error::new(ErrorKind::Io, message));
    }
    File::open(path).map_err(|e| io("cannot open", path, e))
}

/// Reads a small text file; larger than `most` bytes is an error.
pub(super) fn read_text(path: &Path, most: u64) -> Result<String> {
    use std::io::Read;
    let mut bytes = Vec::new();
    open(path)?.take(most + 1).read_to_end(&mut bytes).map_err(|e| io("cannot read", path, e))?;
    if bytes.len() as u64 > most {
        let message = format_args!("{}: expected at most {most} bytes", path.display());
        return Err(Error::new(ErrorKind::Checkpoint, message));
    }
    String::from_utf8(bytes)
        .map_err(|e| Error::because(ErrorKind::Checkpoint, format_args!("{}: not UTF-8", path.display()), e))
}

/// An I/O failure; one of a missing file is [`ErrorKind::NotFound`].
pub(crate) fn io(what: &str, path: &Path, error: std::io::Error) -> Error {
    let kind = match error.kind() {
        std::io::ErrorKind::NotFound => ErrorKind::NotFound,
        _ => ErrorKind::Io,
    };
    Error::because(kind, format_args!("{what} {}", path.display()), error)
}
