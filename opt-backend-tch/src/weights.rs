//! Linears, norms and tables, and the products with them.
//!
//! # How a weight is laid out
//!
//! LibTorch's own `linear` keeps `[out, in]`. What streams memory fastest depends on the device, the format and the
//! number of rows; [`Layout`] says which of the two orders a weight is kept in, and [`Weight::product`] which kernel
//! runs. Both were chosen by measurement on x86-64 with AVX-512; see `benches/README.md`.

use crate::{
    Tch,
    error::torch,
    tensor::{Held, Matrix, Tensor, kind_of, read_matrix, read_vector, sizes, upload_matrix, upload_vector},
};
use opt_backend::{DType, HostLinear, HostMatrix, HostNorm, HostVector, NormParams, Result, check};
use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
};
use tch::{Device, Kind};

/// Rows up to which f16 weights are multiplied as they are on the CPU. Where the processor has no arithmetic in f16,
/// LibTorch's kernel streams them well for one row and does no better for many; from here on widening them pays.
const MOST_F16_ROWS: usize = 4;
/// Elements that are widened at a time: 4 MiB.
const WIDENED: usize = 1 << 20;

/// Weight `[out, in]` and bias of a linear.
pub struct Linear {
    shape: [usize; 2],
    biased: bool,
    /// Replaced once, when [`qkv`] joins three linears: then each is a view of its part of the whole.
    parts: RwLock<Parts>,
}

struct Parts {
    weight: Weight,
    bias: Option<Held>,
    joined: Option<(Arc<Joined>, usize)>,
}

/// The linears of queries, keys and values side by side.
struct Joined {
    weight: Weight,
    bias: Option<Held>,
}

/// Parameters of a LayerNorm, in f32.
pub struct Norm {
    pub(crate) width: usize,
    pub(crate) eps: f32,
    pub(crate) weight: Option<Held>,
    pub(crate) bias: Option<Held>,
}

/// An embedding table `[entries, width]` that is also an LM head.
pub struct Table {
    pub(crate) shape: [usize; 2],
    pub(crate) weight: Weight,
}

/// A matrix `[out, in]`.
pub(crate) struct Weight {
    /// `[in, out]`, whatever the order in memory: the second operand of a product.
    transposed: Held,
    kind: Kind,
    layout: Layout,
    outputs: usize,
}

/// The order in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// `[out, in]`: each output's weights lie end to end.
    Outputs,
    /// `[in, out]`: each input's weights lie end to end.
    Inputs,
}

impl Layout {
    fn of(device: Device, kind: Kind) -> Self {
        match (device, kind) {
            // One row times f32 weights: MKL streams half as much again in this order.
            (Device::Cpu, Kind::Float) => Layout::Inputs,
            _ => Layout::Outputs,
        }
    }
}

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Linear").field("shape", &self.shape).field("bias", &self.biased).finish()
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
        let (kind, device) = (kind_of(dtype)?, tch.device());
        let layout = Layout::of(device, kind);
        let rows = upload_matrix(op, host, device)?.f_to_dtype(kind, false, false).map_err(torch(op))?;
        let transposed = rows.f_transpose(0, 1);
        let transposed = match layout {
            Layout::Outputs => transposed,
            Layout::Inputs => transposed.and_then(|t| t.f_contiguous()),
        };
        let outputs = host.shape()[0];
        Ok(Self { transposed: Held::new(transposed.map_err(torch(op))?), kind, layout, outputs })
    }

    /// `x W^T + b`, and the elements it is in. `x` is `[rows, in]`, the result `[rows, out]` and contiguous.
    fn product(
        &self,
        op: &'static str,
        tch: &Tch,
        x: &Tensor,
        bias: Option<&Held>,
    ) -> Result<(tch::Tensor, Kind)> {
        let few = x.shape()[0] <= MOST_F16_ROWS;
        if self.kind == Kind::Half && tch.device() == Device::Cpu && !few {
            return Ok((self.product_in_f32(op, x, bias)?, Kind::Float));
        }
        let x = x.matrix_as(op, self.kind)?;
        let y = match bias {
            Some(bias) => bias.f_addmm(&x, &self.transposed),
            None => x.f_mm(&self.transposed),
        };
        Ok((y.map_err(torch(op))?, self.kind))
    }

    /// The product with weights widened to f32, some outputs at a time so that they stay in the processor's cache.
    fn product_in_f32(&self, op: &'static str, x: &Tensor, bias: Option<&Held>) -> Result<tch::Tensor> {
        let [rows, input] = x.shape();
        let x = x.matrix_as(op, Kind::Float)?;
        let part = i64::try_from(WIDENED / input.max(1)).unwrap_or(i64::MAX).max(1);
        let multiply = || {
            let out = self.outputs as i64;
            let y = tch::Tensor::f_empty([rows as i64, out], (Kind::Float, Device::Cpu))?;
            let mut start = 0;
            while start < out {
                let len = part.min(out - start);
                let weight = self.transposed.f_narrow(1, start, len)?.f_totype(Kind::Float)?;
                let to = y.f_narrow(1, start, len)?;
                let _ = match bias {
                    Some(bias) => {
                        bias.f_narrow(0, start, len)?.f_totype(Kind::Float)?.f_addmm_out(&to, &x, &weight)?
                    }
                    None => x.f_mm_out(&to, &weight)?,
                };
                start += len;
            }
            Ok(y)
        };
        multiply().map_err(torch(op))
    }

    /// This and others of the same number of inputs, side by side.
    fn join(op: &'static str, weights: [&Weight; 3]) -> Result<Self> {
        let [first, ..] = weights;
        let joined = match first.layout {
            Layout::Inputs => tch::Tensor::f_cat(&weights.map(|w| &*w.transposed), 1),
            Layout::Outputs => (|| {
                let [q, k, v] = weights.map(|w| w.transposed.f_transpose(0, 1));
                tch::Tensor::f_cat(&[q?, k?, v?], 0)?.f_transpose(0, 1)
            })(),
        };
        let transposed = Held::new(joined.map_err(torch(op))?);
        let outputs = weights.iter().map(|w| w.outputs).sum();
        Ok(Self { transposed, kind: first.kind, layout: first.layout, outputs })
    }

    /// The outputs from `start` on.
    fn part(&self, op: &'static str, start: usize, len: usize) -> Result<Self> {
        let part = self.transposed.f_narrow(1, start as i64, len as i64).map_err(torch(op))?;
        Ok(Self { transposed: Held::new(part), kind: self.kind, layout: self.layout, outputs: len })
    }
}

impl Linear {
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
        let weight = Weight::new(OP, tch, weight, dtype)?;
        let bias = match bias {
            Some(bias) => {
                let bias = upload_vector(OP, bias, tch.device())?.f_to_dtype(weight.kind, false, false);
                Some(Held::new(bias.map_err(torch(OP))?))
            }
            None => None,
        };
        let biased = bias.is_some();
        Ok(Self { shape, biased, parts: RwLock::new(Parts { weight, bias, joined: None }) })
    }

    /// `[out, in]`.
    pub(crate) fn shape(&self) -> [usize; 2] {
        self.shape
    }

    pub(crate) fn read(&self) -> Result<HostLinear> {
        const OP: &str = "read_linear";
        let parts = self.parts();
        let rows = parts.weight.transposed.f_transpose(0, 1).map_err(torch(OP))?;
        let weight = read_matrix(OP, &rows, self.shape)?;
        let bias = match parts.bias.as_ref().filter(|_| self.biased) {
            Some(bias) => Some(read_vector(OP, bias, self.shape[0])?),
            None => None,
        };
        Ok(HostLinear { weight, bias })
    }

    /// `x W^T + b`.
    pub(crate) fn apply(&self, op: &'static str, tch: &Tch, x: &Tensor) -> Result<(tch::Tensor, Kind)> {
        let parts = self.parts();
        parts.weight.product(op, tch, x, parts.bias.as_ref())
    }

    // Whoever panicked with the lock held has written nothing: `join` replaces all parts or none.
    fn parts(&self) -> RwLockReadGuard<'_, Parts> {
        self.parts.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn joined(&self, place: usize) -> Option<Arc<Joined>> {
        let parts = self.parts();
        parts.joined.as_ref().filter(|(_, own)| *own == place).map(|(joined, _)| Arc::clone(joined))
    }
}

/// Queries, keys and values of one input: one product where the three linears are alike.
///
/// The first call lays their weights side by side, which takes the memory of the three once more while it lasts;
/// from then on each of them is a view of the whole.
pub(crate) fn qkv(tch: &Tch, x: &Tensor, linears: [&Linear; 3]) -> Result<[Tensor; 3]> {
    const OP: &str = "qkv";
    let [rows, width] = x.shape();
    for linear in linears {
        check::width(OP, width, linear.shape[1])?;
    }
    let [q, k, v] = linears;
    if let Some(joined) = joined(linears)? {
        let (y, kind) = joined.weight.product(OP, tch, x, joined.bias.as_ref())?;
        return Ok(Tensor::columns(y, kind, [rows, q.shape[0]]));
    }
    let each = |linear: &Linear| {
        let (y, kind) = linear.apply(OP, tch, x)?;
        Ok(Tensor::new(y, kind, [rows, linear.shape[0]]))
    };
    Ok([each(q)?, each(k)?, each(v)?])
}

/// The three as one; `None` if they differ, belong to other linears already, or are in use by another thread now.
fn joined([q, k, v]: [&Linear; 3]) -> Result<Option<Arc<Joined>>> {
    const OP: &str = "qkv";
    if let [Some(a), Some(b), Some(c)] = [q.joined(0), k.joined(1), v.joined(2)] {
        return Ok((Arc::ptr_eq(&a, &b) && Arc::ptr_eq(&a, &c)).then_some(a));
    }
    // Never waiting for a lock: two threads that join the same linears in another order cannot block each other.
    let (Ok(mut q_parts), Ok(mut k_parts), Ok(mut v_parts)) =
        (q.parts.try_write(), k.parts.try_write(), v.parts.try_write())
    else {
        return Ok(None);
    };
    let mut parts = [&mut *q_parts, &mut *k_parts, &mut *v_parts];
    let alike = k.shape == q.shape
        && v.shape == q.shape
        && parts.iter().all(|p| p.joined.is_none() && p.weight.kind == parts[0].weight.kind);
    if !alike {
        return Ok(None);
    }
    let out = q.shape[0];
    let weight = Weight::join(OP, parts.each_ref().map(|p| &p.weight))?;
    let bias = join_biases(parts.each_ref().map(|p| p.bias.as_ref()), out)?;
    let whole = Arc::new(Joined { weight, bias });
    let mut views = Vec::with_capacity(parts.len());
    for i in 0..parts.len() {
        let bias = match &whole.bias {
            Some(bias) => {
                let part = bias.f_narrow(0, (i * out) as i64, out as i64).map_err(torch(OP))?;
                Some(Held::new(part))
            }
            None => None,
        };
        views.push(Parts {
            weight: whole.weight.part(OP, i * out, out)?,
            bias,
            joined: Some((Arc::clone(&whole), i)),
        });
    }
    for (part, view) in parts.iter_mut().zip(views) {
        **part = view;
    }
    Ok(Some(whole))
}

/// The biases end to end, zeros for those absent; `None` if all are.
fn join_biases(biases: [Option<&Held>; 3], out: usize) -> Result<Option<Held>> {
    const OP: &str = "qkv";
    let Some(one) = biases.iter().flatten().next() else { return Ok(None) };
    let zeros = one.f_zeros_like().map_err(torch(OP))?;
    let all = biases.map(|bias| bias.map_or(&zeros, |bias| bias));
    debug_assert!(all.iter().all(|bias| bias.size() == [out as i64]));
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
        Ok(Self { shape: rows.shape(), weight: Weight::new("new_table", tch, rows, dtype)? })
    }

    /// `[ids, width]`, in f32.
    pub(crate) fn gather(&self, op: &'static str, ids: &tch::Tensor) -> Result<tch::Tensor> {
        let rows = || match self.weight.layout {
            Layout::Outputs => self.weight.transposed.f_transpose(0, 1)?.f_index_select(0, ids),
            Layout::Inputs => {
                self.weight.transposed.f_index_select(1, ids)?.f_transpose(0, 1)?.f_contiguous()
            }
        };
        rows().and_then(|rows| rows.f_to_dtype(Kind::Float, false, false)).map_err(torch(op))
    }

    /// The entries `start..start + len`.
    pub(crate) fn rows(&self, op: &'static str, start: usize, len: usize) -> Result<tch::Tensor> {
        let [start, len] = sizes([start, len]);
        let rows = self.weight.transposed.f_narrow(1, start, len).and_then(|rows| rows.f_transpose(0, 1));
        rows.map_err(torch(op))
    }

    /// Logits `[rows, entries]`.
    pub(crate) fn logits(&self, op: &'static str, tch: &Tch, x: &Tensor) -> Result<(tch::Tensor, Kind)> {
        self.weight.product(op, tch, x, None)
    }
}
