use std::fmt;

/// What the functions of this crate return.
pub type Result<T> = std::result::Result<T, Error>;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// A failure, as one line: what, where, what was expected and what was found.
///
/// The fields stay private so that context can grow; ask [`Error::kind`], and walk [`std::error::Error::source`] for
/// causes.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
    #[source]
    source: Option<Source>,
}

/// The classes of failure a caller may want to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Something named does not exist: a file, a model, a tensor.
    NotFound,
    /// Reading or writing failed.
    Io,
    /// A checkpoint that is damaged, lies about itself or does not fit its config.
    Checkpoint,
    /// A config.json or generation_config.json that cannot be meant.
    Config,
    /// A tokenizer file that cannot be used, or text without one.
    Tokenizer,
    /// A prompt that cannot be run: empty, too long, or with ids outside the vocabulary.
    Prompt,
    /// An option out of range, or options that contradict each other.
    Option,
    /// A training whose loss is no number any more.
    Diverged,
    /// The caller asked for this to end.
    Cancelled,
    /// Something that this build, backend or model cannot do.
    Unsupported,
    /// The hub refused, was not reachable, or sent something else than it announced.
    Hub,
    /// The backend failed: its device, its memory, or a shape that reached it.
    Backend,
}

impl Error {
    /// An error of `kind`; `message` is one line that says what, where, expected and found.
    pub fn new(kind: ErrorKind, message: impl fmt::Display) -> Self {
        Self { kind, message: message.to_string(), source: None }
    }

    /// Like [`Error::new`], with the cause behind it. The message names the cause too, since many print only that.
    pub fn because(kind: ErrorKind, message: impl fmt::Display, cause: impl Into<Source>) -> Self {
        let cause = cause.into();
        Self { kind, message: format!("{message}: {cause}"), source: Some(cause) }
    }

    /// The class of this failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Puts `place` (a file, a tensor, a line) in front of the message.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

impl From<opt_backend::Error> for Error {
    fn from(error: opt_backend::Error) -> Self {
        Self { kind: ErrorKind::Backend, message: error.to_string(), source: Some(Box::new(error)) }
    }
}
