//! What a model is tuned on: examples out of text files and JSONL, and which of them each step sees.
//!
//! A file is read once, tokenized and checked from beginning to end before any training starts; a line that cannot be
//! used is named then. Token ids are kept in memory while they are few and in a temporary file beyond, from which
//! examples are fetched one by one: data may be larger than memory, and is shuffled as a whole all the same.
//!
//! - `.txt`: the tokens of its documents ([`Documents`]), each with what the tokenizer puts in front (`</s>` for OPT),
//!   end to end and cut into blocks of [`DataOptions::seq_len`] tokens, as transformers' `run_clm.py` does it. An
//!   incomplete block at the end is dropped, unless it is all there is.
//! - `.jsonl`, an object a line: `{"text": "..."}` is an example of its own; of
//!   `{"prompt": "...", "completion": "..."}` only the tokens of the completion and the end-of-text token after it are
//!   learned; `{"ids": [...]}` is used exactly as given. Other keys are left alone, and so are blank lines. With
//!   [`DataOptions::pack`], texts and ids are cut into blocks like those of `.txt`.
//!
//! A model without tokenizer takes only `ids`. What else lines may say, for heads and for search, is said at [`Reads`].
//!
//! ```
//! use opt_core::{config::OptConfig, tokenizer::Tokenizer, tuning::data::{Batches, DataOptions, Dataset}};
//!
//! # let dir = tempfile::tempdir().unwrap();
//! # let file = dir.path().join("data.jsonl");
//! std::fs::write(&file, r#"{"prompt": "The old house", "completion": " stood upon the hill."}"#)?;
//! let tokenizer = Tokenizer::from_dir("../models/opt-novels")?;
//! let options = DataOptions::new(&OptConfig::default(), Some(tokenizer)).seq_len(64);
//! let data = Dataset::open(&file, &options)?;
//! let example = data.get(0)?;
//! assert_eq!(example.ids()[0], 2);
//! assert_eq!(example.targets().last(), Some((example.ids().len() - 1, 2)));
//! let batches = Batches::new(data, 8, 1)?.shuffled(7);
//! assert_eq!(batches.step(0)?.targets() as u64, batches.data().targets());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod batches;
mod goals;
pub(super) mod jsonl;
mod permutation;
mod read;
mod store;
mod text;

pub use batches::{Batches, Step};
pub use goals::classes;

use super::Example;
use crate::{
    CancelToken, Error, ErrorKind, ProgressFn, Result,
    config::OptConfig,
    heads::Task,
    tokenizer::{Bos, Tokenizer},
};
use permutation::Permutation;
use read::Collector;
use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};
use store::Store;

/// What a document of a text file is; each begins with what the tokenizer puts in front of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Documents {
    /// The whole file. Long ones are tokenized piece by piece, with the tokens of the whole.
    #[default]
    File,
    /// What stands between blank lines.
    Paragraphs,
    /// Each line with its line break, blank ones included: what `run_clm.py` takes a text file for.
    Lines,
}

/// What lines of JSONL are read for. A text file can only be read for its language.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Reads {
    /// Tokens to be predicted.
    #[default]
    Language,
    /// What a head is to say: `{"text": "...", "label": ...}` (or `ids` in the place of `text`), where the label is the
    /// name or the number of a class, an array of these where any of them may be true, and a number or an array of
    /// numbers for a regression; `{"question": "...", "context": "...", "answer": "..."}` for answers, which stand in
    /// the context where they first occur, unless `answer_start` says where (in characters, as in SQuAD).
    Head(Task),
    /// Texts and what belongs to them: `{"query": "...", "passage": "..."}`.
    Pairs,
}

/// How data is read.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DataOptions {
    /// Tokens of a block, and the most that an example has; the model's context unless set.
    pub seq_len: usize,
    /// The model's context: what `seq_len` may be at most.
    pub context: usize,
    /// Ids must be below.
    pub vocab_size: usize,
    /// Turns text into tokens; without one only `ids` can be read.
    pub tokenizer: Option<Tokenizer>,
    /// What is put in front of a text.
    pub bos: Bos,
    /// What is put behind a completion: the tokenizer's end-of-text token, else the config's.
    pub eos: Option<u32>,
    /// What lines of JSONL are read for.
    pub reads: Reads,
    /// What a document of a text file is.
    pub documents: Documents,
    /// Cuts the lines of JSONL into blocks too.
    pub pack: bool,
    /// Leaves the end of longer examples away, where that is an error otherwise; examples whose answer was there are left
    /// out.
    pub truncate: bool,
    /// The folder of temporary files; the system's unless set. About 4 bytes a token and 24 an example are needed.
    pub scratch: Option<PathBuf>,
    /// Ends reading from elsewhere.
    pub cancel: CancelToken,
    /// Bytes of text that are tokenized at once.
    piece: usize,
    /// Bytes that are held before a file is made of them.
    in_memory: Option<usize>,
}

impl DataOptions {
    /// Options for a model with this config.
    pub fn new(config: &OptConfig, tokenizer: Option<Tokenizer>) -> Self {
        let of_config = || config.eos_token_id.as_ref().and_then(|ids| ids.to_vec().first().copied());
        Self {
            seq_len: config.max_position_embeddings,
            context: config.max_position_embeddings,
            vocab_size: config.vocab_size,
            eos: tokenizer.as_ref().and_then(Tokenizer::eos_id).or_else(of_config),
            tokenizer,
            bos: Bos::Model,
            reads: Reads::Language,
            documents: Documents::File,
            pack: false,
            truncate: false,
            scratch: None,
            cancel: CancelToken::new(),
            piece: 1 << 18,
            in_memory: None,
        }
    }

    /// Sets [`DataOptions::seq_len`].
    #[must_use]
    pub fn seq_len(self, tokens: usize) -> Self {
        Self { seq_len: tokens, ..self }
    }

    /// Sets [`DataOptions::bos`].
    #[must_use]
    pub fn bos(self, bos: Bos) -> Self {
        Self { bos, ..self }
    }

    /// Sets [`DataOptions::reads`].
    #[must_use]
    pub fn reads(self, reads: Reads) -> Self {
        Self { reads, ..self }
    }

    /// Sets [`DataOptions::documents`].
    #[must_use]
    pub fn documents(self, documents: Documents) -> Self {
        Self { documents, ..self }
    }

    /// Sets [`DataOptions::pack`].
    #[must_use]
    pub fn pack(self, pack: bool) -> Self {
        Self { pack, ..self }
    }

    /// Sets [`DataOptions::truncate`].
    #[must_use]
    pub fn truncate(self, truncate: bool) -> Self {
        Self { truncate, ..self }
    }

    /// Sets [`DataOptions::scratch`].
    #[must_use]
    pub fn scratch(self, folder: impl Into<PathBuf>) -> Self {
        Self { scratch: Some(folder.into()), ..self }
    }

    /// Sets [`DataOptions::cancel`].
    #[must_use]
    pub fn cancel(self, cancel: CancelToken) -> Self {
        Self { cancel, ..self }
    }

    fn check(&self) -> Result<()> {
        if self.seq_len < 2 || self.seq_len > self.context {
            let message = format_args!(
                "sequence length: expected 2 to {} tokens (the context), found {}",
                self.context, self.seq_len
            );
            return Err(Error::new(ErrorKind::Option, message));
        }
        Ok(())
    }
}

/// Examples by number. Cheap to clone, and never empty.
#[derive(Debug, Clone)]
pub struct Dataset {
    store: Arc<Store>,
    part: Option<Part>,
}

/// Some of a store's examples.
#[derive(Debug, Clone)]
struct Part {
    order: Permutation,
    places: Range<u64>,
    targets: u64,
}

impl Dataset {
    /// Takes over examples from memory.
    ///
    /// # Errors
    /// [`ErrorKind::Prompt`] if there are none, or one is too long, has no target or ids outside the vocabulary;
    /// [`ErrorKind::Option`] for a sequence length that the model does not have.
    pub fn new(examples: impl IntoIterator<Item = Example>, options: &DataOptions) -> Result<Self> {
        let mut collector = Collector::new(options)?;
        for (number, example) in examples.into_iter().enumerate() {
            collector.example(example).map_err(|e| e.at(format_args!("example {number}")))?;
        }
        Ok(Self { store: Arc::new(collector.finish()?), part: None })
    }

    /// Reads a `.txt` or `.jsonl` file.
    ///
    /// # Errors
    /// One line that names file, line, what was expected and what was found: [`ErrorKind::NotFound`] and
    /// [`ErrorKind::Io`] for a file that cannot be read, [`ErrorKind::Prompt`] for what is in it, which is also that
    /// of a file with nothing in it, [`ErrorKind::Tokenizer`] for text without a tokenizer, [`ErrorKind::Option`] for
    /// a file of another name and a sequence length that the model does not have, [`ErrorKind::Cancelled`].
    pub fn open(path: impl AsRef<Path>, options: &DataOptions) -> Result<Self> {
        Self::read(&[path.as_ref()], options, None)
    }

    /// Reads several files, one after the other, and reports bytes read; a block may span two files.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn read(
        paths: &[&Path],
        options: &DataOptions,
        progress: Option<&mut ProgressFn<'_>>,
    ) -> Result<Self> {
        let mut collector = Collector::new(options)?;
        collector.files(paths, progress)?;
        let names = || paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        // Of a whole file, not of a line of it.
        let store = match collector.finish() {
            Err(error) if error.kind() == ErrorKind::Prompt => return Err(error.at(names())),
            store => store?,
        };
        Ok(Self { store: Arc::new(store), part: None })
    }

    /// Holds a random `fraction` of the examples out: those to train on, and those to evaluate on. At least one each,
    /// and the same for the same seed.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a fraction that is not between 0 and 1, [`ErrorKind::Prompt`] if there is only one
    /// example, [`ErrorKind::Io`].
    pub fn split(&self, fraction: f64, seed: u64) -> Result<[Self; 2]> {
        if !(fraction > 0.0 && fraction < 1.0) {
            let message = format_args!("held-out part: expected a number between 0 and 1, found {fraction}");
            return Err(Error::new(ErrorKind::Option, message));
        }
        let len = self.len();
        if len < 2 || self.part.is_some() {
            let message = if len < 2 {
                "held-out part: expected at least 2 examples to divide, found 1"
            } else {
                "held-out part: expected data that is not divided yet"
            };
            return Err(Error::new(ErrorKind::Prompt, message));
        }
        let held_out = ((len as f64 * fraction).round() as u64).clamp(1, len - 1);
        let order = Permutation::new(len, seed, u64::from(u32::from_be_bytes(*b"held")) << 32);
        let mut targets = 0;
        for place in 0..held_out {
            targets += self.store.get(order.at(place))?.units() as u64;
        }
        let part = |places, targets| Self {
            store: self.store.clone(),
            part: Some(Part { order: order.clone(), places, targets }),
        };
        Ok([part(held_out..len, self.targets() - targets), part(0..held_out, targets)])
    }

    /// The number of examples.
    #[allow(clippy::len_without_is_empty)] // it never is
    pub fn len(&self) -> u64 {
        self.part.as_ref().map_or(self.store.totals.examples, |part| part.places.end - part.places.start)
    }

    /// The number of tokens to be predicted, over all examples; that of the examples where the goal is another.
    pub fn targets(&self) -> u64 {
        self.part.as_ref().map_or(self.store.totals.targets, |part| part.targets)
    }

    /// Example `index`, in the order of the files unless the data is a part.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] if there is none, [`ErrorKind::Io`] if the temporary file of token ids cannot be read.
    pub fn get(&self, index: u64) -> Result<Example> {
        if index >= self.len() {
            let message =
                format_args!("expected the number of an example, below {}, found {index}", self.len());
            return Err(Error::new(ErrorKind::Option, message));
        }
        let number = self.part.as_ref().map_or(index, |part| part.order.at(part.places.start + index));
        self.store.get(number)
    }

    /// All examples in batches of `size`, in order: what an evaluation goes through.
    pub fn batches(&self, size: usize) -> impl Iterator<Item = Result<Vec<Example>>> + '_ {
        let (len, size) = (self.len(), size.max(1) as u64);
        (0..len.div_ceil(size)).map(move |batch| {
            let start = batch * size;
            (start..start.saturating_add(size).min(len)).map(|index| self.get(index)).collect()
        })
    }
}

#[cfg(test)]
mod tests;
