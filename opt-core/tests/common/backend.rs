//! The backend that these tests run on.
//!
//! `OPT_TEST_BACKEND` names it (`cpu` if unset; `reference` is the bodies of the trait layer), `OPT_TEST_DEVICE` its
//! device. So the same tests, and the same number of them, hold for every backend:
//!
//! ```text
//! OPT_TEST_BACKEND=candle cargo test -p opt-core --features candle
//! ```

use ndarray::{ArrayView, Dimension};
use opt_backend::conformance::Tolerance;
use opt_core::{
    DType, GeneratedSequence, Load,
    backends::{self, BackendOptions, Chosen},
};
use std::{io::Write, sync::LazyLock};

/// Its name.
pub fn name() -> &'static str {
    static NAME: LazyLock<String> =
        LazyLock::new(|| std::env::var("OPT_TEST_BACKEND").unwrap_or_else(|_| "cpu".to_owned()));
    &NAME
}

/// Loads on it.
pub fn load<'a>() -> Load<'a> {
    load_with_threads(None)
}

/// Loads on it, with activations as they are in products with quantized weights.
pub fn load_exact<'a>() -> Load<'a> {
    match name() {
        "reference" => Load::on(opt_backend::Reference::new()),
        name => {
            let mut options = options(None);
            options.compute = backends::Compute::F32;
            Load::with(chosen(name, &options))
        }
    }
}

/// Loads on it, with so many threads where it has any.
pub fn load_with_threads<'a>(threads: Option<usize>) -> Load<'a> {
    match name() {
        "reference" => Load::on(opt_backend::Reference::new()),
        name => Load::with(chosen(name, &options(threads))),
    }
}

fn options(threads: Option<usize>) -> BackendOptions {
    let mut options = BackendOptions::default();
    options.device = std::env::var("OPT_TEST_DEVICE").ok();
    options.threads = threads.filter(|_| name() != "wgpu");
    options
}

fn chosen(name: &str, options: &BackendOptions) -> Chosen {
    backends::choose(name, options).unwrap_or_else(|e| panic!("OPT_TEST_BACKEND={name}: {e}"))
}

/// Says what a test leaves out and why, on the standard error itself: what `eprintln!` writes is shown of failed tests
/// only.
pub fn skipped(what: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "skipped: {what}");
}

/// Whether results are bit-equal over batch, chunk and thread count.
pub fn deterministic() -> bool {
    matches!(name(), "cpu" | "reference")
}

/// How close results must be in f32.
pub fn tolerance() -> Tolerance {
    let gpu = name() == "wgpu" || std::env::var("OPT_TEST_DEVICE").is_ok_and(|device| device != "cpu");
    if gpu { Tolerance::GPU_F32 } else { Tolerance::of(DType::F32) }
}

/// Fails unless `found` equals `expected` within [`tolerance`]. Infinities and NaN must be the same.
#[track_caller]
pub fn assert_close<D: Dimension>(found: ArrayView<'_, f32, D>, expected: ArrayView<'_, f32, D>, what: &str) {
    assert_within(tolerance(), found, expected, what);
}

/// [`assert_close`] by another row of the table.
#[track_caller]
pub fn assert_within<D: Dimension>(
    tolerance: Tolerance,
    found: ArrayView<'_, f32, D>,
    expected: ArrayView<'_, f32, D>,
    what: &str,
) {
    assert_eq!(found.shape(), expected.shape(), "{what}: shape");
    let (mut worst, mut largest, mut error, mut length) = (0f64, 1f64, 0f64, 0f64);
    for (f, e) in found.iter().zip(expected.iter()) {
        if !e.is_finite() || !f.is_finite() {
            assert!(f == e || f.is_nan() && e.is_nan(), "{what}: found {f}, expected {e}");
            continue;
        }
        let (f, e) = (f64::from(*f), f64::from(*e));
        worst = worst.max((f - e).abs());
        largest = largest.max(e.abs());
        error += (f - e).powi(2);
        length += e.powi(2);
    }
    let Tolerance { max, nmse, .. } = tolerance;
    eprintln!(
        "{what}: off by {:.2e} of {max:.2e}, NMSE {:.2e} of {nmse:.2e}",
        worst / largest,
        error / length.max(f64::MIN_POSITIVE)
    );
    assert!(worst <= max * largest, "{what}: off by {worst:.2e} where the largest value is {largest:.2e}");
    assert!(error <= nmse * length.max(f64::MIN_POSITIVE), "{what}: NMSE {:.2e}", error / length);
}

/// Numbers that two ways of computing the same gave: equal bit for bit where the backend is deterministic.
pub fn same_numbers(found: &[f32], expected: &[f32]) -> bool {
    let close = |(f, e): (&f32, &f32)| {
        f.to_bits() == e.to_bits() || f == e || (f - e).abs() <= 1e-4 * e.abs().max(1.0)
    };
    if deterministic() {
        found == expected
    } else {
        found.len() == expected.len() && found.iter().zip(expected).all(close)
    }
}

/// Fails unless two ways of computing the same array agree: bit for bit where the backend is deterministic.
#[track_caller]
pub fn assert_same_array<D: Dimension>(found: ArrayView<'_, f32, D>, expected: ArrayView<'_, f32, D>) {
    if deterministic() {
        assert_eq!(found, expected)
    } else {
        assert_close(found, expected, "the same, in company")
    }
}

/// Why two ways of generating the same differ, if they do: ids and ends must be equal, numbers as [`same_numbers`]
/// says.
pub fn difference(found: &[GeneratedSequence], expected: &[GeneratedSequence]) -> Option<String> {
    let same = |f: &GeneratedSequence, e: &GeneratedSequence| {
        let scores: [Vec<f32>; 2] = [f, e].map(|s| s.score.into_iter().collect());
        let rows =
            |s: &GeneratedSequence| s.scores.iter().chain(&s.logits).flatten().copied().collect::<Vec<_>>();
        (&f.ids, &f.text, f.finish, &f.beam_indices) == (&e.ids, &e.text, e.finish, &e.beam_indices)
            && same_numbers(&f.log_probs, &e.log_probs)
            && same_numbers(&scores[0], &scores[1])
            && same_numbers(&rows(f), &rows(e))
    };
    if deterministic() {
        return (found != expected).then(|| format!("expected {expected:?}, found {found:?}"));
    }
    let equal = found.len() == expected.len() && found.iter().zip(expected).all(|(f, e)| same(f, e));
    (!equal).then(|| format!("expected {expected:?}, found {found:?}"))
}

/// Fails with [`difference`].
#[track_caller]
pub fn assert_same(found: &[GeneratedSequence], expected: &[GeneratedSequence]) {
    if let Some(difference) = difference(found, expected) {
        panic!("{difference}");
    }
}

/// [`assert_same`] within a property.
#[allow(unused_macros)]
macro_rules! prop_assert_same {
    ($found:expr, $expected:expr $(, $($what:tt)*)?) => {
        if let Some(difference) = $crate::common::backend::difference(&$found, &$expected) {
            let what: &[String] = &[$(format!($($what)*))?];
            return Err(proptest::test_runner::TestCaseError::fail(format!("{}: {difference}", what.concat())));
        }
    };
}
#[allow(unused_imports)]
pub(crate) use prop_assert_same;
