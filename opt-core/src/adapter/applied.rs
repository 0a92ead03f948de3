//! A backend whose weights may have adapters beside them.
//!
//! Each tensor carries which adapter each of its rows wears, so that rows of one batch may wear different ones and any
//! number of batches may run at once. The low-rank matrices of all adapters of a linear are stacked, A to `[Σr, in]`
//! and B to `[out, Σr]`; of x Aᵀ, `[rows, Σr]`, each row keeps its own adapter's columns. The weight itself stays as
//! it is, packed or not.

use ndarray::{Array2, Array3, ArrayView2};
use opt_backend::{
    Attend, Backend, CacheLayer, CacheSpec, Counters, DType, Error, ErrorKind, HostLinear, HostMatrix,
    HostNorm, HostVector, Info, Layout as Product, MaybeSend, NormParams, Readback, Result, TargetScore,
    Then, TopK, Train, oracle, quant::Quantized,
};
use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

/// An adapter by its place among the loaded ones, from 1; 0 is none.
pub(crate) type Worn = usize;

/// The decorator.
pub(crate) struct Adapted<B: Train> {
    pub(crate) inner: B,
}

/// A tensor and what its rows wear; `None` is nothing.
pub(crate) struct Tensor<B: Train> {
    pub(crate) inner: B::Tensor,
    pub(crate) rows: Option<Arc<RowMap<B>>>,
}

/// What each row of a tensor wears.
pub(crate) struct RowMap<B: Train> {
    of: Vec<Worn>,
    /// What all rows wear, if it is the same.
    uniform: Option<Worn>,
    /// The masks made so far, by the number of the layout.
    masks: Mutex<HashMap<usize, Arc<B::Tensor>>>,
}

impl<B: Train> RowMap<B> {
    /// `None` where no row wears anything.
    pub(crate) fn new(of: Vec<Worn>) -> Option<Arc<Self>> {
        if of.iter().all(|worn| *worn == 0) {
            return None;
        }
        let first = of.first().copied();
        let uniform = first.filter(|first| of.iter().all(|worn| worn == first));
        Some(Arc::new(Self { of, uniform, masks: Mutex::default() }))
    }

    fn take(&self, rows: &[usize]) -> Option<Arc<Self>> {
        Self::new(rows.iter().map(|row| self.of.get(*row).copied().unwrap_or(0)).collect())
    }

    /// `[rows, width]`: 1 in the columns that belong to what a row wears.
    fn mask(&self, inner: &B, layout: &Layout) -> Result<Arc<B::Tensor>> {
        let mut masks = self.masks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mask) = masks.get(&layout.number) {
            return Ok(Arc::clone(mask));
        }
        let mut mask = Array2::zeros((self.of.len(), layout.width));
        for (mut row, worn) in mask.outer_iter_mut().zip(&self.of) {
            let ones =
                layout.columns.iter().find(|(owner, _)| owner == worn).map(|(_, columns)| columns.clone());
            row.iter_mut().enumerate().for_each(|(column, value)| {
                *value = f32::from(u8::from(ones.as_ref().is_some_and(|ones| ones.contains(&column))));
            });
        }
        let mask = Arc::new(inner.upload(mask.view())?);
        masks.insert(layout.number, Arc::clone(&mask));
        Ok(mask)
    }
}

/// Whose the columns of stacked low-rank matrices are.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Layouts of different content have different numbers.
    pub(crate) number: usize,
    pub(crate) columns: Vec<(Worn, Range<usize>)>,
    pub(crate) width: usize,
}

/// What adapters add to the result of one weight.
pub(crate) struct Side<B: Train> {
    pub(crate) low_rank: Option<LowRank<B>>,
    /// What the result is multiplied by, `[1 + adapters, out]`.
    pub(crate) gains: Option<B::Tensor>,
    /// What is then added, likewise.
    pub(crate) offsets: Option<B::Tensor>,
}

/// Stacked low-rank matrices.
pub(crate) struct LowRank<B: Train> {
    pub(crate) layout: Arc<Layout>,
    pub(crate) a: Down<B>,
    /// `[out, Σr]`, scaled.
    pub(crate) b: B::Tensor,
}

/// What leads into the low rank.
pub(crate) enum Down<B: Train> {
    /// `[Σr, in]`.
    Matrix(B::Tensor),
    /// For token ids, `[entries, Σr]`.
    Table(B::Table),
}

/// A weight of the model, and those that adapters have in its place.
pub(crate) struct Variants<W> {
    pub(crate) base: W,
    pub(crate) own: Vec<(Worn, W)>,
}

impl<W> From<W> for Variants<W> {
    fn from(base: W) -> Self {
        Self { base, own: Vec::new() }
    }
}

impl<W> Variants<W> {
    fn of(&self, worn: Worn) -> &W {
        self.own.iter().find(|(owner, _)| *owner == worn).map_or(&self.base, |(_, own)| own)
    }
}

pub(crate) struct Linear<B: Train> {
    pub(crate) weights: Variants<B::Linear>,
    pub(crate) side: Option<Side<B>>,
}

pub(crate) struct Table<B: Train> {
    /// As embedding.
    pub(crate) rows: Variants<B::Table>,
    pub(crate) side: Option<Side<B>>,
    /// As LM head, in place of the table's own.
    pub(crate) heads: Vec<(Worn, B::Table)>,
    pub(crate) head_side: Option<Side<B>>,
}

impl<B: Train> Table<B> {
    fn head(&self, worn: Worn) -> &B::Table {
        self.heads.iter().find(|(owner, _)| *owner == worn).map_or(&self.rows.base, |(_, own)| own)
    }
}

/// What a low-rank term reads.
enum Input<'a, B: Train> {
    Rows(&'a B::Tensor),
    Ids(&'a [u32]),
}

impl<B: Train> Adapted<B> {
    fn plain(&self, inner: B::Tensor) -> Tensor<B> {
        Tensor { inner, rows: None }
    }

    /// `weights` `[vectors, rows]` times states, on the device.
    pub(crate) fn pool(&self, weights: ArrayView2<'_, f32>, states: &Tensor<B>) -> Result<Tensor<B>> {
        crate::engine::pool(&self.inner, weights, &states.inner).map(|pooled| self.plain(pooled))
    }

    /// Runs `run` for each kind of row by itself: with what the rows wear, and which they are (`None`: all). `kind`
    /// says which of the worn adapters are treated alike.
    fn grouped(
        &self,
        rows: Option<&RowMap<B>>,
        kind: impl Fn(Worn) -> Worn,
        mut run: impl FnMut(Worn, Option<&[usize]>) -> Result<B::Tensor>,
    ) -> Result<B::Tensor> {
        let Some(rows) = rows else { return run(0, None) };
        if let Some(worn) = rows.uniform {
            return run(kind(worn), None);
        }
        let mut groups: Vec<(Worn, Vec<usize>)> = Vec::new();
        for (row, worn) in rows.of.iter().enumerate() {
            let worn = kind(*worn);
            match groups.iter_mut().find(|(of, _)| *of == worn) {
                Some((_, members)) => members.push(row),
                None => groups.push((worn, vec![row])),
            }
        }
        if let [(worn, _)] = &groups[..] {
            return run(*worn, None);
        }
        let parts: Vec<B::Tensor> =
            groups.iter().map(|(worn, members)| run(*worn, Some(members))).collect::<Result<_>>()?;
        let all = self.inner.concat(&parts.iter().collect::<Vec<_>>())?;
        let mut order = vec![0; rows.of.len()];
        for (place, row) in groups.iter().flat_map(|(_, members)| members).enumerate() {
            if let Some(from) = order.get_mut(*row) {
                *from = place;
            }
        }
        self.inner.take_rows(&all, &order)
    }

    /// [`Adapted::grouped`] over the rows of a tensor.
    fn grouped_rows<W>(
        &self,
        x: &Tensor<B>,
        own: &[(Worn, W)],
        run: impl Fn(&B::Tensor, Worn) -> Result<B::Tensor>,
    ) -> Result<B::Tensor> {
        let rows = x.rows.as_deref().filter(|_| !own.is_empty());
        self.grouped(rows, owner(own), |worn, members| match members {
            None => run(&x.inner, worn),
            Some(members) => run(&self.inner.take_rows(&x.inner, members)?, worn),
        })
    }

    /// Gives the result `y` of a weight what the rows' adapters add.
    fn aside(
        &self,
        mut y: B::Tensor,
        input: Input<'_, B>,
        side: Option<&Side<B>>,
        rows: Option<&RowMap<B>>,
    ) -> Result<B::Tensor> {
        let (Some(side), Some(rows)) = (side, rows) else { return Ok(y) };
        let inner = &self.inner;
        if let Some(gains) = &side.gains {
            y = match rows.uniform {
                Some(worn) => inner.mul_row(y, &inner.take_rows(gains, &[worn])?)?,
                None => inner.mul(y, &inner.take_rows(gains, &rows.of)?)?,
            };
        }
        if let Some(offsets) = &side.offsets {
            y = match rows.uniform {
                Some(worn) => inner.add_row(y, &inner.take_rows(offsets, &[worn])?)?,
                None => inner.add(y, &inner.take_rows(offsets, &rows.of)?)?,
            };
        }
        let Some(LowRank { layout, a, b }) = &side.low_rank else { return Ok(y) };
        let is_worn = |(owner, _): &(Worn, Range<usize>)| match rows.uniform {
            Some(worn) => worn == *owner,
            None => rows.of.contains(owner),
        };
        if !layout.columns.iter().any(is_worn) {
            return Ok(y);
        }
        let mut low = match (a, input) {
            (Down::Matrix(a), Input::Rows(x)) => {
                inner.matmul(x, a, Product::TimesTransposed, DType::F32, None)?
            }
            (Down::Table(a), Input::Ids(ids)) => inner.gather(a, ids)?,
            _ => return Err(Error::shape("adapter", "a low-rank term does not fit its input")),
        };
        if rows.uniform.is_none() || layout.columns.len() > 1 {
            low = inner.mul(low, &*rows.mask(inner, layout)?)?;
        }
        inner.matmul(&low, b, Product::TimesTransposed, DType::F32, Some(y))
    }

    /// Token embeddings of rows that wear `rows`.
    pub(crate) fn gather_worn(
        &self,
        table: &Table<B>,
        ids: &[u32],
        rows: Option<Arc<RowMap<B>>>,
    ) -> Result<Tensor<B>> {
        let own = &table.rows.own;
        let y = self.grouped(rows.as_deref().filter(|_| !own.is_empty()), owner(own), |worn, members| {
            let table = table.rows.of(worn);
            match members {
                None => self.inner.gather(table, ids),
                Some(members) => {
                    let ids: Vec<u32> = members.iter().filter_map(|row| ids.get(*row).copied()).collect();
                    self.inner.gather(table, &ids)
                }
            }
        })?;
        let inner = self.aside(y, Input::Ids(ids), table.side.as_ref(), rows.as_deref())?;
        Ok(Tensor { inner, rows })
    }
}

/// What `worn` is treated as where only these adapters have something of their own.
fn owner<W>(own: &[(Worn, W)]) -> impl Fn(Worn) -> Worn {
    move |worn| if own.iter().any(|(owner, _)| *owner == worn) { worn } else { 0 }
}

impl<B: Train> Backend for Adapted<B> {
    type Tensor = Tensor<B>;
    type Linear = Linear<B>;
    type Norm = Variants<B::Norm>;
    type Table = Table<B>;
    type Cache = B::Cache;

    fn info(&self) -> Info {
        self.inner.info()
    }

    fn counters(&self) -> &Counters {
        self.inner.counters()
    }

    fn shape(&self, x: &Self::Tensor) -> [usize; 2] {
        self.inner.shape(&x.inner)
    }

    fn upload(&self, x: ArrayView2<'_, f32>) -> Result<Self::Tensor> {
        self.inner.upload(x).map(|x| self.plain(x))
    }

    fn read<'a>(&'a self, x: &Self::Tensor) -> Readback<'a, Array2<f32>> {
        self.inner.read(&x.inner)
    }

    fn read_owned(&self, x: Self::Tensor) -> Readback<'_, Array2<f32>> {
        self.inner.read_owned(x.inner)
    }

    fn block_on<T: MaybeSend>(&self, readback: Readback<'_, T>) -> Result<T> {
        self.inner.block_on(readback)
    }

    fn new_linear(
        &self,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<Self::Linear> {
        Ok(Linear { weights: self.inner.new_linear(weight, bias, dtype)?.into(), side: None })
    }

    fn new_quantized_linear(&self, weight: &Quantized, bias: Option<HostVector<'_>>) -> Result<Self::Linear> {
        Ok(Linear { weights: self.inner.new_quantized_linear(weight, bias)?.into(), side: None })
    }

    fn new_quantized_table(&self, rows: &Quantized) -> Result<Self::Table> {
        self.inner.new_quantized_table(rows).map(table)
    }

    fn read_linear<'a>(&'a self, linear: &Self::Linear) -> Readback<'a, HostLinear> {
        self.inner.read_linear(&linear.weights.base)
    }

    fn new_norm(&self, params: NormParams<'_>) -> Result<Self::Norm> {
        self.inner.new_norm(params).map(Variants::from)
    }

    fn read_norm<'a>(&'a self, norm: &Self::Norm) -> Readback<'a, HostNorm> {
        self.inner.read_norm(&norm.base)
    }

    fn new_table(&self, rows: HostMatrix<'_>, dtype: DType) -> Result<Self::Table> {
        self.inner.new_table(rows, dtype).map(table)
    }

    fn table_shape(&self, table: &Self::Table) -> [usize; 2] {
        self.inner.table_shape(&table.rows.base)
    }

    fn read_table<'a>(&'a self, table: &Self::Table, rows: Range<usize>) -> Readback<'a, Array2<f32>> {
        self.inner.read_table(&table.rows.base, rows)
    }

    fn new_cache(&self, spec: CacheSpec) -> Result<Self::Cache> {
        self.inner.new_cache(spec)
    }

    fn cache_len(&self, cache: &Self::Cache, layer: usize) -> usize {
        self.inner.cache_len(cache, layer)
    }

    fn cache_append(
        &self,
        cache: &mut Self::Cache,
        layer: usize,
        keys: &Self::Tensor,
        values: &Self::Tensor,
        rows: Range<usize>,
    ) -> Result<()> {
        self.inner.cache_append(cache, layer, &keys.inner, &values.inner, rows)
    }

    fn cache_read<'a>(&'a self, cache: &Self::Cache, layer: usize) -> Readback<'a, CacheLayer> {
        self.inner.cache_read(cache, layer)
    }

    fn cache_truncate(&self, cache: &mut Self::Cache, len: usize) -> Result<()> {
        self.inner.cache_truncate(cache, len)
    }

    fn cache_fork(&self, cache: &Self::Cache) -> Result<Self::Cache> {
        self.inner.cache_fork(cache)
    }

    fn cache_seed(
        &self,
        cache: &mut Self::Cache,
        layer: usize,
        keys: ArrayView2<'_, f32>,
        values: ArrayView2<'_, f32>,
    ) -> Result<()> {
        self.inner.cache_seed(cache, layer, keys, values)
    }

    fn gather(&self, table: &Self::Table, ids: &[u32]) -> Result<Self::Tensor> {
        self.gather_worn(table, ids, None)
    }

    fn add_gathered(&self, x: Self::Tensor, table: &Self::Table, ids: &[u32]) -> Result<Self::Tensor> {
        let own = &table.rows.own;
        let inner = match x.rows.as_deref() {
            Some(rows) if !own.is_empty() && rows.of.iter().any(|worn| owner(own)(*worn) != 0) => {
                let rows = self.gather_worn(table, ids, x.rows.clone())?;
                self.inner.add(x.inner, &rows.inner)?
            }
            _ => self.inner.add_gathered(x.inner, &table.rows.base, ids)?,
        };
        Ok(Tensor { inner, rows: x.rows })
    }

    fn layer_norm(&self, x: &Self::Tensor, norm: &Self::Norm) -> Result<Self::Tensor> {
        let inner = self.grouped_rows(x, &norm.own, |x, worn| self.inner.layer_norm(x, norm.of(worn)))?;
        Ok(Tensor { inner, rows: x.rows.clone() })
    }

    fn linear(
        &self,
        x: &Self::Tensor,
        linear: &Self::Linear,
        then: Then<Self::Tensor>,
    ) -> Result<Self::Tensor> {
        let Linear { weights, side } = linear;
        let rows = x.rows.clone();
        let tagged = |inner| Tensor { inner, rows: rows.clone() };
        let then = match then {
            Then::Nothing => Then::Nothing,
            Then::Activate(activation) => Then::Activate(activation),
            Then::Add(residual) => Then::Add(residual.inner),
            _ => return Err(Error::new(ErrorKind::Unsupported, "linear", "not with adapters")),
        };
        if rows.is_none() || side.is_none() && weights.own.is_empty() {
            return self.inner.linear(&x.inner, &weights.base, then).map(tagged);
        }
        let side = side.as_ref();
        let gains = side.is_some_and(|side| side.gains.is_some());
        if let (Then::Add(residual), true, false) = (&then, weights.own.is_empty(), gains) {
            // What is added last may as well be added first.
            let _ = residual;
            let y = self.inner.linear(&x.inner, &weights.base, then)?;
            return self.aside(y, Input::Rows(&x.inner), side, rows.as_deref()).map(tagged);
        }
        let y = self
            .grouped_rows(x, &weights.own, |x, worn| self.inner.linear(x, weights.of(worn), Then::Nothing))?;
        let y = self.aside(y, Input::Rows(&x.inner), side, rows.as_deref())?;
        match then {
            Then::Activate(activation) => self.inner.activate(y, activation),
            Then::Add(residual) => self.inner.add(residual, &y),
            _ => Ok(y),
        }
        .map(tagged)
    }

    fn qkv(
        &self,
        x: &Self::Tensor,
        q: &Self::Linear,
        k: &Self::Linear,
        v: &Self::Linear,
    ) -> Result<[Self::Tensor; 3]> {
        let all = [q, k, v];
        if x.rows.is_some() && all.iter().any(|linear| !linear.weights.own.is_empty()) {
            let one = |linear| self.linear(x, linear, Then::Nothing);
            return Ok([one(q)?, one(k)?, one(v)?]);
        }
        let [q, k, v] = all.map(|linear| &linear.weights.base);
        let results = self.inner.qkv(&x.inner, q, k, v)?;
        let mut done = results.into_iter().zip(all).map(|(y, linear)| {
            let inner = self.aside(y, Input::Rows(&x.inner), linear.side.as_ref(), x.rows.as_deref())?;
            Ok(Tensor { inner, rows: x.rows.clone() })
        });
        let mut next = || done.next().unwrap_or_else(|| Err(Error::shape("qkv", "expected three results")));
        Ok([next()?, next()?, next()?])
    }

    fn add(&self, x: Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor> {
        Ok(Tensor { inner: self.inner.add(x.inner, &y.inner)?, rows: x.rows })
    }

    fn attend(
        &self,
        q: Self::Tensor,
        k: Self::Tensor,
        v: Self::Tensor,
        attend: Attend<'_>,
        caches: Option<&mut [&mut Self::Cache]>,
    ) -> Result<Self::Tensor> {
        Ok(Tensor { inner: self.inner.attend(q.inner, k.inner, v.inner, attend, caches)?, rows: q.rows })
    }

    fn attention_weights<'a>(
        &'a self,
        q: Self::Tensor,
        k: Self::Tensor,
        v: Self::Tensor,
        attend: Attend<'_>,
        caches: Option<&mut [&mut Self::Cache]>,
    ) -> Result<(Self::Tensor, Readback<'a, Vec<Array3<f32>>>)> {
        let (inner, weights) = self.inner.attention_weights(q.inner, k.inner, v.inner, attend, caches)?;
        Ok((Tensor { inner, rows: q.rows }, weights))
    }

    fn take_rows(&self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor> {
        let inner = self.inner.take_rows(&x.inner, rows)?;
        Ok(Tensor { inner, rows: x.rows.as_ref().and_then(|worn| worn.take(rows)) })
    }

    fn logits(&self, x: &Self::Tensor, head: &Self::Table) -> Result<Self::Tensor> {
        let y = self.grouped_rows(x, &head.heads, |x, worn| self.inner.logits(x, head.head(worn)))?;
        let inner = self.aside(y, Input::Rows(&x.inner), head.head_side.as_ref(), x.rows.as_deref())?;
        Ok(Tensor { inner, rows: x.rows.clone() })
    }

    fn log_probs<'a>(
        &'a self,
        x: &Self::Tensor,
        head: &Self::Table,
        targets: &[u32],
    ) -> Readback<'a, Vec<TargetScore>> {
        let is_same = head.head_side.is_none();
        let one = match x.rows.as_deref() {
            None => Some(0),
            Some(_) if is_same && head.heads.is_empty() => Some(0),
            Some(rows) => rows.uniform.filter(|_| is_same),
        };
        if let Some(worn) = one {
            return self.inner.log_probs(&x.inner, head.head(worn), targets);
        }
        // Heads of several adapters: rare enough for the host.
        let logits = match self.logits(x, head) {
            Ok(logits) => self.inner.read_owned(logits.inner),
            Err(error) => return opt_backend::ready(Err(error)),
        };
        let targets = targets.to_vec();
        Box::pin(async move {
            let logits = logits.await?;
            opt_backend::check::targets("log_probs", &targets, logits.nrows())?;
            opt_backend::check::ids("log_probs", &targets, logits.ncols())?;
            Ok(logits.outer_iter().zip(&targets).map(|(row, &t)| oracle::target_score(row, t)).collect())
        })
    }

    fn top_k<'a>(&'a self, logits: &Self::Tensor, k: usize) -> Readback<'a, Vec<TopK>> {
        self.inner.top_k(&logits.inner, k)
    }
}

fn table<B: Train>(base: B::Table) -> Table<B> {
    Table { rows: base.into(), side: None, heads: Vec::new(), head_side: None }
}
