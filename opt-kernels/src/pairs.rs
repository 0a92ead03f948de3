//! Products of bf16: weights lie in pairs, activations are rounded to pairs, and one instruction multiplies and adds two
//! numbers a lane.
//!
//! That is twice the products of an FMA, and half the loads. It is also what is commonly understood by computing in
//! bf16: LibTorch rounds activations before they meet weights of bf16, too. Sums are f32 from the first to the last.
//! Whoever wants activations as they are asks for [`Compute::F32`](crate::Compute::F32): then [`Split`] reads the same
//! weights as f32.

use crate::{
    Machine,
    gemm::{self, Block, Task, Wide},
    memory::{Shared, reserve},
    output::Product,
    pack::{Panels, Source},
    simd::{Halves, Kernel, Pair, Simd},
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
    products: &[(&Product<'_>, &Panels<Pair>)],
) -> Result<()> {
    let pairs = round(machine, x, [rows, depth])?;
    let run = |task: Task<'_, Pair>, weights: &Panels<Pair>| machine.level.run(Block { task, weights });
    // SAFETY: the caller's promise; a row has one place for each pair.
    unsafe { gemm::multiply_by(machine, &pairs, [rows, depth.div_ceil(2)], products, run) }
}

/// Rows `[rows, depth]` as `[rows, depth / 2]` pairs; where the depth is odd, the last of a row ends with a 0.
fn round(machine: Machine<'_>, x: &[f32], [rows, depth]: [usize; 2]) -> Result<Vec<Pair>> {
    let places = depth.div_ceil(2);
    let mut pairs = reserve("linear", rows * places)?;
    pairs.resize(rows * places, Pair::default());
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
    pairs: &'a mut [Pair],
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (whole, rest) = self.x.as_chunks::<2>();
        for (pair, x) in self.pairs.iter_mut().zip(whole) {
            *pair = Pair::round(x[0], x[1]);
        }
        if let (Some(pair), [x]) = (self.pairs.last_mut(), rest) {
            *pair = Pair::round(*x, 0.0);
        }
    }
}

/// Panels of pairs whose numbers are multiplied one after the other, as f32.
pub(crate) struct Split<'a>(pub(crate) &'a Panels<Pair>);

impl Split<'_> {
    pub(crate) fn shape(&self) -> [usize; 2] {
        self.0.shape()
    }

    pub(crate) fn places(&self) -> usize {
        self.shape()[1]
    }

    pub(crate) fn read_row(&self, output: usize, row: &mut [f32]) {
        self.0.read_row(output, row);
    }
}

impl Source for Split<'_> {
    type Element = Halves;

    fn count(&self) -> usize {
        self.0.count()
    }

    fn bytes(&self, places: usize) -> usize {
        self.0.bytes(places.div_ceil(2))
    }

    #[inline(always)]
    fn address(&self, panel: usize, start: usize) -> *const u8 {
        self.0.address(panel, start / 2)
    }

    #[inline(always)]
    fn elements(&self, panel: usize, start: usize) -> Option<*const Halves> {
        Some(self.0.address(panel, start / 2).cast())
    }

    #[inline(always)]
    unsafe fn widen<S: Simd>(&self, s: S, panel: usize, start: usize, block: usize, wide: &mut Wide<f32>) {
        let width = 2 * S::LANES;
        let pairs = &self.0.panel(panel)[start / 2 * width..][..block.div_ceil(2) * width];
        for (i, pairs) in pairs.chunks_exact(width).enumerate() {
            for n in [0, S::LANES] {
                // SAFETY: two vectors of pairs become two rows of two vectors. Where the depth is odd, there is room for
                // one more row: that of a whole block is even.
                unsafe {
                    let from = pairs.as_ptr().add(n);
                    let to = wide.0.as_mut_ptr().add(2 * i * width + n);
                    let [first, second] = s.halves(s.load(from.cast()));
                    s.store(to, first);
                    s.store(to.add(width), second);
                }
            }
        }
    }
}
