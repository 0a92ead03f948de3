use crate::{Error, ErrorKind, Result, tokenizer::Tokenizer};
use llguidance::{
    ParserFactory, panic_utils,
    toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie},
};
use std::{panic::AssertUnwindSafe, sync::Arc};

/// A trie has room for fewer bytes than this, all tokens together; OPT's has 330,000.
const MOST_BYTES: usize = 1 << 22;
/// Tokens that are longer have no place in a trie and are never allowed.
const LONGEST_TOKEN: usize = 1000;
/// The byte that means "a special token by name" to grammars. No UTF-8 text has it.
const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// A tokenizer's tokens as a trie of bytes: made once for a model, shared by all its constraints.
pub(crate) struct Vocabulary {
    pub(super) factory: ParserFactory,
    /// A bit for each id that is text.
    text: Vec<u32>,
    tokenizer: Tokenizer,
}

impl Vocabulary {
    /// # Errors
    /// [`ErrorKind::Tokenizer`] for a tokenizer without any text, [`ErrorKind::Unsupported`] for one that is too large.
    pub(crate) fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let words = words(tokenizer);
        if words.iter().all(Vec::is_empty) {
            let message = "constraint: expected a tokenizer with tokens that are text, found none";
            return Err(Error::new(ErrorKind::Tokenizer, message));
        }
        let bytes: usize = words.iter().map(Vec::len).sum();
        if bytes >= MOST_BYTES {
            let message =
                format!("constraint: expected a vocabulary below {MOST_BYTES} bytes, found {bytes}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let mut text = vec![0; words.len().div_ceil(32)];
        for (id, _) in words.iter().enumerate().filter(|(_, word)| !word.is_empty()) {
            set(&mut text, id as u32, true);
        }
        // What ends a text is each request's own affair, so the trie is told of no end token.
        let info = TokRxInfo::new(words.len() as u32, INVALID_TOKEN);
        let factory = panic_utils::catch_unwind(AssertUnwindSafe(|| {
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
            let mut factory = ParserFactory::new_simple(&env)?;
            factory.quiet();
            let limits = factory.limits_mut();
            limits.verbose_errors = false;
            // A fifth of the default, which took 200 MB and ten seconds to reach: forms that people write have hundreds.
            limits.max_lexer_states = 50_000;
            Ok(factory)
        }))
        .map_err(|e| Error::new(ErrorKind::Tokenizer, super::line("constraint: the vocabulary", &e)))?;
        Ok(Self { factory, text, tokenizer: tokenizer.clone() })
    }

    /// Clears the bits of all ids that are no text.
    pub(super) fn keep_text(&self, mask: &mut Vec<u32>) {
        mask.resize(self.text.len(), 0);
        mask.iter_mut().zip(&self.text).for_each(|(word, text)| *word &= text);
    }

    /// Whether `tokenizer` has the same tokens.
    pub(super) fn is_of(&self, tokenizer: &Tokenizer) -> bool {
        self.tokenizer.is_same(tokenizer) || words(&self.tokenizer) == words(tokenizer)
    }
}

/// Sets or clears the bit of `id`; ids behind the last word are passed over.
pub(super) fn set(mask: &mut [u32], id: u32, on: bool) {
    if let Some(word) = mask.get_mut(id as usize / 32) {
        let bit = 1 << (id % 32);
        *word = if on { *word | bit } else { *word & !bit };
    }
}

/// The bytes of each id; none for what is no text: gaps, special tokens, and bytes that no text has.
fn words(tokenizer: &Tokenizer) -> Vec<Vec<u8>> {
    let strings = tokenizer.token_strings();
    // Files need not say of these that they are special.
    let named = [tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id(), tokenizer.unk_id()];
    let word = |id| match strings.get(id) {
        Some(bytes)
            if !strings.is_special(id)
                && !named.contains(&Some(id))
                && bytes.len() <= LONGEST_TOKEN
                && !bytes.contains(&MARKER) =>
        {
            bytes.to_vec()
        }
        _ => Vec::new(),
    };
    (0..strings.len() as u32).map(word).collect()
}
