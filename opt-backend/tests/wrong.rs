//! Tests of the suite itself: backends that are wrong in one thing each must be caught, and by the right case.
//!
//! Each is [`Reference`] with one fault; the list at the end says which op must be named in the report.

use ndarray::{Array2, ArrayView2, s};
use opt_backend::{
    Activation, Attend, Backend, CacheLayer, CacheSpec, Counters, DType, Error, HostLinear, HostMatrix,
    HostNorm, HostVector, Info, NormParams, Readback, Reference, ReferenceCache, Result, TargetScore, Then,
    TopK, conformance::Suite, oracle, ready,
};
use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

/// What can be wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// No fault: everything in f32, summed from left to right, as the plainest kernel does.
    PlainF32,
    TanhGelu,
    BiasDroppedWithResidual,
    ResidualDroppedOnOneRow,
    EpsTooSmall,
    VarianceOverWidthMinusOne,
    OnePassVariance,
    MaskSeesNext,
    MaskMissesItself,
    Unscaled,
    SoftmaxWithoutMax,
    FiniteMask,
    SpansRunTogether,
    CacheIgnored,
    WrongCacheLayer,
    ForkShares,
    TruncatesFirstLayerOnly,
    ForkLosesFullBlock,
    AppendsWholeTensor,
    LaterIdWinsTies,
    TopKOneShort,
    LogSumExpOverTopK,
    GreedyOnTies,
    StridesIgnored,
    WeightsNotRounded,
    HalfActivations,
    LastColumnOfTableLost,
    TableSplitOffByOne,
    LongSumsSplitByBatch,
    IdsWrap,
    PanicsOnBadIds,
    ErrorOfWrongKind,
    RefusedCallAppends,
    ReadIsLate,
    BatchChangesBits,
    Guards,
}

/// [`Reference`] with a fault.
struct Wrong {
    inner: Reference,
    fault: Fault,
}

/// The cache of the reference behind a lock, so that a faulty fork can share it.
#[derive(Clone)]
struct Shared(Arc<Mutex<ReferenceCache>>, CacheSpec);

impl Shared {
    fn new(cache: ReferenceCache, spec: CacheSpec) -> Self {
        Self(Arc::new(Mutex::new(cache)), spec)
    }

    fn with<T>(&self, f: impl FnOnce(&mut ReferenceCache) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Wrong {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn attend_wrongly(
        &self,
        q: ArrayView2<'_, f32>,
        keys: ArrayView2<'_, f32>,
        values: ArrayView2<'_, f32>,
        heads: usize,
    ) -> Array2<f32> {
        let (rows, width) = q.dim();
        let (positions, head_dim) = (keys.nrows(), width / heads);
        let mut out = Array2::zeros((rows, width));
        let scale = if self.is(Fault::Unscaled) { 1.0 } else { (head_dim as f32).sqrt().recip() };
        for head in 0..heads {
            let columns = head * head_dim..(head + 1) * head_dim;
            for row in 0..rows {
                let seen = positions - rows + row + 1;
                let seen = match self.fault {
                    Fault::MaskSeesNext => (seen + 1).min(positions),
                    Fault::MaskMissesItself => (seen - 1).max(1),
                    _ => seen,
                };
                let mut scores = vec![0.0; positions];
                for (p, score) in scores.iter_mut().enumerate() {
                    let dot: f32 = columns.clone().map(|c| q[[row, c]] * keys[[p, c]]).sum();
                    *score = dot * scale;
                    if p >= seen {
                        *score = if self.is(Fault::FiniteMask) { *score - 1e4 } else { f32::NEG_INFINITY };
                    }
                }
                let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let max = if self.is(Fault::SoftmaxWithoutMax) { 0.0 } else { largest };
                let weights: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f32 = weights.iter().sum();
                for c in columns.clone() {
                    let mixed = weights.iter().enumerate().map(|(p, w)| w / sum * values[[p, c]]).sum();
                    out[[row, c]] = mixed;
                }
            }
        }
        out
    }

    /// Layer norm in f32, with the variance as the fault has it.
    fn norm_wrongly(&self, x: &Array2<f32>, norm: &HostNorm) -> Array2<f32> {
        let n = x.ncols() as f32;
        let mut out = x.clone();
        for mut row in out.outer_iter_mut() {
            let mean = row.sum() / n;
            let variance = if self.is(Fault::OnePassVariance) {
                row.iter().map(|v| v * v).sum::<f32>() / n - mean * mean
            } else {
                let n = if self.is(Fault::PlainF32) { n } else { (n - 1.0).max(1.0) };
                row.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / n
            };
            let scale = (variance.max(0.0) + norm.eps).sqrt().recip();
            for (i, v) in row.iter_mut().enumerate() {
                let weight = norm.weight.as_ref().map_or(1.0, |w| w[i]);
                *v = (*v - mean) * scale * weight + norm.bias.as_ref().map_or(0.0, |b| b[i]);
            }
        }
        out
    }
}

impl Backend for Wrong {
    type Tensor = Array2<f32>;
    type Linear = HostLinear;
    type Norm = HostNorm;
    type Table = Array2<f32>;
    type Cache = Shared;

    fn info(&self) -> Info {
        let mut info = self.inner.info();
        info.name = format!("{:?}", self.fault);
        if self.is(Fault::TableSplitOffByOne) {
            info.max_binding = Some(1 << 20);
        }
        info
    }

    fn counters(&self) -> &Counters {
        self.inner.counters()
    }

    fn shape(&self, x: &Array2<f32>) -> [usize; 2] {
        self.inner.shape(x)
    }

    fn upload(&self, x: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
        if self.is(Fault::StridesIgnored) && x.ncols() > 1 && x.strides()[1] < 0 {
            // What lies in memory from the lowest address on, taken row by row.
            let mut x = x;
            x.invert_axis(ndarray::Axis(1));
            return self.inner.upload(x);
        }
        let mut x = self.inner.upload(x)?;
        if self.is(Fault::HalfActivations) {
            x.mapv_inplace(|v| DType::F16.round(v));
        }
        Ok(x)
    }

    fn read<'a>(&'a self, x: &Array2<f32>) -> Readback<'a, Array2<f32>> {
        self.inner.read(x)
    }

    fn new_linear(
        &self,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<HostLinear> {
        let dtype = if self.is(Fault::WeightsNotRounded) { DType::F32 } else { dtype };
        self.inner.new_linear(weight, bias, dtype)
    }

    fn read_linear<'a>(&'a self, linear: &HostLinear) -> Readback<'a, HostLinear> {
        self.inner.read_linear(linear)
    }

    fn new_norm(&self, mut params: NormParams<'_>) -> Result<HostNorm> {
        if self.is(Fault::EpsTooSmall) {
            params.eps = 1e-6;
        }
        self.inner.new_norm(params)
    }

    fn read_norm<'a>(&'a self, norm: &HostNorm) -> Readback<'a, HostNorm> {
        let mut norm = norm.clone();
        // The fault is in the kernel; what is read back looks right.
        if self.is(Fault::EpsTooSmall) {
            norm.eps = 1e-5;
        }
        ready(Ok(norm))
    }

    fn new_table(&self, rows: HostMatrix<'_>, dtype: DType) -> Result<Array2<f32>> {
        self.inner.new_table(rows, dtype)
    }

    fn table_shape(&self, table: &Array2<f32>) -> [usize; 2] {
        self.inner.table_shape(table)
    }

    fn read_table<'a>(&'a self, table: &Array2<f32>, rows: Range<usize>) -> Readback<'a, Array2<f32>> {
        self.inner.read_table(table, rows)
    }

    fn new_cache(&self, spec: CacheSpec) -> Result<Shared> {
        Ok(Shared::new(self.inner.new_cache(spec)?, spec))
    }

    fn cache_len(&self, cache: &Shared, layer: usize) -> usize {
        cache.with(|cache| self.inner.cache_len(cache, layer))
    }

    fn cache_append(
        &self,
        cache: &mut Shared,
        layer: usize,
        keys: &Array2<f32>,
        values: &Array2<f32>,
        rows: Range<usize>,
    ) -> Result<()> {
        let whole = self.is(Fault::AppendsWholeTensor) && !rows.is_empty() && rows.end <= keys.nrows();
        let rows = if whole { 0..keys.nrows() } else { rows };
        cache.with(|cache| self.inner.cache_append(cache, layer, keys, values, rows))
    }

    fn cache_read<'a>(&'a self, cache: &Shared, layer: usize) -> Readback<'a, CacheLayer> {
        if self.is(Fault::ReadIsLate) {
            let cache = cache.clone();
            return Box::pin(async move { cache.with(|cache| self.inner.cache_read(cache, layer)).await });
        }
        cache.with(|cache| self.inner.cache_read(cache, layer))
    }

    fn cache_truncate(&self, cache: &mut Shared, len: usize) -> Result<()> {
        if !self.is(Fault::TruncatesFirstLayerOnly) {
            return cache.with(|cache| self.inner.cache_truncate(cache, len));
        }
        let mut short = self.inner.new_cache(cache.1)?;
        for layer in 0..cache.1.layers {
            let held = self.block_on(self.cache_read(cache, layer))?;
            let len = if layer == 0 { len.min(held.keys.nrows()) } else { held.keys.nrows() };
            let [keys, values] = [&held.keys, &held.values].map(|held| held.slice(s![..len, ..]));
            self.inner.cache_seed(&mut short, layer, keys, values)?;
        }
        cache.with(|cache| *cache = short);
        Ok(())
    }

    fn cache_fork(&self, cache: &Shared) -> Result<Shared> {
        if self.is(Fault::ForkShares) {
            return Ok(cache.clone());
        }
        let mut fork = cache.with(|cache| self.inner.cache_fork(cache))?;
        let len = self.inner.cache_len(&fork, 0);
        if self.is(Fault::ForkLosesFullBlock) && len > 0 && len % 64 == 0 {
            self.inner.cache_truncate(&mut fork, len - 1)?;
        }
        Ok(Shared::new(fork, cache.1))
    }

    fn gather(&self, table: &Array2<f32>, ids: &[u32]) -> Result<Array2<f32>> {
        let entries = table.nrows();
        if self.is(Fault::PanicsOnBadIds) {
            let rows: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
            return Ok(table.select(ndarray::Axis(0), &rows));
        }
        if self.is(Fault::IdsWrap) {
            let ids: Vec<u32> = ids.iter().map(|&id| id % entries as u32).collect();
            return self.inner.gather(table, &ids);
        }
        if self.is(Fault::TableSplitOffByOne) {
            let first = (1 << 20) / (4 * table.ncols()).max(1) as u32;
            let ids: Vec<u32> = ids.iter().map(|&id| if id == first { id - 1 } else { id }).collect();
            return self.inner.gather(table, &ids);
        }
        match self.inner.gather(table, ids) {
            Err(error) if self.is(Fault::ErrorOfWrongKind) => {
                Err(Error::new(opt_backend::ErrorKind::Device, "gather", error))
            }
            Ok(mut rows) if self.is(Fault::LastColumnOfTableLost) && rows.ncols() % 2 == 1 => {
                rows.column_mut(table.ncols() - 1).fill(0.0);
                Ok(rows)
            }
            rows => rows,
        }
    }

    fn layer_norm(&self, x: &Array2<f32>, norm: &HostNorm) -> Result<Array2<f32>> {
        let own = [Fault::PlainF32, Fault::VarianceOverWidthMinusOne, Fault::OnePassVariance];
        if own.contains(&self.fault) {
            opt_backend::check::width("layer_norm", x.ncols(), norm.width)?;
            return Ok(self.norm_wrongly(x, norm));
        }
        self.inner.layer_norm(x, norm)
    }

    fn linear(&self, x: &Array2<f32>, linear: &HostLinear, then: Then<Array2<f32>>) -> Result<Array2<f32>> {
        if self.is(Fault::PlainF32) && x.ncols() == linear.weight.ncols() {
            let mut y = Array2::from_shape_fn((x.nrows(), linear.weight.nrows()), |(i, j)| {
                let products = x.row(i).into_iter().zip(linear.weight.row(j)).map(|(x, w)| x * w);
                products.fold(0.0f32, |sum, product| sum + product)
                    + linear.bias.as_ref().map_or(0.0, |bias| bias[j])
            });
            match then {
                Then::Activate(f) => y.mapv_inplace(|v| f.apply(f64::from(v)) as f32),
                Then::Add(residual) => y = self.inner.add(residual, &y)?,
                _ => {}
            }
            return Ok(y);
        }
        let (fault, rows) = (self.fault, x.nrows());
        let mut y = match then {
            Then::Activate(Activation::Gelu) if fault == Fault::TanhGelu => {
                self.inner.linear(x, linear, Then::Activate(Activation::GeluTanh))
            }
            Then::Add(residual) if fault == Fault::BiasDroppedWithResidual => {
                let linear = HostLinear { weight: linear.weight.clone(), bias: None };
                self.inner.linear(x, &linear, Then::Add(residual))
            }
            Then::Add(mut residual) if fault == Fault::ResidualDroppedOnOneRow && residual.nrows() > 64 => {
                residual.row_mut(64).fill(0.0);
                self.inner.linear(x, linear, Then::Add(residual))
            }
            then => self.inner.linear(x, linear, then),
        }?;
        let split = fault == Fault::LongSumsSplitByBatch && rows > 16 && x.ncols() > 512;
        if split || fault == Fault::BatchChangesBits && rows > 1 {
            // Within every tolerance, and still not the same.
            y.mapv_inplace(|v| f32::from_bits(v.to_bits() ^ 1));
        }
        Ok(y)
    }

    fn qkv(
        &self,
        x: &Array2<f32>,
        q: &HostLinear,
        k: &HostLinear,
        v: &HostLinear,
    ) -> Result<[Array2<f32>; 3]> {
        self.inner.qkv(x, q, k, v)
    }

    fn attend(
        &self,
        q: Array2<f32>,
        k: Array2<f32>,
        v: Array2<f32>,
        attend: Attend<'_>,
        caches: Option<&mut [&mut Shared]>,
    ) -> Result<Array2<f32>> {
        use opt_backend::check;
        if self.is(Fault::RefusedCallAppends) {
            if let Some(caches) = caches {
                for (span, cache) in attend.spans.iter().zip(caches.iter_mut()) {
                    self.cache_append(
                        cache,
                        attend.layer,
                        &k,
                        &v,
                        span.start..span.start.wrapping_add(span.len),
                    )?;
                }
            }
            return Err(Error::shape("attend", "too late"));
        }
        check::spans("attend", attend, q.dim().into())?;
        check::same_shape("attend", k.dim().into(), q.dim().into())?;
        check::same_shape("attend", v.dim().into(), q.dim().into())?;
        let mut spans = attend.spans.to_vec();
        if self.is(Fault::SpansRunTogether) && caches.is_none() && spans.len() > 1 {
            // Rows of one sequence see those of the one before.
            spans = vec![opt_backend::Span { start: 0, len: q.nrows() }];
        }
        let mut out = Array2::zeros(q.dim());
        let mut caches = caches;
        if let Some(caches) = &caches {
            check::caches(attend, caches.len())?;
        }
        for (i, span) in spans.iter().enumerate() {
            let rows = s![span.rows(), ..];
            let (mut keys, mut values) = (k.slice(rows).to_owned(), v.slice(rows).to_owned());
            if let Some(caches) = caches.as_deref_mut() {
                let layer = if self.is(Fault::WrongCacheLayer) { 0 } else { attend.layer };
                self.cache_append(caches[i], layer, &k, &v, span.rows())?;
                if !self.is(Fault::CacheIgnored) {
                    let held = self.block_on(self.cache_read(caches[i], layer))?;
                    (keys, values) = (held.keys, held.values);
                }
            }
            let wrong = matches!(
                self.fault,
                Fault::PlainF32
                    | Fault::MaskSeesNext
                    | Fault::MaskMissesItself
                    | Fault::Unscaled
                    | Fault::SoftmaxWithoutMax
                    | Fault::FiniteMask
            );
            let q = q.slice(rows);
            let y = if wrong {
                self.attend_wrongly(q, keys.view(), values.view(), attend.heads)
            } else {
                oracle::attend(q, keys.view(), values.view(), attend.heads).0
            };
            out.slice_mut(rows).assign(&y);
        }
        Ok(out)
    }

    fn log_probs<'a>(
        &'a self,
        x: &Array2<f32>,
        head: &Array2<f32>,
        targets: &[u32],
    ) -> Readback<'a, Vec<TargetScore>> {
        let scores = self.block_on(self.inner.log_probs(x, head, targets));
        if !self.is(Fault::GreedyOnTies) {
            return ready(scores);
        }
        ready(scores.and_then(|mut scores| {
            let logits = self.block_on(self.read_owned(self.logits(x, head)?))?;
            for ((score, row), &target) in scores.iter_mut().zip(logits.outer_iter()).zip(targets) {
                score.greedy = row.iter().all(|v| *v <= row[target as usize]);
            }
            Ok(scores)
        }))
    }

    fn top_k<'a>(&'a self, logits: &Array2<f32>, k: usize) -> Readback<'a, Vec<TopK>> {
        let wrong = |row: ndarray::ArrayView1<'_, f32>| {
            let mut top = oracle::top_k(row, k);
            match self.fault {
                Fault::LaterIdWinsTies => {
                    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
                    ids.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(b.cmp(&a)));
                    ids.truncate(k);
                    top.logits = ids.iter().map(|&id| row[id as usize]).collect();
                    top.ids = ids;
                }
                Fault::TopKOneShort if k > 64 => {
                    top.ids.truncate(64);
                    top.logits.truncate(64);
                }
                Fault::LogSumExpOverTopK if k > 0 => {
                    top.log_sum_exp = oracle::log_sum_exp(ndarray::aview1(&top.logits)) as f32;
                }
                _ => {}
            }
            top
        };
        ready(Ok(logits.outer_iter().map(wrong).collect()))
    }
}

fn suite(fault: Fault) -> Suite<Wrong> {
    Suite::new(move || Wrong { inner: Reference::new(), fault }).quick()
}

/// The wrapper itself is right: what is caught below is the fault.
#[test]
fn without_a_fault_it_passes() {
    suite(Fault::None).run();
}

/// The bounds leave room for f32: also for the long sums and the large table.
#[test]
fn plain_f32_passes() {
    Suite::new(|| Wrong { inner: Reference::new(), fault: Fault::PlainF32 }).run();
}

/// (fault, the op or property that must be reported)
const FAULTS: &[(Fault, &str)] = &[
    (Fault::TanhGelu, "linear"),
    (Fault::BiasDroppedWithResidual, "linear"),
    (Fault::ResidualDroppedOnOneRow, "linear"),
    (Fault::EpsTooSmall, "layer_norm"),
    (Fault::VarianceOverWidthMinusOne, "layer_norm"),
    (Fault::OnePassVariance, "layer_norm"),
    (Fault::MaskSeesNext, "attend"),
    (Fault::MaskMissesItself, "attend"),
    (Fault::Unscaled, "attend"),
    (Fault::SoftmaxWithoutMax, "attend"),
    (Fault::FiniteMask, "attend"),
    (Fault::SpansRunTogether, "attend"),
    (Fault::CacheIgnored, "attend"),
    (Fault::WrongCacheLayer, "attend"),
    (Fault::ForkShares, "cache"),
    (Fault::TruncatesFirstLayerOnly, "cache"),
    (Fault::ForkLosesFullBlock, "cache"),
    (Fault::AppendsWholeTensor, "cache"),
    (Fault::ReadIsLate, "cache"),
    (Fault::LaterIdWinsTies, "top_k"),
    (Fault::TopKOneShort, "top_k"),
    (Fault::LogSumExpOverTopK, "top_k"),
    (Fault::GreedyOnTies, "log_probs"),
    (Fault::StridesIgnored, "upload"),
    (Fault::WeightsNotRounded, "new_linear"),
    (Fault::HalfActivations, "upload"),
    (Fault::LastColumnOfTableLost, "gather"),
    (Fault::TableSplitOffByOne, "gather"),
    (Fault::LongSumsSplitByBatch, "deterministic"),
    (Fault::IdsWrap, "errors"),
    (Fault::PanicsOnBadIds, "errors"),
    (Fault::ErrorOfWrongKind, "errors"),
    (Fault::RefusedCallAppends, "errors"),
    (Fault::BatchChangesBits, "model"),
];

#[test]
fn each_fault_is_caught() {
    let mut missed = Vec::new();
    for &(fault, op) in FAULTS {
        let report = suite(fault).only(&[op]).check();
        assert!(report.passed + report.failures.len() > 0, "no case is named {op}");
        match report.failures.first() {
            Some(failure) => eprintln!("{fault:?} ({} cases): {failure}", report.failures.len()),
            None => missed.push(format!("{fault:?} does not show in {op}")),
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
}

#[test]
fn a_broken_guard_fails_each_case_it_is_seen_after() {
    let report =
        suite(Fault::Guards).only(&["add", "read"]).guards(|_| Err("4 bytes after a buffer".into())).check();
    assert_eq!(report.passed, 0);
    assert!(report.failures[0].message.contains("4 bytes after a buffer"), "{}", report.failures[0]);
}

#[test]
fn what_is_counted_can_be_demanded() {
    use opt_backend::Op;
    let report =
        suite(Fault::None).only(&["counters"]).no_defaults(&[Op::Attend, Op::TopK]).reads_per_step(0).check();
    // Attend and TopK are overridden above, but the layers between read and upload.
    let failed: Vec<&str> = report.failures.iter().map(|failure| failure.case.as_str()).collect();
    assert_eq!(failed, ["a decode step"]);
    let report = suite(Fault::None).only(&["counters"]).no_defaults(&[Op::Attend, Op::LayerNorm]).check();
    assert!(report.failures[0].message.contains("[LayerNorm]"), "{}", report.failures[0]);
    assert!(report.step.default_bodies(Op::Linear) > 0 && report.step.default_bodies(Op::Attend) == 0);
}

/// A backend that holds activations in half precision passes once it says so, and not before.
#[test]
fn half_precision_has_its_own_tolerance() {
    suite(Fault::HalfActivations).activations(DType::F16).run();
    let report = suite(Fault::HalfActivations).only(&["linear", "model"]).check();
    assert!(report.failures.len() > report.passed, "{report}");
}
