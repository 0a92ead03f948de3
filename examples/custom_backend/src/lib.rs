//! A backend that is none of opt-rs's own: [`Counting`] wraps another and notes what each op is called for and how
//! long it takes.
//!
//! For whoever writes a backend: the trait to implement is [`opt_backend::Backend`], the crate to depend on is
//! opt-backend, and the proof is the conformance suite (`tests/conformance.rs`). `Load::on(backend)` of opt-core then
//! runs every model and every way of generating on it; no name has to be registered anywhere.
//!
//! A backend for a new device starts from the source of [`opt_backend::Reference`]: its required methods store and
//! move tensors, and every computation has a default body that goes through the host, to be overridden one by one.
//! A *wrapper* such as this one must forward every method, those with default bodies too. What it does not forward
//! is still computed, but by the default body, through the host, instead of by the backend inside; the suite's
//! `no_defaults` finds it.

use opt_backend::{
    Attend, Backend, CacheLayer, CacheSpec, Counters, DType, HostLinear, HostMatrix, HostNorm, HostVector,
    Info, MaybeSend, NormParams, Readback, Result, TargetScore, Then, TopK, Train,
    ndarray::{Array2, Array3, ArrayView2},
    quant::Quantized,
};
use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The backend `B`, watched.
#[derive(Debug)]
pub struct Counting<B> {
    inner: B,
    tally: Arc<Tally>,
}

/// Calls and time of each op. `Display` prints a table, the op that took longest first.
#[derive(Debug, Default)]
pub struct Tally(Mutex<BTreeMap<&'static str, Spent>>);

/// What one op was called for and took.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Spent {
    /// Number of calls.
    pub calls: u64,
    /// Time within them. (A device that only queues work when called is waited for in `block_on`.)
    pub time: Duration,
}

impl<B> Counting<B> {
    /// Watches `inner`.
    pub fn new(inner: B) -> Self {
        Self { inner, tally: Arc::default() }
    }

    /// The tally, which stays readable while an engine owns the backend.
    pub fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    /// Runs `call` on the backend inside.
    fn note<'a, T>(&'a self, op: &'static str, call: impl FnOnce(&'a B) -> T) -> T {
        let start = Instant::now();
        let result = call(&self.inner);
        let mut ops = self.tally.lock();
        let spent = ops.entry(op).or_default();
        spent.calls += 1;
        spent.time += start.elapsed();
        result
    }
}

impl Tally {
    /// What `op`, a method's name, was called for so far.
    pub fn of(&self, op: &str) -> Spent {
        self.lock().get(op).copied().unwrap_or_default()
    }

    /// Forgets everything so far.
    pub fn reset(&self) {
        self.lock().clear();
    }

    // A backend is used from many threads at once. A panic elsewhere leaves counts usable.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, Spent>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows: Vec<_> = self.lock().iter().map(|(op, spent)| (*op, *spent)).collect();
        rows.sort_by_key(|(_, spent)| std::cmp::Reverse(spent.time));
        writeln!(f, "{:<14} {:>8} {:>12} {:>12}", "op", "calls", "total ms", "each µs")?;
        for (op, Spent { calls, time }) in rows {
            let total = time.as_secs_f64();
            let each = total / calls.max(1) as f64;
            writeln!(f, "{op:<14} {calls:>8} {:>12.2} {:>12.1}", total * 1e3, each * 1e6)?;
        }
        Ok(())
    }
}

// Training and adapters, by the bodies there are: right, but through the host.
impl<B: Backend> Train for Counting<B> {}

impl<B: Backend> Backend for Counting<B> {
    // What the backend inside holds goes through unchanged. A wrapper that has something to keep beside a tensor
    // would put a struct of its own here.
    type Tensor = B::Tensor;
    type Linear = B::Linear;
    type Norm = B::Norm;
    type Table = B::Table;
    type Cache = B::Cache;

    // The capabilities are those of the backend inside: formats, limits, memory, whether it is deterministic. The
    // suite, and the loading of a model, go by them.
    fn info(&self) -> Info {
        let mut info = self.inner.info();
        info.name = format!("counting {}", info.name);
        info
    }

    // The counters, too: default bodies and transfers are noted by whoever runs them.
    fn counters(&self) -> &Counters {
        self.inner.counters()
    }

    // Questions that cost nothing are not worth counting.
    fn shape(&self, x: &B::Tensor) -> [usize; 2] {
        self.inner.shape(x)
    }

    fn table_shape(&self, table: &B::Table) -> [usize; 2] {
        self.inner.table_shape(table)
    }

    fn cache_len(&self, cache: &B::Cache, layer: usize) -> usize {
        self.inner.cache_len(cache, layer)
    }

    // Transfers.

    fn upload(&self, x: ArrayView2<'_, f32>) -> Result<B::Tensor> {
        self.note("upload", |b| b.upload(x))
    }

    fn read<'a>(&'a self, x: &B::Tensor) -> Readback<'a, Array2<f32>> {
        self.note("read", |b| b.read(x))
    }

    fn read_owned(&self, x: B::Tensor) -> Readback<'_, Array2<f32>> {
        self.note("read_owned", |b| b.read_owned(x))
    }

    fn block_on<T: MaybeSend>(&self, readback: Readback<'_, T>) -> Result<T> {
        self.note("block_on", |b| b.block_on(readback))
    }

    // Weights.

    fn new_linear(
        &self,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<B::Linear> {
        self.note("new_linear", |b| b.new_linear(weight, bias, dtype))
    }

    fn read_linear<'a>(&'a self, linear: &B::Linear) -> Readback<'a, HostLinear> {
        self.note("read_linear", |b| b.read_linear(linear))
    }

    fn new_norm(&self, params: NormParams<'_>) -> Result<B::Norm> {
        self.note("new_norm", |b| b.new_norm(params))
    }

    fn read_norm<'a>(&'a self, norm: &B::Norm) -> Readback<'a, HostNorm> {
        self.note("read_norm", |b| b.read_norm(norm))
    }

    fn new_quantized_linear(&self, weight: &Quantized, bias: Option<HostVector<'_>>) -> Result<B::Linear> {
        self.note("new_quantized_linear", |b| b.new_quantized_linear(weight, bias))
    }

    fn new_quantized_table(&self, rows: &Quantized) -> Result<B::Table> {
        self.note("new_quantized_table", |b| b.new_quantized_table(rows))
    }

    fn new_table(&self, rows: HostMatrix<'_>, dtype: DType) -> Result<B::Table> {
        self.note("new_table", |b| b.new_table(rows, dtype))
    }

    fn read_table<'a>(&'a self, table: &B::Table, rows: Range<usize>) -> Readback<'a, Array2<f32>> {
        self.note("read_table", |b| b.read_table(table, rows))
    }

    // Caches.

    fn new_cache(&self, spec: CacheSpec) -> Result<B::Cache> {
        self.note("new_cache", |b| b.new_cache(spec))
    }

    fn cache_append(
        &self,
        cache: &mut B::Cache,
        layer: usize,
        keys: &B::Tensor,
        values: &B::Tensor,
        rows: Range<usize>,
    ) -> Result<()> {
        self.note("cache_append", |b| b.cache_append(cache, layer, keys, values, rows))
    }

    fn cache_read<'a>(&'a self, cache: &B::Cache, layer: usize) -> Readback<'a, CacheLayer> {
        self.note("cache_read", |b| b.cache_read(cache, layer))
    }

    fn cache_truncate(&self, cache: &mut B::Cache, len: usize) -> Result<()> {
        self.note("cache_truncate", |b| b.cache_truncate(cache, len))
    }

    fn cache_fork(&self, cache: &B::Cache) -> Result<B::Cache> {
        self.note("cache_fork", |b| b.cache_fork(cache))
    }

    fn cache_seed(
        &self,
        cache: &mut B::Cache,
        layer: usize,
        keys: ArrayView2<'_, f32>,
        values: ArrayView2<'_, f32>,
    ) -> Result<()> {
        self.note("cache_seed", |b| b.cache_seed(cache, layer, keys, values))
    }

    // Ops. Operands that are handed over go on by value, so that the backend inside may still reuse their memory.

    fn gather(&self, table: &B::Table, ids: &[u32]) -> Result<B::Tensor> {
        self.note("gather", |b| b.gather(table, ids))
    }

    fn add_gathered(&self, x: B::Tensor, table: &B::Table, ids: &[u32]) -> Result<B::Tensor> {
        self.note("add_gathered", |b| b.add_gathered(x, table, ids))
    }

    fn layer_norm(&self, x: &B::Tensor, norm: &B::Norm) -> Result<B::Tensor> {
        self.note("layer_norm", |b| b.layer_norm(x, norm))
    }

    fn linear(&self, x: &B::Tensor, linear: &B::Linear, then: Then<B::Tensor>) -> Result<B::Tensor> {
        self.note("linear", |b| b.linear(x, linear, then))
    }

    fn qkv(&self, x: &B::Tensor, q: &B::Linear, k: &B::Linear, v: &B::Linear) -> Result<[B::Tensor; 3]> {
        self.note("qkv", |b| b.qkv(x, q, k, v))
    }

    fn add(&self, x: B::Tensor, y: &B::Tensor) -> Result<B::Tensor> {
        self.note("add", |b| b.add(x, y))
    }

    fn attend(
        &self,
        q: B::Tensor,
        k: B::Tensor,
        v: B::Tensor,
        attend: Attend<'_>,
        caches: Option<&mut [&mut B::Cache]>,
    ) -> Result<B::Tensor> {
        self.note("attend", |b| b.attend(q, k, v, attend, caches))
    }

    fn attention_weights<'a>(
        &'a self,
        q: B::Tensor,
        k: B::Tensor,
        v: B::Tensor,
        attend: Attend<'_>,
        caches: Option<&mut [&mut B::Cache]>,
    ) -> Result<(B::Tensor, Readback<'a, Vec<Array3<f32>>>)> {
        self.note("attention_weights", |b| b.attention_weights(q, k, v, attend, caches))
    }

    fn take_rows(&self, x: &B::Tensor, rows: &[usize]) -> Result<B::Tensor> {
        self.note("take_rows", |b| b.take_rows(x, rows))
    }

    fn logits(&self, x: &B::Tensor, head: &B::Table) -> Result<B::Tensor> {
        self.note("logits", |b| b.logits(x, head))
    }

    fn log_probs<'a>(
        &'a self,
        x: &B::Tensor,
        head: &B::Table,
        targets: &[u32],
    ) -> Readback<'a, Vec<TargetScore>> {
        self.note("log_probs", |b| b.log_probs(x, head, targets))
    }

    fn top_k<'a>(&'a self, logits: &B::Tensor, k: usize) -> Readback<'a, Vec<TopK>> {
        self.note("top_k", |b| b.top_k(logits, k))
    }
}
