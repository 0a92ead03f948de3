//! Quantized weights: packed in memory, on every device.
//!
//! On the CPU they are multiplied by the kernels of `opt-kernels`, on the memory of LibTorch's tensors. On other
//! devices codes are a tensor of bytes that LibTorch's ops expand to f32, some rows at a time. Results are f32 in both.

use crate::{
    Tch,
    activation::activate,
    backend::sum,
    error::{Tried, torch},
    tensor::{Held, Matrix, Tensor, read, read_vector, sizes, upload, upload_vector},
};
use opt_backend::{
    Error, ErrorKind, HostVector, Result, Then, check,
    ndarray::{Array1, Array2, ArrayView2},
    quant::Quantized,
};
use opt_kernels::{
    host::{Product, Weight},
    output::After,
    rows::{Numbers, Rows},
};
use std::{mem::MaybeUninit, ops::Range, slice};
use tch::{Device, Kind};

/// Elements of a weight that the CPU's kernels expand at a time, where LibTorch multiplies: 4 MiB.
const EXPANDED: usize = 1 << 20;

/// A quantized weight `[out, in]`, and its bias if it is a linear's.
pub(crate) enum Coded {
    /// For the CPU's kernels.
    Host { weight: Box<Weight>, bias: Option<Vec<f32>> },
    /// For LibTorch's ops.
    Tiles { tiles: Box<Tiles>, bias: Option<Held> },
}

/// A quantized weight on a device. What its parts mean: [`opt_kernels::rows`].
pub(crate) struct Tiles {
    shape: [usize; 2],
    bytes: Held,
    levels: Held,
    /// f16 or f32, as are zero points.
    scales: Held,
    zeros: Option<Held>,
    group: usize,
    places: usize,
    order: Option<Held>,
    /// Rows that are expanded at a time.
    tile: usize,
}

impl Coded {
    pub(crate) fn new(
        op: &'static str,
        tch: &Tch,
        weight: &Quantized,
        bias: Option<HostVector<'_>>,
    ) -> Result<Self> {
        if let Some(bias) = &bias {
            check::length(op, "bias", bias.len(), weight.shape()[0])?;
        }
        if tch.host_kernels() {
            let bias = bias.map(|bias| bias.to_f32().to_vec());
            return Ok(Coded::Host { weight: Box::new(tch.host.pack(weight, op)?), bias });
        }
        let bias = match bias {
            Some(bias) => {
                let bias = upload_vector(op, bias, tch.device())?.f_to_dtype(Kind::Float, false, false);
                Some(Held::new(bias.map_err(torch(op))?))
            }
            None => None,
        };
        Ok(Coded::Tiles { tiles: Box::new(Tiles::new(op, weight, tch.device())?), bias })
    }

    /// `[out, in]`
    pub(crate) fn shape(&self) -> [usize; 2] {
        match self {
            Coded::Host { weight, .. } => weight.shape(),
            Coded::Tiles { tiles, .. } => tiles.shape,
        }
    }

    /// The rows `rows` in f32.
    pub(crate) fn read(&self, op: &'static str, rows: Range<usize>) -> Result<Array2<f32>> {
        let [outputs, inputs] = self.shape();
        check::range(op, &rows, outputs)?;
        let shape = [rows.len(), inputs];
        let data = match self {
            Coded::Host { weight, .. } => weight.read(op, rows)?,
            Coded::Tiles { tiles, .. } => tiles.read(op, rows)?,
        };
        Array2::from_shape_vec(shape, data).map_err(|error| Error::shape(op, error))
    }

    pub(crate) fn read_bias(&self, op: &'static str) -> Result<Option<Array1<f32>>> {
        match self {
            Coded::Host { bias, .. } => Ok(bias.clone().map(Array1::from_vec)),
            Coded::Tiles { tiles, bias } => {
                bias.as_ref().map(|bias| read_vector(op, bias, tiles.shape[0])).transpose()
            }
        }
    }

    /// The entries `ids`, which are there, as f32 rows.
    pub(crate) fn gather(&self, op: &'static str, tch: &Tch, ids: &[u32]) -> Result<tch::Tensor> {
        match self {
            Coded::Host { weight, .. } => {
                let shape = [ids.len(), weight.shape()[1]];
                let rows = tch::Tensor::f_zeros(sizes(shape), (Kind::Float, Device::Cpu));
                let mut rows = rows.map_err(torch(op))?;
                tch.host.gather(op, weight, ids, changeable(op, &mut rows)?)?;
                Ok(rows)
            }
            Coded::Tiles { tiles, .. } => {
                let shape = [ids.len(), tiles.shape[1]];
                if shape.contains(&0) {
                    return tch::Tensor::f_zeros(sizes(shape), (Kind::Float, tch.device()))
                        .map_err(torch(op));
                }
                let indices = tch.indices(op, ids.iter().map(|id| i64::from(*id)))?;
                tiles.expand(ids.len(), |x| x.f_index_select(0, &indices)).map_err(torch(op))
            }
        }
    }

    /// Calls `each` with some rows of the weight in f32, and the number of the first, from the first to the last.
    pub(crate) fn each_block(
        &self,
        op: &'static str,
        tch: &Tch,
        mut each: impl FnMut(usize, &tch::Tensor) -> Result<()>,
    ) -> Result<()> {
        let [outputs, inputs] = self.shape();
        if outputs == 0 || inputs == 0 {
            return Ok(());
        }
        let weight = match self {
            Coded::Host { weight, .. } => weight,
            Coded::Tiles { tiles, .. } => {
                for (i, rows) in tiles.tiles(0..outputs).enumerate() {
                    each(i * tiles.tile, &rows.map_err(torch(op))?)?;
                }
                return Ok(());
            }
        };
        let share = (EXPANDED / inputs).clamp(1, outputs);
        // One buffer for all of them: fresh memory costs as much as filling it.
        let size = sizes([share, inputs]);
        let mut block = tch::Tensor::f_zeros(size, (Kind::Float, Device::Cpu)).map_err(torch(op))?;
        for start in (0..outputs).step_by(share) {
            let count = share.min(outputs - start);
            let ids: Vec<u32> = (start..start + count).map(|row| row as u32).collect();
            let to = changeable(op, &mut block)?;
            tch.host.gather(op, weight, &ids, &mut to[..count * inputs])?;
            each(start, &block.f_narrow(0, 0, count as i64).map_err(torch(op))?)?;
        }
        Ok(())
    }

    /// `x W^T` without bias, and that it is f32: logits.
    pub(crate) fn product(&self, op: &'static str, tch: &Tch, x: &Tensor) -> Result<(tch::Tensor, Kind)> {
        let y = match self {
            Coded::Host { weight, .. } => {
                let [y] = products(op, tch, x, [Product { weight, bias: None, after: After::Nothing }])?;
                y
            }
            Coded::Tiles { tiles, .. } => tiles.product(op, tch, x)?,
        };
        Ok((y, Kind::Float))
    }

    /// `x W^T + b`, and what comes after. Widths and the residual's shape have been checked.
    pub(crate) fn apply(
        &self,
        op: &'static str,
        tch: &Tch,
        x: &Tensor,
        then: Then<Tensor>,
    ) -> Result<Tensor> {
        let shape = [x.shape()[0], self.shape()[0]];
        let (tiles, bias) = match self {
            Coded::Tiles { tiles, bias } => (tiles, bias),
            Coded::Host { weight, bias } => {
                let residual = match &then {
                    Then::Add(residual) => Some(contiguous(op, residual)?),
                    _ => None,
                };
                let after = match (&then, &residual) {
                    (Then::Activate(activation), _) => After::Activate(*activation),
                    (_, Some(residual)) => After::Add(numbers(op, residual)?),
                    (Then::Nothing, _) => After::Nothing,
                    (other, _) => return Err(unknown(op, other)),
                };
                let [y] = products(op, tch, x, [Product { weight, bias: bias.as_deref(), after }])?;
                return Ok(Tensor::new(y, Kind::Float, shape));
            }
        };
        let mut y = tiles.product(op, tch, x)?;
        if let Some(bias) = bias {
            let _ = y.f_add_(bias).map_err(torch(op))?;
        }
        match then {
            Then::Nothing => Ok(Tensor::new(y, Kind::Float, shape)),
            Then::Activate(activation) => {
                let (y, kind) = activate(op, activation, y, Kind::Float)?;
                Ok(Tensor::new(y, kind, shape))
            }
            Then::Add(residual) => sum(op, residual, &y),
            other => Err(unknown(op, &other)),
        }
    }
}

pub(crate) fn unknown(op: &'static str, then: &Then<Tensor>) -> Error {
    Error::new(ErrorKind::Unsupported, op, format_args!("this backend does not know {then:?}"))
}

/// Queries, keys and values of one input, whose width has been checked: one pass over it where the kernels are ours.
pub(crate) fn qkv<'a>(op: &'static str, tch: &Tch, x: &Tensor, all: [&'a Coded; 3]) -> Result<[Tensor; 3]> {
    let host = |coded: &'a Coded| match coded {
        Coded::Host { weight, bias } => {
            Some(Product { weight, bias: bias.as_deref(), after: After::Nothing })
        }
        Coded::Tiles { .. } => None,
    };
    if let [Some(q), Some(k), Some(v)] = all.map(host) {
        let shapes = all.map(|coded| [x.shape()[0], coded.shape()[0]]);
        let [q, k, v] = products(op, tch, x, [q, k, v])?;
        let [of_q, of_k, of_v] = shapes;
        let tensor = |y, shape| Tensor::new(y, Kind::Float, shape);
        return Ok([tensor(q, of_q), tensor(k, of_k), tensor(v, of_v)]);
    }
    let [q, k, v] = all.map(|coded| coded.apply(op, tch, x, Then::Nothing));
    Ok([q?, k?, v?])
}

/// Products on the CPU, of activations in whatever format, in f32.
fn products<const N: usize>(
    op: &'static str,
    tch: &Tch,
    x: &Tensor,
    products: [Product<'_>; N],
) -> Result<[tch::Tensor; N]> {
    let shape = x.shape();
    let x = contiguous(op, x)?;
    let mut made = Vec::with_capacity(N);
    for product in &products {
        let size = sizes([shape[0], product.weight.shape()[0]]);
        made.push(tch::Tensor::f_empty(size, (Kind::Float, Device::Cpu)).map_err(torch(op))?);
    }
    let mut outs = made.iter_mut().map(|y| memory(op, y)).collect::<Result<Vec<_>>>()?;
    tch.host.multiply_into(op, numbers(op, &x)?, shape, &products, &mut outs)?;
    made.try_into().map_err(|_| Error::new(ErrorKind::Device, op, "products went missing"))
}

/// Activations as rows of f32 that lie end to end.
pub(crate) fn contiguous<'a>(op: &'static str, x: &'a Tensor) -> Result<Matrix<'a>> {
    let x = x.matrix_as(op, Kind::Float)?;
    if x.is_contiguous() { Ok(x) } else { x.f_contiguous().map(Matrix::Own).map_err(torch(op)) }
}

/// Where the f32 of a contiguous tensor on the CPU lie, and how many.
fn located(op: &'static str, x: &tch::Tensor) -> Result<(*mut f32, usize)> {
    if x.device() != Device::Cpu || x.f_kind().map_err(torch(op))? != Kind::Float || !x.is_contiguous() {
        return Err(Error::new(ErrorKind::Device, op, "expected contiguous f32 in main memory"));
    }
    let data = x.data_ptr().cast::<f32>();
    // Tensors of no elements have no memory.
    Ok(if data.is_null() { (std::ptr::dangling_mut(), 0) } else { (data, x.numel()) })
}

/// The numbers of a contiguous tensor on the CPU.
pub(crate) fn numbers<'a>(op: &'static str, x: &'a tch::Tensor) -> Result<&'a [f32]> {
    let (data, len) = located(op, x)?;
    // SAFETY: as many f32 are there, and stay while the tensor does. Nobody writes to a tensor of activations that
    // another holds (see `Held`).
    Ok(unsafe { slice::from_raw_parts(data, len) })
}

/// The numbers of a contiguous tensor on the CPU whose memory nobody else holds and that has been written to.
pub(crate) fn changeable<'a>(op: &'static str, x: &'a mut tch::Tensor) -> Result<&'a mut [f32]> {
    let (data, len) = located(op, x)?;
    // SAFETY: as many f32 are there, and the tensor, the only one of this memory, is borrowed mutably.
    Ok(unsafe { slice::from_raw_parts_mut(data, len) })
}

/// The memory of a contiguous tensor on the CPU that nobody else has seen.
fn memory<'a>(op: &'static str, x: &'a mut tch::Tensor) -> Result<&'a mut [MaybeUninit<f32>]> {
    let (data, len) = located(op, x)?;
    // SAFETY: there is room for as many f32, and the tensor is borrowed mutably.
    Ok(unsafe { slice::from_raw_parts_mut(data.cast(), len) })
}

impl Tiles {
    fn new(op: &'static str, weight: &Quantized, device: Device) -> Result<Self> {
        let rows = Rows::new(weight);
        let tile = rows.tile();
        let Rows { shape, bytes, per_byte, levels, scales, zeros, group, places, order } = rows;
        let beside = [shape[0], places / group];
        Ok(Self {
            shape,
            bytes: hold(op, &bytes, [shape[0], places / per_byte], device)?,
            levels: hold(op, &levels, [256, per_byte], device)?,
            scales: hold_numbers(op, scales, beside, device)?,
            zeros: zeros.map(|zeros| hold_numbers(op, zeros, beside, device)).transpose()?,
            group,
            places,
            order: match order {
                Some(order) => {
                    let order = Array1::from_iter(order.into_iter().map(i64::from));
                    Some(Held::new(upload(op, order.view(), device)?))
                }
                None => None,
            },
            tile,
        })
    }

    /// Those of the rows that `part` takes of each tensor, `count` of them, `[count, in]` in f32. Of elements there
    /// must be some.
    fn expand(&self, count: usize, part: impl Fn(&tch::Tensor) -> Tried<tch::Tensor>) -> Tried<tch::Tensor> {
        let bytes = part(&self.bytes)?.f_reshape([-1])?.f_totype(Kind::Int)?;
        let groups = self.places / self.group;
        let levels = self.levels.f_index_select(0, &bytes)?;
        let mut x = levels.f_reshape(sizes([count, groups, self.group]))?;
        let beside = |x: &tch::Tensor| part(x)?.f_totype(Kind::Float)?.f_unsqueeze(2);
        if let Some(zeros) = &self.zeros {
            let _ = x.f_sub_(&beside(zeros)?)?;
        }
        let _ = x.f_mul_(&beside(&self.scales)?)?;
        let x = x.f_reshape(sizes([count, self.places]))?;
        match &self.order {
            Some(order) => x.f_index_select(1, order),
            None => Ok(x),
        }
    }

    /// The rows `rows` in f32, expanded a tile at a time.
    fn tiles(&self, rows: Range<usize>) -> impl Iterator<Item = Tried<tch::Tensor>> {
        rows.clone().step_by(self.tile).map(move |start| {
            let count = self.tile.min(rows.end - start);
            self.expand(count, |x| x.f_narrow(0, start as i64, count as i64))
        })
    }

    /// `x W^T`, contiguous and in f32.
    fn product(&self, op: &'static str, tch: &Tch, x: &Tensor) -> Result<tch::Tensor> {
        let [rows, inputs] = x.shape();
        let shape = [rows, self.shape[0]];
        if shape.contains(&0) || inputs == 0 {
            return tch::Tensor::f_zeros(sizes(shape), (Kind::Float, tch.device())).map_err(torch(op));
        }
        let x = x.matrix_as(op, Kind::Float)?;
        let parts = self.tiles(0..self.shape[0]).map(|weight| x.f_matmul(&weight?.f_transpose(0, 1)?));
        let mut parts = parts.collect::<Tried<Vec<_>>>().map_err(torch(op))?;
        match (parts.pop(), parts.is_empty()) {
            (Some(only), true) => Ok(only),
            (last, _) => {
                parts.extend(last);
                tch::Tensor::f_cat(&parts, 1).map_err(torch(op))
            }
        }
    }

    /// The rows `rows`, end to end in host memory.
    fn read(&self, op: &'static str, rows: Range<usize>) -> Result<Vec<f32>> {
        let mut data = Vec::new();
        if self.shape[1] == 0 {
            return Ok(data);
        }
        for tile in self.tiles(rows) {
            let tile = tile.map_err(torch(op))?;
            data.extend(read(op, &tile, tile.numel())?);
        }
        Ok(data)
    }
}

fn hold<T: tch::kind::Element + Copy>(
    op: &'static str,
    data: &[T],
    shape: [usize; 2],
    device: Device,
) -> Result<Held> {
    let array = ArrayView2::from_shape(shape, data).map_err(|error| Error::shape(op, error))?;
    Ok(Held::new(upload(op, array, device)?))
}

fn hold_numbers(op: &'static str, numbers: Numbers, shape: [usize; 2], device: Device) -> Result<Held> {
    match numbers {
        Numbers::Half(numbers) => hold(op, &numbers, shape, device),
        Numbers::Single(numbers) => hold(op, &numbers, shape, device),
    }
}
