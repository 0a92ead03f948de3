//! Where products go, and what is done to them on the way.

use crate::{
    memory::Shared,
    pack::Packed,
    simd::{Simd, SimdLevel, math},
};
use opt_backend::Activation;

/// Elements of the largest tile.
pub const TILE: usize = 12 * 32;

/// What happens to a product before it is stored.
#[derive(Clone, Copy)]
pub enum After<'a> {
    Nothing,
    Activate(Activation),
    /// Adds a matrix of the output's shape.
    Add(&'a [f32]),
}

/// One matrix to multiply by, and where the product goes.
pub struct Product<'a> {
    pub weights: &'a Packed,
    pub bias: Option<&'a [f32]>,
    pub after: After<'a>,
    /// `[rows, outputs]`, every element of which is written.
    pub out: Shared<f32>,
}

/// The output of one product, for the threads that compute it.
#[derive(Clone, Copy)]
pub struct Output<'a> {
    pub product: &'a Product<'a>,
    /// Columns of the output.
    pub outputs: usize,
    pub level: SimdLevel,
}

impl Output<'_> {
    /// Where the outputs of `row` and `panel` are, and how many.
    ///
    /// # Safety
    /// Both exist.
    #[inline(always)]
    pub unsafe fn target<S: Simd>(&self, _: S, row: usize, panel: usize) -> (*mut f32, usize) {
        let column = panel * 2 * S::LANES;
        // SAFETY: the caller's promise.
        let out = unsafe { self.product.out.at(row * self.outputs + column) };
        (out, (2 * S::LANES).min(self.outputs - column))
    }

    /// # Safety
    /// The rows and the panel exist, and nobody else accesses their outputs.
    #[inline(always)]
    pub unsafe fn copy_out<S: Simd>(
        &self,
        s: S,
        sums: &[f32; TILE],
        rows: std::ops::Range<usize>,
        panel: usize,
    ) {
        for (r, row) in rows.enumerate() {
            // SAFETY: `target` gives as many elements as there are.
            unsafe {
                let (out, columns) = self.target(s, row, panel);
                std::ptr::copy_nonoverlapping(sums.as_ptr().add(r * 2 * S::LANES), out, columns);
            }
        }
    }

    /// # Safety
    /// The rows and the panel exist and have been written, and nobody else accesses their outputs.
    #[inline(always)]
    pub unsafe fn copy_in<S: Simd>(
        &self,
        s: S,
        sums: &mut [f32; TILE],
        rows: std::ops::Range<usize>,
        panel: usize,
    ) {
        for (r, row) in rows.enumerate() {
            // SAFETY: `target` gives as many elements as there are.
            unsafe {
                let (out, columns) = self.target(s, row, panel);
                std::ptr::copy_nonoverlapping(out, sums.as_mut_ptr().add(r * 2 * S::LANES), columns);
            }
        }
    }

    /// Bias, then activation or residual.
    ///
    /// # Safety
    /// The rows and the panel exist and have been written, and nobody else accesses their outputs.
    #[inline(always)]
    pub unsafe fn finish<S: Simd>(&self, s: S, rows: std::ops::Range<usize>, panel: usize) {
        let column = panel * 2 * S::LANES;
        let product = self.product;
        if product.bias.is_none() && matches!(product.after, After::Nothing) {
            return;
        }
        for row in rows {
            // SAFETY: the caller's promise; bias has one element a column and the residual the output's shape.
            let (out, bias, other) = unsafe {
                let (start, columns) = self.target(s, row, panel);
                let out = std::slice::from_raw_parts_mut(start, columns);
                let bias =
                    product.bias.map(|bias| std::slice::from_raw_parts(bias.as_ptr().add(column), columns));
                let other = match product.after {
                    After::Add(other) => other.as_ptr().add(row * self.outputs + column),
                    _ => start.cast_const(),
                };
                (out, bias, other)
            };
            if let Some(bias) = bias {
                out.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
            }
            match product.after {
                After::Nothing => (),
                // The one that the published models use, and too cheap for a call.
                After::Activate(Activation::Relu) => {
                    out.iter_mut().for_each(|x| *x = if *x < 0.0 { 0.0 } else { *x });
                }
                After::Activate(activation) => self.level.run(math::Activate(activation, out)),
                After::Add(_) => {
                    // SAFETY: the residual has the output's shape.
                    let other = unsafe { std::slice::from_raw_parts(other, out.len()) };
                    out.iter_mut().zip(other).for_each(|(x, o)| *x += o);
                }
            }
        }
    }
}
