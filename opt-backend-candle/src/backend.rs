//! [`Backend`] for [`Candle`]: arguments are checked here, once; the two ways of computing rely on it.

use crate::{
    Cache, Candle, Linear, Norm, Table, Way,
    cpu::{After, Heads, Kernels, Product, Sequence},
    error::convert,
    host,
    plain::Plain,
    quant::Tiles,
    weights::{Kept, Weight},
};
use opt_backend::{
    Attend, Backend, CacheLayer, CacheSpec, Counters, DType, Error, ErrorKind, HostLinear, HostMatrix,
    HostNorm, HostVector, Info, NormParams, Readback, Result, TargetScore, Then, TopK, check, host_memory,
    ndarray::{Array2, ArrayView2},
    oracle,
    quant::Quantized,
    ready,
};
use opt_kernels::Compute;
use std::{fmt, ops::Range};

/// Logits that [`Backend::log_probs`] holds at a time.
const LOGITS_HELD: usize = 8 << 20;

/// Activations `[rows, width]`, f32. No two share storage.
pub struct Tensor {
    pub(crate) data: candle_core::Tensor,
    pub(crate) shape: [usize; 2],
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensor").field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl Candle {
    pub(crate) fn tensor(
        op: &'static str,
        shape: [usize; 2],
        data: candle_core::Result<candle_core::Tensor>,
    ) -> Result<Tensor> {
        let data = data.map_err(|error| convert(op, error))?;
        Ok(Tensor { data, shape })
    }

    /// A quantized weight for the way that ops are computed.
    fn quantized(&self, op: &'static str, weight: &Quantized) -> Result<Kept> {
        match &self.way {
            Way::Cpu(kernels) => kernels.host().pack(weight, op).map(|weight| Kept::Host(Box::new(weight))),
            Way::Plain(_) => Tiles::new(op, &self.device, weight).map(|tiles| Kept::Tiles(Box::new(tiles))),
        }
    }

    fn append(
        &self,
        op: &'static str,
        cache: &mut Cache,
        layer: usize,
        [keys, values]: [&Tensor; 2],
        rows: Range<usize>,
    ) -> Result<()> {
        check::layer(op, layer, cache.layers.len())?;
        check::same_shape(op, values.shape, keys.shape)?;
        check::width(op, keys.shape[1], cache.width())?;
        check::range(op, &rows, keys.shape[0])?;
        let both = [&keys.data, &values.data];
        match &self.way {
            Way::Cpu(kernels) => kernels.append(op, cache, layer, both, rows),
            Way::Plain(plain) => plain.append(op, cache, layer, both, rows),
        }
    }

    /// The logits of some rows of `x`.
    fn logits_of(&self, x: &Tensor, head: &Table) -> Result<Tensor> {
        let op = "logits";
        let [entries, width] = head.0.shape();
        check::width(op, x.shape[1], width)?;
        let shape = [x.shape[0], entries];
        match &self.way {
            Way::Cpu(kernels) => {
                let product = Product { weight: &head.0, bias: None, after: After::Nothing };
                let [data] = products(kernels, op, x, [product])?;
                Ok(Tensor { data, shape })
            }
            Way::Plain(plain) => Self::tensor(op, shape, plain.product(&x.data, &head.0)),
        }
    }

    /// Scores of targets under logits at hand, one a row.
    fn scores(&self, logits: &Tensor, targets: &[u32]) -> Result<Vec<TargetScore>> {
        let op = "log_probs";
        let [_, entries] = logits.shape;
        let plain = match &self.way {
            Way::Cpu(kernels) => return kernels.target_scores(&logits.data, entries, targets),
            Way::Plain(plain) => plain,
        };
        let best = plain.best(&logits.data, logits.shape, Some(targets)).map_err(|e| convert(op, e))?;
        self.counters.read(4 * size_of::<f32>() * best.len());
        let each = best.iter().zip(targets).enumerate();
        each.map(|(row, (best, &target))| match best.entry {
            Some((id, _)) => Ok(TargetScore { log_prob: best.target - best.log_sum, greedy: id == target }),
            // A row with infinities or NaN, which the host tells apart.
            None => Ok(oracle::target_score(self.read_rows(op, logits, row..row + 1)?.row(0), target)),
        })
        .collect()
    }

    /// The top k of each row on a device that computes by candle's ops.
    fn plain_top_k(&self, plain: &Plain, logits: &Tensor, k: usize) -> Result<Vec<TopK>> {
        let op = "top_k";
        if k == 1 {
            let best = plain.best(&logits.data, logits.shape, None).map_err(|error| convert(op, error))?;
            self.counters.read(3 * size_of::<f32>() * best.len());
            let each = best.iter().enumerate();
            return each
                .map(|(row, best)| match best.entry {
                    Some((id, logit)) => Ok(TopK {
                        ids: vec![id],
                        logits: vec![logit],
                        log_sum_exp: (f64::from(logit) + f64::from(best.log_sum)) as f32,
                    }),
                    None => Ok(oracle::top_k(self.read_rows(op, logits, row..row + 1)?.row(0), 1)),
                })
                .collect();
        }
        // candle sorts rows of at most a thousand or so on GPUs; a row's logits are 200 KB.
        let rows = self.read_rows(op, logits, 0..logits.shape[0])?;
        let rows = rows.as_slice().unwrap_or_default();
        Ok(crate::cpu::top_k_of(rows, logits.shape, k))
    }

    /// Rows of a tensor as they are now.
    fn read_rows(&self, op: &'static str, x: &Tensor, rows: Range<usize>) -> Result<Array2<f32>> {
        let shape = [rows.len(), x.shape[1]];
        let len = host::count(op, shape)?;
        self.counters.read(len * size_of::<f32>());
        let read = || x.data.narrow(0, rows.start, rows.len())?.flatten_all()?.to_vec1::<f32>();
        let data = if len == 0 { Vec::new() } else { read().map_err(|error| convert(op, error))? };
        Array2::from_shape_vec(shape, data).map_err(|error| Error::shape(op, error))
    }
}

/// Several products of one input on the CPU.
fn products<const N: usize>(
    kernels: &Kernels,
    op: &'static str,
    x: &Tensor,
    products: [Product<'_>; N],
) -> Result<[candle_core::Tensor; N]> {
    let made = kernels.products(op, &x.data, x.shape, &products)?;
    made.try_into().map_err(|_| Error::new(ErrorKind::Device, op, "products went missing"))
}

/// Attention on the CPU; caches hold the new rows already.
fn attend_on_cpu(
    kernels: &Kernels,
    [q, k, v]: [&Tensor; 3],
    attend: Attend<'_>,
    caches: Option<&[&mut Cache]>,
) -> Result<candle_core::Tensor> {
    let op = "attend";
    let width = q.shape[1];
    let dim = width / attend.heads;
    let (k, v) = (k.data.storage_and_layout(), v.data.storage_and_layout());
    let (k, v) = (host::numbers::<f32>(op, &k.0, k.1)?, host::numbers::<f32>(op, &v.0, v.1)?);
    let layers = attend.spans.iter().enumerate().map(|(i, _)| {
        let layer = caches.and_then(|caches| caches.get(i)).and_then(|cache| cache.layers.get(attend.layer));
        layer.and_then(|layer| layer.held())
    });
    let layers: Vec<_> = layers.collect();
    let locks: Vec<_> =
        layers.iter().map(|held| held.map(|(room, _)| (room.keys.lock(), room.values.lock()))).collect();
    let mut sequences = Vec::with_capacity(attend.spans.len());
    for (span, (held, locks)) in attend.spans.iter().zip(layers.iter().zip(&locks)) {
        let own = |data: &'_ [f32]| -> usize { data.len().min(span.start * width) };
        let (keys, values, len) = match (held, locks) {
            (Some((room, len)), Some((keys, values))) => {
                (keys.heads(op, room, dim)?, values.heads(op, room, dim)?, *len)
            }
            _ => (
                Heads::F32 { data: &k[own(k)..], head: dim, position: width },
                Heads::F32 { data: &v[own(v)..], head: dim, position: width },
                span.len,
            ),
        };
        sequences.push(Sequence { span: *span, keys, values, len });
    }
    kernels.attend(&q.data, q.shape, attend.heads, &sequences)
}

impl Backend for Candle {
    type Tensor = Tensor;
    type Linear = Linear;
    type Norm = Norm;
    type Table = Table;
    type Cache = Cache;

    fn info(&self) -> Info {
        let mut info = Info::new("candle", self.name.clone());
        info.dtypes = vec![DType::F32, DType::F16, DType::BF16];
        let mut compute = Compute::F32;
        if let Way::Cpu(kernels) = &self.way {
            compute = kernels.host().compute();
            info.threads = kernels.threads();
            info.simd = Some(kernels.simd().to_owned());
        }
        if self.device.is_cpu() {
            info.memory = host_memory();
        }
        // What candle says it was built with, or found.
        use candle_core::utils;
        let built = [
            ("mkl", utils::has_mkl()),
            ("accelerate", utils::has_accelerate()),
            ("cuda", utils::cuda_is_available()),
            ("metal", utils::metal_is_available()),
            ("avx2", utils::with_avx()),
            ("f16c", utils::with_f16c()),
            ("neon", utils::with_neon()),
            ("simd128", utils::with_simd128()),
        ];
        let there: Vec<&str> = built.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
        info.details.push(("candle".to_owned(), there.join("+")));
        info.details.push(("quantized weights".to_owned(), format!("multiplied in {compute}")));
        info
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn shape(&self, x: &Tensor) -> [usize; 2] {
        x.shape
    }

    fn upload(&self, x: ArrayView2<'_, f32>) -> Result<Tensor> {
        let op = "upload";
        self.counters.upload(size_of::<f32>() * x.len());
        let mut data = host::reserve(op, x.len())?;
        match x.as_slice() {
            Some(x) => data.extend_from_slice(x),
            None => data.extend(x.iter()),
        }
        let shape: [usize; 2] = x.dim().into();
        Self::tensor(op, shape, candle_core::Tensor::from_vec(data, &shape, &self.device))
    }

    fn read<'a>(&'a self, x: &Tensor) -> Readback<'a, Array2<f32>> {
        // candle copies when asked and waits for the copy.
        ready(self.read_rows("read", x, 0..x.shape[0]))
    }

    fn new_linear(
        &self,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<Linear> {
        Linear::new(&self.device, weight, bias, dtype)
    }

    fn read_linear<'a>(&'a self, linear: &Linear) -> Readback<'a, HostLinear> {
        ready(linear.read())
    }

    fn new_norm(&self, params: NormParams<'_>) -> Result<Norm> {
        Norm::new(&self.device, params)
    }

    fn read_norm<'a>(&'a self, norm: &Norm) -> Readback<'a, HostNorm> {
        ready(norm.read())
    }

    fn new_table(&self, rows: HostMatrix<'_>, dtype: DType) -> Result<Table> {
        Weight::new("new_table", &self.device, rows, dtype).map(|rows| Table(Kept::Dense(rows)))
    }

    fn new_quantized_linear(&self, weight: &Quantized, bias: Option<HostVector<'_>>) -> Result<Linear> {
        Linear::quantized(&self.device, self.quantized("new_linear", weight)?, bias)
    }

    fn new_quantized_table(&self, rows: &Quantized) -> Result<Table> {
        self.quantized("new_table", rows).map(Table)
    }

    fn table_shape(&self, table: &Table) -> [usize; 2] {
        table.0.shape()
    }

    fn read_table<'a>(&'a self, table: &Table, rows: Range<usize>) -> Readback<'a, Array2<f32>> {
        ready(table.0.read("read_table", rows))
    }

    fn new_cache(&self, spec: CacheSpec) -> Result<Cache> {
        Cache::new(spec)
    }

    fn cache_len(&self, cache: &Cache, layer: usize) -> usize {
        cache.layers.get(layer).map_or(0, |layer| layer.len)
    }

    fn cache_append(
        &self,
        cache: &mut Cache,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        rows: Range<usize>,
    ) -> Result<()> {
        self.append("cache_append", cache, layer, [keys, values], rows)
    }

    fn cache_read<'a>(&'a self, cache: &Cache, layer: usize) -> Readback<'a, CacheLayer> {
        ready(cache.read(layer))
    }

    fn cache_truncate(&self, cache: &mut Cache, len: usize) -> Result<()> {
        cache.truncate(len);
        Ok(())
    }

    fn cache_fork(&self, cache: &Cache) -> Result<Cache> {
        Ok(cache.fork())
    }

    fn gather(&self, table: &Table, ids: &[u32]) -> Result<Tensor> {
        let op = "gather";
        check::ids(op, ids, table.0.shape()[0])?;
        let shape = [ids.len(), table.0.shape()[1]];
        match &self.way {
            Way::Cpu(kernels) => Ok(Tensor { data: kernels.gather(&table.0, ids)?, shape }),
            Way::Plain(plain) => Self::tensor(op, shape, plain.gather(&table.0, ids)),
        }
    }

    fn add_gathered(&self, x: Tensor, table: &Table, ids: &[u32]) -> Result<Tensor> {
        let op = "add_gathered";
        check::ids(op, ids, table.0.shape()[0])?;
        check::same_shape(op, [ids.len(), table.0.shape()[1]], x.shape)?;
        let rows = self.gather(table, ids)?;
        self.add(x, &rows)
    }

    fn layer_norm(&self, x: &Tensor, norm: &Norm) -> Result<Tensor> {
        let op = "layer_norm";
        check::width(op, x.shape[1], norm.width)?;
        match &self.way {
            Way::Cpu(kernels) => {
                Ok(Tensor { data: kernels.layer_norm(&x.data, x.shape, norm)?, shape: x.shape })
            }
            Way::Plain(plain) => Self::tensor(op, x.shape, plain.layer_norm(&x.data, norm)),
        }
    }

    fn linear(&self, x: &Tensor, linear: &Linear, then: Then<Tensor>) -> Result<Tensor> {
        let op = "linear";
        let [outputs, depth] = linear.weight.shape();
        check::width(op, x.shape[1], depth)?;
        let shape = [x.shape[0], outputs];
        let after = match &then {
            Then::Nothing => After::Nothing,
            Then::Activate(activation) => After::Activate(*activation),
            Then::Add(residual) => {
                check::same_shape(op, residual.shape, shape)?;
                After::Add(&residual.data)
            }
            other => {
                let message = format_args!("this backend does not know {other:?}");
                return Err(Error::new(ErrorKind::Unsupported, op, message));
            }
        };
        match &self.way {
            Way::Cpu(kernels) => {
                let product = Product { weight: &linear.weight, bias: linear.bias.as_ref(), after };
                let [data] = products(kernels, op, x, [product])?;
                Ok(Tensor { data, shape })
            }
            Way::Plain(plain) => {
                let y = plain.linear(&x.data, linear).map_err(|error| convert(op, error))?;
                match after {
                    After::Nothing => Ok(Tensor { data: y, shape }),
                    After::Activate(activation) => Ok(Tensor { data: plain.activate(y, activation)?, shape }),
                    After::Add(residual) => Self::tensor(op, shape, y + residual),
                }
            }
        }
    }

    fn qkv(&self, x: &Tensor, q: &Linear, k: &Linear, v: &Linear) -> Result<[Tensor; 3]> {
        let op = "qkv";
        let all = [q, k, v];
        for linear in all {
            check::width(op, x.shape[1], linear.weight.shape()[1])?;
        }
        let shape = |linear: &Linear| [x.shape[0], linear.weight.shape()[0]];
        match &self.way {
            Way::Cpu(kernels) => {
                let all = all.map(|linear| Product {
                    weight: &linear.weight,
                    bias: linear.bias.as_ref(),
                    after: After::Nothing,
                });
                let [a, b, c] = products(kernels, op, x, all)?;
                Ok([
                    Tensor { data: a, shape: shape(q) },
                    Tensor { data: b, shape: shape(k) },
                    Tensor { data: c, shape: shape(v) },
                ])
            }
            Way::Plain(plain) => {
                let [a, b, c] =
                    all.map(|linear| Self::tensor(op, shape(linear), plain.linear(&x.data, linear)));
                Ok([a?, b?, c?])
            }
        }
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        let op = "add";
        check::same_shape(op, y.shape, x.shape)?;
        match &self.way {
            Way::Cpu(kernels) => {
                kernels.add(op, &x.data, &y.data)?;
                Ok(x)
            }
            Way::Plain(_) => Self::tensor(op, x.shape, &x.data + &y.data),
        }
    }

    fn attend(
        &self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attend: Attend<'_>,
        mut caches: Option<&mut [&mut Cache]>,
    ) -> Result<Tensor> {
        let op = "attend";
        check::spans(op, attend, q.shape)?;
        check::same_shape(op, k.shape, q.shape)?;
        check::same_shape(op, v.shape, q.shape)?;
        let shape = q.shape;
        if let Some(caches) = caches.as_deref_mut() {
            check::caches(attend, caches.len())?;
            // All checks come before the first append: an error leaves every cache as it was.
            for cache in caches.iter() {
                check::layer(op, attend.layer, cache.layers.len())?;
                check::width(op, shape[1], cache.width())?;
                check::heads(op, attend, cache.spec.heads)?;
            }
            for (span, cache) in attend.spans.iter().zip(caches.iter_mut()) {
                self.append(op, cache, attend.layer, [&k, &v], span.rows())?;
            }
        }
        let caches = caches.as_deref();
        match &self.way {
            Way::Cpu(kernels) => {
                Ok(Tensor { data: attend_on_cpu(kernels, [&q, &k, &v], attend, caches)?, shape })
            }
            Way::Plain(plain) => {
                Self::tensor(op, shape, plain.attend([&q.data, &k.data, &v.data], shape, attend, caches))
            }
        }
    }

    fn take_rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        let op = "take_rows";
        let [available, width] = x.shape;
        check::rows(op, rows, available)?;
        let shape = [rows.len(), width];
        match &self.way {
            Way::Cpu(kernels) => Ok(Tensor { data: kernels.take_rows(&x.data, width, rows)?, shape }),
            Way::Plain(plain) => Self::tensor(op, shape, plain.take_rows(&x.data, width, rows)),
        }
    }

    fn logits(&self, x: &Tensor, head: &Table) -> Result<Tensor> {
        self.logits_of(x, head)
    }

    fn log_probs<'a>(&'a self, x: &Tensor, head: &Table, targets: &[u32]) -> Readback<'a, Vec<TargetScore>> {
        let op = "log_probs";
        let compute = || {
            let [entries, width] = head.0.shape();
            check::width(op, x.shape[1], width)?;
            check::ids(op, targets, entries)?;
            check::targets(op, targets, x.shape[0])?;
            let share = (LOGITS_HELD / entries.max(1)).max(1);
            if targets.len() <= share {
                return self.scores(&self.logits_of(x, head)?, targets);
            }
            let mut scores = Vec::with_capacity(targets.len());
            for (i, targets) in targets.chunks(share).enumerate() {
                let rows: Vec<usize> = (i * share..i * share + targets.len()).collect();
                let logits = self.logits_of(&self.take_rows(x, &rows)?, head)?;
                scores.extend(self.scores(&logits, targets)?);
            }
            Ok(scores)
        };
        ready(compute())
    }

    fn top_k<'a>(&'a self, logits: &Tensor, k: usize) -> Readback<'a, Vec<TopK>> {
        ready(match &self.way {
            Way::Cpu(kernels) => {
                self.counters.read(2 * size_of::<f32>() * k.saturating_mul(logits.shape[0]).min(1 << 30));
                kernels.top_k(&logits.data, logits.shape, k)
            }
            Way::Plain(plain) => self.plain_top_k(plain, logits, k),
        })
    }
}
