//! Linears, norms and tables, and the products with them.
//!
//! Weights are rows `[out, in]`, as LibTorch's own `linear` wants them, or, on the CPU where it can be had, in
//! oneDNN's order (see [`onednn`]).

use crate::{
    Tch,
    error::torch,
    onednn,
    quant::Coded,
    tensor::{Held, Matrix, Tensor, kind_of, read_matrix, read_vector, upload_matrix, upload_vector},
};
use opt_backend::{
    DType, HostLinear, HostMatrix, HostNorm, HostVector, NormParams, Result, check, ndarray::Array2,
};
use std::{
    fmt,
    ops::Range,
    sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard},
};
use tch::{Device, Kind};

/// Rows up to which f16 weights are multiplied as they are on the CPU. Where the processor has no arithmetic in f16,
/// LibTorch's kernel streams them well for one row and does no better for many; from here on widening them pays.
const MOST_F16_ROWS: usize = 4;
/// Elements that are widened at a time: 4 MiB.
const WIDENED: usize = 1 << 20;

/// Weight `[out, in]` and bias of a linear.
pub struct Linear(pub(crate) Kept);

pub(crate) enum Kept {
    Dense(Dense),
    Coded(Coded),
}

/// A linear in f32, f16 or bf16.
pub(crate) struct Dense {
    shape: [usize; 2],
    biased: bool,
    /// Whether the weight is a parameter's: it may lie in the parameter's memory, and lives for one step.
    trained: bool,
    /// Replaced once, when [`qkv`] joins three linears.
    part: RwLock<Part>,
}

/// The outputs from `start` on of a weight: all of them, or those of one of three linears that were joined.
#[derive(Clone)]
struct Part {
    whole: Arc<Whole>,
    start: usize,
}

struct Whole {
    weight: Weight,
    bias: Option<Held>,
    /// The weight's rows, where oneDNN has packed it and a gradient has asked for them.
    rows: OnceLock<Held>,
}

impl Whole {
    fn new(weight: Weight, bias: Option<Held>) -> Self {
        Self { weight, bias, rows: OnceLock::new() }
    }
}

/// Parameters of a LayerNorm, in f32.
pub struct Norm {
    pub(crate) width: usize,
    pub(crate) eps: f32,
    pub(crate) weight: Option<Held>,
    bias: Option<Held>,
}

/// An embedding table `[entries, width]` that is also an LM head.
///
/// Where oneDNN packs weights, a table that serves as head is held twice from its first logits on: rows cannot be
/// gathered from a packed one. A quantized table is held once.
pub struct Table {
    pub(crate) shape: [usize; 2],
    entries: Entries,
}

enum Entries {
    Dense { rows: Weight, packed: OnceLock<Weight> },
    Coded(Coded),
}

/// A matrix `[out, in]`.
struct Weight {
    form: Form,
    kind: Kind,
    shape: [usize; 2],
}

enum Form {
    /// `[out, in]`. Shared with a parameter, if it is one's.
    Rows(Arc<Held>),
    /// What [`onednn::pack`] gave.
    Packed(Held),
}

/// The rows of a weight `[out, in]`.
pub(crate) enum Rows<'a> {
    Dense(Matrix<'a>, Kind),
    Coded(&'a Coded),
}

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quantized = matches!(self.0, Kept::Coded(_));
        f.debug_struct("Linear").field("shape", &self.shape()).field("quantized", &quantized).finish()
    }
}

impl fmt::Debug for Norm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Norm").field("width", &self.width).finish_non_exhaustive()
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl Weight {
    fn new(op: &'static str, tch: &Tch, host: HostMatrix<'_>, dtype: DType) -> Result<Self> {
        let kind = kind_of(dtype)?;
        let rows =
            upload_matrix(op, host, tch.device())?.f_to_dtype(kind, false, false).map_err(torch(op))?;
        Ok(Self { form: Form::Rows(Arc::new(Held::new(rows))), kind, shape: host.shape() })
    }

    /// In the order that multiplies fastest on the device.
    fn prepared(&self, op: &'static str, tch: &Tch) -> Result<Option<Self>> {
        let Form::Rows(rows) = &self.form else { return Ok(None) };
        let empty = self.shape.contains(&0);
        if tch.device() != Device::Cpu || !onednn::can_pack(self.kind) || empty {
            return Ok(None);
        }
        let packed = Held::new(onednn::pack(op, rows)?);
        Ok(Some(Self { form: Form::Packed(packed), kind: self.kind, shape: self.shape }))
    }

    /// `[out, in]`, whatever the form.
    fn rows(&self, op: &'static str) -> Result<Matrix<'_>> {
        match &self.form {
            Form::Rows(rows) => Ok(Matrix::Whole(rows)),
            Form::Packed(packed) => Ok(Matrix::Own(packed.f_to_dense(self.kind, false).map_err(torch(op))?)),
        }
    }

    /// `x W^T + b`, its positive part if `relu`, and the elements it is in. `x` is `[rows, in]`, the result
    /// `[rows, out]` and contiguous.
    fn product(
        &self,
        op: &'static str,
        tch: &Tch,
        x: &Tensor,
        bias: Option<&Held>,
        relu: bool,
    ) -> Result<(tch::Tensor, Kind)> {
        let [rows, _] = x.shape();
        let (mut y, kind) = match &self.form {
            Form::Packed(packed) if rows > 0 => {
                let x = x.matrix_as(op, self.kind)?;
                let x = x.f_contiguous().map_err(torch(op))?;
                let bias = bias.map(|bias| &**bias);
                let shape = [rows, self.shape[0]];
                return Ok((onednn::linear(op, &x, packed, bias, relu, shape, self.kind)?, self.kind));
            }
            Form::Packed(_) => {
                let size = [0, self.shape[0] as i64];
                let empty = tch::Tensor::f_empty(size, (self.kind, tch.device())).map_err(torch(op))?;
                return Ok((empty, self.kind));
            }
            Form::Rows(weight) if self.widened(tch, rows) => {
                (self.product_in_f32(op, x, weight, bias)?, Kind::Float)
            }
            Form::Rows(weight) => {
                let x = x.matrix_as(op, self.kind)?;
                let y = x.f_linear(weight, bias.map(|bias| &**bias)).map_err(torch(op))?;
                (y, self.kind)
            }
        };
        if relu {
            let _ = y.f_relu_().map_err(torch(op))?;
        }
        Ok((y, kind))
    }

    fn widened(&self, tch: &Tch, rows: usize) -> bool {
        self.kind == Kind::Half && tch.device() == Device::Cpu && rows > MOST_F16_ROWS
    }

    /// The product with weights widened to f32, some outputs at a time so that they stay in the processor's cache.
    fn product_in_f32(
        &self,
        op: &'static str,
        x: &Tensor,
        weight: &Held,
        bias: Option<&Held>,
    ) -> Result<tch::Tensor> {
        let [outputs, input] = self.shape;
        let [rows, _] = x.shape();
        let x = x.matrix_as(op, Kind::Float)?;
        let part = (WIDENED / input.max(1)).max(1);
        let multiply = || {
            let size = [rows as i64, outputs as i64];
            let y = tch::Tensor::f_empty(size, (Kind::Float, Device::Cpu))?;
            for start in (0..outputs).step_by(part) {
                let (start, len) = (start as i64, part.min(outputs - start) as i64);
                let weight = weight.f_narrow(0, start, len)?.f_totype(Kind::Float)?.f_transpose(0, 1)?;
                let to = y.f_narrow(1, start, len)?;
                let _ = match bias {
                    Some(bias) => {
                        bias.f_narrow(0, start, len)?.f_totype(Kind::Float)?.f_addmm_out(&to, &x, &weight)?
                    }
                    None => x.f_mm_out(&to, &weight)?,
                };
            }
            Ok(y)
        };
        multiply().map_err(torch(op))
    }
}

impl Linear {
    /// `[out, in]`.
    pub(crate) fn shape(&self) -> [usize; 2] {
        match &self.0 {
            Kept::Dense(dense) => dense.shape,
            Kept::Coded(coded) => coded.shape(),
        }
    }

    /// See [`Rows`].
    pub(crate) fn rows(&self, op: &'static str) -> Result<Rows<'_>> {
        Ok(match &self.0 {
            Kept::Dense(dense) => {
                let (rows, kind) = dense.rows(op)?;
                Rows::Dense(Matrix::Own(rows), kind)
            }
            Kept::Coded(coded) => Rows::Coded(coded),
        })
    }

    pub(crate) fn read(&self) -> Result<HostLinear> {
        const OP: &str = "read_linear";
        match &self.0 {
            Kept::Dense(dense) => dense.read(OP),
            Kept::Coded(coded) => {
                Ok(HostLinear { weight: coded.read(OP, 0..coded.shape()[0])?, bias: coded.read_bias(OP)? })
            }
        }
    }
}

impl Dense {
    pub(crate) fn new(
        tch: &Tch,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<Self> {
        const OP: &str = "new_linear";
        let shape = weight.shape();
        if let Some(bias) = &bias {
            check::length(OP, "bias", bias.len(), shape[0])?;
        }
        let rows = Weight::new(OP, tch, weight, dtype)?;
        let weight = rows.prepared(OP, tch)?.unwrap_or(rows);
        let bias = match bias {
            Some(bias) => {
                let bias = upload_vector(OP, bias, tch.device())?.f_to_dtype(weight.kind, false, false);
                Some(Held::new(bias.map_err(torch(OP))?))
            }
            None => None,
        };
        let biased = bias.is_some();
        let part = Part { whole: Arc::new(Whole::new(weight, bias)), start: 0 };
        Ok(Self { shape, biased, trained: false, part: RwLock::new(part) })
    }

    /// Of parameters on the device: in f32 the weight is the parameter's own memory. It is not packed, which would
    /// have to be done again in each step.
    pub(crate) fn of(op: &'static str, weight: &Tensor, bias: Option<&Tensor>, dtype: DType) -> Result<Self> {
        let (kind, shape) = (kind_of(dtype)?, weight.shape());
        let weight = Weight { form: Form::Rows(weight.hold(op, kind)?), kind, shape };
        let bias = match bias {
            Some(bias) => {
                let bias = bias.matrix(op)?.f_reshape([shape[0] as i64]);
                let bias = bias.and_then(|bias| bias.f_to_dtype(kind, false, true));
                Some(Held::new(bias.map_err(torch(op))?))
            }
            None => None,
        };
        let biased = bias.is_some();
        let part = Part { whole: Arc::new(Whole::new(weight, bias)), start: 0 };
        Ok(Self { shape, biased, trained: true, part: RwLock::new(part) })
    }

    /// The weight's rows as a view, and what they are in. A weight that oneDNN has packed is held twice from the first
    /// call on: that it be unpacked for each gradient would cost each a few percent.
    pub(crate) fn rows(&self, op: &'static str) -> Result<(tch::Tensor, Kind)> {
        let part = self.part().clone();
        let Whole { weight, rows: unpacked, .. } = &*part.whole;
        let rows = match (&weight.form, unpacked.get()) {
            (Form::Rows(rows), _) => &**rows,
            (Form::Packed(_), Some(rows)) => rows,
            (Form::Packed(packed), None) => {
                let rows = packed.f_to_dense(weight.kind, false).map_err(torch(op))?;
                unpacked.get_or_init(|| Held::new(rows))
            }
        };
        let rows = rows.f_narrow(0, part.start as i64, self.shape[0] as i64).map_err(torch(op))?;
        Ok((rows, weight.kind))
    }

    fn read(&self, op: &'static str) -> Result<HostLinear> {
        let part = self.part();
        let [start, len] = [part.start as i64, self.shape[0] as i64];
        let rows = part.whole.weight.rows(op)?.f_narrow(0, start, len).map_err(torch(op))?;
        let weight = read_matrix(op, &rows, self.shape)?;
        let bias = match part.whole.bias.as_ref().filter(|_| self.biased) {
            Some(bias) => {
                let bias = bias.f_narrow(0, start, len).map_err(torch(op))?;
                Some(read_vector(op, &bias, self.shape[0])?)
            }
            None => None,
        };
        Ok(HostLinear { weight, bias })
    }

    /// `x W^T + b`, and its positive part if `relu`.
    pub(crate) fn apply(
        &self,
        op: &'static str,
        tch: &Tch,
        x: &Tensor,
        relu: bool,
    ) -> Result<(tch::Tensor, Kind)> {
        let part = self.part().clone();
        let (y, kind) = part.whole.weight.product(op, tch, x, part.whole.bias.as_ref(), relu)?;
        if part.whole.weight.shape == self.shape {
            return Ok((y, kind));
        }
        // One of three that were joined, by itself: rare, and right.
        let columns = y.f_narrow_copy(1, part.start as i64, self.shape[0] as i64).map_err(torch(op))?;
        Ok((columns, kind))
    }

    // Whoever panicked with the lock held has written nothing: `joined` replaces all parts or none.
    fn part(&self) -> RwLockReadGuard<'_, Part> {
        self.part.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Queries, keys and values of one input: one product where the three linears are alike.
///
/// The first call lays their weights side by side, which takes the memory of the three once more while it lasts;
/// from then on each of them is a part of the whole.
pub(crate) fn qkv(tch: &Tch, x: &Tensor, linears: [&Dense; 3]) -> Result<[Tensor; 3]> {
    const OP: &str = "qkv";
    let rows = x.shape()[0];
    let [q, k, v] = linears;
    if let Some(whole) = joined(tch, linears)? {
        let (y, kind) = whole.weight.product(OP, tch, x, whole.bias.as_ref(), false)?;
        return Ok(Tensor::columns(y, kind, [rows, q.shape[0]]));
    }
    let each = |linear: &Dense| {
        let (y, kind) = linear.apply(OP, tch, x, false)?;
        Ok(Tensor::new(y, kind, [rows, linear.shape[0]]))
    };
    Ok([each(q)?, each(k)?, each(v)?])
}

/// The three as one; `None` if they differ, belong to other linears already, or are in use by another thread now.
fn joined(tch: &Tch, linears: [&Dense; 3]) -> Result<Option<Arc<Whole>>> {
    const OP: &str = "qkv";
    let [q, k, v] = linears;
    let [out, input] = q.shape;
    if k.shape != q.shape || v.shape != q.shape || linears.iter().any(|linear| linear.trained) {
        return Ok(None);
    }
    {
        let parts = [q.part(), k.part(), v.part()];
        let whole = &parts[0].whole;
        if whole.weight.shape[0] == 3 * out {
            let own =
                parts.iter().enumerate().all(|(i, p)| Arc::ptr_eq(&p.whole, whole) && p.start == i * out);
            return Ok(own.then(|| Arc::clone(whole)));
        }
    }
    // Never waiting for a lock: two threads that join the same linears in another order cannot block each other, and
    // a linear that is given twice is found locked.
    let (Ok(mut q_part), Ok(mut k_part), Ok(mut v_part)) =
        (q.part.try_write(), k.part.try_write(), v.part.try_write())
    else {
        return Ok(None);
    };
    let mut parts = [&mut *q_part, &mut *k_part, &mut *v_part];
    let kind = parts[0].whole.weight.kind;
    if parts.iter().any(|p| p.whole.weight.shape != q.shape || p.whole.weight.kind != kind) {
        return Ok(None);
    }
    let weight = {
        let rows = parts.each_ref().map(|part| part.whole.weight.rows(OP));
        let [q, k, v] = rows;
        let rows = tch::Tensor::f_cat(&[&*q?, &*k?, &*v?], 0).map_err(torch(OP))?;
        let rows = Weight { form: Form::Rows(Arc::new(Held::new(rows))), kind, shape: [3 * out, input] };
        rows.prepared(OP, tch)?.unwrap_or(rows)
    };
    let bias = join_biases(parts.each_ref().map(|part| part.whole.bias.as_ref()))?;
    let whole = Arc::new(Whole::new(weight, bias));
    for (i, part) in parts.iter_mut().enumerate() {
        **part = Part { whole: Arc::clone(&whole), start: i * out };
    }
    Ok(Some(whole))
}

/// The biases end to end, zeros for those absent; `None` if all are.
fn join_biases(biases: [Option<&Held>; 3]) -> Result<Option<Held>> {
    const OP: &str = "qkv";
    let Some(one) = biases.iter().flatten().next() else { return Ok(None) };
    let zeros = Held::new(one.f_zeros_like().map_err(torch(OP))?);
    let all = biases.map(|bias| &**bias.unwrap_or(&zeros));
    Ok(Some(Held::new(tch::Tensor::f_cat(&all, 0).map_err(torch(OP))?)))
}

impl Norm {
    pub(crate) fn new(tch: &Tch, params: NormParams<'_>) -> Result<Self> {
        const OP: &str = "new_norm";
        let hold = |what: &str, vector: Option<HostVector<'_>>| -> Result<Option<Held>> {
            let Some(vector) = vector else { return Ok(None) };
            check::length(OP, what, vector.len(), params.width)?;
            let wide = upload_vector(OP, vector, tch.device())?.f_to_dtype(Kind::Float, false, false);
            Ok(Some(Held::new(wide.map_err(torch(OP))?)))
        };
        Ok(Self {
            width: params.width,
            eps: params.eps,
            weight: hold("weight", params.weight)?,
            bias: hold("bias", params.bias)?,
        })
    }

    /// Of parameters on the device, copied.
    pub(crate) fn of(op: &'static str, [weight, bias]: [&Tensor; 2], eps: f32) -> Result<Self> {
        let width = weight.shape()[1];
        let hold = |x: &Tensor| -> Result<Option<Held>> {
            let vector = x.matrix(op)?.f_reshape([width as i64]);
            let vector = vector.and_then(|vector| vector.f_to_dtype(Kind::Float, false, true));
            Ok(Some(Held::new(vector.map_err(torch(op))?)))
        };
        Ok(Self { width, eps, weight: hold(weight)?, bias: hold(bias)? })
    }

    pub(crate) fn read(&self) -> Result<HostNorm> {
        let read = |vector: &Option<Held>| {
            vector.as_ref().map(|vector| read_vector("read_norm", vector, self.width)).transpose()
        };
        Ok(HostNorm {
            eps: self.eps,
            weight: read(&self.weight)?,
            bias: read(&self.bias)?,
            width: self.width,
        })
    }

    /// LayerNorm of each row, in f32.
    pub(crate) fn apply(&self, x: &Matrix<'_>) -> Result<tch::Tensor> {
        let [weight, bias] = [&self.weight, &self.bias].map(|v| v.as_ref().map(|v| &**v));
        x.f_layer_norm([self.width as i64], weight, bias, f64::from(self.eps), true)
            .map_err(torch("layer_norm"))
    }
}

impl Table {
    pub(crate) fn new(tch: &Tch, rows: HostMatrix<'_>, dtype: DType) -> Result<Self> {
        let rows = Weight::new("new_table", tch, rows, dtype)?;
        Ok(Self { shape: rows.shape, entries: Entries::Dense { rows, packed: OnceLock::new() } })
    }

    pub(crate) fn quantized(coded: Coded) -> Self {
        Self { shape: coded.shape(), entries: Entries::Coded(coded) }
    }

    /// The entries `ids`, `[ids, width]`, in f32.
    pub(crate) fn gather(&self, op: &'static str, tch: &Tch, ids: &[u32]) -> Result<tch::Tensor> {
        check::ids(op, ids, self.shape[0])?;
        let rows = match &self.entries {
            Entries::Dense { rows, .. } => rows,
            Entries::Coded(coded) => return coded.gather(op, tch, ids),
        };
        let ids = tch.indices(op, ids.iter().map(|id| i64::from(*id)))?;
        let rows = rows.rows(op)?.f_index_select(0, &ids);
        rows.and_then(|rows| rows.f_to_dtype(Kind::Float, false, false)).map_err(torch(op))
    }

    /// The entries `range`, in host memory.
    pub(crate) fn read(&self, op: &'static str, range: Range<usize>) -> Result<Array2<f32>> {
        check::range(op, &range, self.shape[0])?;
        let rows = match &self.entries {
            Entries::Dense { rows, .. } => rows,
            Entries::Coded(coded) => return coded.read(op, range),
        };
        let entries = rows.rows(op)?.f_narrow(0, range.start as i64, range.len() as i64);
        read_matrix(op, &entries.map_err(torch(op))?, [range.len(), self.shape[1]])
    }

    /// As [`Dense::rows`], or the codes.
    pub(crate) fn rows(&self, op: &'static str) -> Result<Rows<'_>> {
        Ok(match &self.entries {
            Entries::Dense { rows, .. } => Rows::Dense(rows.rows(op)?, rows.kind),
            Entries::Coded(coded) => Rows::Coded(coded),
        })
    }

    /// Logits `[rows, entries]`.
    pub(crate) fn logits(&self, op: &'static str, tch: &Tch, x: &Tensor) -> Result<(tch::Tensor, Kind)> {
        let (rows, packed) = match &self.entries {
            Entries::Dense { rows, packed } => (rows, packed),
            Entries::Coded(coded) => return coded.product(op, tch, x),
        };
        let weight = match packed.get() {
            Some(packed) => packed,
            None => match rows.prepared(op, tch)? {
                Some(made) => packed.get_or_init(|| made),
                None => rows,
            },
        };
        weight.product(op, tch, x, None, false)
    }
}
