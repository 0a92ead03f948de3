//! Every op on the memory of candle's CPU tensors.
//!
//! Operands have been checked by [`crate::backend`]; slices are indexed on that ground. Results do not depend on the
//! number of threads: work is cut by outputs, never within a sum.

mod attention;
mod attention_grad;
mod cache;
mod gradient;
mod norm;
mod pool;
mod product;
mod quantized;
mod simd;
mod vocab;

pub(crate) use attention::{Heads, Sequence};
pub(crate) use product::{After, Product};
pub(crate) use vocab::top_k_of;

use crate::{
    host,
    weights::{Kept, foreign},
};
use candle_core::Tensor;
use opt_backend::Result;
use opt_kernels::{Compute, host::Host};
use pool::Pool;
use pulp::Arch;

/// The threads and the instruction set that ops run with.
#[derive(Debug)]
pub(crate) struct Kernels {
    pool: Pool,
    arch: Arch,
    /// Whether candle multiplies with MKL or Accelerate.
    library: bool,
    /// What quantized weights are multiplied with. Its threads start with the first of them.
    host: Host,
}

impl Kernels {
    pub(crate) fn new(threads: usize, compute: Compute) -> Result<Self> {
        let library = candle_core::utils::has_mkl() || candle_core::utils::has_accelerate();
        let host = Host::new(threads, compute);
        Ok(Self { pool: Pool::new(threads)?, arch: Arch::new(), library, host })
    }

    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    pub(crate) fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The instruction set that loops run with.
    pub(crate) fn simd(&self) -> &'static str {
        match self.arch {
            #[cfg(target_arch = "x86_64")]
            Arch::V4(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Arch::V3(_) => "avx2",
            #[cfg(target_arch = "aarch64")]
            Arch::Neon(_) => "neon",
            _ => "scalar",
        }
    }

    /// The entries `ids` of a table.
    pub(crate) fn gather(&self, table: &Kept, ids: &[u32]) -> Result<Tensor> {
        let op = "gather";
        let table = match table {
            Kept::Dense(table) => table,
            Kept::Host(table) => return self.gather_quantized(op, table, ids),
            Kept::Tiles(_) => return Err(foreign(op)),
        };
        let shape = [ids.len(), table.shape[1]];
        let mut out = host::reserve(op, host::count(op, shape)?)?;
        let (storage, layout) = table.data.storage_and_layout();
        let held = product::held(op, &storage, layout, table.data.dtype())?;
        let mut wide = vec![0.0; shape[1]];
        for &id in ids {
            let start = id as usize * shape[1];
            out.extend_from_slice(held.part(start..start + shape[1]).widen(&mut wide));
        }
        host::tensor(op, out, &shape)
    }

    /// Adds `y` to `x`, in place.
    pub(crate) fn add(&self, op: &'static str, x: &Tensor, y: &Tensor) -> Result<()> {
        let (storage, layout) = y.storage_and_layout();
        let y = host::numbers::<f32>(op, &storage, layout)?;
        host::change::<f32, _>(op, x, |x| x.iter_mut().zip(y).for_each(|(x, y)| *x += y))
    }

    /// The rows `rows` of `x` `[_, width]`.
    pub(crate) fn take_rows(&self, x: &Tensor, width: usize, rows: &[usize]) -> Result<Tensor> {
        let op = "take_rows";
        let shape = [rows.len(), width];
        let mut out = host::reserve(op, host::count(op, shape)?)?;
        let (storage, layout) = x.storage_and_layout();
        let x = host::numbers::<f32>(op, &storage, layout)?;
        for row in rows {
            out.extend_from_slice(&x[row * width..(row + 1) * width]);
        }
        host::tensor(op, out, &shape)
    }
}

/// A matrix in memory: its element (i, j) is `data[i * strides[0] + j * strides[1]]`.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    data: &'a [f32],
    strides: [usize; 2],
}

impl Matrix<'_> {
    /// Fails to hold only if the caller has the sizes wrong.
    fn holds(self, [rows, columns]: [usize; 2]) -> bool {
        let last = (rows - 1) * self.strides[0] + (columns - 1) * self.strides[1];
        last < self.data.len()
    }
}

/// `out = scale · a b` on this thread, with a `[rows, depth]`, b `[depth, columns]` and `out` `[rows, columns]` in
/// row order.
fn gemm(out: &mut [f32], shape: [usize; 2], a: Matrix<'_>, b: Matrix<'_>, depth: usize, scale: f32) {
    if shape.contains(&0) || depth == 0 {
        out.fill(0.0);
        return;
    }
    multiply(out, shape, a, b, depth, scale, false);
}

/// `out += a b`, otherwise as [`gemm`].
fn gemm_add(out: &mut [f32], shape: [usize; 2], a: Matrix<'_>, b: Matrix<'_>, depth: usize) {
    if !shape.contains(&0) && depth > 0 {
        multiply(out, shape, a, b, depth, 1.0, true);
    }
}

/// A product of some rows, columns and depth, added to `out` or in its place.
fn multiply(
    out: &mut [f32],
    [rows, columns]: [usize; 2],
    a: Matrix<'_>,
    b: Matrix<'_>,
    depth: usize,
    scale: f32,
    add: bool,
) {
    assert!(a.holds([rows, depth]) && b.holds([depth, columns]) && out.len() >= rows * columns);
    let stride = |n: usize| n as isize;
    // SAFETY: by the assertion every element that the three matrices consist of lies within their slices, and `out`
    // is borrowed mutably, so that it overlaps neither operand.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            depth,
            out.as_mut_ptr(),
            1,
            stride(columns),
            add,
            a.data.as_ptr(),
            stride(a.strides[1]),
            stride(a.strides[0]),
            b.data.as_ptr(),
            stride(b.strides[1]),
            stride(b.strides[0]),
            if add { 1.0 } else { 0.0 },
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
