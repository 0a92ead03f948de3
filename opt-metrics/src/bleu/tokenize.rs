use crate::python::{NUMBER, PUNCTUATION, SYMBOL, replace_pairs, split};

/// How BLEU makes tokens of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum BleuTokenizer {
    /// That of mteval-v13a, which WMT uses: punctuation of ASCII is split off, but for periods and commas in numbers.
    #[default]
    V13a,
    /// That of mteval-v14's international mode: all of Unicode's punctuation and symbols. Characters are classified by
    /// Unicode 16; sacrebleu does it by what its Python environment has.
    Intl,
    /// Every character is a token.
    Char,
    /// Only white space separates.
    None,
}

impl BleuTokenizer {
    /// sacrebleu's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V13a => "13a",
            Self::Intl => "intl",
            Self::Char => "char",
            Self::None => "none",
        }
    }

    /// The tokenizer of one of sacrebleu's names: 13a, intl, char or none.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::V13a, Self::Intl, Self::Char, Self::None].into_iter().find(|t| t.name() == name)
    }

    /// The tokens of a text.
    ///
    /// ```
    /// use opt_metrics::bleu::BleuTokenizer;
    /// assert_eq!(BleuTokenizer::V13a.tokenize("It's 3.5, no?"), ["It's", "3.5", ",", "no", "?"]);
    /// ```
    pub fn tokenize(self, text: &str) -> Vec<String> {
        match self {
            Self::V13a => words(&v13a(text)),
            Self::Intl => words(&intl(text)),
            Self::Char => text.chars().filter(|c| !crate::python::is_space(*c)).map(String::from).collect(),
            Self::None => split(text).map(str::to_owned).collect(),
        }
    }
}

fn words(text: &[char]) -> Vec<String> {
    split(&text.iter().collect::<String>()).map(str::to_owned).collect()
}

fn is_stop(c: char) -> bool {
    c == '.' || c == ','
}

fn v13a(text: &str) -> Vec<char> {
    let mut text = text.replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    if text.contains('&') {
        for (entity, character) in [("&quot;", "\""), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")] {
            text = text.replace(entity, character);
        }
    }
    split_stops(&space_out(&format!(" {text} "), is_western_punctuation))
}

/// Whether 13a makes a token of its own of a character wherever it stands.
pub(crate) fn is_western_punctuation(c: char) -> bool {
    matches!(c, '{'..='~' | '['..='`' | ' '..='&' | '('..='+' | ':'..='@' | '/')
}

/// Spaces around each character of a kind.
pub(crate) fn space_out(text: &str, kind: impl Fn(char) -> bool) -> Vec<char> {
    let mut spaced = Vec::with_capacity(text.len() + text.len() / 2);
    for c in text.chars() {
        if kind(c) { spaced.extend([' ', c, ' ']) } else { spaced.push(c) }
    }
    spaced
}

/// Splits off periods and commas unless between digits, and dashes after digits.
pub(crate) fn split_stops(text: &[char]) -> Vec<char> {
    let text = replace_pairs(
        text,
        |a, b| !a.is_ascii_digit() && is_stop(b),
        |a, b, out| out.extend([a, ' ', b, ' ']),
    );
    let text = replace_pairs(
        &text,
        |a, b| is_stop(a) && !b.is_ascii_digit(),
        |a, b, out| out.extend([' ', a, ' ', b]),
    );
    replace_pairs(&text, |a, b| a.is_ascii_digit() && b == '-', |a, b, out| out.extend([a, ' ', b, ' ']))
}

fn intl(text: &str) -> Vec<char> {
    let text: Vec<char> = text.chars().collect();
    let text = replace_pairs(
        &text,
        |a, b| !NUMBER.has(a) && PUNCTUATION.has(b),
        |a, b, out| out.extend([a, ' ', b, ' ']),
    );
    let text = replace_pairs(
        &text,
        |a, b| PUNCTUATION.has(a) && !NUMBER.has(b),
        |a, b, out| out.extend([' ', a, ' ', b]),
    );
    space_out(&text.iter().collect::<String>(), |c| SYMBOL.has(c))
}
