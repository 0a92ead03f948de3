//! Edits with shifts of phrases, found greedily as Tercom does.

use super::distance::{Edit, Table};
use std::collections::HashMap;

/// Longest phrase that is shifted.
const MAX_SIZE: usize = 10;
/// Farthest a phrase is shifted.
const MAX_DISTANCE: usize = 50;
/// After this many tried shifts the search ends.
const MAX_TRIED: usize = 1000;

/// Edits from a hypothesis to a reference, each shift of a phrase counting one.
pub(super) fn edits(hypothesis: &[String], reference: &[String]) -> usize {
    if reference.is_empty() {
        return hypothesis.len();
    }
    // Words as numbers: a search compares them very often.
    let mut ids = HashMap::new();
    let mut number = |words: &[String]| -> Vec<u32> {
        words
            .iter()
            .map(|word| {
                let next = ids.len() as u32;
                *ids.entry(word.clone()).or_insert(next)
            })
            .collect()
    };
    let (mut words, reference) = (number(hypothesis), number(reference));
    let (mut shifts, mut tried) = (0, 0);
    while let Some(better) = best_shift(&words, &reference, &mut tried) {
        words = better;
        shifts += 1;
    }
    shifts + Table::new(&words, &reference).distance()
}

/// The hypothesis after the shift that saves most edits, of equals the one of the longest phrase, then from nearest to
/// the start, then to there; none if no shift saves any, or the search was too long.
fn best_shift(words: &[u32], reference: &[u32], tried: &mut usize) -> Option<Vec<u32>> {
    let table = Table::new(words, reference);
    let before = table.distance();
    let alignment = Alignment::new(&table.edits());
    let mut best: Option<(i64, usize, usize, usize)> = None;
    let mut shifted = Vec::new();
    let mut found = Vec::new();
    for start in 0..words.len() {
        let nearest = start.saturating_sub(MAX_DISTANCE);
        for place in nearest..reference.len().min(start + MAX_DISTANCE + 1) {
            let (from, to) =
                (words.get(start..).unwrap_or_default(), reference.get(place..).unwrap_or_default());
            let same = from.iter().zip(to).take(MAX_SIZE).take_while(|(a, b)| a == b).count();
            for length in 1..=same {
                if !alignment.worth_shifting(start, place, length) {
                    continue;
                }
                let mut last = None;
                for target in alignment.targets(place, length) {
                    if last.replace(target) == Some(target) {
                        continue;
                    }
                    shift(words, start, length, target, &mut shifted);
                    *tried += 1;
                    let after = table.distance_of(&shifted, start.min(target));
                    let saved = before as i64 - after as i64;
                    let better =
                        best.is_none_or(|(s, l, from, to)| (saved, length, from, to) > (s, l, start, target));
                    if better {
                        best = Some((saved, length, start, target));
                        found.clone_from(&shifted);
                    }
                }
                if *tried >= MAX_TRIED {
                    return None;
                }
            }
        }
    }
    best.filter(|b| b.0 > 0).map(|_| found)
}

/// Moves a phrase of `length` words at `start` to before the word `target`. Inside of itself it moves that far on.
fn shift(words: &[u32], start: usize, length: usize, target: usize, out: &mut Vec<u32>) {
    let part =
        |from: usize, to: usize| words.get(from.min(words.len())..to.min(words.len())).unwrap_or_default();
    let end = start + length;
    out.clear();
    if target < start {
        for piece in [part(0, target), part(start, end), part(target, start), part(end, words.len())] {
            out.extend_from_slice(piece);
        }
    } else {
        let after = if target > end { target } else { length + target };
        for piece in [part(0, start), part(end, after), part(start, end), part(after, words.len())] {
            out.extend_from_slice(piece);
        }
    }
}

/// Which words of both sides stand for each other.
struct Alignment {
    /// For each word of the reference how many words of the hypothesis are before or at it.
    after: Vec<usize>,
    reference_wrong: Vec<bool>,
    hypothesis_wrong: Vec<bool>,
}

impl Alignment {
    fn new(edits: &[Edit]) -> Self {
        let mut made = Self { after: Vec::new(), reference_wrong: Vec::new(), hypothesis_wrong: Vec::new() };
        for edit in edits {
            let wrong = *edit != Edit::Keep;
            if *edit != Edit::Insert {
                made.hypothesis_wrong.push(wrong);
            }
            if *edit != Edit::Delete {
                made.reference_wrong.push(wrong);
                made.after.push(made.hypothesis_wrong.len());
            }
        }
        made
    }

    /// Whether a phrase is wrong where it is, its place in the reference is wrong too, and is not in the phrase itself.
    fn worth_shifting(&self, start: usize, place: usize, length: usize) -> bool {
        let any = |flags: &[bool], from: usize| flags.iter().skip(from).take(length).any(|f| *f);
        let inside =
            self.after.get(place).is_some_and(|&after| (start + 1..start + 1 + length).contains(&after));
        any(&self.hypothesis_wrong, start) && any(&self.reference_wrong, place) && !inside
    }

    /// Where in the hypothesis the phrase could go: before what is aligned with the word before its place, or with any
    /// of its own.
    fn targets(&self, place: usize, length: usize) -> impl Iterator<Item = usize> {
        let before = if place == 0 { Some(0) } else { self.after.get(place - 1).copied() };
        before.into_iter().chain(self.after.iter().skip(place).take(length).copied())
    }
}
