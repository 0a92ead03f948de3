//! The conformance suite: what every backend must pass.
//!
//! # For whoever writes a backend
//!
//! 1. Start from [`crate::Reference`]: implement the required methods of [`Backend`], leave every computation to the
//!    default bodies.
//! 2. Add to your `Cargo.toml`
//!    ```toml
//!    [dev-dependencies]
//!    opt-backend = { version = "0.1", features = ["conformance"] }
//!    ```
//!    and to `tests/conformance.rs`
//!    ```no_run
//!    # struct MyBackend;
//!    # impl MyBackend { fn new() -> opt_backend::Reference { opt_backend::Reference::new() } }
//!    // in a function marked #[test]:
//!    opt_backend::conformance::run(|| MyBackend::new());
//!    ```
//!    `cargo test` then runs some hundred cases and lists all that fail, each with op, shape, dtype, and the largest
//!    and the mean error found.
//! 3. Override one op, run the suite, repeat. [`Suite::no_defaults`] and [`Suite::reads_per_step`] keep what you
//!    gained: they fail when an op falls back to its default body or a step reads more than it should.
//!
//! # What is checked
//!
//! - Storage: what is uploaded comes back, also from strided views; weights come back rounded to their dtype.
//! - Every op against [`crate::oracle`], over shapes that hurt, under one tolerance per dtype ([`Tolerance`]). The
//!   oracle is given the weights as the backend reads them back, so rounding at storage is no error of the op.
//! - Linears and tables of every quantized format against the same of [`crate::quant::Quantized::dequantize`].
//! - Arguments that do not fit give [`crate::ErrorKind::Shape`], never a panic, and leave caches as they were.
//! - Caches against a model of vectors, over random sequences of append, seed, truncate and fork.
//! - Operands passed by reference, and results of earlier ops, stay as they are while later ops run; guard zones,
//!   where the backend has them ([`Suite::guards`]).
//! - A small OPT: prefill in one piece, in chunks, token by token, in ragged batches and forked gives what
//!   [`crate::Reference`] gives; bit-equal to each other where [`crate::Info::deterministic`] says so, and then also
//!   every op row by row at the widths of real models.
//! - Counters: calls of default bodies and transfers.
//! - [`Suite::train`], for backends that implement [`Train`]: every op of it, in the same manner.
//!
//! [`crate::Info`] steers it: dtypes that are not listed are not tried, `max_binding` sizes the large table.

mod attention;
mod cache;
mod compare;
mod counting;
mod data;
mod deterministic;
mod errors;
mod head;
mod kept;
mod model;
mod ops;
mod quantized;
mod train;
mod whole;

pub use compare::Tolerance;
pub use counting::{decode_step, defaults_used};
pub use train::training_defaults_used;

use crate::{Backend, Counts, DType, Op, Train};
use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// Runs the suite with its default options and panics with the list of failures if there are any.
///
/// # Panics
/// If a case fails.
pub fn run<B: Backend>(make: impl Fn() -> B + 'static) -> Report {
    Suite::new(make).run()
}

type Guards<B> = Box<dyn Fn(&B) -> Result<(), String>>;

/// The suite with its options.
///
/// ```
/// use opt_backend::{Op, Reference, conformance::Suite};
///
/// let report = Suite::new(Reference::new).only(&["linear", "cache"]).check();
/// assert!(report.failures.is_empty(), "{report}");
/// // Reference lives on default bodies, and that shows.
/// let report = Suite::new(Reference::new).only(&["counters"]).no_defaults(&[Op::Attend]).check();
/// assert_eq!(report.failures.len(), 1);
/// ```
pub struct Suite<B: Backend> {
    make: Box<dyn Fn() -> B>,
    activations: DType,
    tolerance: Option<Tolerance>,
    quantized: Option<Tolerance>,
    bf16: bool,
    dtypes: Option<Vec<DType>>,
    heavy: bool,
    only: Vec<String>,
    no_defaults: Vec<Op>,
    reads_per_step: Option<u64>,
    guards: Option<Guards<B>>,
}

impl<B: Backend> Suite<B> {
    /// The suite over backends that `make` builds: one at the start, and a fresh one after each case that panicked.
    pub fn new(make: impl Fn() -> B + 'static) -> Self {
        Self {
            make: Box::new(make),
            activations: DType::F32,
            tolerance: None,
            quantized: None,
            bf16: false,
            dtypes: None,
            heavy: true,
            only: Vec::new(),
            no_defaults: Vec::new(),
            reads_per_step: None,
            guards: None,
        }
    }

    /// How this backend holds activations and computes; f32 unless said otherwise. It sets the tolerance, and inputs
    /// are made of numbers that this format can hold.
    pub fn activations(mut self, dtype: DType) -> Self {
        self.activations = dtype;
        self
    }

    /// Sets how close results must be; what [`Tolerance::of`] says of the activations unless said otherwise.
    pub fn tolerance(mut self, tolerance: Tolerance) -> Self {
        self.tolerance = Some(tolerance);
        self
    }

    /// Sets how close results must be where weights are quantized: [`Tolerance::INT16_ACTIVATIONS`] or
    /// [`Tolerance::INT8_ACTIVATIONS`] for a backend that quantizes activations too. As for other weights unless said otherwise.
    pub fn quantized_tolerance(mut self, tolerance: Tolerance) -> Self {
        self.quantized = Some(tolerance);
        self
    }

    /// Says whether the backend rounds activations to bf16 as they meet weights of bf16. Products are then expected to be
    /// those of rounded activations, as exact as any; whole models with such weights may be off by
    /// [`Tolerance::BF16_ACTIVATIONS`].
    pub fn bf16_activations(mut self, rounds: bool) -> Self {
        self.bf16 = rounds;
        self
    }

    /// Tries only these formats of weights, not all that [`crate::Info::dtypes`] lists. For backends that compute in
    /// the format of their weights: one run for each, with the [`Suite::activations`] that belong to it.
    pub fn dtypes(mut self, dtypes: &[DType]) -> Self {
        self.dtypes = Some(dtypes.to_vec());
        self
    }

    /// Leaves out the cases that need hundreds of megabytes or a second each: the large table, long caches.
    pub fn quick(mut self) -> Self {
        self.heavy = false;
        self
    }

    /// Runs only the cases of these ops, as they are named in front of a failure: `linear`, `attend`, `cache`, ...
    pub fn only(mut self, ops: &[&str]) -> Self {
        self.only = ops.iter().map(|op| (*op).to_owned()).collect();
        self
    }

    /// Fails if one of these ops is served by its default body.
    pub fn no_defaults(mut self, ops: &[Op]) -> Self {
        self.no_defaults = ops.to_vec();
        self
    }

    /// Fails if a decode step of a batch (embedding to top-k) reads from the device more than `reads` times.
    pub fn reads_per_step(mut self, reads: u64) -> Self {
        self.reads_per_step = Some(reads);
        self
    }

    /// Calls `check` after every case; it fails if something was written outside a buffer.
    ///
    /// For backends that own their buffers: let `make` build one that puts a guard zone (a recognisable pattern)
    /// around each, looks at the zones when a buffer is given back and remembers the first that changed; `check`
    /// looks at those still in use and reports what is remembered.
    pub fn guards(mut self, check: impl Fn(&B) -> Result<(), String> + 'static) -> Self {
        self.guards = Some(Box::new(check));
        self
    }

    /// Runs all cases.
    ///
    /// # Panics
    /// If a case fails, with the report as message.
    pub fn run(&self) -> Report {
        let report = self.check();
        assert!(report.failures.is_empty(), "{report}");
        report
    }

    /// Runs all cases and reports.
    pub fn check(&self) -> Report {
        let mut run = self.start();
        ops::run(&mut run);
        quantized::run(&mut run);
        attention::run(&mut run);
        head::run(&mut run);
        cache::run(&mut run);
        errors::run(&mut run);
        kept::run(&mut run);
        whole::run(&mut run);
        deterministic::run(&mut run);
        counting::run(&mut run);
        run.report
    }

    /// Runs the cases of [`Train`]'s ops; those of [`Backend`]'s are [`Suite::run`]'s.
    ///
    /// The options are the same: [`Suite::only`] takes the names of [`Train`]'s methods, `errors`, `kept` and
    /// `counters`, and [`Suite::no_defaults`] ops of [`Op::TRAIN`].
    ///
    /// # Panics
    /// If a case fails, with the report as message.
    pub fn train(&self) -> Report
    where
        B: Train,
    {
        let report = self.check_training();
        assert!(report.failures.is_empty(), "{report}");
        report
    }

    /// Runs the cases of [`Train`]'s ops and reports.
    pub fn check_training(&self) -> Report
    where
        B: Train,
    {
        let mut run = self.start();
        train::run(&mut run);
        run.report
    }

    fn start(&self) -> Run<'_, B> {
        let backend = (self.make)();
        let info = backend.info();
        Run {
            kit: Kit {
                activations: self.activations,
                tolerance: self.tolerance.unwrap_or(Tolerance::of(self.activations)),
                bf16: self.bf16,
                quantized: self.quantized.or(self.tolerance).unwrap_or(Tolerance::of(self.activations)),
            },
            dtypes: match &self.dtypes {
                Some(dtypes) => dtypes.clone(),
                None if info.dtypes.is_empty() => vec![DType::F32],
                None => info.dtypes.clone(),
            },
            max_binding: info.max_binding,
            deterministic: info.deterministic,
            report: Report { backend: format!("{} on {}", info.name, info.device), ..Report::default() },
            backend,
            suite: self,
        }
    }
}

/// What a run of the suite found. `Display` prints it in full.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// Name and device of the backend.
    pub backend: String,
    /// Number of cases that passed.
    pub passed: usize,
    /// Cases that the backend said it does not support, as `op: case: reason`.
    pub skipped: Vec<String>,
    /// Cases that failed.
    pub failures: Vec<Failure>,
    /// What one decode step of a batch of three cost; see [`decode_step`]. Nothing where training was checked.
    pub step: Counts,
    /// What calling every op once cost; see [`defaults_used`] and [`training_defaults_used`].
    pub tour: Counts,
}

/// A case that failed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Failure {
    /// The op or property.
    pub op: &'static str,
    /// Shape, dtype and variant.
    pub case: String,
    /// What was expected and found, with both errors where numbers were compared.
    pub message: String,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [passed, failed, skipped] = [self.passed, self.failures.len(), self.skipped.len()];
        writeln!(f, "{}: {passed} passed, {failed} failed, {skipped} not supported", self.backend)?;
        self.failures.iter().try_for_each(|failure| writeln!(f, "FAILED {failure}"))?;
        self.skipped.iter().try_for_each(|skipped| writeln!(f, "not supported: {skipped}"))?;
        if self.step != Counts::default() {
            writeln!(f, "a decode step: {}", self.step)?;
        }
        write!(f, "every op once: {}", self.tour)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.op, self.case, self.message)
    }
}

/// How a case can end other than well.
enum Verdict {
    Failed(String),
    NotSupported(String),
}

type Outcome<T = ()> = Result<T, Verdict>;

impl From<crate::Error> for Verdict {
    fn from(error: crate::Error) -> Self {
        Verdict::Failed(format!("unexpected error: {error}"))
    }
}

fn fail<T>(message: impl fmt::Display) -> Outcome<T> {
    Err(Verdict::Failed(message.to_string()))
}

fn ensure(holds: bool, message: impl fmt::Display) -> Outcome {
    if holds { Ok(()) } else { fail(message) }
}

/// What cases need beside the backend.
#[derive(Clone, Copy)]
struct Kit {
    activations: DType,
    /// Whether activations are rounded to bf16 as they meet weights of bf16.
    bf16: bool,
    tolerance: Tolerance,
    quantized: Tolerance,
}

impl Kit {
    /// Whether activations are rounded as they meet weights that are held as `dtype`.
    fn rounds_for(&self, dtype: DType) -> bool {
        self.bf16 && dtype == DType::BF16
    }
}

/// One run over one backend.
struct Run<'s, B: Backend> {
    suite: &'s Suite<B>,
    backend: B,
    kit: Kit,
    dtypes: Vec<DType>,
    max_binding: Option<u64>,
    deterministic: bool,
    report: Report,
}

impl<B: Backend> Run<'_, B> {
    /// Whether the device takes tensors of rows this wide.
    fn row_fits(&self, width: usize) -> bool {
        self.max_binding.is_none_or(|most| (width * size_of::<f32>()) as u64 <= most)
    }

    /// Runs one case; panics are failures, and cost the backend its life since it may be left in any state.
    fn case(
        &mut self,
        op: &'static str,
        case: impl fmt::Display,
        body: impl FnOnce(&B, &mut data::Data) -> Outcome,
    ) {
        if !self.suite.only.is_empty() && self.suite.only.iter().all(|only| only != op) {
            return;
        }
        let case = case.to_string();
        // Named seeds: what a case computes does not depend on which cases ran before it.
        let mut data = data::Data::new(&format!("{op} {case}"), self.kit);
        let ended = catch_unwind(AssertUnwindSafe(|| body(&self.backend, &mut data)));
        let ended = ended.unwrap_or_else(|panic| {
            self.backend = (self.suite.make)();
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            fail(format_args!("panicked: {}", text.unwrap_or_default()))
        });
        let guarded = match &self.suite.guards {
            Some(guards) => guards(&self.backend)
                .or_else(|message| fail(format_args!("written outside a buffer: {message}"))),
            None => Ok(()),
        };
        match ended.and(guarded) {
            Ok(()) => self.report.passed += 1,
            Err(Verdict::Failed(message)) => self.report.failures.push(Failure { op, case, message }),
            Err(Verdict::NotSupported(message)) => {
                self.report.skipped.push(format!("{op}: {case}: {message}"));
            }
        }
    }
}
