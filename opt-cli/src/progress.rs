//! What goes to stderr while the command works, and Ctrl-C.

use crate::args::ShowArgs;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use opt_core::{CancelToken, Progress};
use std::{
    cell::Cell,
    io::{self, IsTerminal, Write},
    ops::ControlFlow,
    time::{Duration, Instant},
};

/// The side of the command that is not its result.
pub(crate) struct Console {
    quiet: bool,
    bars: bool,
    /// Whether Ctrl-C is caught already.
    catches: Cell<bool>,
    /// Used by the first Ctrl-C.
    pub(crate) cancel: CancelToken,
}

impl Console {
    pub(crate) fn new(show: ShowArgs) -> Self {
        let bars = !show.quiet && io::stderr().is_terminal();
        Self { quiet: show.quiet, bars, catches: Cell::new(false), cancel: CancelToken::new() }
    }

    /// From here on the first Ctrl-C ends the work cleanly and the second one the process. Called once all input is
    /// read: until then there is nothing to end cleanly.
    pub(crate) fn catch_interrupts(&self) {
        if self.catches.replace(true) {
            return;
        }
        let cancel = self.cancel.clone();
        let caught = ctrlc::set_handler(move || {
            if cancel.is_cancelled() {
                std::process::exit(130);
            }
            cancel.cancel();
        });
        if let Err(error) = caught {
            self.warn(&format!("Ctrl-C will end the program at once: {error}"));
        }
    }

    /// One line that does not keep the work from being done.
    pub(crate) fn warn(&self, message: &str) {
        self.say(&format!("warning: {message}"));
    }

    /// One line for a person, unless told to be quiet.
    pub(crate) fn say(&self, line: &str) {
        if !self.quiet {
            let _ = writeln!(io::stderr(), "{line}");
        }
    }

    /// A bar that counts tensors, tokens or inputs.
    pub(crate) fn bar(&self, what: &'static str) -> Bar {
        self.styled(what, "{prefix} {bar:30} {pos}/{len} {elapsed}")
    }

    /// A bar that counts bytes.
    pub(crate) fn byte_bar(&self, what: &'static str) -> Bar {
        self.styled(what, "{prefix} {bar:30} {decimal_bytes}/{decimal_total_bytes} {elapsed}")
    }

    /// A bar that counts steps, with a line beside it.
    pub(crate) fn steps(&self, what: &'static str) -> Bar {
        self.styled(what, "{prefix} {bar:30} {pos}/{len} {msg}")
    }

    /// A count without an end.
    pub(crate) fn counter(&self, what: &'static str) -> Bar {
        self.styled(what, "{spinner} {prefix} {pos} tokens {elapsed}")
    }

    fn styled(&self, what: &'static str, template: &str) -> Bar {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(what);
        Bar { bar, wanted: self.bars, since: Instant::now() }
    }
}

/// Work shorter than this shows no bar.
const PATIENCE: Duration = Duration::from_millis(300);

/// A progress bar on stderr, if a person sees it and the work takes long. It is gone when dropped.
pub(crate) struct Bar {
    bar: ProgressBar,
    wanted: bool,
    since: Instant,
}

impl Bar {
    /// Shows how far the work has come; never ends it.
    pub(crate) fn show(&self, at: Progress<'_>) -> ControlFlow<()> {
        if self.is_awake() {
            self.bar.set_length(at.total.max(at.done));
            self.bar.set_position(at.done);
        }
        ControlFlow::Continue(())
    }

    /// Counts one more.
    pub(crate) fn tick(&self) {
        self.bar.inc(1);
        if self.is_awake() {
            self.bar.tick();
        }
    }

    /// Shows the step that was made, and what is to be said of it.
    pub(crate) fn at(&self, step: u64, steps: u64, message: &str) {
        if self.is_awake() {
            self.bar.set_length(steps);
            self.bar.set_position(step);
            self.bar.set_message(message.to_owned());
        }
    }

    /// One line above the bar.
    pub(crate) fn say(&self, console: &Console, line: &str) {
        self.bar.suspend(|| console.say(line));
    }

    /// Takes the bar off the screen.
    pub(crate) fn hide(&self) {
        self.bar.finish_and_clear();
    }

    fn is_awake(&self) -> bool {
        if self.wanted && self.bar.is_hidden() && self.since.elapsed() > PATIENCE {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        !self.bar.is_hidden()
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.hide();
    }
}

/// `12.3 s`, `45 ms`.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 1.0 { format!("{:.0} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}
