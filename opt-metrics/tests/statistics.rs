//! Aggregates and standard errors against lm-evaluation-harness, tests against SciPy and sacrebleu.

mod common;

use common::{close, of, pairs, read, rows};
use opt_metrics::{
    Result,
    bleu::Bleu,
    chrf::{Chrf, ChrfOptions},
    labels::{f1_binary, matthews_corrcoef},
    statistics::*,
    ter::Ter,
};
use serde_json::Value;

fn floats(value: &Value) -> Vec<f64> {
    of::<Vec<Option<f64>>>(value).into_iter().map(|v| v.unwrap_or(f64::NAN)).collect()
}

fn drawn<T: Clone>(items: &[T], indices: &[usize]) -> Vec<T> {
    indices.iter().map(|&i| items[i].clone()).collect()
}

#[test]
fn aggregates_equal_the_harness() {
    let fixture = read("statistics.json");
    let values = floats(&fixture["values"]);
    let weighted: Vec<(f64, f64)> = of(&fixture["pairs"]);
    // The sums run in the same order, so all digits agree.
    for (name, found) in [
        ("mean", mean(&values)),
        ("median", median(&values)),
        ("even_median", median(&values[..values.len() - 1])),
        ("stddev", sample_stddev(&values)),
        ("stderr", mean_stderr(&values)),
        ("perplexity", perplexity(&values)),
        ("weighted_perplexity", weighted_perplexity(&weighted)),
        ("bits_per_byte", bits_per_byte(&weighted)),
        ("nanmean", Ok(nan_mean(&floats(&fixture["nans"])))),
    ] {
        let expected: f64 = of(&fixture[name]);
        assert!(
            (found.clone().unwrap() - expected).abs() <= 2e-16 * expected.abs(),
            "{name}: {found:?} {expected}"
        );
    }
    assert!(nan_mean(&[]).is_nan() && nan_mean(&[f64::NAN]).is_nan());
}

#[test]
fn bootstrap_equals_the_harness() {
    let fixture = read("statistics.json");
    let expected = &fixture["bootstrap"];
    let values = floats(&fixture["values"]);
    for (iterations, expected) in [2, 100, 1000, 2500].into_iter().zip(floats(&expected["median"])) {
        let found = bootstrap_stderr(values.len(), iterations, |i| median(&drawn(&values, i))).unwrap();
        close(found, expected, &format!("median, {iterations} resamples"));
    }
    let check = |name: &str, iterations: usize, items: usize, f: &dyn Fn(&[usize]) -> Result<f64>| {
        close(bootstrap_stderr(items, iterations, f).unwrap(), of(&expected[name]), name);
    };
    check("perplexity", 300, values.len(), &|i| perplexity(&drawn(&values, i)));
    let nans = floats(&fixture["nans"]);
    check("nanmean", 200, nans.len(), &|i| Ok(nan_mean(&drawn(&nans, i))));
    let (gold, predicted): (Vec<i64>, Vec<i64>) =
        of::<Vec<(i64, i64)>>(&fixture["binary"]).into_iter().unzip();
    check("mcc", 50, gold.len(), &|i| matthews_corrcoef(&drawn(&gold, i), &drawn(&predicted, i)));
    check("f1", 50, gold.len(), &|i| f1_binary(&drawn(&gold, i), &drawn(&predicted, i), &1));

    // The harness' texts have one reference here where items have different numbers of them.
    let (hypotheses, references) = pairs();
    let references = opt_metrics::common_references(&references[..12]);
    let texts = |i: &[usize]| (drawn(&hypotheses[..12], i), drawn(&references, i));
    check("bleu", 30, 12, &|i| {
        let (h, r) = texts(i);
        Ok(Bleu::default().corpus(&h, &r)?.score)
    });
    let mut plus = ChrfOptions::default();
    plus.word_order = 2;
    for (name, chrf) in [("chrf", Chrf::default()), ("chrf++", Chrf::new(plus).unwrap())] {
        check(name, 10, 12, &|i| {
            let (h, r) = texts(i);
            Ok(chrf.corpus(&h, &r)?.score)
        });
    }
    check("ter", 10, 12, &|i| {
        let (h, r) = texts(i);
        Ok(Ter::default().corpus(&h, &r)?.score)
    });
}

#[test]
fn rules_of_standard_errors_are_the_harness() {
    for (name, expected) in read("statistics.json")["rules"].as_object().unwrap() {
        let aggregation = Aggregation::from_name(name).unwrap();
        assert_eq!(aggregation.name(), name);
        let expected = match expected.as_str().unwrap() {
            "none" => StderrRule::None,
            "mean" => StderrRule::Mean,
            _ => StderrRule::Bootstrap { iterations: 500 },
        };
        assert_eq!(stderr_rule("other", aggregation, 9, 500), expected, "{name}");
        assert_eq!(stderr_rule("other", aggregation, 1, 500), StderrRule::None);
        assert_eq!(stderr_rule("other", aggregation, 9, 0), StderrRule::None);
    }
    assert_eq!(
        stderr_rule("chrf++", Aggregation::ChrfPlusPlus, 9, 500),
        StderrRule::Bootstrap { iterations: 100 }
    );
    assert_eq!(stderr_rule("ter", Aggregation::Ter, 9, 50), StderrRule::Bootstrap { iterations: 50 });
    assert_eq!(Aggregation::from_name("mode"), None);
}

#[test]
fn errors_of_groups_equal_the_harness() {
    for row in rows(&read("statistics.json")["groups"]) {
        let sizes: Vec<usize> = of(&row["sizes"]);
        let (stderrs, scores) = (floats(&row["stderrs"]), floats(&row["scores"]));
        let check = |name: &str, found: Result<f64>| close(found.unwrap(), of(&row[name]), name);
        check("pooled", pooled_sample_stderr(&stderrs, &sizes));
        check("unweighted", unweighted_mean_stderr(&stderrs));
        check("combined", combined_sample_stderr(&stderrs, &sizes, &scores));
        check("weighted_mean", aggregate_subtask_metrics(&scores, &sizes, true));
        check("plain_mean", aggregate_subtask_metrics(&scores, &sizes, false));
    }
}

#[test]
fn mcnemar_equals_scipys_binomial_test() {
    for row in rows(&read("statistics.json")["mcnemar"]) {
        let (b, c, p): (usize, usize, f64) = of(row);
        let first: Vec<bool> = (0..b + c + 5).map(|i| i < b || i >= b + c).collect();
        let second: Vec<bool> = (0..b + c + 5).map(|i| i >= b).collect();
        let found = mcnemar(&first, &second).unwrap();
        assert_eq!((found.only_first, found.only_second), (b as u64, c as u64));
        assert!((found.p_value - p).abs() <= 1e-9 * p, "{b} {c}: {} found, {p} expected", found.p_value);
    }
    assert_eq!(mcnemar(&[true], &[true]).unwrap().p_value, 1.0);
    assert_eq!(mcnemar(&[], &[]).unwrap().p_value, 1.0);
}

#[test]
fn paired_tests_equal_scipys_and_sacrebleus() {
    for row in rows(&read("statistics.json")["paired"]) {
        let (first, second) = (floats(&row["first"]), floats(&row["second"]));
        let found = paired_difference(&first, &second).unwrap();
        close(found.mean, of(&row["mean"]), "mean");
        close(found.statistic, of(&row["t"]), "t");
        for (name, p) in [("p", found.p_student), ("normal", found.p_normal)] {
            let expected: f64 = of(&row[name]);
            let tolerance = 1e-9 * expected + 1e-300;
            assert!(
                (p - expected).abs() <= tolerance,
                "{name} of {}: {p} found, {expected} expected",
                first.len()
            );
        }
        let Some(seed) = row["seed"].as_u64().filter(|_| row["boot_p"].is_f64()) else { continue };
        let differences: Vec<f64> = first.iter().zip(&second).map(|(a, b)| a - b).collect();
        let found = paired_bootstrap(first.len(), 250, seed, |i| mean(&drawn(&differences, i))).unwrap();
        close(found.mean, of(&row["boot_mean"]), "mean of resamples");
        close(found.stderr, of(&row["boot_stderr"]), "error of resamples");
        close((found.interval.1 - found.interval.0) / 2.0, of(&row["boot_half"]), "interval");
        close(found.p_value, of(&row["boot_p"]), "p of the bootstrap");
    }
}

#[test]
fn no_difference_and_no_spread_have_values() {
    let same = paired_difference(&[1.0, 0.0], &[1.0, 0.0]).unwrap();
    assert_eq!((same.statistic, same.p_student, same.p_normal), (0.0, 1.0, 1.0));
    let shifted = paired_difference(&[2.0, 1.0], &[1.0, 0.0]).unwrap();
    assert_eq!((shifted.statistic, shifted.p_student, shifted.p_normal), (f64::INFINITY, 0.0, 0.0));
    assert!(paired_difference(&[f64::NAN, 1.0], &[0.0, 0.0]).unwrap().p_student.is_nan());
}

#[test]
fn what_cannot_be_computed_is_an_error() {
    assert!(
        mean(&[]).is_err() && median(&[]).is_err() && perplexity(&[]).is_err() && weighted_mean(&[]).is_err()
    );
    assert!(sample_stddev(&[1.0]).is_err() && mean_stderr(&[1.0]).is_err());
    assert!(bootstrap_stderr(0, 10, |_| Ok(0.0)).is_err());
    assert!(bootstrap_stderr(5, 0, |_| Ok(0.0)).is_err());
    assert!(bootstrap_stderr(5, 1, |_| Ok(0.0)).is_err());
    assert!(bootstrap_stderr(5, 10, |_| mean(&[])).is_err());
    assert!(paired_difference(&[1.0], &[1.0]).is_err() && paired_difference(&[1.0; 2], &[1.0; 3]).is_err());
    assert!(
        paired_bootstrap(0, 10, 0, |_| Ok(0.0)).is_err() && paired_bootstrap(3, 1, 0, |_| Ok(0.0)).is_err()
    );
    assert!(mcnemar(&[true], &[]).is_err());
    assert!(pooled_sample_stderr(&[0.1], &[1]).is_err() && pooled_sample_stderr(&[], &[]).is_err());
    assert!(unweighted_mean_stderr(&[]).is_err() && combined_sample_stderr(&[], &[], &[]).is_err());
    assert!(aggregate_subtask_metrics(&[1.0], &[0], true).is_err());
    assert!(aggregate_subtask_metrics(&[], &[], false).is_err());
    assert!(median(&[f64::NAN, 1.0, 2.0]).unwrap() == 2.0);
}
