//! Tests of the suite's part for training: backends that are wrong in one thing each must be caught, and one that
//! computes in plain f32 must not.

mod faulty;

use faulty::{Fault, Wrong};
use opt_backend::{Op, Reference, conformance::Suite};

fn suite(fault: Fault) -> Suite<Wrong> {
    Suite::new(move || Wrong { inner: Reference::new(), fault }).quick()
}

/// The bounds leave room for f32, also for long sums; the faults below are what is caught.
#[test]
fn plain_f32_passes() {
    Suite::new(|| Wrong { inner: Reference::new(), fault: Fault::PlainF32 }).train();
}

/// (fault, the op or property that must be reported)
const FAULTS: &[(Fault, &str)] = &[
    (Fault::IntoForgotten, "matmul"),
    (Fault::IntoForgottenByLinears, "linear_grad"),
    (Fault::SummedInHalf, "matmul"),
    (Fault::WeightTransposed, "linear_grad"),
    (Fault::LogitsLoseLastEntries, "logits_grad"),
    (Fault::MeanTermForgotten, "layer_norm_grad"),
    (Fault::ProductTermForgotten, "layer_norm_grad"),
    (Fault::NormOfIgnoresBias, "norm_of"),
    (Fault::SpansRunTogether, "attend_grad"),
    (Fault::ScoreScaleForgotten, "attend_grad"),
    (Fault::KeysOfLaterRows, "attend_grad"),
    (Fault::GapsNotZero, "attend_grad"),
    (Fault::SlopeAtZero, "activate_grad"),
    (Fault::TanhGelu, "activate_grad"),
    (Fault::SmoothingIgnored, "cross_entropy"),
    (Fault::ExpWithoutMax, "cross_entropy"),
    (Fault::TemperatureNotSquared, "soft_targets"),
    (Fault::LastOfRepeatedRowsWins, "scatter_add"),
    (Fault::SumsOfFirst256Rows, "sum_rows"),
    (Fault::OnePartSquared, "sum_squares"),
    (Fault::MaskRepeatsEachRow, "dropout"),
    (Fault::MaskOfLowSeed, "dropout"),
    (Fault::DroppedUnscaled, "dropout"),
    (Fault::DecayInGradient, "adamw"),
    (Fault::DecayIgnored, "adamw"),
    (Fault::ClipIgnored, "adamw"),
    (Fault::ClipIgnored, "sgd"),
    (Fault::ClipScalesUp, "adamw"),
    (Fault::EpsInsideRoot, "adamw"),
    (Fault::NotCorrected, "adamw"),
    (Fault::MomentsNotKept, "adamw"),
    (Fault::ClipIgnored, "adamw8"),
    (Fault::CodesOfLevelsBelow, "adamw8"),
    (Fault::MovedByCodes, "adamw8"),
    (Fault::PartOfBlockForgotten, "adamw8"),
    (Fault::VelocityNotKept, "sgd"),
    (Fault::SgdIgnoresClip, "sgd"),
    (Fault::RefusedStepChangesMoments, "errors"),
    (Fault::PanicsOnTargets, "errors"),
    (Fault::ErrorOfWrongKind, "errors"),
];

#[test]
fn each_fault_is_caught() {
    let mut missed = Vec::new();
    for &(fault, op) in FAULTS {
        let report = suite(fault).only(&[op]).check_training();
        assert!(report.passed + report.failures.len() > 0, "no case is named {op}");
        match report.failures.first() {
            Some(failure) => eprintln!("{fault:?} ({} cases): {failure}", report.failures.len()),
            None => missed.push(format!("{fault:?} does not show in {op}")),
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
}

#[test]
fn default_bodies_can_be_forbidden() {
    let only = |ops: &[Op]| suite(Fault::PlainF32).only(&["counters"]).no_defaults(ops).check_training();
    let overridden = only(&[Op::Matmul, Op::AdamW, Op::LayerNormGradParams, Op::ScatterAdd]);
    assert!(overridden.failures.is_empty(), "{overridden}");
    let report = only(&[Op::Matmul, Op::Concat]);
    assert!(report.failures[0].message.contains("[Concat]"), "{report}");
    let report = Suite::new(Reference::new).only(&["counters"]).no_defaults(&Op::TRAIN).check_training();
    for op in Op::TRAIN {
        assert!(report.failures[0].message.contains(&format!("{op:?}")), "{op:?}: {report}");
    }
}

#[test]
fn a_broken_guard_fails_training_too() {
    let guarded = suite(Fault::PlainF32).only(&["scale"]).guards(|_| Err("4 bytes after a buffer".into()));
    let report = guarded.check_training();
    assert_eq!(report.passed, 0);
    assert!(report.failures[0].message.contains("4 bytes after a buffer"), "{}", report.failures[0]);
}
