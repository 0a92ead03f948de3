//! Texts cut into passages of whole sentences, up to a number of tokens, with some overlap.

use opt_core::Result;
use std::ops::Range;
use unicode_segmentation::UnicodeSegmentation;

/// How long passages are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lengths {
    /// Most tokens of a passage.
    pub(crate) tokens: usize,
    /// Most tokens at its beginning that the one before it ended with.
    pub(crate) overlap: usize,
}

/// A sentence, or a part of one that is too long for a passage.
struct Unit {
    bytes: Range<usize>,
    ends_paragraph: bool,
}

/// White space in a text means nothing but where words and paragraphs end; what is embedded, counted and stored has one
/// space between words.
pub(crate) fn flat(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The passages of a text, as bytes of it. `count` tells how many tokens a text is.
///
/// # Errors
/// Those of `count`.
pub(crate) fn passages(
    text: &str,
    lengths: Lengths,
    count: &dyn Fn(&str) -> Result<usize>,
) -> Result<Vec<Range<usize>>> {
    let size = |bytes: &Range<usize>| count(&flat(text.get(bytes.clone()).unwrap_or_default()));
    let mut units = Vec::new();
    for paragraph in paragraphs(text) {
        for sentence in sentences(text, paragraph) {
            cut(text, sentence, &|bytes| Ok(size(bytes)? <= lengths.tokens), &mut units)?;
        }
        if let Some(last) = units.last_mut() {
            last.ends_paragraph = true;
        }
    }
    let mut found = Vec::new();
    let mut rest = &units[..];
    while let [first, others @ ..] = rest {
        // As many units as fit. A passage ends with a paragraph where it is half full by then.
        let (mut taken, mut bytes) = (1, first.bytes.clone());
        let mut whole = None;
        for (i, unit) in others.iter().enumerate() {
            let longer = bytes.start..unit.bytes.end;
            let tokens = size(&longer)?;
            if tokens > lengths.tokens {
                break;
            }
            (taken, bytes) = (i + 2, longer);
            if unit.ends_paragraph && tokens * 2 >= lengths.tokens {
                whole = Some((taken, bytes.clone()));
            }
        }
        if let Some(whole) = whole.filter(|_| taken < rest.len()) {
            (taken, bytes) = whole;
        }
        let Some((next, behind)) = rest.get(taken).zip(rest.get(..taken)) else {
            found.push(bytes);
            break;
        };
        // The next one begins a few sentences before this one's end, if they leave room for something new.
        let mut again = 0;
        for unit in behind.iter().skip(1).rev() {
            let fits = size(&(unit.bytes.start..bytes.end))? <= lengths.overlap
                && size(&(unit.bytes.start..next.bytes.end))? <= lengths.tokens;
            if !fits {
                break;
            }
            again += 1;
        }
        found.push(bytes);
        rest = rest.get(taken - again..).unwrap_or_default();
    }
    Ok(found)
}

/// Lines between empty ones.
fn paragraphs(text: &str) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    let mut goes_on = false;
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        let end = start + line.len();
        let blank = line.trim().is_empty();
        match found.last_mut() {
            _ if blank => {}
            Some(last) if goes_on => last.end = end,
            _ => found.push(start..end),
        }
        goes_on = !blank;
        start = end;
    }
    found
}

/// The sentences of a part of a text, without white space around them, by the rules of Unicode (UAX 29). There the end
/// of a line ends a sentence; in texts with lines of a fixed width it does not.
pub(crate) fn sentences(text: &str, part: Range<usize>) -> Vec<Range<usize>> {
    let lines = text.get(part.clone()).unwrap_or_default().replace(['\n', '\r'], " ");
    let bounds = lines.split_sentence_bound_indices();
    let trimmed = bounds.map(|(at, sentence)| {
        let start = part.start + at + sentence.len() - sentence.trim_start().len();
        start..start + sentence.trim().len()
    });
    trimmed.filter(|bytes| !bytes.is_empty()).collect()
}

/// Halves what does not fit, between words where there are some.
fn cut(
    text: &str,
    bytes: Range<usize>,
    fits: &dyn Fn(&Range<usize>) -> Result<bool>,
    units: &mut Vec<Unit>,
) -> Result<()> {
    let part = text.get(bytes.clone()).unwrap_or_default();
    let middle = part.floor_char_boundary(part.len() / 2);
    let gap = |(at, c): (usize, char)| c.is_whitespace().then_some(at);
    let (before, after) = part.split_at(middle);
    let gaps =
        [before.char_indices().rev().find_map(gap), after.char_indices().find_map(gap).map(|at| middle + at)];
    let at = gaps.into_iter().flatten().min_by_key(|at| at.abs_diff(middle)).unwrap_or(middle);
    // One character always fits: four bytes are four tokens at most, and the command asks for more.
    if at == 0 || fits(&bytes)? {
        units.push(Unit { bytes, ends_paragraph: false });
        return Ok(());
    }
    let (left, right) = part.split_at(at);
    let left = bytes.start..bytes.start + left.trim_end().len();
    cut(text, left, fits, units)?;
    cut(text, bytes.end - right.trim_start().len()..bytes.end, fits, units)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut_up(text: &str, tokens: usize, overlap: usize) -> Vec<&str> {
        let words = |text: &str| Ok(text.split_whitespace().count());
        let found = passages(text, Lengths { tokens, overlap }, &words).unwrap();
        found.into_iter().map(|bytes| &text[bytes]).collect()
    }

    #[test]
    fn sentences_are_kept_whole_and_overlap() {
        let text = "One two three. Four five six. Seven eight nine. Ten eleven.";
        assert_eq!(cut_up(text, 100, 3), [text]);
        assert_eq!(
            cut_up(text, 6, 3),
            [
                "One two three. Four five six.",
                "Four five six. Seven eight nine.",
                "Seven eight nine. Ten eleven."
            ]
        );
        assert_eq!(cut_up(text, 6, 0), ["One two three. Four five six.", "Seven eight nine. Ten eleven."]);
        // An overlap that would leave no room for the next sentence is left out.
        assert_eq!(cut_up(text, 3, 2).len(), 4);
        assert!(cut_up(" \n\n \n", 6, 3).is_empty());
    }

    #[test]
    fn paragraphs_end_passages_and_lines_do_not() {
        let text = "A b c d e.\nF g\r\nh.\n\nI j k l.  M n o.\n";
        assert_eq!(cut_up(text, 100, 0), [text.trim_end()]);
        assert_eq!(cut_up(text, 12, 0), ["A b c d e.\nF g\r\nh.", "I j k l.  M n o."]);
    }

    #[test]
    fn what_is_too_long_is_cut_between_words() {
        let text = "a b c d e f g h i j k l m";
        let found = cut_up(text, 4, 0);
        assert!(found.iter().all(|part| part.split(' ').count() <= 4), "{found:?}");
        assert_eq!(found.join(" "), text);
        let bytes = |text: &str| Ok(text.len());
        let text = "é".repeat(50);
        let found = passages(&text, Lengths { tokens: 8, overlap: 0 }, &bytes).unwrap();
        assert!(found.iter().all(|part| part.len() <= 8), "{found:?}");
        assert_eq!(found.iter().map(Range::len).sum::<usize>(), text.len());
    }
}
