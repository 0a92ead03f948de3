//! Text to token ids and back.
//!
//! [`Tokenizer`] reads the files that checkpoints ship: `tokenizer.json`, or `vocab.json` with `merges.txt` (GPT-2's
//! byte-level BPE). [`Detokenizer`] turns ids back into text one by one, for streaming.
//!
//! OPT was trained with one `</s>` (id 2) in front of every text. [`Bos::Model`] follows what the files say, so a
//! tokenizer of OPT's kind puts it there exactly once and one without such a rule puts nothing.

mod bpe;
mod cleanup;
mod detokenizer;
mod files;
mod parts;
mod strings;

pub use detokenizer::Detokenizer;
pub use files::TokenizerFiles;
pub use strings::TokenStrings;

use crate::{Error, ErrorKind, Result};
use std::{
    fmt,
    path::Path,
    sync::{Arc, OnceLock},
};

/// What is put in front of an encoded text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Bos {
    /// What the tokenizer's own files say: one BOS for OPT, none for Galactica. The default.
    #[default]
    Model,
    /// The BOS token, also where the files do not ask for it. An error where the tokenizer has none.
    Always,
    /// The text's own tokens and nothing else.
    Never,
}

/// A tokenizer as a checkpoint ships it. Cheap to clone; usable from many threads at once.
///
/// ```
/// use opt_core::tokenizer::{Bos, Tokenizer};
///
/// let tokenizer = Tokenizer::from_dir("../models/opt-novels")?;
/// let ids = tokenizer.encode("The old house stood", Bos::Model)?;
/// assert_eq!(ids[0], 2); // OPT begins every text with `</s>`
/// assert_eq!(tokenizer.decode(&ids, true)?, "The old house stood");
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

pub(crate) struct Inner {
    /// Without post-processor, truncation and padding: what surrounds a text is `prefix` and `suffix`.
    hf: tokenizers::Tokenizer,
    /// What the post-processor of tokenizer.json puts around a text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    /// tokenizer_config.json's `add_bos_token` is true.
    add_bos: bool,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    unk: Option<u32>,
    clean_up: bool,
    /// Tokens are bytes in GPT-2's alphabet, so decoding is to join those bytes.
    byte_level: bool,
    strings: OnceLock<TokenStrings>,
}

impl Tokenizer {
    /// Reads the tokenizer of a checkpoint directory in Hugging Face layout: `tokenizer.json`, else `vocab.json` and
    /// `merges.txt`; with `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` where present.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when the directory has no tokenizer; [`ErrorKind::Tokenizer`] when its files cannot be
    /// used.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        Self::from_files(&TokenizerFiles::read(dir)?).map_err(|e| e.at(dir.display()))
    }

    /// Reads a `tokenizer.json` by its path, with the configs beside it where present.
    ///
    /// # Errors
    /// As [`Tokenizer::from_dir`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::from_files(&TokenizerFiles::read_file(path)?).map_err(|e| e.at(path.display()))
    }

    /// Reads the content of a `tokenizer.json`. BOS and the like are then only known as far as that file tells.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] when it cannot be used.
    pub fn from_bytes(tokenizer_json: &[u8]) -> Result<Self> {
        Self::from_files(&TokenizerFiles {
            tokenizer_json: Some(tokenizer_json.into()),
            ..Default::default()
        })
    }

    /// Builds a tokenizer from files held in memory.
    ///
    /// # Errors
    /// As [`Tokenizer::from_dir`].
    pub fn from_files(files: &TokenizerFiles) -> Result<Self> {
        files::build(files).map(|inner| Self(Arc::new(inner)))
    }

    /// The ids of `text`. Special tokens written out in it (`</s>`, `<pad>`) become their ids, as in transformers; a
    /// text that already begins with `</s>` therefore has two under [`Bos::Model`].
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] when the text cannot be encoded, or [`Bos::Always`] is asked of a tokenizer without
    /// BOS.
    pub fn encode(&self, text: &str, bos: Bos) -> Result<Vec<u32>> {
        let inner = &*self.0;
        let encoding = inner
            .hf
            .encode_fast(text, false)
            .map_err(|e| Error::because(ErrorKind::Tokenizer, "the text cannot be encoded", e))?;
        let text_ids = encoding.get_ids();
        let (prefix, suffix): (&[u32], &[u32]) = match bos {
            Bos::Never => return Ok(text_ids.to_vec()),
            Bos::Model | Bos::Always => (&inner.prefix, &inner.suffix),
        };
        let wanted = match bos {
            Bos::Always => Some(inner.bos.ok_or_else(|| {
                Error::new(ErrorKind::Tokenizer, "a BOS was asked for, but this tokenizer names none")
            })?),
            _ => inner.bos.filter(|_| inner.add_bos),
        };
        // The files may ask for BOS twice over, in the post-processor and in the config: once is meant.
        let missing = wanted.filter(|bos| !prefix.contains(bos));
        Ok(missing.iter().chain(prefix).chain(text_ids).chain(suffix).copied().collect())
    }

    /// The ids of `text` alone, and the bytes of it that each stands for.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn encode_with_places(&self, text: &str) -> Result<(Vec<u32>, Vec<std::ops::Range<usize>>)> {
        let encoding = self
            .0
            .hf
            .encode(text, false)
            .map_err(|e| Error::because(ErrorKind::Tokenizer, "the text cannot be encoded", e))?;
        let places = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok((encoding.get_ids().to_vec(), places))
    }

    /// The text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids that the tokenizer does not have (OPT's table is
    /// padded past them) become nothing. `skip_special` leaves out `</s>`, `<pad>` and the like.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] from unusual decoders in tokenizer.json; never for byte-level tokenizers.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let text = self.decode_raw(ids, skip_special)?;
        Ok(if self.0.clean_up { cleanup::clean_up(&text) } else { text })
    }

    fn decode_raw(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let strings = self.token_strings();
        // Some decoders cannot take nothing at all.
        if !ids.iter().any(|id| strings.get(*id).is_some() && !(skip_special && strings.is_special(*id))) {
            return Ok(String::new());
        }
        self.0
            .hf
            .decode(ids, skip_special)
            .map_err(|e| Error::because(ErrorKind::Tokenizer, "the ids cannot be decoded", e))
    }

    /// Decodes ids as they come; see [`Detokenizer`].
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer {
        Detokenizer::new(self.clone(), skip_special)
    }

    /// The bytes that each id stands for; made on first use and kept.
    pub fn token_strings(&self) -> &TokenStrings {
        self.0.strings.get_or_init(|| TokenStrings::new(&self.0))
    }

    /// The id of a token as the vocabulary writes it (`Ġthe`, `</s>`).
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.hf.token_to_id(token)
    }

    /// The token of an id as the vocabulary writes it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.hf.id_to_token(id)
    }

    /// Whether `other` is a clone of this one.
    #[cfg(all(feature = "constraint", not(target_arch = "wasm32")))]
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The number of tokens, added ones included. A model's table may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.0.hf.get_vocab_size(true)
    }

    /// The token that begins a text, where the files name one.
    pub fn bos_id(&self) -> Option<u32> {
        self.0.bos
    }

    /// The token that ends a text, where the files name one.
    pub fn eos_id(&self) -> Option<u32> {
        self.0.eos
    }

    /// The padding token, where the files name one.
    pub fn pad_id(&self) -> Option<u32> {
        self.0.pad
    }

    /// The token for what the vocabulary lacks, where the files name one.
    pub fn unk_id(&self) -> Option<u32> {
        self.0.unk
    }

    /// Whether [`Bos::Model`] puts a BOS in front.
    pub fn adds_bos(&self) -> bool {
        let inner = &*self.0;
        inner.bos.is_some_and(|bos| inner.add_bos || inner.prefix.contains(&bos))
    }

    /// Whether decoding with `skip_special` leaves this id out.
    pub fn is_special(&self, id: u32) -> bool {
        self.id_to_token(id).is_some_and(|token| self.0.hf.get_added_vocabulary().is_special_token(&token))
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos_id())
            .field("eos", &self.eos_id())
            .field("adds_bos", &self.adds_bos())
            .finish_non_exhaustive()
    }
}

/// Runs untrusted bytes through loading, encoding and decoding: the body of a fuzz target. They are a tokenizer.json,
/// or a tokenizer_config.json, vocab.json and merges.txt (and a tokenizer.json, which then stands in for those two)
/// separated by zero bytes. Whether they are a tokenizer.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) -> bool {
    let mut parts = data.split(|b| *b == 0).map(<[u8]>::to_vec);
    let mut files = TokenizerFiles::default();
    if data.contains(&0) {
        files.tokenizer_config_json = parts.next().filter(|p| !p.is_empty());
        files.vocab_json = parts.next();
        files.merges_txt = parts.next();
        files.tokenizer_json = parts.next();
    } else {
        files.tokenizer_json = parts.next();
    }
    let Ok(tokenizer) = Tokenizer::from_files(&files) else { return false };
    for text in ["", "It's  a </s> tëst\u{1F600} of 12345\n\n <pad>x\u{0}", "\u{4F60}\u{597D} aAbBcC"] {
        for bos in [Bos::Model, Bos::Always, Bos::Never] {
            let Ok(ids) = tokenizer.encode(text, bos) else { continue };
            let mut stream = tokenizer.detokenizer(false);
            for id in ids.iter().copied().chain([0, 1, 2, 255, 256, 50_271, u32::MAX]) {
                let _ = stream.push(id);
            }
            let _ = stream.finish();
            let _ = tokenizer.decode(&ids, true);
        }
    }
    let _ = tokenizer.token_strings().get(0);
    true
}
