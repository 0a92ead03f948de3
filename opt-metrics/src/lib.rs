//! Metrics of generated and scored text, equal to the tools that papers use.
