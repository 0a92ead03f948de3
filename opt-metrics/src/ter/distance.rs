//! Edit distance within a beam around the diagonal.

/// Cells to either side of the diagonal that are looked at.
const BEAM: usize = 25;

/// More than any distance; a cell outside of the beam.
const FAR: usize = usize::MAX / 2;

/// One step from a hypothesis to a reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Edit {
    /// The words are the same.
    Keep,
    /// One word for another.
    Substitute,
    /// A word that only the hypothesis has.
    Delete,
    /// A word that only the reference has.
    Insert,
}

/// The distance of a hypothesis from a reference, and the edits from start to end. At equal costs keeping or
/// substituting goes before deleting, and that before inserting.
///
/// Only cells near the diagonal are looked at, so that for long texts of which the words are far out of place the
/// distance may be more than the least; Tercom does about the same.
pub(super) fn distance<T: PartialEq>(hypothesis: &[T], reference: &[T]) -> (usize, Vec<Edit>) {
    let width = reference.len() + 1;
    let ratio = if hypothesis.is_empty() { 1.0 } else { reference.len() as f64 / hypothesis.len() as f64 };
    // Beams of neighbouring rows must overlap.
    let beam = if (BEAM as f64) < ratio / 2.0 { (ratio / 2.0 + BEAM as f64).ceil() as usize } else { BEAM };

    // Rows of only the cells looked at: where each starts, its costs, and the edit that leads to each.
    let mut rows = vec![Row { start: 0, costs: (0..width).collect(), edits: vec![Edit::Insert; width] }];
    for (i, word) in (1..).zip(hypothesis) {
        let diagonal = (i as f64 * ratio).floor() as usize;
        let start = diagonal.saturating_sub(beam).min(width);
        let end = if i == hypothesis.len() { width } else { width.min(diagonal + beam) };
        let above = rows.last();
        let from = |j: usize| above.map_or(FAR, |row| row.cost(j));
        let mut row = Row { start, costs: Vec::new(), edits: Vec::new() };
        let mut left = FAR;
        for j in start..end {
            let mut best = (FAR, Edit::Delete);
            let other = j.checked_sub(1).and_then(|k| reference.get(k));
            if let (Some(other), Some(k)) = (other, j.checked_sub(1)) {
                let step = if word == other { (0, Edit::Keep) } else { (1, Edit::Substitute) };
                best = least(best, from(k) + step.0, step.1);
            }
            best = least(best, from(j) + 1, Edit::Delete);
            best = least(best, left + 1, Edit::Insert);
            left = best.0;
            row.costs.push(best.0);
            row.edits.push(best.1);
        }
        rows.push(row);
    }

    let (mut i, mut j) = (hypothesis.len(), reference.len());
    let total = rows.last().map_or(FAR, |row| row.cost(j));
    let mut edits = Vec::new();
    while i > 0 || j > 0 {
        let edit = rows.get(i).map_or(Edit::Delete, |row| row.edit(j));
        edits.push(edit);
        if edit != Edit::Insert {
            i = i.saturating_sub(1);
        }
        if edit != Edit::Delete {
            j = j.saturating_sub(1);
        }
    }
    edits.reverse();
    (total, edits)
}

fn least(best: (usize, Edit), cost: usize, edit: Edit) -> (usize, Edit) {
    if cost < best.0 { (cost, edit) } else { best }
}

struct Row {
    start: usize,
    costs: Vec<usize>,
    edits: Vec<Edit>,
}

impl Row {
    fn cost(&self, j: usize) -> usize {
        j.checked_sub(self.start).and_then(|k| self.costs.get(k)).copied().unwrap_or(FAR)
    }

    fn edit(&self, j: usize) -> Edit {
        // No way leads outside of the beam; deleting and, at the top, inserting end the walk all the same.
        j.checked_sub(self.start).and_then(|k| self.edits.get(k)).copied().unwrap_or(Edit::Delete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_least_edits_of_short_words() {
        let of = |a: &str, b: &str| distance(a.as_bytes(), b.as_bytes()).0;
        assert_eq!(of("kitten", "sitting"), 3);
        assert_eq!(of("", "abc"), 3);
        assert_eq!(of("abc", ""), 3);
        assert_eq!(of("", ""), 0);
    }

    #[test]
    fn edits_lead_from_one_to_the_other() {
        let (a, b) = (b"the quick brown fox".as_slice(), b"quick red foxes".as_slice());
        let (cost, edits) = distance(a, b);
        let count = |kind: &[Edit]| edits.iter().filter(|e| kind.contains(e)).count();
        assert_eq!(count(&[Edit::Keep, Edit::Substitute, Edit::Delete]), a.len());
        assert_eq!(count(&[Edit::Keep, Edit::Substitute, Edit::Insert]), b.len());
        assert_eq!(count(&[Edit::Substitute, Edit::Delete, Edit::Insert]), cost);
    }
}
