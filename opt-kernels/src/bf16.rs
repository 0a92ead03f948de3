//! Products of bf16: weights are packed in pairs, activations are rounded and paired, and one instruction multiplies
//! and adds two numbers a lane.
//!
//! That is twice the products of an FMA, and half the loads. It is also what is commonly understood by computing in
//! bf16: LibTorch rounds activations before they meet weights of bf16, too. Sums are f32 from the first to the last.
//! Whoever wants activations as they are asks for [`Compute::F32`](crate::Compute::F32); then weights of bf16 are not
//! packed in pairs.

use crate::{
    Machine,
    gemm::{self, Block},
    memory::{Shared, reserve},
    output::Product,
    pack::Panels,
    simd::{Bf16x2, Kernel, Simd},
};
use opt_backend::Result;

/// Elements below which a parallel region costs more than it saves.
const ELEMENTS: usize = 1 << 14;

/// Computes the products of `x`, `[rows, depth]`, rounded to bf16.
///
/// # Safety
/// Every weight has `depth` inputs and was packed for the machine's level; bias, residual and output have the fitting
/// sizes, and nobody else accesses the outputs.
pub(crate) unsafe fn multiply(
    machine: Machine<'_>,
    x: &[f32],
    [rows, depth]: [usize; 2],
    products: &[(&Product<'_>, &Panels<Bf16x2>)],
) -> Result<()> {
    let pairs = round(machine, x, [rows, depth])?;
    let run = |block: Block<'_, Bf16x2, &Panels<Bf16x2>>| machine.level.run(block);
    // SAFETY: the caller's promise; a row has one place for each pair.
    unsafe { gemm::multiply_by(machine, &pairs, [rows, depth.div_ceil(2)], products, run) }
}

/// Rows `[rows, depth]` as `[rows, depth / 2]` pairs; where the depth is odd, the last of a row ends with a 0.
fn round(machine: Machine<'_>, x: &[f32], [rows, depth]: [usize; 2]) -> Result<Vec<Bf16x2>> {
    let places = depth.div_ceil(2);
    let mut pairs = reserve("linear", rows * places)?;
    pairs.resize(rows * places, Bf16x2::default());
    let target = Shared(pairs.as_mut_ptr());
    let share = (ELEMENTS / depth.max(1)).max(1);
    let body = |task: usize| {
        for row in task * share..rows.min((task + 1) * share) {
            // SAFETY: this row has so many places, and belongs to this task alone.
            let pairs = unsafe { std::slice::from_raw_parts_mut(target.at(row * places), places) };
            machine.level.run(Round { x: &x[row * depth..][..depth], pairs });
        }
    };
    if rows <= share {
        (0..rows.div_ceil(share)).for_each(body);
    } else {
        machine.pool.run(rows.div_ceil(share), &body)?;
    }
    Ok(pairs)
}

/// One row.
struct Round<'a> {
    x: &'a [f32],
    pairs: &'a mut [Bf16x2],
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (whole, rest) = self.x.as_chunks::<2>();
        for (pair, x) in self.pairs.iter_mut().zip(whole) {
            *pair = Bf16x2::new(x[0], x[1]);
        }
        if let (Some(pair), [x]) = (self.pairs.last_mut(), rest) {
            *pair = Bf16x2::new(*x, 0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Compute, memory::Guards, output::After, pack::Packed, pool::Pool, product, simd::SimdLevel};
    use opt_backend::{
        DType, HostMatrix,
        ndarray::{Array2, s},
    };

    /// The levels of this machine with dot products of bf16.
    fn levels() -> impl Iterator<Item = SimdLevel> {
        SimdLevel::ALL.into_iter().filter(|level| level.is_available() && level.bf16_dot())
    }

    fn random(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Array2::from_shape_simple_fn((rows, columns), || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
    }

    /// `x` times `w` held in bf16, as `[rows * outputs]`.
    fn product(
        level: SimdLevel,
        compute: Compute,
        threads: usize,
        x: &Array2<f32>,
        w: &Array2<f32>,
    ) -> Vec<f32> {
        let (pool, guards) = (Pool::new(threads).unwrap(), Guards::new(true));
        let machine = Machine { pool: &pool, guards: &guards, level, compute };
        let weights = Packed::new(machine, HostMatrix::F32(w.view()), DType::BF16, "test").unwrap();
        for (output, expected) in w.outer_iter().enumerate() {
            let mut row = vec![f32::NAN; w.ncols()];
            weights.read_row(output, &mut row);
            assert!(row.iter().zip(expected).all(|(found, w)| *found == DType::BF16.round(*w)));
        }
        let mut out = vec![f32::NAN; x.nrows() * w.nrows()];
        let target = Shared(out.as_mut_ptr());
        let products = [Product { weights: &weights, bias: None, after: After::Nothing, out: target }];
        // SAFETY: the output has room for every product, and all sizes fit.
        unsafe {
            product::multiply(machine, x.as_slice().unwrap(), [x.nrows(), x.ncols()], &products).unwrap()
        };
        drop(weights);
        assert_eq!(guards.take(), [""; 0]);
        out
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn products_are_those_of_rounded_numbers() {
        for level in levels() {
            for (depth, outputs) in [
                (0, 3),
                (1, 1),
                (2, 33),
                (3, 64),
                (31, 70),
                (255, 7),
                (511, 32),
                (512, 40),
                (513, 5),
                (777, 33),
                (1025, 31),
            ] {
                // Rows where they lie, tiles that stream their weights, and more of them.
                let (x, w) = (random(50, depth, 3), random(outputs, depth, 4));
                let whole = product(level, Compute::Int16, 2, &x, &w);
                for rows in (1..=20).chain([36, 37, 49]) {
                    let part = x.slice(s![..rows, ..]).to_owned();
                    let found = product(level, Compute::Int16, 1 + rows % 3, &part, &w);
                    assert_eq!(bits(&found), bits(&whole[..rows * outputs]), "{rows} x {depth} x {outputs}");
                }
                // With activations as they are, it is what a level without dot products of bf16 computes.
                let found = product(level, Compute::F32, 2, &x, &w);
                let expected = product(SimdLevel::Avx512Vnni, Compute::Int16, 1, &x, &w);
                assert_eq!(bits(&found), bits(&expected), "{depth} x {outputs}");
                for (i, found) in whole.into_iter().enumerate() {
                    let terms = x.row(i / outputs).into_iter().zip(w.row(i % outputs));
                    let terms = terms.map(|(x, w)| [x, w].map(|x| f64::from(DType::BF16.round(*x))));
                    let (mut exact, mut size) = (0.0, 0.0);
                    terms.for_each(|[x, w]| (exact, size) = (exact + x * w, size + (x * w).abs()));
                    // Roundings add up like steps at random, each half a unit of what has been summed.
                    let bound = 2.0 * (depth as f64).sqrt() * f64::from(f32::EPSILON) * size;
                    assert!((f64::from(found) - exact).abs() <= bound, "{depth}, {i}: {found}, not {exact}");
                }
            }
        }
    }

    /// Every row keeps to itself what is not finite or hardly a number.
    #[test]
    fn awkward_numbers_stay_in_their_rows() {
        let (depth, outputs) = (67, 37);
        let w = random(outputs, depth, 5).mapv(|w| w.abs() + 0.1);
        let mut x = random(16, depth, 6);
        x[[1, 66]] = f32::NAN;
        x[[2, 0]] = f32::INFINITY;
        x[[3, 1]] = f32::NEG_INFINITY;
        // Rounded, this is infinite.
        x[[4, 33]] = f32::MAX;
        (x[[5, 2]], x[[5, 3]]) = (f32::INFINITY, f32::NEG_INFINITY);
        x.row_mut(6).fill(1e-41);
        x.row_mut(7).fill(-0.0);
        for level in levels() {
            let whole = product(level, Compute::Int16, 2, &x, &w);
            for (row, found) in whole.chunks(outputs).enumerate() {
                let fits = |y: f32| match row {
                    1 | 5 => y.is_nan(),
                    2 | 4 => y == f32::INFINITY,
                    3 => y == f32::NEG_INFINITY,
                    6 => y.abs() < 1e-37,
                    7 => y == 0.0,
                    _ => y.is_finite(),
                };
                assert!(found.iter().all(|y| fits(*y)), "row {row}: {found:?}");
                let alone = x.slice(s![row..row + 1, ..]).to_owned();
                let alone = product(level, Compute::Int16, 1, &alone, &w);
                assert!(
                    found
                        .iter()
                        .zip(&alone)
                        .all(|(f, a)| f.to_bits() == a.to_bits() || f.is_nan() && a.is_nan())
                );
            }
        }
    }
}
