//! What is printed where, and how the command ends.

use opt_core::{Error, ErrorKind};
use serde::Serialize;
use std::{
    fmt::Display,
    io::{self, BufWriter, IsTerminal, StdoutLock, Write},
    process::ExitCode,
};

/// Why the command ends before its work is done.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The work failed: one line that says what, where, what was expected.
    Failed(String),
    /// The command was used wrongly.
    Usage(String),
    /// Ctrl-C.
    Interrupted,
    /// Nobody reads stdout any more.
    ClosedPipe,
}

impl Failure {
    pub(crate) fn failed(message: impl Display) -> Self {
        Failure::Failed(message.to_string())
    }

    pub(crate) fn usage(message: impl Display) -> Self {
        Failure::Usage(message.to_string())
    }

    /// Puts `place` in front of the message.
    pub(crate) fn at(self, place: impl Display) -> Self {
        match self {
            Failure::Failed(message) => Failure::Failed(format!("{place}: {message}")),
            Failure::Usage(message) => Failure::Usage(format!("{place}: {message}")),
            other => other,
        }
    }

    /// For those who take the library's errors.
    pub(crate) fn into_error(self) -> Error {
        match self {
            Failure::Failed(message) => Error::new(ErrorKind::Backend, message),
            Failure::Usage(message) => Error::new(ErrorKind::Option, message),
            Failure::Interrupted | Failure::ClosedPipe => Error::new(ErrorKind::Cancelled, "interrupted"),
        }
    }

    /// Tells the user and gives the exit code.
    pub(crate) fn report(self) -> ExitCode {
        let (line, code) = match self {
            Failure::Failed(message) => (format!("error: {}", one_line(&message)), 1),
            Failure::Usage(message) => (format!("error: {}", one_line(&message)), 2),
            Failure::Interrupted => ("interrupted".to_owned(), 130),
            // As `head` wants it: what was asked for has been delivered.
            Failure::ClosedPipe => return ExitCode::SUCCESS,
        };
        // stderr may be closed too, and then nobody can be told.
        let _ = writeln!(io::stderr(), "{line}");
        ExitCode::from(code)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error.kind() {
            ErrorKind::Option => Failure::Usage(error.to_string()),
            ErrorKind::Cancelled => Failure::Interrupted,
            _ => Failure::Failed(error.to_string()),
        }
    }
}

/// Writing to stdout failed; nothing else is written with this type's `?`.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::ClosedPipe,
            _ => Failure::Failed(format!("stdout: {error}")),
        }
    }
}

/// Causes from other crates may have several lines; the command promises one.
fn one_line(message: &str) -> String {
    message.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Results on stdout.
pub(crate) struct Out {
    stdout: BufWriter<StdoutLock<'static>>,
}

impl Out {
    pub(crate) fn new() -> Self {
        Self { stdout: BufWriter::new(io::stdout().lock()) }
    }

    /// Whether a person reads along.
    pub(crate) fn is_terminal(&self) -> bool {
        self.stdout.get_ref().is_terminal()
    }

    /// Writes text that is to be seen at once.
    pub(crate) fn text(&mut self, text: &str) -> Result<(), Failure> {
        self.stdout.write_all(text.as_bytes())?;
        Ok(self.stdout.flush()?)
    }

    /// Writes one line of text.
    pub(crate) fn line(&mut self, line: &str) -> Result<(), Failure> {
        self.text(&format!("{line}\n"))
    }

    /// Writes one line of JSON.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let line = serde_json::to_string(value).map_err(|e| Failure::failed(format!("JSON: {e}")))?;
        self.line(&line)
    }
}

/// A number of bytes for people, in the decimal units of file sizes.
pub(crate) fn bytes(count: u64) -> String {
    let units = ["kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = "bytes";
    for larger in units {
        if value < 1000.0 {
            break;
        }
        value /= 1000.0;
        unit = larger;
    }
    if unit == "bytes" { format!("{count} bytes") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        assert_eq!(bytes(999), "999 bytes");
        assert_eq!(bytes(1_500), "1.5 kB");
        assert_eq!(bytes(13_946_736), "13.9 MB");
        assert_eq!(bytes(131_000_000_000), "131.0 GB");
    }

    #[test]
    fn an_error_is_one_line() {
        assert_eq!(one_line("what\n  where\n\nwhy"), "what where why");
    }
}
