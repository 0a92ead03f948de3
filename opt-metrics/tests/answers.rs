//! Answers and labels against lm-evaluation-harness, transformers' SQuAD script, scikit-learn and NumPy.

mod common;

use common::{close, of, read, rows};
use opt_metrics::{
    Error,
    calibration::{brier_score, calibration},
    diversity::{distinct_n, mean_repetition, repetition},
    labels::{accuracy, all_right, argmax, f1_binary, f1_macro, matthews_corrcoef},
    statistics::{mean, mean_stderr},
    text::{ExactMatch, ExactMatchOptions, best_of, normalize_answer, squad_exact, squad_f1},
};

fn answers() -> (Vec<String>, Vec<String>) {
    of::<Vec<(String, String)>>(&read("answers.json")).into_iter().unzip()
}

#[test]
fn exact_match_equals_the_harness() {
    let (predictions, references) = answers();
    for row in rows(&read("texts.json")["exact"]) {
        let o = &row["options"];
        let flag = |name: &str| o[name].as_bool().unwrap_or(false);
        let mut options = ExactMatchOptions::default();
        options.ignore_case = flag("ignore_case");
        options.ignore_punctuation = flag("ignore_punctuation");
        options.ignore_numbers = flag("ignore_numbers");
        if o["regexes_to_ignore"].is_array() {
            options.regexes_to_ignore = of(&o["regexes_to_ignore"]);
        }
        let exact = ExactMatch::new(options).unwrap();
        for (i, expected) in of::<Vec<f64>>(&row["each"]).into_iter().enumerate() {
            let found = exact.matches(&predictions[i], &references[i]).unwrap();
            assert_eq!(found, expected > 0.0, "{o} {:?} {:?}", predictions[i], references[i]);
        }
        close(exact.score(&predictions, &references).unwrap(), of(&row["all"]), &o.to_string());
    }
}

#[test]
fn squad_equals_transformers() {
    let (predictions, references) = answers();
    let fixture = read("texts.json");
    for (i, row) in rows(&fixture["squad"]).iter().enumerate() {
        let (exact, f1): (u8, f64) = of(row);
        let (reference, prediction) = (&references[i], &predictions[i]);
        assert_eq!(normalize_answer(prediction), of::<String>(&fixture["normal"][i]), "{prediction:?}");
        assert_eq!(u8::from(squad_exact(reference, prediction)), exact, "{prediction:?} {reference:?}");
        close(squad_f1(reference, prediction), f1, prediction);
    }
    assert_eq!(best_of::<&str>(&[], "a", squad_f1), 0.0);
}

#[test]
fn labels_equal_scikit_learn() {
    for row in rows(&read("labels.json")["labels"]) {
        let (gold, predicted): (Vec<usize>, Vec<usize>) = (of(&row["gold"]), of(&row["predicted"]));
        match row["f1"].as_f64() {
            Some(expected) => close(f1_binary(&gold, &predicted, &1).unwrap(), expected, "f1"),
            None => assert!(f1_binary(&gold, &predicted, &1).is_err()),
        }
        close(f1_macro(&gold, &predicted).unwrap(), of(&row["macro"]), "macro f1");
        close(matthews_corrcoef(&gold, &predicted).unwrap(), of(&row["mcc"]), "mcc");
        close(accuracy(&gold, &predicted).unwrap(), of(&row["accuracy"]), "accuracy");
        let right: Vec<bool> = gold.iter().zip(&predicted).map(|(g, p)| g == p).collect();
        let groups = all_right(&of::<Vec<usize>>(&row["groups"]), &right).unwrap();
        close(mean(&groups).unwrap(), of(&row["acc_all"]), "acc_all");
        match row["acc_all_stderr"].as_f64() {
            Some(expected) => close(mean_stderr(&groups).unwrap(), expected, "error of acc_all"),
            None => assert!(mean_stderr(&groups).is_err()),
        }
        if let Some(expected) = row["brier"].as_f64() {
            let probabilities: Vec<Vec<f64>> = of(&row["probabilities"]);
            close(brier_score(&gold, &probabilities).unwrap(), expected, "Brier score");
        }
    }
}

#[test]
fn argmax_equals_numpys() {
    for row in rows(&read("labels.json")["argmax"]) {
        let (values, expected): (Vec<f64>, usize) = of(row);
        assert_eq!(argmax(&values), Some(expected));
    }
    assert_eq!(argmax(&[1.0, f64::NAN, 2.0, f64::NAN]), Some(1)); // as numpy
    assert_eq!(argmax(&[]), None);
}

#[test]
fn calibration_equals_its_definition_in_numpy() {
    for row in rows(&read("labels.json")["calibration"]) {
        let (confidences, right): (Vec<f64>, Vec<bool>) = (of(&row["confidences"]), of(&row["right"]));
        let found = calibration(&confidences, &right, of(&row["bins"])).unwrap();
        close(found.expected_error, of(&row["ece"]), "expected error");
        close(found.maximum_error, of(&row["mce"]), "maximum error");
        assert_eq!(found.bins.iter().map(|b| b.items).sum::<usize>(), right.len());
    }
}

#[test]
fn repetition_counts_what_was_there_before() {
    let text = ["a", "b", "a", "b", "a", "b", "c"];
    // Of the pairs ab ba ab ba ab bc three are new.
    assert_eq!(distinct_n(&[text], 2), Some(0.5));
    assert_eq!(repetition(&text, 2), Some(0.5));
    assert_eq!(mean_repetition(&[vec![1, 1, 1], vec![1, 2, 3], vec![1]], 2), Some(0.25));
    assert_eq!(distinct_n::<u8, [u8; 0]>(&[], 1), None);
    assert_eq!(repetition(&text, 0), None);
    assert_eq!(repetition(&text, 8), None);
}

#[test]
fn what_cannot_be_computed_is_an_error_in_one_line() {
    let mut options = ExactMatchOptions::default();
    options.regexes_to_ignore = vec!["a\n(".to_owned()];
    let error = ExactMatch::new(options).unwrap_err();
    assert!(matches!(error, Error::Pattern { .. }));
    assert!(!error.to_string().contains('\n'), "{error}");
    let exact = ExactMatch::default();
    assert!(exact.score(&["a"], &["a", "b"]).is_err());
    assert!(exact.matches_any::<&str>("a", &[]).is_err());
    assert!(accuracy::<u8>(&[], &[]).is_err() && accuracy(&[1], &[1, 2]).is_err());
    assert!(f1_binary(&[0, 2], &[0, 0], &1).is_err());
    assert!(matthews_corrcoef::<u8>(&[], &[]).is_err() && f1_macro::<u8>(&[], &[]).is_err());
    assert!(all_right(&[1], &[]).is_err());
    assert!(calibration(&[0.5], &[true], 0).is_err() && calibration(&[], &[], 5).is_err());
    for bad in [f64::NAN, -0.1, 1.1] {
        assert!(calibration(&[bad], &[true], 5).is_err());
    }
    assert!(brier_score(&[2], &[[0.5, 0.5]]).is_err());
    assert!(brier_score(&[0, 0], &[vec![0.5, 0.5], vec![1.0]]).is_err());
    assert!(brier_score::<[f64; 1]>(&[], &[]).is_err());
}
