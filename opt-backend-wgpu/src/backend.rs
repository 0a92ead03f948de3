//! [`Backend`] for [`Wgpu`].

use crate::{
    Wgpu, attention,
    cache::{Cache, Store},
    fault::lock,
    readback::Pending,
    tensor::{Tensor, quads},
    weights::{Bias, Linear, Matrix, Norm, Parameters, Table},
};
use opt_backend::{
    Attend, Backend, CacheDType, CacheLayer, CacheSpec, Counters, DType, HostLinear, HostMatrix, HostNorm,
    HostVector, Info, MaybeSend, NormParams, Readback, Result, TargetScore, Then, TopK, check,
    ndarray::{Array2, ArrayView2},
    quant::Quantized,
    ready,
};
use std::ops::Range;

/// A readback that has begun, or what kept it from beginning.
fn begun<'a, T: MaybeSend + 'a>(
    future: Result<impl Future<Output = Result<T>> + MaybeSend + 'a>,
) -> Readback<'a, T> {
    match future {
        Ok(future) => Box::pin(future),
        Err(error) => ready(Err(error)),
    }
}

/// Host memory made of the bytes that arrive.
fn made_of<'a, T: MaybeSend + 'a>(
    pending: Result<Pending>,
    make: impl FnOnce(&[u8]) -> Result<T> + MaybeSend + 'a,
) -> Readback<'a, T> {
    begun(pending.map(|pending| async move { make(&pending.await?) }))
}

impl Backend for Wgpu {
    type Tensor = Tensor;
    type Linear = Linear;
    type Norm = Norm;
    type Table = Table;
    type Cache = Cache;

    fn info(&self) -> Info {
        self.describe()
    }

    fn counters(&self) -> &Counters {
        &self.gpu.counters
    }

    fn shape(&self, x: &Tensor) -> [usize; 2] {
        x.shape()
    }

    fn upload(&self, x: ArrayView2<'_, f32>) -> Result<Tensor> {
        self.gpu.counters.upload(size_of::<f32>() * x.len());
        Tensor::upload(&self.gpu, "upload", x)
    }

    fn read<'a>(&'a self, x: &Tensor) -> Readback<'a, Array2<f32>> {
        let shape = x.shape();
        self.gpu.counters.read(size_of::<f32>() * shape[0] * shape[1]);
        made_of(self.gpu.read("read", &x.slices()), move |bytes| Tensor::decode("read", shape, bytes))
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn block_on<T: MaybeSend>(&self, readback: Readback<'_, T>) -> Result<T> {
        // Polls from here, so that the future finds its bytes and needs no thread to wait for them. If another thread
        // polls just now and has the callback in hand, the future is pending still and waits as any other does.
        self.gpu.wait();
        opt_backend::block_on(readback)
    }

    fn new_linear(
        &self,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<Linear> {
        let op = "new_linear";
        if let Some(bias) = &bias {
            check::length(op, "bias", bias.len(), weight.shape()[0])?;
        }
        // The bias is held like the weight; the copy is for reading it back.
        let bias = bias.map(|bias| bias.to_f32().mapv_into(|v| dtype.round(v)));
        Ok(Linear {
            weight: Matrix::new(&self.gpu, op, weight, bias.as_ref(), dtype)?,
            bias: bias.map(Bias::Host),
        })
    }

    fn new_quantized_linear(&self, weight: &Quantized, bias: Option<HostVector<'_>>) -> Result<Linear> {
        let op = "new_quantized_linear";
        if let Some(bias) = &bias {
            check::length(op, "bias", bias.len(), weight.shape()[0])?;
        }
        let bias = bias.map(|bias| bias.to_f32());
        Ok(Linear {
            weight: Matrix::packed(&self.gpu, op, weight, bias.as_ref(), false)?,
            bias: bias.map(Bias::Host),
        })
    }

    fn new_quantized_table(&self, rows: &Quantized) -> Result<Table> {
        Ok(Table(Matrix::packed(&self.gpu, "new_quantized_table", rows, None, true)?))
    }

    fn read_linear<'a>(&'a self, linear: &Linear) -> Readback<'a, HostLinear> {
        let op = "read_linear";
        let (mut slices, decode) = linear.weight.rows(op, &(0..linear.weight.shape[0]));
        let of_weight: u64 = slices.iter().map(|slice| slice.size).sum();
        let (host, device) = match &linear.bias {
            Some(Bias::Host(bias)) => (Some(bias.clone()), None),
            Some(Bias::Device(bias, dtype)) => {
                slices.extend(bias.slices());
                (None, Some((bias.shape(), *dtype)))
            }
            None => (None, None),
        };
        made_of(self.gpu.read(op, &slices), move |bytes| {
            let (weight, rest) = bytes.split_at((of_weight as usize).min(bytes.len()));
            let bias = match device {
                Some((shape, dtype)) => {
                    let bias = Tensor::decode(op, shape, rest)?;
                    Some(bias.into_iter().map(|v| dtype.round(v)).collect())
                }
                None => host,
            };
            Ok(HostLinear { weight: decode(weight)?, bias })
        })
    }

    fn new_norm(&self, params: NormParams<'_>) -> Result<Norm> {
        for (what, vector) in [("weight", &params.weight), ("bias", &params.bias)] {
            if let Some(vector) = vector {
                check::length("new_norm", what, vector.len(), params.width)?;
            }
        }
        Norm::new(&self.gpu, params)
    }

    fn read_norm<'a>(&'a self, norm: &Norm) -> Readback<'a, HostNorm> {
        let (width, eps) = (norm.width, norm.eps);
        match &norm.parameters {
            Parameters::Host { weight, bias } => {
                ready(Ok(HostNorm { width, eps, weight: weight.clone(), bias: bias.clone() }))
            }
            Parameters::Device => {
                let op = "read_norm";
                let bytes = norm.buffer.slice(0, 32 * quads(width) as u64);
                made_of(self.gpu.read(op, &[bytes]), move |bytes| {
                    let both = Tensor::decode(op, [2, width], bytes)?;
                    let row = |row| (row < both.nrows()).then(|| both.row(row).to_owned());
                    Ok(HostNorm { width, eps, weight: row(0), bias: row(1) })
                })
            }
        }
    }

    fn new_table(&self, rows: HostMatrix<'_>, dtype: DType) -> Result<Table> {
        Ok(Table(Matrix::new(&self.gpu, "new_table", rows, None, dtype)?))
    }

    fn table_shape(&self, table: &Table) -> [usize; 2] {
        table.0.shape
    }

    fn read_table<'a>(&'a self, table: &Table, rows: Range<usize>) -> Readback<'a, Array2<f32>> {
        let op = "read_table";
        if let Err(error) = check::range(op, &rows, table.0.shape[0]) {
            return ready(Err(error));
        }
        let (slices, decode) = table.0.rows(op, &rows);
        made_of(self.gpu.read(op, &slices), decode)
    }

    fn new_cache(&self, spec: CacheSpec) -> Result<Cache> {
        self.gpu.fault.check("new_cache")?;
        Ok(Cache::new(self.stores.get(&self.gpu, Cache::shape(&self.gpu, spec)?)))
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
        self.gpu.append(cache, layer, keys, values, rows)
    }

    fn cache_read<'a>(&'a self, cache: &Cache, layer: usize) -> Readback<'a, CacheLayer> {
        let op = "cache_read";
        let shape = cache.store.shape;
        let (Some(pages), Some(slabs)) = (cache.layers.get(layer), cache.store.layers.get(layer)) else {
            return ready(check::layer(op, layer, cache.layers.len()).and_then(|()| attention::missing(op)));
        };
        let len = pages.len;
        self.gpu.counters.read(2 * size_of::<f32>() * len * shape.width());
        let buffer = lock(slabs).buffer(pages.slab);
        let pending = match &buffer {
            Some(buffer) => {
                let slices: Vec<_> = pages.pages.iter().map(|&page| cache.page_slice(buffer, page)).collect();
                self.gpu.read(op, &slices)
            }
            None => self.gpu.read(op, &[]),
        };
        made_of(pending, move |bytes| Ok(Store::decode(shape, len, bytes)))
    }

    fn cache_truncate(&self, cache: &mut Cache, len: usize) -> Result<()> {
        cache.truncate(len);
        Ok(())
    }

    fn cache_fork(&self, cache: &Cache) -> Result<Cache> {
        self.gpu.fault.check("cache_fork")?;
        Ok(cache.fork())
    }

    fn gather(&self, table: &Table, ids: &[u32]) -> Result<Tensor> {
        self.gpu.gather("gather", &table.0, ids, None)
    }

    fn add_gathered(&self, x: Tensor, table: &Table, ids: &[u32]) -> Result<Tensor> {
        self.gpu.gather("add_gathered", &table.0, ids, Some(&x))
    }

    fn layer_norm(&self, x: &Tensor, norm: &Norm) -> Result<Tensor> {
        self.gpu.layer_norm(x, norm)
    }

    fn linear(&self, x: &Tensor, linear: &Linear, then: Then<Tensor>) -> Result<Tensor> {
        self.gpu.linear(x, linear, then)
    }

    fn qkv(&self, x: &Tensor, q: &Linear, k: &Linear, v: &Linear) -> Result<[Tensor; 3]> {
        self.gpu.qkv(x, [q, k, v])
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        self.gpu.add(&x, y)
    }

    fn attend(
        &self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attend: Attend<'_>,
        caches: Option<&mut [&mut Cache]>,
    ) -> Result<Tensor> {
        if let Some(caches) = caches {
            return self.gpu.attend([&q, &k, &v], attend, caches);
        }
        check::spans("attend", attend, q.shape())?;
        let head_dim = q.width() / attend.heads.max(1);
        let dtype = CacheDType::F32;
        let spec = CacheSpec { layers: 1, heads: attend.heads, head_dim, dtype, capacity_hint: 0 };
        let shape = Cache::shape(&self.gpu, spec)?;
        let mut caches: Vec<Cache> =
            attend.spans.iter().map(|_| Cache::new(self.stores.get(&self.gpu, shape))).collect();
        let mut caches: Vec<&mut Cache> = caches.iter_mut().collect();
        self.gpu.attend([&q, &k, &v], Attend { layer: 0, ..attend }, &mut caches)
    }

    fn take_rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        self.gpu.take_rows(x, rows)
    }

    fn logits(&self, x: &Tensor, head: &Table) -> Result<Tensor> {
        self.gpu.logits("logits", x, &head.0)
    }

    fn log_probs<'a>(&'a self, x: &Tensor, head: &Table, targets: &[u32]) -> Readback<'a, Vec<TargetScore>> {
        self.gpu.counters.read(size_of::<TargetScore>() * targets.len());
        begun(self.gpu.log_probs(x, &head.0, targets))
    }

    fn top_k<'a>(&'a self, logits: &Tensor, k: usize) -> Readback<'a, Vec<TopK>> {
        self.gpu.counters.read(8 * k.min(logits.width()) * logits.rows());
        begun(self.gpu.top_k(logits, k))
    }
}
