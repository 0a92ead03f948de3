//! `clean_up_tokenization_spaces`: transformers' repair of spaces before English punctuation and contractions.

/// What is replaced by what, one pass after another over the whole text (transformers' `clean_up_tokenization`).
const PASSES: [(&str, &str); 10] = [
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
];

pub(super) fn clean_up(text: &str) -> String {
    PASSES.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// The same on a text that comes in pieces. Each pass keeps back what may be the beginning of its pattern.
#[derive(Debug, Clone, Default)]
pub(super) struct CleanUp {
    held: [String; PASSES.len()],
}

impl CleanUp {
    /// What can be said of the cleaned text once `piece` has come; `last` when nothing follows.
    pub(super) fn push(&mut self, piece: &str, last: bool) -> String {
        let mut text = piece.to_owned();
        for (held, (from, to)) in self.held.iter_mut().zip(PASSES) {
            if held.is_empty() && text.is_empty() {
                continue;
            }
            held.push_str(&text);
            // Matches do not overlap and are taken from the left, so what follows the last one is still unread.
            let after = held.match_indices(from).last().map_or(0, |(at, _)| at + from.len());
            let rest = &held[after..];
            let keep = if last { 0 } else { longest_overlap(rest, from) };
            let cut = held.len() - keep;
            text = held[..cut].replace(from, to);
            held.drain(..cut);
        }
        text
    }
}

/// The length of the longest end of `text` that is a true beginning of `pattern`.
fn longest_overlap(text: &str, pattern: &str) -> usize {
    (1..pattern.len()).rev().find(|n| text.ends_with(&pattern[..*n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // Made with transformers 4.57.6: PreTrainedTokenizerBase.clean_up_tokenization(text).
    const CASES: [(&str, &str); 5] = [
        ("Hello , world ! Is n't it ?", "Hello, world! Isn't it?"),
        ("I 'm sure it 's fine .", "I'm sure it's fine."),
        ("they 've said : we 're ' quoted ' here", "they've said : we're'quoted'here"),
        ("a  . b ' ' c", "a . b'' c"),
        (" . . .", "..."),
    ];

    #[test]
    fn matches_transformers() {
        for (text, expected) in CASES {
            assert_eq!(clean_up(text), expected, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn in_pieces_equals_whole(pieces in prop::collection::vec("[ .,!?'nmtsver]{0,4}", 0..20)) {
            let mut stream = CleanUp::default();
            let mut text: String = pieces.iter().map(|p| stream.push(p, false)).collect();
            text += &stream.push("", true);
            prop_assert_eq!(text, clean_up(&pieces.concat()));
        }
    }
}
