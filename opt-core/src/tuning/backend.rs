//! [`Taped`] as a [`Backend`], so that the decoder runs on it unchanged.

use super::{
    tape::{Taped, Var},
    weights::{LinearParts, LinearSource, NormParts, TableParts, Weight},
};
use ndarray::{Array2, ArrayView2, Axis};
use opt_backend::{
    Attend, Backend, CacheLayer, CacheSpec, Counters, DType, HostLinear, HostMatrix, HostNorm, HostVector,
    Info, NormParams, Readback, Result, Then, Train, quant::Quantized,
};
use std::{ops::Range, sync::Arc};

impl<B: Train> Backend for Taped<B> {
    type Tensor = Var<B>;
    type Linear = Arc<LinearParts<B>>;
    type Norm = Arc<NormParts<B>>;
    type Table = Arc<TableParts<B>>;
    type Cache = B::Cache;

    fn info(&self) -> Info {
        self.backend.info()
    }

    fn counters(&self) -> &Counters {
        self.backend.counters()
    }

    fn shape(&self, x: &Var<B>) -> [usize; 2] {
        self.backend.shape(&x.value)
    }

    fn upload(&self, x: ArrayView2<'_, f32>) -> Result<Var<B>> {
        Ok(Var::constant(self.backend.upload(x)?))
    }

    fn read<'a>(&'a self, x: &Var<B>) -> Readback<'a, Array2<f32>> {
        self.backend.read(&x.value)
    }

    fn new_linear(
        &self,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<Self::Linear> {
        self.take_linear(LinearSource::Plain(weight), bias, dtype)
    }

    fn new_quantized_linear(&self, weight: &Quantized, bias: Option<HostVector<'_>>) -> Result<Self::Linear> {
        self.take_linear(LinearSource::Quantized(weight), bias, DType::F32)
    }

    fn new_quantized_table(&self, rows: &Quantized) -> Result<Self::Table> {
        self.take_table(LinearSource::Quantized(rows), DType::F32)
    }

    fn read_linear<'a>(&'a self, linear: &Self::Linear) -> Readback<'a, HostLinear> {
        match &linear.weight {
            Weight::Frozen(linear) => self.backend.read_linear(linear),
            Weight::Trained(id) => {
                let read = || {
                    let weight = self.backend.block_on(self.backend.read(&*self.param(*id)?))?;
                    Ok(HostLinear { weight, bias: None })
                };
                opt_backend::ready(read())
            }
        }
    }

    fn new_norm(&self, params: NormParams<'_>) -> Result<Self::Norm> {
        self.take_norm(params)
    }

    fn read_norm<'a>(&'a self, norm: &Self::Norm) -> Readback<'a, HostNorm> {
        match &**norm {
            NormParts::Frozen(norm) => self.backend.read_norm(norm),
            NormParts::Trained(parts, eps) => {
                let read = || {
                    let [weight, bias] =
                        [self.vector(&parts[0])?, self.vector(&parts[1])?].map(|v| self.backend.read(&v));
                    let vector = |v: Array2<f32>| v.index_axis_move(Axis(0), 0);
                    let weight = vector(self.backend.block_on(weight)?);
                    let bias = vector(self.backend.block_on(bias)?);
                    Ok(HostNorm { eps: *eps, width: weight.len(), weight: Some(weight), bias: Some(bias) })
                };
                opt_backend::ready(read())
            }
        }
    }

    fn new_table(&self, rows: HostMatrix<'_>, dtype: DType) -> Result<Self::Table> {
        self.take_table(LinearSource::Plain(rows), dtype)
    }

    fn table_shape(&self, table: &Self::Table) -> [usize; 2] {
        match &table.rows {
            Weight::Frozen(table) => self.backend.table_shape(table),
            Weight::Trained(id) => self.param(*id).map_or([0, 0], |rows| self.backend.shape(&rows)),
        }
    }

    fn read_table<'a>(&'a self, table: &Self::Table, rows: Range<usize>) -> Readback<'a, Array2<f32>> {
        match &table.rows {
            Weight::Frozen(table) => self.backend.read_table(table, rows),
            Weight::Trained(id) => {
                let rows: Vec<usize> = rows.collect();
                let read = || {
                    let rows = self.backend.take_rows(&*self.param(*id)?, &rows)?;
                    self.backend.block_on(self.backend.read_owned(rows))
                };
                opt_backend::ready(read())
            }
        }
    }

    fn new_cache(&self, spec: CacheSpec) -> Result<Self::Cache> {
        self.backend.new_cache(spec)
    }

    fn cache_len(&self, cache: &Self::Cache, layer: usize) -> usize {
        self.backend.cache_len(cache, layer)
    }

    fn cache_append(
        &self,
        cache: &mut Self::Cache,
        layer: usize,
        keys: &Var<B>,
        values: &Var<B>,
        rows: Range<usize>,
    ) -> Result<()> {
        self.backend.cache_append(cache, layer, &keys.value, &values.value, rows)
    }

    fn cache_read<'a>(&'a self, cache: &Self::Cache, layer: usize) -> Readback<'a, CacheLayer> {
        self.backend.cache_read(cache, layer)
    }

    fn cache_truncate(&self, cache: &mut Self::Cache, len: usize) -> Result<()> {
        self.backend.cache_truncate(cache, len)
    }

    fn cache_fork(&self, cache: &Self::Cache) -> Result<Self::Cache> {
        self.backend.cache_fork(cache)
    }

    fn gather(&self, table: &Self::Table, ids: &[u32]) -> Result<Var<B>> {
        self.wired_gather(table, ids, self.plan.padding)
    }

    fn add_gathered(&self, x: Var<B>, table: &Self::Table, ids: &[u32]) -> Result<Var<B>> {
        let rows = self.wired_gather(table, ids, None)?;
        self.wired_add(x, &rows)
    }

    fn layer_norm(&self, x: &Var<B>, norm: &Self::Norm) -> Result<Var<B>> {
        self.wired_layer_norm(x, norm)
    }

    fn linear(&self, x: &Var<B>, linear: &Self::Linear, then: Then<Var<B>>) -> Result<Var<B>> {
        self.wired_linear(x, linear, then)
    }

    fn qkv(&self, x: &Var<B>, q: &Self::Linear, k: &Self::Linear, v: &Self::Linear) -> Result<[Var<B>; 3]> {
        Ok([
            self.wired_linear(x, q, Then::Nothing)?,
            self.wired_linear(x, k, Then::Nothing)?,
            self.wired_linear(x, v, Then::Nothing)?,
        ])
    }

    fn add(&self, x: Var<B>, y: &Var<B>) -> Result<Var<B>> {
        self.wired_add(x, y)
    }

    fn attend(
        &self,
        q: Var<B>,
        k: Var<B>,
        v: Var<B>,
        attend: Attend<'_>,
        caches: Option<&mut [&mut Self::Cache]>,
    ) -> Result<Var<B>> {
        match caches {
            None => self.wired_attend(q, k, v, attend),
            Some(caches) => {
                let [q, k, v] = [self.owned(q)?, self.owned(k)?, self.owned(v)?];
                Ok(Var::constant(self.backend.attend(q, k, v, attend, Some(caches))?))
            }
        }
    }

    fn take_rows(&self, x: &Var<B>, rows: &[usize]) -> Result<Var<B>> {
        self.wired_take_rows(x, rows.to_vec())
    }

    fn logits(&self, x: &Var<B>, head: &Self::Table) -> Result<Var<B>> {
        self.wired_logits(x, head)
    }
}
