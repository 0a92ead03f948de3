//! [`Backend`] for [`Cpu`]: arguments are checked here, once; kernels below may rely on them.

use crate::{
    Cache, Cpu, Norm, attention,
    cache::{Layer, Shape},
    norm, vocab,
};
use opt_backend::{
    Attend, Backend, CacheDType, CacheLayer, CacheSpec, Counters, DType, Error, HostLinear, HostMatrix,
    HostNorm, HostVector, Info, NormParams, Readback, Result, Span, TargetScore, Then, TopK, check,
    ndarray::{Array1, Array2, ArrayView2, Axis},
    quant::Quantized,
    ready,
};
use opt_kernels::{
    Machine,
    memory::{Buffer, Guards, Shared, out_of_memory, reserve},
    output::{After, Product},
    pack::Packed,
    product,
};
use std::{fmt, ops::Range};

/// Logits that [`Backend::log_probs`] holds at a time.
const LOGITS_HELD: usize = 8 << 20;
/// Elements a task of an element-wise op handles.
pub(crate) const ELEMENTS: usize = 1 << 15;

/// Activations `[rows, width]` in row order.
pub struct Tensor {
    pub(crate) data: Buffer,
    pub(crate) shape: [usize; 2],
}

/// Packed weights of a linear and its bias.
pub struct Linear {
    pub(crate) weight: Packed,
    pub(crate) bias: Option<Vec<f32>>,
}

/// A packed table.
pub struct Table(pub(crate) Packed);

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensor").field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape = self.weight.shape();
        f.debug_struct("Linear").field("shape", &shape).field("bias", &self.bias.is_some()).finish()
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("shape", &self.0.shape()).finish_non_exhaustive()
    }
}

impl Tensor {
    /// A tensor whose elements `write` has all written through the pointer it is given.
    ///
    /// # Safety
    /// If `write` succeeds, it has written all `rows * width` elements.
    pub(crate) unsafe fn written(
        guards: &Guards,
        op: &'static str,
        shape: [usize; 2],
        write: impl FnOnce(Shared<f32>) -> Result<()>,
    ) -> Result<Self> {
        let len = shape[0].checked_mul(shape[1]);
        let len = len.ok_or_else(|| out_of_memory(op, usize::MAX))?;
        let mut data = Buffer::reserve(guards, op, len)?;
        write(data.target())?;
        // SAFETY: the caller's promise.
        unsafe { data.written() };
        Ok(Self { data, shape })
    }

    fn host(data: Vec<f32>, shape: [usize; 2], op: &'static str) -> Result<Array2<f32>> {
        Array2::from_shape_vec(shape, data).map_err(|e| Error::shape(op, e))
    }
}

impl Cpu {
    pub(crate) fn machine(&self) -> Machine<'_> {
        Machine { pool: &self.pool, guards: &self.guards, level: self.level, compute: self.compute }
    }

    /// Several products of one input.
    fn products<const N: usize>(
        &self,
        op: &'static str,
        x: &Tensor,
        weights: [(&Packed, Option<&[f32]>, After<'_>); N],
    ) -> Result<[Tensor; N]> {
        let [rows, depth] = x.shape;
        let mut outs = Vec::with_capacity(N);
        let mut products = Vec::with_capacity(N);
        for (weight, bias, after) in weights {
            let [outputs, expected] = weight.shape();
            check::width(op, depth, expected)?;
            let len = rows.checked_mul(outputs);
            let len = len.ok_or_else(|| out_of_memory(op, usize::MAX))?;
            let mut data = Buffer::reserve(&self.guards, op, len)?;
            products.push(Product { weights: weight, bias, after, out: data.target() });
            outs.push(Tensor { data, shape: [rows, outputs] });
        }
        // SAFETY: depths are checked here, bias when the linear was made, the residual by `linear`; each output has
        // room for its elements, and this function owns it.
        unsafe { product::multiply(self.machine(), &x.data, x.shape, &products)? };
        for out in &mut outs {
            // SAFETY: `multiply` has written every element.
            unsafe { out.data.written() };
        }
        outs.try_into().map_err(|_| Error::shape(op, "outputs went missing"))
    }

    /// Runs `body` on ranges that cover `0..len`.
    pub(crate) fn for_ranges(
        &self,
        len: usize,
        share: usize,
        body: impl Fn(Range<usize>) + Sync,
    ) -> Result<()> {
        let share = share.max(1);
        self.pool.run(len.div_ceil(share), &|i| body(i * share..len.min((i + 1) * share)))
    }

    fn append(
        &self,
        op: &'static str,
        cache: &mut Cache,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        rows: Range<usize>,
    ) -> Result<()> {
        cache.check(op, layer, keys.shape[1])?;
        check::width(op, values.shape[1], keys.shape[1])?;
        if rows.start > rows.end || rows.end > keys.shape[0].min(values.shape[0]) {
            let found = format_args!(
                "expected rows within {} keys and {} values, found {rows:?}",
                keys.shape[0], values.shape[0]
            );
            return Err(Error::shape(op, found));
        }
        let shape = cache.shape;
        match cache.layers.get_mut(layer) {
            Some(layer) => layer.append(shape, &keys.data, &values.data, rows),
            None => Ok(()),
        }
    }

    /// Copies `ids.len()` entries of a table through `write(row, entry as f32)`.
    fn entries(&self, table: &Table, ids: &[u32], write: impl Fn(usize, &[f32]) + Sync) -> Result<()> {
        let width = table.0.shape()[1];
        self.for_ranges(ids.len(), 4096 / width.max(1), |rows| {
            let mut entry = vec![0.0; width];
            for row in rows {
                table.0.read_row(ids[row] as usize, &mut entry);
                write(row, &entry);
            }
        })
    }
}

fn vector(v: Option<HostVector<'_>>) -> Option<Vec<f32>> {
    v.map(|v| v.to_f32().to_vec())
}

fn expect_len(op: &'static str, what: &str, v: Option<&Vec<f32>>, expected: usize) -> Result<()> {
    match v {
        Some(v) if v.len() != expected => {
            Err(Error::shape(op, format_args!("expected a {what} of {expected} elements, found {}", v.len())))
        }
        _ => Ok(()),
    }
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Linear = Linear;
    type Norm = Norm;
    type Table = Table;
    type Cache = Cache;

    fn info(&self) -> Info {
        let mut info = Info::new("cpu", device_name());
        info.threads = self.threads();
        info.simd = Some(self.level.to_string());
        info.dtypes = vec![DType::F32, DType::F16, DType::BF16];
        info.memory = opt_backend::host_memory();
        info.deterministic = true;
        info.details.push(("quantized weights".to_owned(), format!("multiplied in {}", self.compute)));
        let bf16 = if self.machine().multiplies_bf16() { "bf16" } else { "f32" };
        info.details.push(("bf16 weights".to_owned(), format!("multiplied in {bf16}")));
        info
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn shape(&self, x: &Tensor) -> [usize; 2] {
        x.shape
    }

    fn upload(&self, x: ArrayView2<'_, f32>) -> Result<Tensor> {
        self.counters.upload(size_of::<f32>() * x.len());
        let mut data = reserve("upload", x.len())?;
        match x.as_slice() {
            Some(x) => data.extend_from_slice(x),
            None => data.extend(x.iter()),
        }
        let data = Buffer::holding(&self.guards, "upload", data)?;
        Ok(Tensor { data, shape: x.dim().into() })
    }

    fn read<'a>(&'a self, x: &Tensor) -> Readback<'a, Array2<f32>> {
        self.counters.read(size_of::<f32>() * x.data.len());
        let copy = reserve("read", x.data.len()).and_then(|mut copy| {
            copy.extend_from_slice(&x.data);
            Tensor::host(copy, x.shape, "read")
        });
        ready(copy)
    }

    fn read_owned(&self, x: Tensor) -> Readback<'_, Array2<f32>> {
        self.counters.read(size_of::<f32>() * x.data.len());
        ready(Tensor::host(x.data.into_vec(), x.shape, "read"))
    }

    fn new_linear(
        &self,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<Linear> {
        // The bias is rounded like the weight, and kept as f32: it is small, and added in f32.
        let bias = vector(bias).map(|bias| bias.into_iter().map(|b| dtype.round(b)).collect());
        expect_len("new_linear", "bias", bias.as_ref(), weight.shape()[0])?;
        let weight = Packed::new(self.machine(), weight, dtype, "new_linear")?;
        Ok(Linear { weight, bias })
    }

    fn new_quantized_linear(&self, weight: &Quantized, bias: Option<HostVector<'_>>) -> Result<Linear> {
        let bias = vector(bias);
        expect_len("new_linear", "bias", bias.as_ref(), weight.shape()[0])?;
        Ok(Linear { weight: Packed::quantized(self.machine(), weight, "new_linear")?, bias })
    }

    fn new_quantized_table(&self, rows: &Quantized) -> Result<Table> {
        Ok(Table(Packed::quantized(self.machine(), rows, "new_table")?))
    }

    fn read_linear<'a>(&'a self, linear: &Linear) -> Readback<'a, HostLinear> {
        let shape = linear.weight.shape();
        let weight = (|| {
            let mut data = reserve("read_linear", shape[0] * shape[1])?;
            data.resize(shape[0] * shape[1], 0.0);
            let mut weight = Tensor::host(data, shape, "read_linear")?;
            for (j, mut row) in weight.axis_iter_mut(Axis(0)).enumerate() {
                if let Some(row) = row.as_slice_mut() {
                    linear.weight.read_row(j, row);
                }
            }
            Ok(HostLinear { weight, bias: linear.bias.clone().map(Array1::from_vec) })
        })();
        ready(weight)
    }

    fn new_norm(&self, params: NormParams<'_>) -> Result<Norm> {
        let (weight, bias) = (vector(params.weight), vector(params.bias));
        expect_len("new_norm", "weight", weight.as_ref(), params.width)?;
        expect_len("new_norm", "bias", bias.as_ref(), params.width)?;
        Ok(Norm { width: params.width, eps: params.eps, weight, bias })
    }

    fn read_norm<'a>(&'a self, norm: &Norm) -> Readback<'a, HostNorm> {
        ready(Ok(HostNorm {
            eps: norm.eps,
            weight: norm.weight.clone().map(Array1::from_vec),
            bias: norm.bias.clone().map(Array1::from_vec),
            width: norm.width,
        }))
    }

    fn new_table(&self, rows: HostMatrix<'_>, dtype: DType) -> Result<Table> {
        Ok(Table(Packed::new(self.machine(), rows, dtype, "new_table")?))
    }

    fn table_shape(&self, table: &Table) -> [usize; 2] {
        table.0.shape()
    }

    fn read_table<'a>(&'a self, table: &Table, rows: Range<usize>) -> Readback<'a, Array2<f32>> {
        let [entries, width] = table.0.shape();
        let read = || {
            if rows.start > rows.end || rows.end > entries {
                let found = format_args!("expected rows within {entries} entries, found {rows:?}");
                return Err(Error::shape("read_table", found));
            }
            let mut data = reserve("read_table", rows.len() * width)?;
            data.resize(rows.len() * width, 0.0);
            for (row, entry) in rows.clone().zip(data.chunks_exact_mut(width.max(1))) {
                table.0.read_row(row, entry);
            }
            Tensor::host(data, [rows.len(), width], "read_table")
        };
        ready(read())
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
        self.append("cache_append", cache, layer, keys, values, rows)
    }

    fn cache_read<'a>(&'a self, cache: &Cache, layer: usize) -> Readback<'a, CacheLayer> {
        let checked = cache.check("cache_read", layer, cache.shape.width());
        ready(checked.map(|()| cache.layers[layer].read(cache.shape)))
    }

    fn cache_truncate(&self, cache: &mut Cache, len: usize) -> Result<()> {
        cache.truncate(len);
        Ok(())
    }

    fn cache_fork(&self, cache: &Cache) -> Result<Cache> {
        Ok(cache.fork())
    }

    fn gather(&self, table: &Table, ids: &[u32]) -> Result<Tensor> {
        let [entries, width] = table.0.shape();
        check::ids("gather", ids, entries)?;
        let write = |out: Shared<f32>| {
            self.entries(table, ids, |row, entry| {
                // SAFETY: row `row` of the output belongs to this task alone.
                unsafe { out.at(row * width).copy_from_nonoverlapping(entry.as_ptr(), width) };
            })
        };
        // SAFETY: every row is written.
        unsafe { Tensor::written(&self.guards, "gather", [ids.len(), width], write) }
    }

    fn add_gathered(&self, mut x: Tensor, table: &Table, ids: &[u32]) -> Result<Tensor> {
        let [entries, width] = table.0.shape();
        check::ids("add_gathered", ids, entries)?;
        check::same_shape("add_gathered", [ids.len(), width], x.shape)?;
        let target = x.data.target();
        self.entries(table, ids, |row, entry| {
            // SAFETY: row `row` exists and belongs to this task alone.
            let x = unsafe { std::slice::from_raw_parts_mut(target.at(row * width), width) };
            x.iter_mut().zip(entry).for_each(|(x, e)| *x += e);
        })?;
        Ok(x)
    }

    fn layer_norm(&self, x: &Tensor, norm: &Norm) -> Result<Tensor> {
        check::width("layer_norm", x.shape[1], norm.width)?;
        let write = |out| {
            // SAFETY: the output has the input's size.
            unsafe { norm::layer_norm(&self.pool, self.level, &x.data, norm, out) }
        };
        // SAFETY: every row is written.
        unsafe { Tensor::written(&self.guards, "layer_norm", x.shape, write) }
    }

    fn linear(&self, x: &Tensor, linear: &Linear, then: Then<Tensor>) -> Result<Tensor> {
        let shape = [x.shape[0], linear.weight.shape()[0]];
        let after = match &then {
            Then::Nothing => After::Nothing,
            Then::Activate(activation) => After::Activate(*activation),
            Then::Add(residual) if residual.shape == shape => After::Add(&residual.data),
            Then::Add(residual) => {
                let found = format_args!("expected equal shapes, found {:?} and {shape:?}", residual.shape);
                return Err(Error::shape("linear", found));
            }
            other => {
                let message = format_args!("this backend does not know {other:?}");
                return Err(Error::new(opt_backend::ErrorKind::Unsupported, "linear", message));
            }
        };
        let [y] = self.products("linear", x, [(&linear.weight, linear.bias.as_deref(), after)])?;
        Ok(y)
    }

    fn qkv(&self, x: &Tensor, q: &Linear, k: &Linear, v: &Linear) -> Result<[Tensor; 3]> {
        self.products("qkv", x, [q, k, v].map(|l| (&l.weight, l.bias.as_deref(), After::Nothing)))
    }

    fn add(&self, mut x: Tensor, y: &Tensor) -> Result<Tensor> {
        check::same_shape("add", y.shape, x.shape)?;
        let target = x.data.target();
        self.for_ranges(y.data.len(), ELEMENTS, |range| {
            // SAFETY: this range exists and belongs to this task alone.
            let x = unsafe { std::slice::from_raw_parts_mut(target.at(range.start), range.len()) };
            x.iter_mut().zip(&y.data[range]).for_each(|(x, y)| *x += y);
        })?;
        Ok(x)
    }

    fn attend(
        &self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attend: Attend<'_>,
        caches: Option<&mut [&mut Cache]>,
    ) -> Result<Tensor> {
        check::spans("attend", attend, q.shape)?;
        check::same_shape("attend", k.shape, q.shape)?;
        check::same_shape("attend", v.shape, q.shape)?;
        let [rows, width] = q.shape;
        let head_dim = width / attend.heads;
        let shape = Shape { heads: attend.heads, head_dim, dtype: CacheDType::F32 };
        let mut own = Vec::new();
        let mut sequences: Vec<(Span, Shape, &Layer)> = Vec::with_capacity(attend.spans.len());
        match caches {
            Some(caches) => {
                check::caches(attend, caches.len())?;
                // All checks come before the first append: a call that is refused leaves every cache as it was.
                for cache in caches.iter() {
                    cache.check("attend", attend.layer, width)?;
                    check::heads("attend", attend, cache.shape.heads)?;
                }
                Cache::for_each(&self.pool, caches, |i, cache| {
                    self.append("attend", cache, attend.layer, &k, &v, attend.spans[i].rows())
                })?;
                for (span, cache) in attend.spans.iter().zip(caches.iter()) {
                    sequences.push((*span, cache.shape, &cache.layers[attend.layer]));
                }
            }
            None => {
                for span in attend.spans {
                    let mut layer = Layer::default();
                    layer.append(shape, &k.data, &v.data, span.rows())?;
                    own.push(layer);
                }
                for (span, layer) in attend.spans.iter().zip(&own) {
                    sequences.push((*span, shape, layer));
                }
            }
        }
        let apart = attend.spans.windows(2).all(|pair| pair[0].rows().end <= pair[1].start);
        let covered: usize = attend.spans.iter().map(|span| span.len).sum();
        let write = |out: Shared<f32>| {
            if !apart || covered < rows {
                // Rows of no span are zeros.
                // SAFETY: the output has this size.
                unsafe { out.at(0).write_bytes(0, rows * width) };
            }
            // Spans that may overlap write one after the other.
            for sequences in sequences.chunks(if apart { sequences.len().max(1) } else { 1 }) {
                // SAFETY: sizes are checked above, and the output is ours.
                unsafe { attention::attend(&self.pool, self.level, &q.data, sequences, out)? };
            }
            Ok(())
        };
        // SAFETY: spans cover all rows or the rest is zeroed.
        unsafe { Tensor::written(&self.guards, "attend", q.shape, write) }
    }

    fn take_rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        let [available, width] = x.shape;
        check::rows("take_rows", rows, available)?;
        let len = rows.len().saturating_mul(width);
        let mut data = reserve("take_rows", len)?;
        for &row in rows {
            data.extend_from_slice(&x.data[row * width..(row + 1) * width]);
        }
        let data = Buffer::holding(&self.guards, "take_rows", data)?;
        Ok(Tensor { data, shape: [rows.len(), width] })
    }

    fn logits(&self, x: &Tensor, head: &Table) -> Result<Tensor> {
        let [logits] = self.products("logits", x, [(&head.0, None, After::Nothing)])?;
        Ok(logits)
    }

    fn log_probs<'a>(&'a self, x: &Tensor, head: &Table, targets: &[u32]) -> Readback<'a, Vec<TargetScore>> {
        let compute = || {
            let [entries, width] = head.0.shape();
            check::ids("log_probs", targets, entries)?;
            check::width("log_probs", x.shape[1], width)?;
            check::targets("log_probs", targets, x.shape[0])?;
            let share = (LOGITS_HELD / entries.max(1)).clamp(1, targets.len().max(1));
            let mut logits = Buffer::reserve(&self.guards, "log_probs", share * entries)?;
            let mut scores = Vec::with_capacity(targets.len());
            for (i, targets) in targets.chunks(share).enumerate() {
                let rows = &x.data[i * share * width..][..targets.len() * width];
                let product =
                    Product { weights: &head.0, bias: None, after: After::Nothing, out: logits.target() };
                let shape = [targets.len(), width];
                // SAFETY: the width is checked, and there is room for this many logits. The first chunk is the
                // largest, so with it all are written.
                unsafe {
                    product::multiply(self.machine(), rows, shape, &[product])?;
                    logits.written();
                }
                let logits = &logits[..targets.len() * entries];
                scores.extend(vocab::target_scores(&self.pool, self.level, logits, entries, targets)?);
            }
            Ok(scores)
        };
        ready(compute())
    }

    fn top_k<'a>(&'a self, logits: &Tensor, k: usize) -> Readback<'a, Vec<TopK>> {
        ready(vocab::top_k(&self.pool, self.level, &logits.data, logits.shape, k))
    }
}

/// The processor's name for itself.
fn device_name() -> String {
    brand().filter(|name| !name.is_empty()).unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// The brand string of leaves 0x8000_0002 to 4.
#[cfg(target_arch = "x86_64")]
fn brand() -> Option<String> {
    use std::arch::x86_64::__cpuid;
    if __cpuid(0x8000_0000).eax < 0x8000_0004 {
        return None;
    }
    let mut bytes = Vec::with_capacity(48);
    for leaf in 0x8000_0002..=0x8000_0004 {
        let found = __cpuid(leaf);
        for register in [found.eax, found.ebx, found.ecx, found.edx] {
            bytes.extend_from_slice(&register.to_le_bytes());
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    Some(text.trim_matches(['\0', ' ']).split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(not(target_arch = "x86_64"))]
fn brand() -> Option<String> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use opt_backend::conformance::Suite;

    /// A kernel's mistake shows as a fault of the backend, and as a failure of the suite.
    #[test]
    fn a_write_past_a_tensor_is_a_fault() {
        let make = || Cpu::builder().threads(1).guarded(true).build().unwrap();
        let guards = |cpu: &Cpu| match cpu.guard_faults() {
            faults if faults.is_empty() => Ok(()),
            faults => Err(faults.join("; ")),
        };
        let cpu = make();
        let write = |out: Shared<f32>| {
            // SAFETY: six elements belong to the tensor, and guard zones follow.
            (0..=6).for_each(|i| unsafe { *out.at(i) = 1.0 });
            Ok(())
        };
        // SAFETY: all six are written.
        let y = unsafe { Tensor::written(&cpu.guards, "layer_norm", [2, 3], write) }.unwrap();
        assert_eq!(cpu.block_on(cpu.read(&y)).unwrap(), Array2::from_elem((2, 3), 1.0));
        assert_eq!(guards(&cpu), Ok(()));
        drop(y);
        let fault = "layer_norm: a buffer of 24 bytes was written to 0 bytes past the end";
        assert_eq!(guards(&cpu), Err(fault.to_owned()));

        // The first case finds what was done before it, and those after it pass.
        let stray = move || {
            let cpu = make();
            // SAFETY: as above.
            drop(unsafe { Tensor::written(&cpu.guards, "layer_norm", [2, 3], write) });
            cpu
        };
        let report = Suite::new(stray).quick().only(&["add"]).guards(guards).check();
        assert_eq!(report.failures.len(), 1, "{report}");
        assert!(report.failures[0].message.contains(fault), "{report}");
        assert!(report.passed > 0, "{report}");
    }
}
