//! Where examples lie: in memory while they are few, in a temporary file beyond.

use crate::{
    Error, ErrorKind, Result,
    tuning::{Example, Goal},
};
use std::{
    fs::File,
    io::{BufWriter, Read, Seek, SeekFrom, Write},
    path::Path,
    sync::{Mutex, PoisonError},
};
use tempfile::{SpooledData, SpooledTempFile};

/// Bytes of each kind that are held in memory before they go to a file.
const IN_MEMORY: usize = 8 << 20;

/// Bytes of one record: where its words start, how many of them are ids, kind and number of the goal, and how many more
/// words belong to the goal.
const RECORD: usize = 24;

/// Takes examples one by one.
pub(super) struct Writer {
    ids: BufWriter<SpooledTempFile>,
    records: BufWriter<SpooledTempFile>,
    /// Written so far.
    words: u64,
    totals: Totals,
}

/// What a dataset has in all.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Totals {
    pub(super) examples: u64,
    /// What a mean over all examples divides by.
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

/// A goal as a kind, a number and some words.
fn words(goal: &Goal) -> (u32, u32, Vec<u32>) {
    match goal {
        Goal::Tokens(from) => (0, *from as u32, Vec::new()),
        Goal::Class(class) => (1, *class, Vec::new()),
        Goal::Numbers(numbers) => (2, 0, numbers.iter().map(|number| number.to_bits()).collect()),
        Goal::Answer(places) => (3, 0, places.iter().map(|place| *place as u32).collect()),
        Goal::Passage(ids) => (4, 0, ids.clone()),
    }
}

/// The way back.
fn goal(kind: u32, number: u32, words: Vec<u32>) -> Goal {
    match (kind, &words[..]) {
        (1, _) => Goal::Class(number),
        (2, _) => Goal::Numbers(words.into_iter().map(f32::from_bits).collect()),
        (3, &[first, last]) => Goal::Answer([first as usize, last as usize]),
        (4, _) => Goal::Passage(words),
        _ => Goal::Tokens(number as usize),
    }
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
        Self { ids: spool(), records: spool(), words: 0, totals: Totals::default() }
    }

    pub(super) fn totals(&self) -> Totals {
        self.totals
    }

    /// Appends an example.
    pub(super) fn push(&mut self, example: &Example) -> Result<()> {
        let narrow = |n: usize| (n as u32).to_le_bytes();
        let (kind, number, more) = words(&example.goal);
        let mut record = self.words.to_le_bytes().to_vec();
        record.extend(
            [narrow(example.ids.len()), kind.to_le_bytes(), number.to_le_bytes(), narrow(more.len())]
                .concat(),
        );
        self.records.write_all(&record).map_err(|e| io("cannot write", e))?;
        for word in example.ids.iter().chain(&more) {
            self.ids.write_all(&word.to_le_bytes()).map_err(|e| io("cannot write", e))?;
        }
        self.words += (example.ids.len() + more.len()) as u64;
        self.totals.examples += 1;
        self.totals.targets += example.units() as u64;
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
    pub(super) fn get(&self, number: u64) -> Result<Example> {
        let mut record = [0; RECORD];
        self.records.read(number * RECORD as u64, &mut record)?;
        let (start, rest) = record.split_at(8);
        let start = u64::from_le_bytes(std::array::from_fn(|b| start[b]));
        let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|b| rest[4 * i + b]));
        let (len, more) = (word(0) as usize, word(3) as usize);
        let mut bytes = vec![0; 4 * (len + more)];
        self.ids.read(4 * start, &mut bytes)?;
        let words = bytes.chunks_exact(4).map(|word| u32::from_le_bytes(std::array::from_fn(|b| word[b])));
        let mut ids: Vec<u32> = words.collect();
        let goal = goal(word(1), word(2), ids.split_off(len));
        Ok(Example { ids, goal })
    }

    /// Whether anything lies in a file.
    #[cfg(test)]
    pub(super) fn on_disk(&self) -> bool {
        matches!(self.ids, Bytes::Disk(_))
    }
}
