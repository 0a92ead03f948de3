//! Prompt builders.
