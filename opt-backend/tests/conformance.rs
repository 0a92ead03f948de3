//! The default bodies pass the suite: [`opt_backend::Reference`] overrides nothing.

use opt_backend::{Reference, conformance};

#[test]
fn reference_passes() {
    let report = conformance::run(Reference::new);
    eprintln!("{report}");
    assert!(report.passed > 400, "only {} cases ran", report.passed);
    assert!(report.skipped.is_empty());
}
