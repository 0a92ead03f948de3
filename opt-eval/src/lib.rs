//! Evaluation of OPT models that agrees with lm-evaluation-harness.
