//! Longest common subsequences.

/// Appends to `row`, lengths for one prefix of a text against all prefixes of `other`, what one more word makes of it.
fn advance<T: PartialEq>(row: &mut [usize], word: &T, other: &[T]) {
    let mut diagonal = 0;
    let mut left = 0;
    for (cell, candidate) in row.iter_mut().skip(1).zip(other) {
        let above = *cell;
        *cell = if word == candidate { diagonal + 1 } else { above.max(left) };
        diagonal = above;
        left = *cell;
    }
}

/// The length of the longest common subsequence, in time |a|·|b|.
pub(super) fn length<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for word in a {
        advance(&mut row, word, b);
    }
    row.last().copied().unwrap_or(0)
}

/// Marks which words of `a` are in the longest common subsequence with `b`. Of several as long, the one is taken that
/// is found from the ends backwards, equal words first, then a step back in `a` unless one in `b` keeps more.
///
/// The whole table of two long lines would not fit into memory, so only some of its rows are kept, about √|a| apart,
/// and those between are made again when the way back comes to them.
pub(super) fn mark<T: PartialEq>(a: &[T], b: &[T], marks: &mut [bool]) {
    let block = a.len().isqrt().max(1);
    let mut row = vec![0; b.len() + 1];
    let mut kept = Vec::new();
    for words in a.chunks(block) {
        kept.push(row.clone());
        for word in words {
            advance(&mut row, word, b);
        }
    }
    let mut j = b.len();
    let blocks = a.chunks(block).zip(marks.chunks_mut(block)).zip(kept);
    for ((words, marks), mut row) in blocks.rev() {
        // rows[i] is the table's row before the block's word i.
        let mut rows = Vec::with_capacity(words.len());
        for word in words {
            rows.push(row.clone());
            advance(&mut row, word, b);
        }
        for ((word, mark), above) in words.iter().zip(marks).zip(&rows).rev() {
            // Row i of the table is not kept: it is `row` at the block's end, then the row above of the step before.
            while let Some(candidate) = j.checked_sub(1).and_then(|k| b.get(k)) {
                if word == candidate {
                    *mark = true;
                    j -= 1;
                    break;
                }
                match (row.get(j - 1), above.get(j)) {
                    (Some(left), Some(above)) if left > above => j -= 1,
                    _ => break,
                }
            }
            row.clone_from(above);
        }
    }
}
