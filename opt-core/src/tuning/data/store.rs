//! Where examples lie: in memory while they are few, in a temporary file beyond.

use crate::{Error, ErrorKind, Result};
use std::{
    fs::File,
    io::{BufWriter, Read, Seek, SeekFrom, Write},
    path::Path,
    sync::{Mutex, PoisonError},
};
use tempfile::{SpooledData, SpooledTempFile};

/// Bytes of each kind that are held in memory before they go to a file.
const IN_MEMORY: usize = 8 << 20;

/// Bytes of one record: start in the ids, length, first target.
const RECORD: usize = 16;

/// Takes examples one by one.
pub(super) struct Writer {
    ids: BufWriter<SpooledTempFile>,
    records: BufWriter<SpooledTempFile>,
    totals: Totals,
}

/// What a dataset has in all.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Totals {
    pub(super) examples: u64,
    pub(super) tokens: u64,
    pub(super) targets: u64,
}

/// Examples, by number.
#[derive(Debug)]
pub(super) struct Store {
    ids: Bytes,
    records: Bytes,
    pub(super) totals: Totals,
}

#[derive(Debug)]
enum Bytes {
    Memory(Vec<u8>),
    /// Read piece by piece, not mapped: nothing of it counts as memory of the process.
    Disk(Mutex<File>),
}

fn io(what: &str, error: std::io::Error) -> Error {
    Error::because(ErrorKind::Io, format_args!("{what} the temporary file of token ids"), error)
}

impl Writer {
    /// A writer whose files, should it need any, lie in `folder`, and are gone when the dataset is.
    pub(super) fn new(folder: &Path, in_memory: Option<usize>) -> Self {
        let spool = || {
            BufWriter::with_capacity(1 << 16, SpooledTempFile::new_in(in_memory.unwrap_or(IN_MEMORY), folder))
        };
        Self { ids: spool(), records: spool(), totals: Totals::default() }
    }

    pub(super) fn totals(&self) -> Totals {
        self.totals
    }

    /// Appends an example whose targets begin at `from`.
    pub(super) fn push(&mut self, ids: &[u32], from: usize) -> Result<()> {
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
        let mut record = [0; RECORD];
        let (start, rest) = record.split_at_mut(8);
        let (len, first) = rest.split_at_mut(4);
        start.copy_from_slice(&self.totals.tokens.to_le_bytes());
        len.copy_from_slice(&narrow(ids.len()));
        first.copy_from_slice(&narrow(from));
        self.records.write_all(&record).map_err(|e| io("cannot write", e))?;
        for id in ids {
            self.ids.write_all(&id.to_le_bytes()).map_err(|e| io("cannot write", e))?;
        }
        self.totals.examples += 1;
        self.totals.tokens += ids.len() as u64;
        self.totals.targets += ids.len().saturating_sub(from) as u64;
        Ok(())
    }

    pub(super) fn finish(self) -> Result<Store> {
        let bytes = |writer: BufWriter<SpooledTempFile>| -> Result<Bytes> {
            let file = writer.into_inner().map_err(|e| io("cannot write", e.into_error()))?;
            Ok(match file.into_inner() {
                SpooledData::InMemory(cursor) => Bytes::Memory(cursor.into_inner()),
                SpooledData::OnDisk(file) => Bytes::Disk(Mutex::new(file)),
            })
        };
        Ok(Store { ids: bytes(self.ids)?, records: bytes(self.records)?, totals: self.totals })
    }
}

impl Bytes {
    fn read(&self, start: u64, out: &mut [u8]) -> Result<()> {
        let short = || io("cannot read", std::io::ErrorKind::UnexpectedEof.into());
        match self {
            Bytes::Memory(bytes) => {
                let start = usize::try_from(start).map_err(|_| short())?;
                let end = start.checked_add(out.len()).ok_or_else(short)?;
                out.copy_from_slice(bytes.get(start..end).ok_or_else(short)?);
                Ok(())
            }
            Bytes::Disk(file) => {
                // Each read says where: nothing is left half done by one that failed.
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(start))
                    .and_then(|_| file.read_exact(out))
                    .map_err(|e| io("cannot read", e))
            }
        }
    }
}

impl Store {
    /// Ids of an example, and where its targets begin.
    pub(super) fn get(&self, number: u64) -> Result<(Vec<u32>, usize)> {
        let mut record = [0; RECORD];
        self.records.read(number * RECORD as u64, &mut record)?;
        let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|b| record[4 * i + b]));
        let start = u64::from(word(0)) | u64::from(word(1)) << 32;
        let (len, from) = (word(2) as usize, word(3) as usize);
        let mut bytes = vec![0; 4 * len];
        self.ids.read(4 * start, &mut bytes)?;
        let ids = bytes.chunks_exact(4).map(|id| u32::from_le_bytes(std::array::from_fn(|b| id[b])));
        Ok((ids.collect(), from))
    }

    /// Whether anything lies in a file.
    #[cfg(test)]
    pub(super) fn on_disk(&self) -> bool {
        matches!(self.ids, Bytes::Disk(_))
    }
}
