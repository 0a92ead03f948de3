//! Products with quantized weights for backends whose tensors belong to a library, as far as these lie in main memory.
//!
//! Such a backend has the library's threads for everything else. Those here start with its first quantized weight.
//! Everything is safe to call: slices are checked against the weight.

use crate::{
    Compute, Machine,
    memory::{Guards, Shared, reserve},
    output::{self, After},
    pack::Packed,
    pool::Pool,
    product,
    simd::SimdLevel,
};
use opt_backend::{Result, check, quant::Quantized};
use std::{
    fmt,
    mem::MaybeUninit,
    ops::Range,
    sync::{Mutex, OnceLock, PoisonError},
};

/// Elements of a table that a task reads.
const ELEMENTS: usize = 4096;

/// Threads, once they are needed, and how they compute: one for each value of a backend.
pub struct Host {
    threads: usize,
    compute: Compute,
    level: SimdLevel,
    guards: Guards,
    pool: OnceLock<Pool>,
}

/// A quantized weight `[out, in]`, packed for the best instruction set of this machine.
// Only `Host` makes them, so that all are packed for the one level that products run at.
pub struct Weight(Packed);

/// A product with one weight.
pub struct Product<'a> {
    pub weight: &'a Weight,
    /// `[out]`
    pub bias: Option<&'a [f32]>,
    /// Adds `[rows, out]`, if it adds.
    pub after: After<'a>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host")
            .field("threads", &self.threads)
            .field("compute", &self.compute)
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Weight").field(&self.shape()).finish()
    }
}

impl Weight {
    /// `[out, in]`
    pub fn shape(&self) -> [usize; 2] {
        self.0.shape()
    }

    /// The rows `rows` as f32, end to end.
    pub fn read(&self, op: &'static str, rows: Range<usize>) -> Result<Vec<f32>> {
        let [outputs, inputs] = self.shape();
        check::range(op, &rows, outputs)?;
        let len = rows.len().saturating_mul(inputs);
        let mut data = reserve(op, len)?;
        data.resize(len, 0.0);
        for (output, row) in rows.zip(data.chunks_exact_mut(inputs.max(1))) {
            self.0.read_row(output, row);
        }
        Ok(data)
    }
}

impl Host {
    /// `threads` in all, the caller's included.
    pub fn new(threads: usize, compute: Compute) -> Self {
        let level = SimdLevel::best();
        Self { threads, compute, level, guards: Guards::default(), pool: OnceLock::new() }
    }

    pub fn compute(&self) -> Compute {
        self.compute
    }

    fn machine(&self) -> Result<Machine<'_>> {
        let pool = match self.pool.get() {
            Some(pool) => pool,
            None => {
                let pool = Pool::new(self.threads)?;
                // Of two threads that come here at once, one finds its pool dropped.
                self.pool.get_or_init(|| pool)
            }
        };
        Ok(Machine { pool, guards: &self.guards, level: self.level, compute: self.compute })
    }

    /// Runs `body` on each task, on any thread.
    ///
    /// # Errors
    /// As [`Pool::run`].
    pub fn each<T: Send>(&self, tasks: Vec<T>, body: impl Fn(T) + Sync) -> Result<()> {
        if tasks.len() <= 1 {
            tasks.into_iter().for_each(body);
            return Ok(());
        }
        let tasks: Vec<_> = tasks.into_iter().map(|task| Mutex::new(Some(task))).collect();
        self.machine()?.pool.run(tasks.len(), &|i| {
            let task =
                tasks.get(i).and_then(|task| task.lock().unwrap_or_else(PoisonError::into_inner).take());
            if let Some(task) = task {
                body(task);
            }
        })
    }

    /// Packs a weight.
    pub fn pack(&self, weight: &Quantized, op: &'static str) -> Result<Weight> {
        Packed::quantized(self.machine()?, weight, op).map(Weight)
    }

    /// Products of the rows `x`, each into its slice of `outs`, `[rows, out]`: every element is written, unless this
    /// fails.
    pub fn multiply_into(
        &self,
        op: &'static str,
        x: &[f32],
        [rows, inputs]: [usize; 2],
        products: &[Product<'_>],
        outs: &mut [&mut [MaybeUninit<f32>]],
    ) -> Result<()> {
        check::length(op, "row", x.len(), rows.saturating_mul(inputs))?;
        check::length(op, "list of results", outs.len(), products.len())?;
        let mut all = Vec::with_capacity(products.len());
        for (product, out) in products.iter().zip(outs) {
            let [outputs, expected] = product.weight.shape();
            let len = rows.saturating_mul(outputs);
            check::width(op, inputs, expected)?;
            check::length(op, "result", out.len(), len)?;
            if let Some(bias) = product.bias {
                check::length(op, "bias", bias.len(), outputs)?;
            }
            if let After::Add(residual) = product.after {
                check::length(op, "residual", residual.len(), len)?;
            }
            if len > 0 {
                let out = Shared(out.as_mut_ptr().cast::<f32>());
                let Product { weight, bias, after } = *product;
                all.push(output::Product { weights: &weight.0, bias, after, out });
            }
        }
        if all.is_empty() {
            return Ok(());
        }
        // SAFETY: widths and lengths were just checked, weights are packed for this level (see `Weight`), and results
        // are borrowed mutably.
        unsafe { product::multiply(self.machine()?, x, [rows, inputs], &all) }
    }

    /// Products of the rows `x`, `[rows, out]` each.
    pub fn multiply(
        &self,
        op: &'static str,
        x: &[f32],
        [rows, inputs]: [usize; 2],
        products: &[Product<'_>],
    ) -> Result<Vec<Vec<f32>>> {
        let lens: Vec<usize> = products.iter().map(|p| rows.saturating_mul(p.weight.shape()[0])).collect();
        let mut data = lens.iter().map(|&len| reserve::<f32>(op, len)).collect::<Result<Vec<_>>>()?;
        let each = data.iter_mut().zip(&lens);
        let mut outs: Vec<_> =
            each.map(|(data, &len)| data.spare_capacity_mut().get_mut(..len).unwrap_or_default()).collect();
        self.multiply_into(op, x, [rows, inputs], products, &mut outs)?;
        for (data, &len) in data.iter_mut().zip(&lens) {
            // SAFETY: slices of this length have just been written, or there was an error.
            unsafe { data.set_len(len) };
        }
        Ok(data)
    }

    /// The rows `ids` of a table, end to end into `out`.
    pub fn gather(&self, op: &'static str, table: &Weight, ids: &[u32], out: &mut [f32]) -> Result<()> {
        let [entries, width] = table.shape();
        check::ids(op, ids, entries)?;
        check::length(op, "result", out.len(), ids.len().saturating_mul(width))?;
        if width == 0 {
            return Ok(());
        }
        let share = (ELEMENTS / width).max(1);
        let target = Shared(out.as_mut_ptr());
        self.machine()?.pool.run(ids.len().div_ceil(share), &|task| {
            for (at, &id) in ids.iter().enumerate().skip(task * share).take(share) {
                // SAFETY: there is such a row, and it belongs to this task alone.
                let row = unsafe { std::slice::from_raw_parts_mut(target.at(at * width), width) };
                table.0.read_row(id as usize, row);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opt_backend::{
        ErrorKind,
        ndarray::Array2,
        quant::{Groups, Levels, Zeros},
    };

    fn weight([out, input]: [usize; 2]) -> Quantized {
        let codes = Array2::from_shape_fn((out, input), |(o, i)| ((o * 7 + i * 3) % 16) as u8);
        let scales = Array2::from_elem((out, 1), 0.25);
        let levels = Levels::Integers { bits: 4 };
        Quantized::new(codes, scales, Zeros::Same(8), levels, Groups::Runs(input.max(1))).unwrap()
    }

    #[test]
    fn products_and_rows_are_the_references() {
        for compute in [Compute::Int8, Compute::Int16, Compute::F32] {
            let host = Host::new(2, compute);
            assert!(host.pool.get().is_none(), "no threads before there is work");
            let weight = weight([37, 64]);
            let (exact, held) = (weight.dequantize(), host.pack(&weight, "test").unwrap());
            assert_eq!(held.read("test", 3..9).unwrap(), exact.as_slice().unwrap()[3 * 64..9 * 64]);
            let mut rows = vec![1.0; 2 * 64];
            host.gather("test", &held, &[36, 0], &mut rows).unwrap();
            assert_eq!(&rows[..64], &exact.as_slice().unwrap()[36 * 64..]);
            // Integers to 127 are themselves in int8.
            let x: Vec<f32> =
                (0..3 * 64).map(|i| if i % 32 == 0 { 127.0 } else { (i % 11) as f32 }).collect();
            let product = || Product { weight: &held, bias: None, after: After::Nothing };
            let found = host.multiply("test", &x, [3, 64], &[product(), product()]).unwrap();
            let expected = Array2::from_shape_vec((3, 64), x).unwrap().dot(&exact.t());
            for found in found {
                assert!(found.iter().zip(&expected).all(|(f, e)| (f - e).abs() < 1e-3), "{compute}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let host = Host::new(1, Compute::Int8);
        let held = host.pack(&weight([5, 8]), "test").unwrap();
        let multiply = |x: usize, shape, bias: Option<&[f32]>, after| {
            let product = Product { weight: &held, bias, after };
            host.multiply("test", &vec![0.0; x], shape, &[product]).map(|found| found[0].len())
        };
        assert_eq!(multiply(16, [2, 8], Some(&[0.0; 5]), After::Add(&[0.0; 10])).unwrap(), 10);
        assert_eq!(multiply(0, [0, 8], None, After::Nothing).unwrap(), 0);
        for refused in [
            multiply(15, [2, 8], None, After::Nothing),
            multiply(14, [2, 7], None, After::Nothing),
            multiply(16, [2, 8], Some(&[0.0; 4]), After::Nothing),
            multiply(16, [2, 8], None, After::Add(&[0.0; 9])),
            multiply(16, [usize::MAX, 8], None, After::Nothing),
            host.gather("test", &held, &[5], &mut [0.0; 8]).map(|()| 0),
            host.gather("test", &held, &[4], &mut [0.0; 7]).map(|()| 0),
            held.read("test", 4..6).map(|_| 0),
        ] {
            assert!(matches!(refused.unwrap_err().kind(), ErrorKind::Shape | ErrorKind::OutOfMemory));
        }
    }
}
