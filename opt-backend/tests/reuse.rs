//! Tests of the suite itself: backends that reuse memory too early must be caught.

use ndarray::{Array2, ArrayView2};
use opt_backend::{
    Backend, CacheLayer, CacheSpec, Counters, DType, HostLinear, HostMatrix, HostNorm, HostVector, Info,
    NormParams, Readback, Reference, ReferenceCache, Result, Then, conformance::Suite,
};
use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// `layer_norm` writes over the operand it was lent.
    InPlace,
    /// `linear` gives out the buffer of its earlier result of the same shape.
    SharedOutput,
    /// `read` looks at the tensor only when it is awaited.
    LateRead,
}

/// [`Reference`] over tensors that can be shared by mistake.
struct Reusing {
    inner: Reference,
    fault: Fault,
    outputs: Mutex<Vec<Tensor>>,
}

#[derive(Clone)]
struct Tensor(Arc<Mutex<Array2<f32>>>);

impl Tensor {
    fn new(x: Array2<f32>) -> Self {
        Self(Arc::new(Mutex::new(x)))
    }

    fn get(&self) -> Array2<f32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, x: Array2<f32>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = x;
    }
}

impl Backend for Reusing {
    type Tensor = Tensor;
    type Linear = HostLinear;
    type Norm = HostNorm;
    type Table = Array2<f32>;
    type Cache = ReferenceCache;

    fn info(&self) -> Info {
        let mut info = self.inner.info();
        // One dtype will do for this.
        info.dtypes = vec![DType::F32];
        info
    }

    fn counters(&self) -> &Counters {
        self.inner.counters()
    }

    fn shape(&self, x: &Tensor) -> [usize; 2] {
        x.get().dim().into()
    }

    fn upload(&self, x: ArrayView2<'_, f32>) -> Result<Tensor> {
        self.inner.upload(x).map(Tensor::new)
    }

    fn read<'a>(&'a self, x: &Tensor) -> Readback<'a, Array2<f32>> {
        if self.fault == Fault::LateRead {
            let x = x.clone();
            return Box::pin(async move { Ok(x.get()) });
        }
        self.inner.read_owned(x.get())
    }

    fn new_linear(
        &self,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<HostLinear> {
        self.inner.new_linear(weight, bias, dtype)
    }

    fn read_linear<'a>(&'a self, linear: &HostLinear) -> Readback<'a, HostLinear> {
        self.inner.read_linear(linear)
    }

    fn new_norm(&self, params: NormParams<'_>) -> Result<HostNorm> {
        self.inner.new_norm(params)
    }

    fn read_norm<'a>(&'a self, norm: &HostNorm) -> Readback<'a, HostNorm> {
        self.inner.read_norm(norm)
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

    fn new_cache(&self, spec: CacheSpec) -> Result<ReferenceCache> {
        self.inner.new_cache(spec)
    }

    fn cache_len(&self, cache: &ReferenceCache, layer: usize) -> usize {
        self.inner.cache_len(cache, layer)
    }

    fn cache_append(
        &self,
        cache: &mut ReferenceCache,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        rows: Range<usize>,
    ) -> Result<()> {
        self.inner.cache_append(cache, layer, &keys.get(), &values.get(), rows)
    }

    fn cache_read<'a>(&'a self, cache: &ReferenceCache, layer: usize) -> Readback<'a, CacheLayer> {
        self.inner.cache_read(cache, layer)
    }

    fn cache_truncate(&self, cache: &mut ReferenceCache, len: usize) -> Result<()> {
        self.inner.cache_truncate(cache, len)
    }

    fn cache_fork(&self, cache: &ReferenceCache) -> Result<ReferenceCache> {
        self.inner.cache_fork(cache)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        // `x` is given away, so this may work in place: unless a read of it is still under way.
        let sum = self.inner.add(x.get(), &y.get())?;
        x.set(sum);
        Ok(x)
    }

    fn layer_norm(&self, x: &Tensor, norm: &HostNorm) -> Result<Tensor> {
        let y = self.inner.layer_norm(&x.get(), norm)?;
        if self.fault == Fault::InPlace {
            x.set(y.clone());
        }
        Ok(Tensor::new(y))
    }

    fn linear(&self, x: &Tensor, linear: &HostLinear, then: Then<Tensor>) -> Result<Tensor> {
        let then = match then {
            Then::Add(residual) => Then::Add(residual.get()),
            Then::Activate(activation) => Then::Activate(activation),
            _ => Then::Nothing,
        };
        let y = self.inner.linear(&x.get(), linear, then)?;
        if self.fault == Fault::SharedOutput {
            let mut outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(output) = outputs.iter().find(|output| output.get().dim() == y.dim()) {
                output.set(y);
                return Ok(output.clone());
            }
            let output = Tensor::new(y);
            outputs.push(output.clone());
            return Ok(output);
        }
        Ok(Tensor::new(y))
    }
}

fn suite(fault: Fault) -> Suite<Reusing> {
    Suite::new(move || Reusing { inner: Reference::new(), fault, outputs: Mutex::default() }).quick()
}

#[test]
fn without_a_fault_it_passes() {
    suite(Fault::None).only(&["kept", "read", "linear", "layer_norm", "add", "qkv"]).run();
}

#[test]
fn memory_reused_too_early_is_caught() {
    for (fault, op, message) in [
        (Fault::InPlace, "kept", "x after layer_norm"),
        (Fault::SharedOutput, "kept", "linear of round 0"),
        (Fault::LateRead, "read", "the first"),
    ] {
        let report = suite(fault).only(&[op]).check();
        assert!(report.failures.iter().any(|failure| failure.message.starts_with(message)), "{op}: {report}");
    }
}
