use super::{Tokenizer, cleanup::CleanUp};
use crate::Result;

/// Turns ids into text as they come. What [`Detokenizer::push`] returned so far, with [`Detokenizer::finish`] after
/// it, equals [`Tokenizer::decode`] of all ids.
///
/// A character split over several tokens is held back until it is whole, so no broken character is ever printed; bytes
/// that cannot become one turn into U+FFFD, as in transformers. The cost of an id does not grow with the text.
///
/// The equality is exact for byte-level tokenizers (OPT's). Decoders that look ahead without bound (a SentencePiece
/// byte fallback that turns out to be broken after whole characters of it were printed) may differ there.
///
/// ```
/// use opt_core::tokenizer::{Bos, Tokenizer};
///
/// let tokenizer = Tokenizer::from_dir("../models/opt-novels")?;
/// let mut stream = tokenizer.detokenizer(true);
/// let mut text = String::new();
/// for id in tokenizer.encode("naïve \u{1F600}", Bos::Model)? {
///     text += &stream.push(id)?; // often empty within the emoji, never half of it
/// }
/// text += &stream.finish()?;
/// assert_eq!(text, "naïve \u{1F600}");
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    clean_up: Option<CleanUp>,
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    /// Byte-level: the beginning of a character, at most three bytes.
    Bytes(Vec<u8>),
    /// Any other decoder: the last ids, decoded again with each new one.
    Window { ids: Vec<u32>, printed: String, printed_ids: usize },
}

/// A window that still ends in U+FFFD at this length is not waiting for the rest of a character.
const WINDOW: usize = 16;

impl Detokenizer {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        let clean_up = tokenizer.0.clean_up.then(CleanUp::default);
        let state = if tokenizer.0.byte_level {
            State::Bytes(Vec::new())
        } else {
            State::Window { ids: Vec::new(), printed: String::new(), printed_ids: 0 }
        };
        Self { tokenizer, skip_special, clean_up, state }
    }

    /// The text that is certain once `id` has come; empty while a character is incomplete.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`]: never for byte-level tokenizers.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let strings = self.tokenizer.token_strings();
        let Some(bytes) = strings.get(id).filter(|_| !(self.skip_special && strings.is_special(id))) else {
            return Ok(String::new());
        };
        let text = match &mut self.state {
            State::Bytes(pending) => {
                pending.extend_from_slice(bytes);
                take_text(pending, false)
            }
            State::Window { ids, printed, printed_ids } => {
                ids.push(id);
                let text = self.tokenizer.decode_raw(ids, self.skip_special)?;
                if text.ends_with(char::REPLACEMENT_CHARACTER) && ids.len() < WINDOW {
                    String::new()
                } else {
                    let new = added(printed, &text);
                    // Keep the ids of the last print as context: decoders treat the first token of a text apart.
                    if !text.is_empty() || ids.len() >= WINDOW {
                        ids.drain(..*printed_ids);
                        *printed_ids = ids.len();
                        *printed = self.tokenizer.decode_raw(ids, self.skip_special)?;
                    }
                    new
                }
            }
        };
        Ok(self.cleaned(text, false))
    }

    /// What was still held back: an incomplete character becomes U+FFFD. The detokenizer is then ready for a new text.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`]: never for byte-level tokenizers.
    pub fn finish(&mut self) -> Result<String> {
        let text = match &mut self.state {
            State::Bytes(pending) => take_text(pending, true),
            State::Window { ids, printed, printed_ids } => {
                let text = added(printed, &self.tokenizer.decode_raw(ids, self.skip_special)?);
                ids.clear();
                printed.clear();
                *printed_ids = 0;
                text
            }
        };
        Ok(self.cleaned(text, true))
    }

    fn cleaned(&mut self, text: String, last: bool) -> String {
        match &mut self.clean_up {
            Some(clean_up) => clean_up.push(&text, last),
            None => text,
        }
    }
}

/// Takes the whole characters off the front of `pending`, and with `last` also what cannot become one any more.
fn take_text(pending: &mut Vec<u8>, last: bool) -> String {
    let mut text = String::with_capacity(pending.len());
    let mut keep = 0;
    let mut chunks = pending.utf8_chunks().peekable();
    while let Some(chunk) = chunks.next() {
        text.push_str(chunk.valid());
        let invalid = chunk.invalid();
        let open = || std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
        if !last && chunks.peek().is_none() && open() {
            keep = invalid.len();
        } else if !invalid.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
    pending.drain(..pending.len() - keep);
    text
}

/// What `text` adds to `printed`. A decoder that changes its mind about earlier text is followed from where it did.
fn added(printed: &str, text: &str) -> String {
    let same: usize =
        printed.chars().zip(text.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    text.get(same..).unwrap_or_default().to_owned()
}
