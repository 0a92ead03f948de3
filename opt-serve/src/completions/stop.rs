//! `stop`: looked for in what was produced only, and no part of the answer.

use opt_core::{generation::StoppingCriterion, tokenizer::Tokenizer};
use std::sync::Arc;

/// Ends a sequence as soon as its produced text holds one of the strings.
pub(super) struct StopAt {
    strings: Vec<Vec<u8>>,
    tokenizer: Tokenizer,
}

impl StopAt {
    pub(super) fn new(strings: &[String], tokenizer: Tokenizer) -> Self {
        Self { strings: strings.iter().map(|string| string.as_bytes().to_vec()).collect(), tokenizer }
    }

    /// What a token adds to the answer: special ones nothing.
    fn bytes(&self, id: u32) -> &[u8] {
        let strings = self.tokenizer.token_strings();
        strings.get(id).filter(|_| !strings.is_special(id)).unwrap_or_default()
    }
}

impl StoppingCriterion for StopAt {
    fn should_stop(&self, ids: &[u32], prompt_len: usize) -> bool {
        let Some((&last, before)) = ids.get(prompt_len..).and_then(<[u32]>::split_last) else { return false };
        let last = self.bytes(last);
        let longest = self.strings.iter().map(Vec::len).max().unwrap_or(0);
        if last.is_empty() || longest == 0 {
            return false;
        }
        // As much of the text as a string that ends within the last token can reach back to.
        let mut tail: Vec<u8> = last.iter().rev().copied().collect();
        for id in before.iter().rev() {
            if tail.len() >= last.len() + longest - 1 {
                break;
            }
            tail.extend(self.bytes(*id).iter().rev());
        }
        tail.reverse();
        self.strings.iter().any(|string| tail.windows(string.len()).any(|window| window == string))
    }
}

/// Where the first of the strings begins.
pub(super) fn find(text: &str, strings: &[String]) -> Option<usize> {
    strings.iter().filter_map(|string| text.find(string.as_str())).min()
}

/// Hands a growing text on, but for a stop string and for an end that may become one.
pub(super) struct StopFilter {
    strings: Arc<[String]>,
    held: String,
    stopped: bool,
}

impl StopFilter {
    pub(super) fn new(strings: &Arc<[String]>) -> Self {
        Self { strings: Arc::clone(strings), held: String::new(), stopped: false }
    }

    /// Whether a stop string has come.
    pub(super) fn stopped(&self) -> bool {
        self.stopped
    }

    /// What is certain to be part of the answer once `text` has come; `last` if nothing comes after it.
    pub(super) fn push(&mut self, text: &str, last: bool) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(at) = find(&self.held, &self.strings) {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = if last { 0 } else { self.beginning() };
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// Bytes at the end that one of the strings begins with.
    fn beginning(&self) -> usize {
        let longest = |string: &String| {
            let most = (string.len() - 1).min(self.held.len());
            let begins = |len: &usize| {
                let start = self.held.len() - len;
                self.held.is_char_boundary(start)
                    && string.as_bytes().starts_with(&self.held.as_bytes()[start..])
            };
            (1..=most).rev().find(begins).unwrap_or(0)
        };
        self.strings.iter().filter(|string| !string.is_empty()).map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the pieces, what comes out is the text up to the first stop string.
    #[test]
    fn a_stream_is_cut_where_the_whole_text_is() {
        let strings: Arc<[String]> = ["\n\n", "stop", "ß", "op?"].map(str::to_owned).into();
        let texts = [
            "no end sto",
            "it stops here",
            "a\n b\n\nc",
            "ich weiß nicht",
            "stostop",
            "st\u{fc}op?",
            "ststo\n\nstop",
        ];
        for text in texts {
            let expected = find(text, &strings).map_or(text, |at| &text[..at]);
            for size in 1..5 {
                let pieces: Vec<char> = text.chars().collect();
                let mut filter = StopFilter::new(&strings);
                let mut out = String::new();
                for piece in pieces.chunks(size) {
                    let piece: String = piece.iter().collect();
                    let certain = filter.push(&piece, false);
                    assert!(
                        expected.starts_with(&format!("{out}{certain}")),
                        "{text:?}: nothing is taken back"
                    );
                    out.push_str(&certain);
                }
                out.push_str(&filter.push("", true));
                assert_eq!(out, expected, "{text:?} in pieces of {size}");
                assert_eq!(filter.stopped(), expected != text, "{text:?}");
            }
        }
    }
}
