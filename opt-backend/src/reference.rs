use crate::{
    Backend, CacheDType, CacheLayer, CacheSpec, Counters, DType, HostLinear, HostMatrix, HostNorm,
    HostVector, Info, NormParams, Readback, Result, Train, check, ready,
};
use half::f16;
use ndarray::{Array2, ArrayView2, ArrayViewMut1, Axis, s};
use std::ops::Range;

/// The smallest backend there can be: host arrays, and nothing overridden.
///
/// Every op runs through its default body, so this is what the default bodies mean, and what whole-model tests
/// compare other backends to. It accumulates in f64 and is slow.
///
/// It is also the template for a new backend. Copy this file, put your device's types in place of the arrays, and
/// you have a correct backend; count uploads and reads as it does; then override the ops of [`Backend`] one by one,
/// running the suite (`opt_backend::conformance`, feature `conformance`) after each. What this file does and yours should not:
/// `cache_fork` copies the whole cache, where storage should be shared until one side changes.
///
/// ```
/// use opt_backend::{Backend, DType, HostMatrix, Reference, Then, ndarray::array};
///
/// let backend = Reference::new();
/// let weight = array![[3.0, 4.0], [5.0, -6.0]];
/// let linear = backend.new_linear(HostMatrix::F32(weight.view()), None, DType::F32)?;
/// let x = backend.upload(array![[1.0, 2.0]].view())?;
/// let y = backend.linear(&x, &linear, Then::Nothing)?;
/// assert_eq!(backend.block_on(backend.read(&y))?, array![[11.0, -7.0]]);
/// # Ok::<(), opt_backend::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Reference {
    counters: Counters,
}

/// The cache of [`Reference`]: a pair of host arrays per layer.
#[derive(Debug, Clone)]
pub struct ReferenceCache {
    spec: CacheSpec,
    /// Held as f32, but only values that `spec.dtype` can hold.
    layers: Vec<CacheLayer>,
}

impl Reference {
    /// The backend; there is nothing to set up.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Train for Reference {}

impl Backend for Reference {
    type Tensor = Array2<f32>;
    // Weights held as f16 or bf16 are rounded when they are taken over and kept as f32.
    type Linear = HostLinear;
    type Norm = HostNorm;
    type Table = Array2<f32>;
    type Cache = ReferenceCache;

    fn info(&self) -> Info {
        let mut info = Info::new("reference", "host");
        info.threads = 1;
        info.dtypes = vec![DType::F32, DType::F16, DType::BF16];
        info.deterministic = true;
        info
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn shape(&self, x: &Array2<f32>) -> [usize; 2] {
        x.dim().into()
    }

    fn upload(&self, x: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
        self.counters.upload(x.len() * size_of::<f32>());
        Ok(x.to_owned())
    }

    fn read<'a>(&'a self, x: &Array2<f32>) -> Readback<'a, Array2<f32>> {
        self.read_owned(x.clone())
    }

    fn read_owned(&self, x: Array2<f32>) -> Readback<'_, Array2<f32>> {
        self.counters.read(x.len() * size_of::<f32>());
        ready(Ok(x))
    }

    fn new_linear(
        &self,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<HostLinear> {
        if let Some(bias) = &bias {
            check::length("new_linear", "bias", bias.len(), weight.shape()[0])?;
        }
        Ok(HostLinear {
            weight: weight.to_f32().mapv_into(|v| dtype.round(v)),
            bias: bias.map(|bias| bias.to_f32().mapv_into(|v| dtype.round(v))),
        })
    }

    fn read_linear<'a>(&'a self, linear: &HostLinear) -> Readback<'a, HostLinear> {
        ready(Ok(linear.clone()))
    }

    fn new_norm(&self, params: NormParams<'_>) -> Result<HostNorm> {
        for (what, vector) in [("weight", &params.weight), ("bias", &params.bias)] {
            if let Some(vector) = vector {
                check::length("new_norm", what, vector.len(), params.width)?;
            }
        }
        let [weight, bias] = [params.weight, params.bias].map(|v| v.map(|v| v.to_f32()));
        Ok(HostNorm { eps: params.eps, weight, bias, width: params.width })
    }

    fn read_norm<'a>(&'a self, norm: &HostNorm) -> Readback<'a, HostNorm> {
        ready(Ok(norm.clone()))
    }

    fn new_table(&self, rows: HostMatrix<'_>, dtype: DType) -> Result<Array2<f32>> {
        Ok(rows.to_f32().mapv_into(|v| dtype.round(v)))
    }

    fn table_shape(&self, table: &Array2<f32>) -> [usize; 2] {
        table.dim().into()
    }

    fn read_table<'a>(&'a self, table: &Array2<f32>, rows: Range<usize>) -> Readback<'a, Array2<f32>> {
        let checked = check::range("read_table", &rows, table.nrows());
        ready(checked.map(|()| table.slice(s![rows, ..]).to_owned()))
    }

    fn new_cache(&self, spec: CacheSpec) -> Result<ReferenceCache> {
        let empty = || Array2::zeros((0, spec.heads * spec.head_dim));
        let layers = (0..spec.layers).map(|_| CacheLayer { keys: empty(), values: empty() }).collect();
        Ok(ReferenceCache { spec, layers })
    }

    fn cache_len(&self, cache: &ReferenceCache, layer: usize) -> usize {
        cache.layers.get(layer).map_or(0, |layer| layer.keys.nrows())
    }

    fn cache_append(
        &self,
        cache: &mut ReferenceCache,
        layer: usize,
        keys: &Array2<f32>,
        values: &Array2<f32>,
        rows: Range<usize>,
    ) -> Result<()> {
        let op = "cache_append";
        let spec = cache.spec;
        check::layer(op, layer, spec.layers)?;
        check::same_shape(op, values.dim().into(), keys.dim().into())?;
        check::width(op, keys.ncols(), spec.heads * spec.head_dim)?;
        check::range(op, &rows, keys.nrows())?;
        let held = &mut cache.layers[layer];
        for (held, new) in [(&mut held.keys, keys), (&mut held.values, values)] {
            let new = spec.dtype.round(new.slice(s![rows.clone(), ..]).to_owned(), spec.heads);
            held.append(Axis(0), new.view()).map_err(|error| crate::Error::shape(op, error))?;
        }
        Ok(())
    }

    fn cache_read<'a>(&'a self, cache: &ReferenceCache, layer: usize) -> Readback<'a, CacheLayer> {
        let checked = check::layer("cache_read", layer, cache.layers.len());
        ready(checked.map(|()| cache.layers[layer].clone()))
    }

    fn cache_truncate(&self, cache: &mut ReferenceCache, len: usize) -> Result<()> {
        for layer in &mut cache.layers {
            let len = len.min(layer.keys.nrows());
            for held in [&mut layer.keys, &mut layer.values] {
                *held = held.slice(s![..len, ..]).to_owned();
            }
        }
        Ok(())
    }

    fn cache_fork(&self, cache: &ReferenceCache) -> Result<ReferenceCache> {
        Ok(cache.clone())
    }
}

impl CacheDType {
    /// Rows `[_, heads * head_dim]` as they come back from a cache that holds them in this format.
    ///
    /// Int8 is symmetric: per row and head, scale = max |x| / 127 and x ≈ scale · round(x / scale).
    fn round(self, mut rows: Array2<f32>, heads: usize) -> Array2<f32> {
        match self {
            CacheDType::F32 => {}
            CacheDType::F16 => rows.mapv_inplace(|v| f16::from_f32(v).to_f32()),
            CacheDType::Int8 => {
                let head_dim = (rows.ncols() / heads.max(1)).max(1);
                let quantize = |mut head: ArrayViewMut1<'_, f32>| {
                    let scale = head.iter().fold(0.0f32, |max, v| max.max(v.abs())) / 127.0;
                    if scale > 0.0 {
                        head.mapv_inplace(|v| (v / scale).round().clamp(-127.0, 127.0) * scale);
                    }
                };
                rows.outer_iter_mut()
                    .for_each(|mut row| row.exact_chunks_mut(head_dim).into_iter().for_each(quantize));
            }
        }
        rows
    }
}
