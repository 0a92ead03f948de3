//! Strategies without an engine: models that are functions of the ids, and caches that are lists of ids.

mod bookkeeping;
mod properties;
mod sampling;
mod toy;
mod truth;
