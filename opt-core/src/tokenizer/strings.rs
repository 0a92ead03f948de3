use super::Inner;
use tokenizers::decoders::DecoderWrapper;

/// The bytes that each id adds to a text, by id: what stop strings and constrained decoding match against.
///
/// For byte-level tokenizers (OPT's) the bytes of a text are those of its ids, end to end; a single id may hold part of
/// a character. For other kinds they are the text an id adds in the middle of a sentence.
///
/// ```
/// # use opt_core::tokenizer::Tokenizer;
/// let tokenizer = Tokenizer::from_dir("../models/opt-novels")?;
/// let the = tokenizer.token_to_id("Ġthe").unwrap();
/// assert_eq!(tokenizer.token_strings().get(the), Some(&b" the"[..]));
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct TokenStrings {
    data: Vec<u8>,
    /// Where each id's bytes begin; one more entry than ids.
    starts: Vec<usize>,
    kinds: Vec<Kind>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// No token has this id.
    Gap,
    Text,
    Special,
}

impl TokenStrings {
    pub(super) fn new(inner: &Inner) -> Self {
        let hf = &inner.hf;
        let added = hf.get_added_vocabulary();
        // The ids may have gaps; several spellings may share one id, so ask for the one that decoding uses.
        let ids = hf.get_vocab(true).into_values().max().map_or(0, |max| max.saturating_add(1));
        let mut table = Self { data: Vec::new(), starts: vec![0], kinds: Vec::new() };
        for id in 0..ids {
            let token = added.simple_id_to_token(id).or_else(|| {
                use tokenizers::Model;
                hf.get_model().id_to_token(id)
            });
            let kind = match &token {
                None => Kind::Gap,
                Some(token) if added.is_special_token(token) => Kind::Special,
                Some(_) => Kind::Text,
            };
            match token {
                None => {}
                Some(token) if inner.byte_level => table.data.extend(byte_level(&token)),
                Some(token) => table.data.extend(in_sentence(hf, id, &token)),
            }
            table.starts.push(table.data.len());
            table.kinds.push(kind);
        }
        table
    }

    /// One past the highest id.
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Whether there are no tokens at all.
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// The bytes of `id`; `None` where no token has this id.
    pub fn get(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        match self.kinds.get(id)? {
            Kind::Gap => None,
            _ => self.data.get(*self.starts.get(id)?..*self.starts.get(id + 1)?),
        }
    }

    /// Whether `id` is a special token, such as `</s>`.
    pub fn is_special(&self, id: u32) -> bool {
        self.kinds.get(id as usize) == Some(&Kind::Special)
    }

    /// All ids that are tokens, with their bytes, by rising id.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &[u8])> {
        (0..self.len() as u32).filter_map(|id| Some((id, self.get(id)?)))
    }
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 stands for itself, and the remaining
/// bytes, in order, for U+0100 onwards.
fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        code @ 0..=0xFF => Some(code as u8).filter(|b| printable(*b)),
        code @ 0x100..=0x143 => (0..=u8::MAX).filter(|b| !printable(*b)).nth(code as usize - 0x100),
        _ => None,
    }
}

/// A token's bytes. One with a character outside the alphabet (an added token) is taken literally.
fn byte_level(token: &str) -> Vec<u8> {
    token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

fn in_sentence(hf: &tokenizers::Tokenizer, id: u32, token: &str) -> Vec<u8> {
    if let Some(byte) = fallback_byte(hf, token) {
        return vec![byte];
    }
    // The first token of a text may lose its space, so look at what a repetition adds.
    let (Ok(once), Ok(twice)) = (hf.decode(&[id], false), hf.decode(&[id, id], false)) else {
        return token.as_bytes().to_vec();
    };
    twice.strip_prefix(once.as_str()).unwrap_or(&once).as_bytes().to_vec()
}

/// The byte of a SentencePiece fallback token such as `<0x0A>`, where the decoder reads those.
fn fallback_byte(hf: &tokenizers::Tokenizer, token: &str) -> Option<u8> {
    let falls_back = match hf.get_decoder()? {
        DecoderWrapper::ByteFallback(_) => true,
        DecoderWrapper::Sequence(s) => {
            s.get_decoders().iter().any(|d| matches!(d, DecoderWrapper::ByteFallback(_)))
        }
        _ => false,
    };
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(digits, 16).ok().filter(|_| falls_back && digits.len() == 2)
}
