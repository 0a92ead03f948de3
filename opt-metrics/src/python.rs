//! Strings as Python sees them.

use fancy_regex::Regex;
use std::sync::LazyLock;

/// Python's `string.punctuation`: all of ASCII that is neither letter, digit, space nor control.
pub(crate) fn is_ascii_punctuation(c: char) -> bool {
    c.is_ascii_punctuation()
}

/// What `str.split()`, `str.strip()` and `\s` take for white space: Unicode's, and four ASCII separators.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// `text.split()`.
pub(crate) fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// `text.rstrip()`.
pub(crate) fn trim_end(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// A class of characters by Unicode's general category.
pub(crate) struct Category {
    ascii: fn(u8) -> bool,
    pattern: LazyLock<Option<Regex>>,
}

impl Category {
    pub(crate) fn has(&self, c: char) -> bool {
        if c.is_ascii() {
            return (self.ascii)(c as u8);
        }
        let mut buffer = [0; 4];
        // A constant pattern of one class neither fails to compile nor to run; a test holds each.
        self.pattern.as_ref().is_some_and(|p| p.is_match(c.encode_utf8(&mut buffer)).unwrap_or(false))
    }
}

fn is_ascii_symbol(b: u8) -> bool {
    b"$+<=>^`|~".contains(&b)
}

/// `\p{P}`
pub(crate) static PUNCTUATION: Category = Category {
    ascii: |b| b.is_ascii_punctuation() && !is_ascii_symbol(b),
    pattern: LazyLock::new(|| Regex::new(r"\p{P}").ok()),
};

/// `\p{S}`
pub(crate) static SYMBOL: Category =
    Category { ascii: is_ascii_symbol, pattern: LazyLock::new(|| Regex::new(r"\p{S}").ok()) };

/// `\p{N}`
pub(crate) static NUMBER: Category =
    Category { ascii: |b| b.is_ascii_digit(), pattern: LazyLock::new(|| Regex::new(r"\p{N}").ok()) };

/// What `\w` is in Python: letters, numbers and the underscore, but no combining marks.
pub(crate) static WORD: Category = Category {
    ascii: |b| b.is_ascii_alphanumeric() || b == b'_',
    pattern: LazyLock::new(|| Regex::new(r"[\p{L}\p{N}]").ok()),
};

/// Replaces pairs of neighbours from left to right, as `re.sub` does with a pattern of two characters: a character
/// that was part of a match is in no other.
pub(crate) fn replace_pairs(
    text: &[char],
    matches: impl Fn(char, char) -> bool,
    mut replace: impl FnMut(char, char, &mut Vec<char>),
) -> Vec<char> {
    let mut out = Vec::with_capacity(text.len() + text.len() / 2);
    let mut rest = text;
    while let Some((&a, tail)) = rest.split_first() {
        match tail.split_first() {
            Some((&b, after)) if matches(a, b) => {
                replace(a, b, &mut out);
                rest = after;
            }
            _ => {
                out.push(a);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn categories_compile_and_know_ascii_as_the_tables_do() {
        for (category, pattern) in
            [(&PUNCTUATION, r"\p{P}"), (&SYMBOL, r"\p{S}"), (&NUMBER, r"\p{N}"), (&WORD, r"[\p{L}\p{N}_]")]
        {
            assert!(category.pattern.is_some());
            let regex = Regex::new(pattern).unwrap();
            for c in (0..0x3100).filter_map(char::from_u32) {
                assert_eq!(category.has(c), regex.is_match(&c.to_string()).unwrap(), "{pattern} {c:?}");
            }
        }
    }

    #[test]
    fn splits_at_what_python_takes_for_white_space() {
        let found: Vec<&str> = split("\x1fa\u{a0}b\x1c\u{3000}c\u{200b}d ").collect();
        assert_eq!(found, ["a", "b", "c\u{200b}d"]);
    }
}
