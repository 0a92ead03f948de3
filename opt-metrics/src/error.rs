/// What the functions of this crate return.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a metric cannot be computed, as one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Fewer entries than the metric is defined for.
    #[error("{what}: at least {needed} needed, {found} given")]
    TooFew {
        /// What there is too little of.
        what: &'static str,
        /// How many are needed.
        needed: usize,
        /// How many were given.
        found: usize,
    },
    /// Two lists that belong together entry by entry, and are of different lengths.
    #[error("{what}: {first} and {second}, as many of both expected")]
    Lengths {
        /// The names of the two.
        what: &'static str,
        /// Entries of the first.
        first: usize,
        /// Entries of the second.
        second: usize,
    },
    /// An option out of range.
    #[error("{what} is {found}, {expected} expected")]
    Option {
        /// The option.
        what: &'static str,
        /// Its value.
        found: String,
        /// The values it may have.
        expected: &'static str,
    },
    /// An entry out of range.
    #[error("{what} {index} is {found}, {expected} expected")]
    Value {
        /// What the entry is.
        what: &'static str,
        /// Its place, from 0.
        index: usize,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// A regular expression that cannot be compiled, or that takes too long.
    #[error("pattern {pattern:?}: {reason}")]
    Pattern {
        /// The pattern as given.
        pattern: String,
        /// What is wrong, in one line.
        reason: String,
    },
}

impl Error {
    pub(crate) fn option(what: &'static str, found: impl ToString, expected: &'static str) -> Self {
        Self::Option { what, found: found.to_string(), expected }
    }
}

/// Fails unless two lists have the same length.
pub(crate) fn same_length(what: &'static str, first: usize, second: usize) -> Result<()> {
    if first == second { Ok(()) } else { Err(Error::Lengths { what, first, second }) }
}

/// Fails unless there are `needed` entries.
pub(crate) fn at_least(what: &'static str, needed: usize, found: usize) -> Result<()> {
    if found >= needed { Ok(()) } else { Err(Error::TooFew { what, needed, found }) }
}
