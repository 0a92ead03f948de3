//! From tokenized corpora back to text as people write it, the way lm-evaluation-harness does.

use regex::Regex;
use std::sync::LazyLock;

// The patterns are constants, so that none of them can fail to compile; a test compiles them all.
static PAIRS: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    let patterns = [
        (r"\(\s*([^\)]*?)\s*\)", "($1)"),
        (r"\[\s*([^\]]*?)\s*\]", "[$1]"),
        (r"\{\s*([^}]*?)\s*\}", "{$1}"),
        (r#""\s*([^"]*?)\s*""#, "\"$1\""),
        (r"'\s*([^']*?)\s*'", "'$1'"),
    ];
    patterns.into_iter().map(|(pattern, by)| (Regex::new(pattern).expect("a constant pattern"), by)).collect()
});

/// WikiText as text: the ` @-@ ` of numbers and compounds, spaces around punctuation, brackets and quotes, headings.
///
/// ```
/// assert_eq!(opt_eval::detokenize::wikitext("a well @-@ known film , and \" good \""), "a well-known film, and \"good\"");
/// ```
pub fn wikitext(text: &str) -> String {
    let mut text = text.replace("s '", "s'");
    // The harness means a quote before a digit; its pattern has slashes, which are not in the corpus, and so has this.
    text = SLASHED.replace_all(&text, "/'[0-9]/").into_owned();
    for (old, new) in [
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (" @.@ ", "."),
        (" : ", ": "),
        (" ; ", "; "),
        (" . ", ". "),
        (" ! ", "! "),
        (" ? ", "? "),
        (" , ", ", "),
    ] {
        text = text.replace(old, new);
    }
    for (pattern, by) in PAIRS.iter() {
        text = pattern.replace_all(&text, *by).into_owned();
    }
    for (old, new) in [
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" \u{b0} ", "\u{b0}"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ] {
        text = text.replace(old, new);
    }
    text
}

/// The harness' general detokenizer, which its task wsc uses.
///
/// ```
/// assert_eq!(opt_eval::detokenize::general("They did n't see *it* ( \" the bird \" ) ."), "They didn't see *it* (\"the bird\").");
/// ```
pub fn general(text: &str) -> String {
    let mut text = text.to_owned();
    for (old, new) in [(" n't", "n't"), (" )", ")"), ("( ", "("), ("\" ", "\""), (" \"", "\"")] {
        text = text.replace(old, new);
    }
    PUNCTUATION.replace_all(&text, "$1").into_owned()
}

static SLASHED: LazyLock<Regex> = LazyLock::new(|| Regex::new("/' [0-9]/").expect("a constant pattern"));

static PUNCTUATION: LazyLock<Regex> = LazyLock::new(|| Regex::new(r" (['.,])").expect("a constant pattern"));
