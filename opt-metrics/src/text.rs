//! Comparisons of single answers: exact match as lm-evaluation-harness has it, and SQuAD's.

use crate::{
    Error, Result,
    error::{at_least, same_length},
    python::{WORD, is_ascii_punctuation, split},
};
use fancy_regex::{Regex, RegexBuilder};
use std::collections::HashMap;

/// What exact match overlooks. The default is nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ExactMatchOptions {
    /// Lowercase both sides.
    pub ignore_case: bool,
    /// Remove ASCII's punctuation.
    pub ignore_punctuation: bool,
    /// Remove the digits 0 to 9.
    pub ignore_numbers: bool,
    /// Remove what these expressions of Python match, one after the other, before anything else.
    pub regexes_to_ignore: Vec<String>,
}

/// Compares texts as the metric exact_match of lm-evaluation-harness does.
///
/// Its texts pass through arrays of NumPy, which leaves two traces, kept here: zero characters at the end are dropped,
/// and lowercasing makes no text longer than the longest of its list was.
///
/// ```
/// use opt_metrics::text::{ExactMatch, ExactMatchOptions};
/// let mut options = ExactMatchOptions::default();
/// options.ignore_case = true;
/// options.regexes_to_ignore = vec![",".into(), r"\.$".into()];
/// let exact = ExactMatch::new(options)?;
/// assert!(exact.matches("1,000 Apples.\n", "1000 apples\n")?);
/// # Ok::<(), opt_metrics::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct ExactMatch {
    options: ExactMatchOptions,
    patterns: Vec<Regex>,
}

impl ExactMatch {
    /// Exact match with options.
    ///
    /// # Errors
    /// [`Error::Pattern`] for an expression that cannot be compiled.
    pub fn new(options: ExactMatchOptions) -> Result<Self> {
        let patterns = options.regexes_to_ignore.iter().map(|p| compile(p)).collect::<Result<_>>()?;
        Ok(Self { options, patterns })
    }

    /// The options.
    pub fn options(&self) -> &ExactMatchOptions {
        &self.options
    }

    /// Whether one text equals another.
    ///
    /// # Errors
    /// [`Error::Pattern`] for an expression that takes too long on a text.
    pub fn matches(&self, prediction: &str, reference: &str) -> Result<bool> {
        Ok(self.score(&[prediction], &[reference])? > 0.0)
    }

    /// Whether a prediction equals any of several references.
    ///
    /// # Errors
    /// [`Error::TooFew`] for no reference; [`Error::Pattern`] for an expression that takes too long on a text.
    pub fn matches_any<S: AsRef<str>>(&self, prediction: &str, references: &[S]) -> Result<bool> {
        Ok(self.score(&vec![prediction; references.len()], references)? > 0.0)
    }

    /// The part of predictions that equal their references, from 0 to 1.
    ///
    /// # Errors
    /// [`Error::TooFew`] for no prediction; [`Error::Lengths`] unless there is a reference for each;
    /// [`Error::Pattern`] for an expression that takes too long on a text.
    pub fn score<P: AsRef<str>, R: AsRef<str>>(&self, predictions: &[P], references: &[R]) -> Result<f64> {
        same_length("predictions and references", predictions.len(), references.len())?;
        at_least("predictions", 1, predictions.len())?;
        let (predictions, references) = (self.prepare(predictions)?, self.prepare(references)?);
        let equal = predictions.iter().zip(&references).filter(|(p, r)| p == r).count();
        Ok(equal as f64 / predictions.len() as f64)
    }

    fn prepare<S: AsRef<str>>(&self, texts: &[S]) -> Result<Vec<String>> {
        let mut texts: Vec<String> = texts.iter().map(|t| t.as_ref().to_owned()).collect();
        for (pattern, source) in self.patterns.iter().zip(&self.options.regexes_to_ignore) {
            for text in &mut texts {
                *text = remove(pattern, source, text)?;
            }
        }
        let drop_zeros = |text: &mut String| text.truncate(text.trim_end_matches('\0').len());
        texts.iter_mut().for_each(drop_zeros);
        if self.options.ignore_case {
            let width = texts.iter().map(|t| t.chars().count()).max().unwrap_or(0);
            for text in &mut texts {
                *text = text.to_lowercase().chars().take(width).collect();
            }
        }
        for text in &mut texts {
            if self.options.ignore_punctuation {
                text.retain(|c| !is_ascii_punctuation(c));
                drop_zeros(text);
            }
            if self.options.ignore_numbers {
                text.retain(|c| !c.is_ascii_digit());
                drop_zeros(text);
            }
        }
        Ok(texts)
    }
}

/// Compiles an expression of Python: there `$` without the flag m, and only there, also stands before a line feed that
/// ends the text, and `\Z` never does.
fn compile(pattern: &str) -> Result<Regex> {
    let mut translated = String::new();
    let (mut class, mut chars) = (false, pattern.chars().peekable());
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('Z') if !class => translated.push_str(r"\z"),
                escaped => {
                    translated.push(c);
                    translated.extend(escaped);
                }
            },
            '$' if !class => translated.push_str(r"(?:$|(?=\n\z))"),
            '[' if !class => {
                class = true;
                translated.push(c);
                // A bracket that comes first is one of the characters.
                for first in ['^', ']'] {
                    translated.extend(chars.next_if_eq(&first).map(|c| if c == ']' { r"\]" } else { "^" }));
                }
            }
            _ => {
                class = class && c != ']';
                translated.push(c);
            }
        }
    }
    // What matches long texts in no time in one engine may take for ever in another: the limit is an error.
    RegexBuilder::new(&translated).backtrack_limit(10_000_000).build().map_err(|e| unusable(pattern, &e))
}

fn unusable(pattern: &str, error: &fancy_regex::Error) -> Error {
    let reason = error.to_string();
    let reason = reason.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    Error::Pattern { pattern: pattern.to_owned(), reason }
}

fn remove(pattern: &Regex, source: &str, text: &str) -> Result<String> {
    let mut kept = String::new();
    let mut end = 0;
    for found in pattern.find_iter(text) {
        let found = found.map_err(|e| unusable(source, &e))?;
        kept.push_str(text.get(end..found.start()).unwrap_or_default());
        end = found.end();
    }
    kept.push_str(text.get(end..).unwrap_or_default());
    Ok(kept)
}

/// SQuAD's normal form of an answer: lowercase, without ASCII's punctuation, then without the words a, an and the, and
/// with one space between words.
///
/// ```
/// assert_eq!(opt_metrics::text::normalize_answer("The  U.S. (a nation)"), "us nation");
/// ```
pub fn normalize_answer(text: &str) -> String {
    let lower: String = text.to_lowercase().chars().filter(|c| !is_ascii_punctuation(*c)).collect();
    let mut without = String::with_capacity(lower.len());
    let mut rest = lower.as_str();
    while !rest.is_empty() {
        // A run of letters, and what separates it from the next.
        let run = rest.find(|c| !WORD.has(c)).unwrap_or(rest.len());
        let (word, tail) = rest.split_at(run);
        without.push_str(if matches!(word, "a" | "an" | "the") { " " } else { word });
        let gap = tail.find(|c| WORD.has(c)).unwrap_or(tail.len());
        let (between, next) = tail.split_at(gap);
        without.push_str(between);
        rest = next;
    }
    split(&without).collect::<Vec<_>>().join(" ")
}

/// Whether two answers have the same normal form: SQuAD's exact match.
pub fn squad_exact(reference: &str, prediction: &str) -> bool {
    normalize_answer(reference) == normalize_answer(prediction)
}

/// SQuAD's F1 of the words of two answers, from 0 to 1; words count as often as both have them. If one has no words,
/// it is 1 where neither has, as in the script of SQuAD 2.0.
///
/// ```
/// assert_eq!(opt_metrics::text::squad_f1("the quick fox", "a quick dog"), 0.5);
/// ```
pub fn squad_f1(reference: &str, prediction: &str) -> f64 {
    let (reference, prediction) = (normalize_answer(reference), normalize_answer(prediction));
    let wanted: Vec<&str> = split(&reference).collect();
    let predicted: Vec<&str> = split(&prediction).collect();
    if wanted.is_empty() || predicted.is_empty() {
        return if wanted == predicted { 1.0 } else { 0.0 };
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in &wanted {
        *left.entry(word).or_default() += 1;
    }
    let mut same = 0.0;
    for word in &predicted {
        if let Some(count @ 1..) = left.get_mut(word) {
            *count -= 1;
            same += 1.0;
        }
    }
    if same == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (same / predicted.len() as f64, same / wanted.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

/// The highest of a score over several references, as SQuAD takes it; 0 for no reference.
///
/// ```
/// use opt_metrics::text::{best_of, squad_f1};
/// assert_eq!(best_of(&["Paris", "the city of Paris"], "paris", squad_f1), 1.0);
/// ```
pub fn best_of<S: AsRef<str>>(references: &[S], prediction: &str, score: impl Fn(&str, &str) -> f64) -> f64 {
    references.iter().map(|r| score(r.as_ref(), prediction)).fold(0.0, f64::max)
}
