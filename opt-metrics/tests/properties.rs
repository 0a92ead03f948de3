//! What holds for all texts and numbers.

use opt_metrics::{
    bleu::{Bleu, BleuOptions, BleuTokenizer, Smoothing, self_bleu},
    calibration::calibration,
    chrf::{Chrf, ChrfOptions},
    diversity::distinct_n,
    labels::{f1_macro, matthews_corrcoef},
    random::PythonRandom,
    rouge::{Rouge, RougeKind, stem},
    statistics::{mcnemar, median, paired_difference},
    ter::{Ter, TerOptions},
    text::{ExactMatch, ExactMatchOptions, normalize_answer, squad_f1},
};
use proptest::prelude::*;

/// Words of few kinds, so that texts have something in common, among any characters.
fn text() -> impl Strategy<Value = String> {
    let word = prop_oneof![4 => "[ab.]{1,2}", 1 => "\\PC{0,3}", 1 => "[\\s\\x1c-\\x1f日🙂\u{301}']{1,2}"];
    prop::collection::vec(word, 0..12).prop_map(|words| words.join(" "))
}

fn bleu() -> impl Strategy<Value = Bleu> {
    let tokenizer = prop::sample::select(vec!["13a", "intl", "char", "none"]);
    let smoothing = prop::sample::select(vec![
        Smoothing::None,
        Smoothing::Exp,
        Smoothing::Floor(0.1),
        Smoothing::AddK(1.0),
        Smoothing::AddK(0.0),
    ]);
    (tokenizer, smoothing, 1_usize..6, any::<bool>(), any::<bool>()).prop_map(
        |(name, smoothing, n, effective, lower)| {
            let mut options = BleuOptions::default();
            options.tokenizer = BleuTokenizer::from_name(name).unwrap();
            options.smoothing = smoothing;
            options.max_order = n;
            options.effective_order = effective;
            options.lowercase = lower;
            Bleu::new(options).unwrap()
        },
    )
}

fn chrf() -> impl Strategy<Value = Chrf> {
    (1_usize..7, 0_usize..3, any::<bool>(), any::<bool>()).prop_map(|(chars, words, whitespace, eps)| {
        let mut options = ChrfOptions::default();
        options.char_order = chars;
        options.word_order = words;
        options.whitespace = whitespace;
        options.eps_smoothing = eps;
        Chrf::new(options).unwrap()
    })
}

fn percent(score: f64) -> bool {
    (0.0..=100.0 + 1e-9).contains(&score)
}

proptest! {
    #[test]
    fn bleu_is_a_percentage(bleu in bleu(), h in text(), refs in prop::collection::vec(text(), 1..4)) {
        prop_assert!(percent(bleu.sentence(&h, &refs).unwrap().score));
    }

    #[test]
    fn bleu_of_a_text_with_itself_is_all(bleu in bleu(), h in text(), other in text()) {
        // Counts of one order at least, and no order without n-grams but those left out.
        let tokens = bleu.tokens(&h).len();
        let o = bleu.options();
        if tokens >= o.max_order || tokens > 0 && o.effective_order {
            let found = bleu.sentence(&h, &[other.as_str(), &h]).unwrap();
            prop_assert!(found.precisions.iter().take(tokens).all(|p| (p - 100.0).abs() < 1e-9), "{found}");
            prop_assert!((bleu.sentence(&h, &[&h]).unwrap().score - 100.0).abs() < 1e-9);
        }
    }

    #[test]
    fn chrf_is_a_percentage_and_all_of_itself(chrf in chrf(), h in text(), r in text()) {
        prop_assert!(percent(chrf.sentence(&h, &[&r]).unwrap().score));
        let itself = chrf.sentence(&h, &[&h]).unwrap().score;
        if !chrf.options().eps_smoothing && h.chars().any(|c| !c.is_whitespace() && !c.is_control()) {
            prop_assert!((itself - 100.0).abs() < 1e-9, "{itself}");
        }
    }

    #[test]
    fn more_references_never_lower_chrf_or_raise_edits(h in text(), r in prop::collection::vec(text(), 2..4)) {
        let chrf = Chrf::default();
        let all = chrf.sentence(&h, &r).unwrap().score;
        prop_assert!(r.iter().all(|one| chrf.sentence(&h, &[one]).unwrap().score <= all + 1e-9));
        let ter = Ter::default();
        let all = ter.statistics(&h, &r).unwrap().edits;
        prop_assert!(r.iter().all(|one| ter.statistics(&h, &[one]).unwrap().edits >= all));
    }

    #[test]
    fn ter_is_nothing_of_itself_and_at_most_all_words(h in text(), r in text(), flags: [bool; 4]) {
        let mut options = TerOptions::default();
        [options.normalized, options.no_punct, options.asian_support, options.case_sensitive] = flags;
        let ter = Ter::new(options);
        prop_assert_eq!(ter.sentence(&h, &[&h]).unwrap().edits, 0);
        let most = ter.tokens(&h).len().max(ter.tokens(&r).len());
        prop_assert!(ter.sentence(&h, &[&r]).unwrap().edits <= most as u64);
    }

    #[test]
    fn rouge_turned_round_swaps_precision_and_recall(a in text(), b in text(), stemmer: bool) {
        let kinds = [RougeKind::N(1), RougeKind::N(2), RougeKind::L];
        let rouge = Rouge::new(&kinds, stemmer).unwrap();
        for (x, y) in rouge.score(&a, &b).into_iter().zip(rouge.score(&b, &a)) {
            prop_assert_eq!((x.precision, x.recall), (y.recall, y.precision));
            prop_assert!((x.f_measure - y.f_measure).abs() < 1e-12);
        }
    }

    #[test]
    fn rouge_is_a_part_and_all_of_itself(a in text(), b in text(), stemmer: bool) {
        let rouge = Rouge::new(&[RougeKind::N(1), RougeKind::L, RougeKind::Lsum], stemmer).unwrap();
        for score in rouge.score(&a, &b) {
            prop_assert!([score.precision, score.recall, score.f_measure].iter().all(|v| (0.0..=1.0).contains(v)));
        }
        if !rouge.tokens(&a).is_empty() {
            prop_assert!(rouge.score(&a, &a).iter().all(|s| s.f_measure == 1.0));
        }
    }

    #[test]
    fn one_line_has_the_same_rouge_l_of_both_kinds(a in "[ab ]{0,30}", b in "[ab ]{0,30}") {
        let rouge = Rouge::new(&[RougeKind::L, RougeKind::Lsum], false).unwrap();
        let found = rouge.score(&a, &b);
        prop_assert_eq!(found[0], found[1]);
    }

    #[test]
    fn any_text_can_be_compared(a in "(?s).{0,40}", b in "(?s).{0,40}", flags: [bool; 3]) {
        let mut options = ExactMatchOptions::default();
        [options.ignore_case, options.ignore_punctuation, options.ignore_numbers] = flags;
        options.regexes_to_ignore = vec![r"(a|b)*\.$".to_owned(), "(?<=x).".to_owned()];
        let exact = ExactMatch::new(options).unwrap();
        prop_assert!(exact.matches(&a, &a).unwrap());
        prop_assert_eq!(exact.matches(&a, &b).unwrap(), exact.matches(&b, &a).unwrap());
        prop_assert!((squad_f1(&a, &b) - squad_f1(&b, &a)).abs() < 1e-12);
        prop_assert_eq!(squad_f1(&a, &a), 1.0);
        prop_assert!(!normalize_answer(&a).contains("  "));
        stem(&a);
        let ab = [a.as_str(), b.as_str()];
        prop_assert!(percent(self_bleu(&Bleu::default(), &ab).unwrap()));
    }

    #[test]
    fn a_sample_has_no_index_twice(seed: u64, n in 0_usize..400, part in 0.0..=1.0_f64) {
        let k = (n as f64 * part) as usize;
        let mut found = PythonRandom::new(seed).sample(n, k).unwrap();
        found.sort_unstable();
        found.dedup();
        prop_assert_eq!(found.len(), k);
        prop_assert!(found.last().is_none_or(|last| *last < n));
    }

    #[test]
    fn paired_tests_turn_round(a in prop::collection::vec((any::<bool>(), any::<bool>()), 2..60)) {
        let (first, second): (Vec<bool>, Vec<bool>) = a.into_iter().unzip();
        let (x, y) = (mcnemar(&first, &second).unwrap(), mcnemar(&second, &first).unwrap());
        prop_assert_eq!((x.only_first, x.only_second, x.p_value), (y.only_second, y.only_first, y.p_value));
        prop_assert!((0.0..=1.0).contains(&x.p_value));
        let floats = |v: &[bool]| v.iter().map(|b| f64::from(u8::from(*b))).collect::<Vec<_>>();
        let found = paired_difference(&floats(&first), &floats(&second)).unwrap();
        prop_assert!((0.0..=1.0).contains(&found.p_student) && (0.0..=1.0).contains(&found.p_normal));
        prop_assert!(found.p_student >= found.p_normal - 1e-12);
    }

    #[test]
    fn any_numbers_can_be_aggregated(values in prop::collection::vec(any::<f64>(), 2..50)) {
        median(&values).unwrap();
        paired_difference(&values, &values).unwrap();
        let right = vec![true; values.len()];
        let usable = values.iter().all(|v| (0.0..=1.0).contains(v));
        prop_assert_eq!(calibration(&values, &right, 7).is_ok(), usable);
    }

    #[test]
    fn figures_of_labels_are_in_range(pairs in prop::collection::vec((0_u8..4, 0_u8..4), 1..60)) {
        let (gold, predicted): (Vec<u8>, Vec<u8>) = pairs.into_iter().unzip();
        prop_assert!((0.0..=1.0).contains(&f1_macro(&gold, &predicted).unwrap()));
        let found = matthews_corrcoef(&gold, &predicted).unwrap();
        prop_assert!((-1.0 - 1e-12..=1.0 + 1e-12).contains(&found));
        prop_assert!(distinct_n(&[gold], 1).is_some_and(|d| d > 0.0 && d <= 1.0));
    }
}
