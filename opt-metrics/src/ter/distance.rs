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

/// Distances of beginnings of a hypothesis from beginnings of a reference, and the edits that lead there. At equal costs
/// keeping or substituting goes before deleting, and that before inserting.
///
/// Only cells near the diagonal are looked at, so that for long texts of which the words are far out of place the
/// distance may be more than the least; Tercom does about the same.
pub(super) struct Table<'a, T> {
    reference: &'a [T],
    /// Words of the hypothesis.
    length: usize,
    /// Words of the reference for each of the hypothesis.
    ratio: f64,
    beam: usize,
    rows: Vec<Row>,
}

impl<'a, T: PartialEq> Table<'a, T> {
    pub(super) fn new(hypothesis: &[T], reference: &'a [T]) -> Self {
        let length = hypothesis.len();
        let ratio = if length == 0 { 1.0 } else { reference.len() as f64 / length as f64 };
        // Beams of neighbouring rows must overlap.
        let beam =
            if (BEAM as f64) < ratio / 2.0 { (ratio / 2.0 + BEAM as f64).ceil() as usize } else { BEAM };
        let width = reference.len() + 1;
        let first = Row { start: 0, costs: (0..width).collect(), edits: vec![Edit::Insert; width] };
        let mut made = Self { reference, length, ratio, beam, rows: vec![first] };
        for (i, word) in (1..).zip(hypothesis) {
            let mut row = Row::default();
            if let Some(above) = made.rows.last() {
                made.fill(i, word, above, &mut row);
            }
            made.rows.push(row);
        }
        made
    }

    /// Makes row `i`, that of `word`, from the one above it.
    fn fill(&self, i: usize, word: &T, above: &Row, row: &mut Row) {
        let width = self.reference.len() + 1;
        let diagonal = (i as f64 * self.ratio).floor() as usize;
        let end = if i == self.length { width } else { width.min(diagonal + self.beam) };
        row.start = diagonal.saturating_sub(self.beam).min(width);
        row.costs.clear();
        row.edits.clear();
        let mut left = FAR;
        for j in row.start..end {
            let mut best = (FAR, Edit::Delete);
            if let Some((k, other)) = j.checked_sub(1).and_then(|k| Some((k, self.reference.get(k)?))) {
                let step = if word == other { (0, Edit::Keep) } else { (1, Edit::Substitute) };
                best = least(best, above.cost(k) + step.0, step.1);
            }
            best = least(best, above.cost(j) + 1, Edit::Delete);
            best = least(best, left + 1, Edit::Insert);
            left = best.0;
            row.costs.push(best.0);
            row.edits.push(best.1);
        }
    }

    /// The distance of the whole hypothesis.
    pub(super) fn distance(&self) -> usize {
        self.rows.last().map_or(FAR, |row| row.cost(self.reference.len()))
    }

    /// The distance of another hypothesis with as many words, of which the first `same` are the same.
    pub(super) fn distance_of(&self, hypothesis: &[T], same: usize) -> usize {
        let Some(first) = self.rows.get(same) else { return FAR };
        let (mut above, mut row) = (Row::default(), Row::default());
        for (i, word) in (1..).zip(hypothesis).skip(same) {
            self.fill(i, word, if i == same + 1 { first } else { &above }, &mut row);
            std::mem::swap(&mut above, &mut row);
        }
        let last = if hypothesis.len() > same { &above } else { first };
        last.cost(self.reference.len())
    }

    /// The edits from the hypothesis to the reference, from start to end.
    pub(super) fn edits(&self) -> Vec<Edit> {
        let (mut i, mut j) = (self.length, self.reference.len());
        let mut edits = Vec::new();
        while i > 0 || j > 0 {
            let edit = self.rows.get(i).map_or(Edit::Delete, |row| row.edit(j));
            edits.push(edit);
            if edit != Edit::Insert {
                i = i.saturating_sub(1);
            }
            if edit != Edit::Delete {
                j = j.saturating_sub(1);
            }
        }
        edits.reverse();
        edits
    }
}

fn least(best: (usize, Edit), cost: usize, edit: Edit) -> (usize, Edit) {
    if cost < best.0 { (cost, edit) } else { best }
}

/// Of one row only the cells looked at: where they start, their costs, and the edit that leads to each.
#[derive(Default)]
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
        let of = |a: &str, b: &str| Table::new(a.as_bytes(), b.as_bytes()).distance();
        assert_eq!(of("kitten", "sitting"), 3);
        assert_eq!(of("", "abc"), 3);
        assert_eq!(of("abc", ""), 3);
        assert_eq!(of("", ""), 0);
    }

    #[test]
    fn edits_lead_from_one_to_the_other() {
        let (a, b) = (b"the quick brown fox".as_slice(), b"quick red foxes".as_slice());
        let table = Table::new(a, b);
        let edits = table.edits();
        let count = |kind: &[Edit]| edits.iter().filter(|e| kind.contains(e)).count();
        assert_eq!(count(&[Edit::Keep, Edit::Substitute, Edit::Delete]), a.len());
        assert_eq!(count(&[Edit::Keep, Edit::Substitute, Edit::Insert]), b.len());
        assert_eq!(count(&[Edit::Substitute, Edit::Delete, Edit::Insert]), table.distance());
    }

    #[test]
    fn a_distance_from_kept_rows_is_that_of_the_whole() {
        let table = Table::new(b"abcdefgh".as_slice(), b"acebdfhg".as_slice());
        for (other, same) in [(b"abcdefgh", 8), (b"abcdefhg", 6), (b"abcdhgfe", 4), (b"habcdefg", 0)] {
            let whole = Table::new(other.as_slice(), b"acebdfhg".as_slice()).distance();
            assert_eq!(table.distance_of(other, same), whole, "{same}");
        }
    }
}
