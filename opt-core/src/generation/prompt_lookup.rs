//! Prompt lookup: the draft is what followed the last few tokens when they occurred before.
//! Method: Saxena, "Prompt Lookup Decoding", 2023.

/// Up to `tokens` ids that may follow `ids`: those behind the first earlier place of its longest tail of at most
/// `max_ngram` ids, up to an end token. Empty where no tail occurs twice.
pub(super) fn candidates<'a>(ids: &'a [u32], max_ngram: usize, tokens: usize, eos: &[u32]) -> &'a [u32] {
    for n in (1..=max_ngram.min(ids.len().saturating_sub(1))).rev() {
        let Some(tail) = ids.get(ids.len() - n..) else { continue };
        // The last window is the tail itself, behind which there is nothing.
        let Some(start) = ids.windows(n).position(|window| window == tail) else { continue };
        let Some(behind) = ids.get(start + n..).filter(|b| !b.is_empty()) else { continue };
        let behind = behind.get(..tokens).unwrap_or(behind);
        let end = behind.iter().position(|id| eos.contains(id)).unwrap_or(behind.len());
        return behind.get(..end).unwrap_or_default();
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::candidates;

    #[test]
    fn the_longest_tail_at_its_first_place() {
        // Of "1 2", which occurs twice before, the first; not of the nearer "2".
        assert_eq!(candidates(&[1, 2, 3, 1, 2, 4, 2, 5, 1, 2], 2, 3, &[]), [3, 1, 2]);
        assert_eq!(candidates(&[1, 2, 3, 1, 2, 4, 2, 5, 1, 2], 1, 1, &[]), [3]);
    }

    #[test]
    fn shorter_tails_where_longer_ones_are_new() {
        assert_eq!(candidates(&[7, 8, 9, 8], 3, 10, &[]), [9, 8]);
    }

    #[test]
    fn nothing_where_nothing_repeats_or_an_end_token_is_next() {
        assert!(candidates(&[1, 2, 3], 2, 5, &[]).is_empty());
        assert!(candidates(&[], 2, 5, &[]).is_empty());
        assert!(candidates(&[4], 2, 5, &[]).is_empty());
        assert!(candidates(&[1, 2, 1], 2, 5, &[2]).is_empty());
        assert_eq!(candidates(&[1, 3, 2, 1], 2, 5, &[2]), [3]);
    }

    #[test]
    fn a_run_of_one_token_proposes_itself() {
        assert_eq!(candidates(&[5, 5, 5], 2, 4, &[]), [5]);
    }
}
