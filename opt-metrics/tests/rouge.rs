//! ROUGE against rouge_score, the stemmer against NLTK.

mod common;

use common::{close, of, pairs, read, rows};
use opt_metrics::{
    random::NumpyRandom,
    rouge::{Rouge, RougeKind, RougeScore, bootstrap_interval, mean_scores, stem},
};

const KINDS: [RougeKind; 6] =
    [RougeKind::N(1), RougeKind::N(2), RougeKind::N(3), RougeKind::N(9), RougeKind::L, RougeKind::Lsum];

fn same(found: &RougeScore, expected: [f64; 3], what: &str) {
    close(found.precision, expected[0], &format!("{what} precision"));
    close(found.recall, expected[1], &format!("{what} recall"));
    close(found.f_measure, expected[2], &format!("{what} F"));
}

#[test]
fn scores_equal_rouge_score() {
    let (hypotheses, references) = pairs();
    let fixture = read("rouge.json");
    for (name, stemmer) in [("plain", false), ("stemmed", true)] {
        let rouge = Rouge::new(&KINDS, stemmer).unwrap();
        let expected = rows(&fixture[name]);
        assert_eq!(expected.len(), hypotheses.len());
        for (i, expected) in expected.iter().enumerate() {
            let found = rouge.score_multi(&references[i], &hypotheses[i]).unwrap();
            for (j, kind) in KINDS.iter().enumerate() {
                same(&found[j], of(&expected[j]), &format!("{name} {kind} of {i}"));
            }
        }
    }
}

#[test]
fn intervals_equal_those_of_a_seeded_aggregator() {
    let (hypotheses, references) = pairs();
    let rouge = Rouge::new(&[RougeKind::N(1), RougeKind::L], true).unwrap();
    let scores: Vec<Vec<RougeScore>> =
        (0..40).map(|i| rouge.score(&references[i][0], &hypotheses[i])).collect();
    let mut random = NumpyRandom::new(11);
    for (kind, expected) in rows(&read("rouge.json")["intervals"]).iter().enumerate() {
        let of_kind: Vec<RougeScore> = scores.iter().map(|s| s[kind]).collect();
        let found = bootstrap_interval(&of_kind, 0.9, 120, &mut random).unwrap();
        for (part, expected) in [found.low, found.mid, found.high].iter().zip(rows(expected)) {
            same(part, of(expected), "interval");
        }
    }
}

#[test]
fn stems_equal_nltks() {
    let words: Vec<(String, String)> = of(&read("stems.json"));
    assert!(words.len() > 2500);
    for (word, expected) in words {
        assert_eq!(stem(&word), expected, "{word}");
    }
}

#[test]
fn names_of_kinds_are_rouge_scores() {
    for name in ["rouge1", "rouge9", "rougeL", "rougeLsum"] {
        assert_eq!(RougeKind::from_name(name).unwrap().to_string(), name);
    }
    for name in ["rouge", "rouge0", "rouge10", "rougel", "bleu", "", "rougé1"] {
        assert_eq!(RougeKind::from_name(name), None, "{name}");
    }
}

#[test]
fn what_cannot_be_scored_is_an_error() {
    let rouge = Rouge::new(&KINDS, true).unwrap();
    assert!(rouge.score_multi::<&str>(&[], "a").is_err());
    assert!(Rouge::new(&[], false).is_err());
    assert!(Rouge::new(&[RougeKind::N(0)], false).is_err());
    assert!(mean_scores(&[]).is_err());
    let score = [RougeScore::default()];
    let mut random = NumpyRandom::new(0);
    assert!(bootstrap_interval(&[], 0.95, 10, &mut random).is_err());
    assert!(bootstrap_interval(&score, f64::NAN, 10, &mut random).is_err());
    assert!(bootstrap_interval(&score, 0.95, 0, &mut random).is_err());
}
