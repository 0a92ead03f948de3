//! The default bodies pass the suite: [`opt_backend::Reference`] overrides nothing.

use opt_backend::{Reference, conformance, conformance::Suite};

#[test]
fn reference_passes() {
    let report = conformance::run(Reference::new);
    eprintln!("{report}");
    assert!(report.passed > 400, "only {} cases ran", report.passed);
    assert!(report.skipped.is_empty());
}

#[test]
fn reference_passes_in_training() {
    let report = Suite::new(Reference::new).train();
    eprintln!("{report}");
    assert!(report.passed > 900, "only {} cases ran", report.passed);
    assert!(report.skipped.is_empty());
    let called = opt_backend::Op::TRAIN.iter().filter(|op| report.tour.default_bodies(**op) > 0);
    assert_eq!(called.count(), opt_backend::Op::TRAIN.len(), "the tour leaves out an op: {}", report.tour);
}
