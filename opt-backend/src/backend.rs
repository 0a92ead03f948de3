use crate::{
    Activation, Counters, DType, HostMatrix, HostVector, Info, MaybeSend, MaybeSync, Op, Readback, Result,
    check, oracle, quant::Quantized,
};
use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, s};
use std::ops::Range;

/// The rows `start..start + len` of a batch: the new tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First row.
    pub start: usize,
    /// Number of rows; may be 0.
    pub len: usize,
}

impl Span {
    /// The rows as a range.
    pub fn rows(self) -> Range<usize> {
        self.start..self.start + self.len
    }

    /// Spans that lie end to end, of the given lengths.
    pub fn lay_out(lengths: impl IntoIterator<Item = usize>) -> Vec<Span> {
        let mut start = 0;
        lengths
            .into_iter()
            .map(|len| {
                let span = Span { start, len };
                start += len;
                span
            })
            .collect()
    }
}

/// What [`Backend::linear`] does with its result before handing it out.
#[derive(Debug)]
#[non_exhaustive]
pub enum Then<T> {
    /// Nothing.
    Nothing,
    /// Applies the function to each element.
    Activate(Activation),
    /// Adds a tensor of the result's shape (the residual).
    Add(T),
}

/// The shape of one attention call.
#[derive(Debug, Clone, Copy)]
pub struct Attend<'a> {
    /// Number of heads; the width of queries, keys and values is `heads * head_dim`.
    pub heads: usize,
    /// The layer whose part of the caches is meant.
    pub layer: usize,
    /// Which rows belong to which sequence.
    pub spans: &'a [Span],
}

/// How a [`Backend::Cache`] holds keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum CacheDType {
    /// Single precision.
    #[default]
    F32,
    /// Half precision.
    F16,
    /// One signed byte an element and one f32 scale per position and head, for keys and values each.
    Int8,
}

/// The shape of a KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSpec {
    /// Number of decoder layers.
    pub layers: usize,
    /// Attention heads of each.
    pub heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// How elements are held.
    pub dtype: CacheDType,
    /// Positions the sequence will probably reach; a hint, not a limit.
    pub capacity_hint: usize,
}

/// One layer of a cache in host memory: keys and values, each `[positions, heads * head_dim]`.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheLayer {
    /// Keys, after bias, not scaled.
    pub keys: Array2<f32>,
    /// Values.
    pub values: Array2<f32>,
}

/// A linear's weights in host memory.
#[derive(Debug, Clone, PartialEq)]
pub struct HostLinear {
    /// `[out, in]`.
    pub weight: Array2<f32>,
    /// `[out]`.
    pub bias: Option<Array1<f32>>,
}

/// A LayerNorm's parameters as handed to a backend; absent ones are 1 and 0.
#[derive(Debug, Clone, Copy)]
pub struct NormParams<'a> {
    /// Width of the rows.
    pub width: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Scale, `[width]`.
    pub weight: Option<HostVector<'a>>,
    /// Shift, `[width]`.
    pub bias: Option<HostVector<'a>>,
}

/// A LayerNorm's parameters read back.
#[derive(Debug, Clone, PartialEq)]
pub struct HostNorm {
    /// Added to the variance.
    pub eps: f32,
    /// Scale, `[width]`.
    pub weight: Option<Array1<f32>>,
    /// Shift, `[width]`.
    pub bias: Option<Array1<f32>>,
    /// Width of the rows.
    pub width: usize,
}

/// The log-probability of one target token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TargetScore {
    /// log softmax(logits)\[target\], in nats.
    pub log_prob: f32,
    /// Whether the target is the most probable token (the lowest id among equals).
    pub greedy: bool,
}

/// The k largest logits of one row, largest first, the lower id first among equals.
#[derive(Debug, Clone, PartialEq)]
pub struct TopK {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Their logits.
    pub logits: Vec<f32>,
    /// log Σ exp(logit) over the whole row, so that `logit - log_sum_exp` is a log-probability.
    pub log_sum_exp: f32,
}

/// A machine that OPT can run on.
///
/// Required are storage and transfers. Every computation has a default body that reads its operands back, calls
/// [`oracle`] and uploads the result; it is right, slow, and counted by [`Backend::counters`]. Override what should
/// be fast. Tensors are `[rows, width]`; a row is one token. Operands that an op consumes are passed by value, so
/// that the backend may reuse their memory.
///
/// # Errors
/// Every op fails with [`crate::ErrorKind::Shape`] if operands do not fit each other or an index is out of range,
/// and with the kinds of the device otherwise. No op panics on its arguments.
pub trait Backend: MaybeSend + MaybeSync + 'static {
    /// Activations, `[rows, width]`.
    type Tensor: MaybeSend + MaybeSync;
    /// Weight `[out, in]` and bias `[out]` of a linear, held and packed as the backend likes.
    type Linear: MaybeSend + MaybeSync;
    /// Parameters of a LayerNorm.
    type Norm: MaybeSend + MaybeSync;
    /// An embedding table `[entries, width]` that also serves as LM head.
    type Table: MaybeSend + MaybeSync;
    /// Keys and values of one sequence, all layers.
    type Cache: MaybeSend + MaybeSync;

    /// What this backend found.
    fn info(&self) -> Info;

    /// The counters that default bodies and transfers report to.
    fn counters(&self) -> &Counters;

    /// `[rows, width]` of a tensor.
    fn shape(&self, x: &Self::Tensor) -> [usize; 2];

    /// Copies a matrix to the device.
    fn upload(&self, x: ArrayView2<'_, f32>) -> Result<Self::Tensor>;

    /// Copies a tensor to the host. The copy is of the tensor as it is now, whatever happens to it before the value
    /// arrives.
    fn read<'a>(&'a self, x: &Self::Tensor) -> Readback<'a, Array2<f32>>;

    /// Like [`Backend::read`], of a tensor that is needed no more.
    fn read_owned(&self, x: Self::Tensor) -> Readback<'_, Array2<f32>> {
        self.read(&x)
    }

    /// Waits for a readback. On wasm32 only values that are ready can be had this way.
    fn block_on<T: MaybeSend>(&self, readback: Readback<'_, T>) -> Result<T> {
        crate::block_on(readback)
    }

    /// Takes over the weight `[out, in]` and bias `[out]` of a linear, to be held as `dtype`.
    fn new_linear(
        &self,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<Self::Linear>;

    /// Takes over a quantized weight `[out, in]` and the bias `[out]` of a linear. The weight stays packed.
    ///
    /// The default body holds the weight in f32, which no backend that is meant for use should do.
    fn new_quantized_linear(&self, weight: &Quantized, bias: Option<HostVector<'_>>) -> Result<Self::Linear> {
        self.counters().default_body(Op::NewQuantizedLinear);
        self.new_linear(HostMatrix::F32(weight.dequantize().view()), bias, DType::F32)
    }

    /// Takes over a quantized table `[entries, width]`, which stays packed.
    ///
    /// The default body holds it in f32, as that of [`Backend::new_quantized_linear`] does.
    fn new_quantized_table(&self, rows: &Quantized) -> Result<Self::Table> {
        self.counters().default_body(Op::NewQuantizedTable);
        self.new_table(HostMatrix::F32(rows.dequantize().view()), DType::F32)
    }

    /// Reads a linear back in logical order.
    fn read_linear<'a>(&'a self, linear: &Self::Linear) -> Readback<'a, HostLinear>;

    /// Takes over the parameters of a LayerNorm, held as f32.
    fn new_norm(&self, params: NormParams<'_>) -> Result<Self::Norm>;

    /// Reads a LayerNorm back.
    fn read_norm<'a>(&'a self, norm: &Self::Norm) -> Readback<'a, HostNorm>;

    /// Takes over a table `[entries, width]`, to be held as `dtype`. It may be larger than one binding.
    fn new_table(&self, rows: HostMatrix<'_>, dtype: DType) -> Result<Self::Table>;

    /// `[entries, width]` of a table.
    fn table_shape(&self, table: &Self::Table) -> [usize; 2];

    /// Reads the entries `rows` of a table back.
    fn read_table<'a>(&'a self, table: &Self::Table, rows: Range<usize>) -> Readback<'a, Array2<f32>>;

    /// An empty cache. Memory grows with the sequence.
    fn new_cache(&self, spec: CacheSpec) -> Result<Self::Cache>;

    /// Positions that `layer` of a cache holds.
    fn cache_len(&self, cache: &Self::Cache, layer: usize) -> usize;

    /// Appends the rows `rows` of keys and values `[_, heads * head_dim]` to `layer`.
    ///
    /// After a fork, appending to either side leaves the other as it was.
    fn cache_append(
        &self,
        cache: &mut Self::Cache,
        layer: usize,
        keys: &Self::Tensor,
        values: &Self::Tensor,
        rows: Range<usize>,
    ) -> Result<()>;

    /// Reads one layer of a cache back.
    fn cache_read<'a>(&'a self, cache: &Self::Cache, layer: usize) -> Readback<'a, CacheLayer>;

    /// Shortens every layer to at most `len` positions.
    fn cache_truncate(&self, cache: &mut Self::Cache, len: usize) -> Result<()>;

    /// A second cache with the same content. Storage is shared until one side changes.
    fn cache_fork(&self, cache: &Self::Cache) -> Result<Self::Cache>;

    /// Appends keys and values from the host to `layer`: how a saved session is restored and a prefix is set.
    fn cache_seed(
        &self,
        cache: &mut Self::Cache,
        layer: usize,
        keys: ArrayView2<'_, f32>,
        values: ArrayView2<'_, f32>,
    ) -> Result<()> {
        check::same_shape("cache_seed", values.dim().into(), keys.dim().into())?;
        let rows = 0..keys.nrows();
        let (keys, values) = (self.upload(keys)?, self.upload(values)?);
        self.cache_append(cache, layer, &keys, &values, rows)
    }

    /// The table entries `ids` as rows: the token embedding.
    fn gather(&self, table: &Self::Table, ids: &[u32]) -> Result<Self::Tensor> {
        self.counters().default_body(Op::Gather);
        let mut rows = Array2::zeros((ids.len(), self.table_shape(table)[1]));
        for (mut row, &id) in rows.outer_iter_mut().zip(ids) {
            check::ids("gather", &[id], self.table_shape(table)[0])?;
            let id = id as usize;
            row.assign(&self.block_on(self.read_table(table, id..id + 1))?.row(0));
        }
        self.upload(rows.view())
    }

    /// `x` plus the table entries `ids`, one a row: the position embedding.
    fn add_gathered(&self, x: Self::Tensor, table: &Self::Table, ids: &[u32]) -> Result<Self::Tensor> {
        self.counters().default_body(Op::AddGathered);
        let rows = self.gather(table, ids)?;
        self.add(x, &rows)
    }

    /// LayerNorm of each row.
    fn layer_norm(&self, x: &Self::Tensor, norm: &Self::Norm) -> Result<Self::Tensor> {
        self.counters().default_body(Op::LayerNorm);
        let norm = self.block_on(self.read_norm(norm))?;
        let x = self.block_on(self.read(x))?;
        check::width("layer_norm", x.ncols(), norm.width)?;
        let [weight, bias] = [&norm.weight, &norm.bias].map(|v| v.as_ref().map(|v| v.view()));
        self.upload(oracle::layer_norm(x.view(), weight, bias, norm.eps).view())
    }

    /// `x W^T + b`, `[rows, in]` to `[rows, out]`, and then what `then` says.
    fn linear(
        &self,
        x: &Self::Tensor,
        linear: &Self::Linear,
        then: Then<Self::Tensor>,
    ) -> Result<Self::Tensor> {
        self.counters().default_body(Op::Linear);
        let host = self.block_on(self.read_linear(linear))?;
        let x = self.block_on(self.read(x))?;
        check::width("linear", x.ncols(), host.weight.ncols())?;
        let activation = if let Then::Activate(activation) = then { Some(activation) } else { None };
        let bias = host.bias_view();
        let y = self.upload(oracle::linear(x.view(), host.weight.view(), bias, activation).view())?;
        match then {
            Then::Add(residual) => self.add(residual, &y),
            _ => Ok(y),
        }
    }

    /// Queries, keys and values of one input. A backend may run the three as one.
    fn qkv(
        &self,
        x: &Self::Tensor,
        q: &Self::Linear,
        k: &Self::Linear,
        v: &Self::Linear,
    ) -> Result<[Self::Tensor; 3]> {
        self.counters().default_body(Op::Qkv);
        Ok([
            self.linear(x, q, Then::Nothing)?,
            self.linear(x, k, Then::Nothing)?,
            self.linear(x, v, Then::Nothing)?,
        ])
    }

    /// `x + y`, of equal shapes.
    fn add(&self, x: Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor> {
        self.counters().default_body(Op::Add);
        let (x, y) = (self.block_on(self.read_owned(x))?, self.block_on(self.read(y))?);
        check::same_shape("add", y.dim().into(), x.dim().into())?;
        self.upload((x + y).view())
    }

    /// Causal attention, softmax(q kᵀ / √head_dim) v per head, within each span and over its cache.
    ///
    /// With caches (one per span, in their order) keys and values are appended first, and the new rows attend to all
    /// that the cache then holds up to themselves. Without, rows attend within their span. Softmax is in f32. What
    /// comes out in rows that no span covers is not specified. If the call fails on shapes, the caches are as before.
    fn attend(
        &self,
        q: Self::Tensor,
        k: Self::Tensor,
        v: Self::Tensor,
        attend: Attend<'_>,
        caches: Option<&mut [&mut Self::Cache]>,
    ) -> Result<Self::Tensor> {
        self.counters().default_body(Op::Attend);
        // All checks come before the first append: a call that fails on its shapes leaves the caches as they were.
        check::spans("attend", attend, self.shape(&q))?;
        check::same_shape("attend", self.shape(&k), self.shape(&q))?;
        check::same_shape("attend", self.shape(&v), self.shape(&q))?;
        let keys_values = keys_values(self, &k, &v, attend, caches)?;
        let q = self.block_on(self.read_owned(q))?;
        let mut out = Array2::zeros(q.dim());
        for (span, layer) in attend.spans.iter().zip(&keys_values) {
            let rows = s![span.rows(), ..];
            let (y, _) = oracle::attend(q.slice(rows), layer.keys.view(), layer.values.view(), attend.heads);
            out.slice_mut(rows).assign(&y);
        }
        self.upload(out.view())
    }

    /// [`Backend::attend`] that also hands out the attention weights `[heads, rows, positions]` of each span.
    ///
    /// For looking, not for speed: the default body, which computes the weights on the host, is all there need be.
    #[allow(clippy::type_complexity)]
    fn attention_weights<'a>(
        &'a self,
        q: Self::Tensor,
        k: Self::Tensor,
        v: Self::Tensor,
        attend: Attend<'_>,
        mut caches: Option<&mut [&mut Self::Cache]>,
    ) -> Result<(Self::Tensor, Readback<'a, Vec<Array3<f32>>>)> {
        self.counters().default_body(Op::AttentionWeights);
        // Nothing is waited for here: what `attend` consumes is read before, what it appends afterwards.
        let queries = self.read(&q);
        let new = caches.is_none().then(|| (self.read(&k), self.read(&v)));
        let out = self.attend(q, k, v, attend, caches.as_deref_mut())?;
        let held: Vec<_> =
            caches.iter().flat_map(|c| c.iter()).map(|c| self.cache_read(c, attend.layer)).collect();
        let (spans, heads) = (attend.spans.to_vec(), attend.heads);
        let weights = async move {
            let queries = queries.await?;
            let new = match new {
                Some((keys, values)) => Some(CacheLayer { keys: keys.await?, values: values.await? }),
                None => None,
            };
            let mut held = held.into_iter();
            let mut weights = Vec::with_capacity(spans.len());
            for span in spans {
                let rows = s![span.rows(), ..];
                let q = queries.slice(rows);
                let (_, of_span) = match (&new, held.next()) {
                    (Some(new), _) => oracle::attend(q, new.keys.slice(rows), new.values.slice(rows), heads),
                    (None, Some(held)) => {
                        let held = held.await?;
                        oracle::attend(q, held.keys.view(), held.values.view(), heads)
                    }
                    (None, None) => break,
                };
                weights.push(of_span);
            }
            Ok(weights)
        };
        Ok((out, Box::pin(weights)))
    }

    /// The rows `rows` of a tensor, in that order.
    fn take_rows(&self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor> {
        self.counters().default_body(Op::TakeRows);
        let x = self.block_on(self.read(x))?;
        check::rows("take_rows", rows, x.nrows())?;
        self.upload(x.select(ndarray::Axis(0), rows).view())
    }

    /// `x Tᵀ`: the logits `[rows, entries]` of hidden rows under an LM head.
    fn logits(&self, x: &Self::Tensor, head: &Self::Table) -> Result<Self::Tensor> {
        self.counters().default_body(Op::Logits);
        let [entries, width] = self.table_shape(head);
        let x = self.block_on(self.read(x))?;
        check::width("logits", x.ncols(), width)?;
        let weight = self.block_on(self.read_table(head, 0..entries))?;
        self.upload(oracle::linear(x.view(), weight.view(), None, None).view())
    }

    /// For each hidden row, the log-probability of its target under an LM head. The logits need not be kept.
    fn log_probs<'a>(
        &'a self,
        x: &Self::Tensor,
        head: &Self::Table,
        targets: &[u32],
    ) -> Readback<'a, Vec<TargetScore>> {
        self.counters().default_body(Op::LogProbs);
        let compute = || {
            check::ids("log_probs", targets, self.table_shape(head)[0])?;
            check::targets("log_probs", targets, self.shape(x)[0])?;
            let logits = self.block_on(self.read_owned(self.logits(x, head)?))?;
            Ok(logits.outer_iter().zip(targets).map(|(row, &t)| oracle::target_score(row, t)).collect())
        };
        crate::ready(compute())
    }

    /// The `k` largest of each row of logits (all of them if the row is shorter).
    fn top_k<'a>(&'a self, logits: &Self::Tensor, k: usize) -> Readback<'a, Vec<TopK>> {
        self.counters().default_body(Op::TopK);
        let logits = self.block_on(self.read(logits));
        crate::ready(logits.map(|logits| logits.outer_iter().map(|row| oracle::top_k(row, k)).collect()))
    }
}

/// The keys and values each span attends to, read back, after appending the new ones to the caches.
fn keys_values<B: Backend + ?Sized>(
    backend: &B,
    k: &B::Tensor,
    v: &B::Tensor,
    attend: Attend<'_>,
    caches: Option<&mut [&mut B::Cache]>,
) -> Result<Vec<CacheLayer>> {
    match caches {
        Some(caches) => {
            check::caches(attend, caches.len())?;
            let each = attend.spans.iter().zip(caches);
            each.map(|(span, cache)| {
                backend.cache_append(cache, attend.layer, k, v, span.rows())?;
                backend.block_on(backend.cache_read(cache, attend.layer))
            })
            .collect()
        }
        None => {
            let (k, v) = (backend.block_on(backend.read(k))?, backend.block_on(backend.read(v))?);
            let rows = |m: ArrayView2<'_, f32>, span: &Span| m.slice(s![span.rows(), ..]).to_owned();
            let each = attend.spans.iter();
            Ok(each
                .map(|span| CacheLayer { keys: rows(k.view(), span), values: rows(v.view(), span) })
                .collect())
        }
    }
}

impl HostLinear {
    /// The bias as a view.
    pub fn bias_view(&self) -> Option<ArrayView1<'_, f32>> {
        self.bias.as_ref().map(|bias| bias.view())
    }
}
