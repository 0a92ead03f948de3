//! Comparisons: of a run with published scores, and of two runs with one another.

mod published;
mod runs;

pub use published::{PublishedComparison, PublishedRow, Verdict, with_published};
pub use runs::{Options, RunComparison, RunRow, Test, runs};

use serde::Serialize;

/// P(|Z| ≥ |z|) of the standard normal distribution.
fn normal_two_sided(z: f64) -> f64 {
    libm::erfc(z.abs() / std::f64::consts::SQRT_2)
}

/// Holm's step-down correction (Holm 1979): the p-values at which each would be significant among all of them, in the
/// same order. NaN stays NaN and does not count.
///
/// ```
/// // statsmodels.stats.multitest.multipletests([0.01, 0.04, 0.03], method="holm")
/// assert_eq!(opt_eval::compare::holm(&[0.01, 0.04, 0.03]), [0.03, 0.06, 0.06]);
/// ```
pub fn holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<(usize, f64)> =
        p_values.iter().copied().enumerate().filter(|(_, p)| !p.is_nan()).collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mut corrected = vec![f64::NAN; p_values.len()];
    let mut largest = 0.0_f64;
    for (rank, (place, p)) in order.iter().enumerate() {
        largest = largest.max(p * (order.len() - rank) as f64).min(1.0);
        if let Some(slot) = corrected.get_mut(*place) {
            *slot = largest;
        }
    }
    corrected
}

/// A value in JSON and its neighbours, indented, with a line end.
pub(crate) fn json(value: &impl Serialize) -> String {
    serde_json::to_value(value).map(|value| format!("{value:#}\n")).unwrap_or_default()
}

/// A difference with its sign.
fn signed(value: f64) -> String {
    if value.is_nan() { "nan".to_owned() } else { format!("{value:+.4}") }
}

/// A number that may be missing.
fn maybe(value: Option<f64>, write: impl Fn(f64) -> String) -> String {
    value.map_or_else(String::new, write)
}

/// Lines under a table: each reason once, with the rows it is true of.
fn reasons<'a>(rows: impl IntoIterator<Item = (&'a str, &'a [String])>) -> String {
    let mut found: Vec<(&str, Vec<&str>)> = Vec::new();
    for (task, lines) in rows {
        for line in lines {
            let place = found.iter().position(|(known, _)| known == line);
            match place.and_then(|place| found.get_mut(place)) {
                Some((_, tasks)) if !tasks.contains(&task) => tasks.push(task),
                Some(_) => {}
                None => found.push((line, vec![task])),
            }
        }
    }
    found.into_iter().fold(String::new(), |text, (line, tasks)| {
        let more = tasks.len().saturating_sub(3);
        let mut named = tasks.into_iter().take(3).collect::<Vec<_>>().join(", ");
        if more > 0 {
            named += &format!(" and {more} more");
        }
        format!("{text}- {named}: {line}\n")
    })
}
