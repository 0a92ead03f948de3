//! Inputs: reproducible numbers, and what is done with them all the time.

use super::{Kit, Outcome, Tolerance};
use crate::{Backend, DType, HostLinear, HostMatrix, HostVector, Result};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

/// A source of numbers for one case (splitmix64, Steele et al. 2014), and the tolerance to judge results by.
#[derive(Clone)]
pub(super) struct Data {
    state: u64,
    kit: Kit,
}

impl Data {
    /// A source whose seed is a hash (FNV-1a) of the case's name.
    pub(super) fn new(name: &str, kit: Kit) -> Self {
        let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        Self { state: name.bytes().fold(0xcbf2_9ce4_8422_2325, hash), kit }
    }

    pub(super) fn tolerance(&self) -> Tolerance {
        self.kit.tolerance
    }

    /// `x` as it is when it meets weights that are held as `dtype`.
    pub(super) fn met(&self, x: &Array2<f32>, dtype: DType) -> Array2<f32> {
        if self.kit.rounds_for(dtype) { x.mapv(|v| dtype.round(v)) } else { x.clone() }
    }

    /// The tolerance for products with quantized weights.
    pub(super) fn quantized_tolerance(&self) -> Tolerance {
        self.kit.quantized
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end` (which is not 0).
    pub(super) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// About normal, of mean 0 and deviation 1: the sum of four uniform numbers.
    pub(super) fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: u64 = (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum();
        (sum as f32 / 65535.0 - 2.0) * 3f32.sqrt()
    }

    /// Activations `[rows, width]` that the backend can hold without rounding.
    pub(super) fn matrix(&mut self, rows: usize, width: usize) -> Array2<f32> {
        let x = Array2::from_shape_simple_fn((rows, width), || self.normal());
        self.held(x)
    }

    /// The nearest numbers that the backend can hold as activations.
    pub(super) fn held(&self, x: Array2<f32>) -> Array2<f32> {
        let dtype = self.kit.activations;
        x.mapv_into(|v| dtype.round(v))
    }

    /// Integers in `-range..=range` as activations: sums of their products are exact in any order.
    pub(super) fn integers(&mut self, rows: usize, width: usize, range: usize) -> Array2<f32> {
        Array2::from_shape_simple_fn((rows, width), || self.below(2 * range + 1) as f32 - range as f32)
    }

    pub(super) fn vector(&mut self, len: usize) -> Array1<f32> {
        Array1::from_shape_simple_fn(len, || self.normal())
    }

    /// A weight `[out, in]` that keeps the size of what it is applied to.
    pub(super) fn weight(&mut self, out: usize, input: usize) -> Array2<f32> {
        let scale = (input.max(1) as f32).sqrt().recip();
        Array2::from_shape_simple_fn((out, input), || scale * self.normal())
    }

    /// A linear on the backend, and its weights as the backend holds them.
    pub(super) fn linear<B: Backend>(
        &mut self,
        b: &B,
        [input, out]: [usize; 2],
        bias: bool,
        dtype: DType,
    ) -> Outcome<(B::Linear, HostLinear)> {
        let weight = self.weight(out, input);
        let bias = bias.then(|| self.vector(out));
        let linear = new_linear(b, weight.view(), bias.as_ref().map(|v| v.view()), dtype)?;
        let held = b.block_on(b.read_linear(&linear))?;
        Ok((linear, held))
    }
}

pub(super) fn new_linear<B: Backend>(
    b: &B,
    weight: ArrayView2<'_, f32>,
    bias: Option<ArrayView1<'_, f32>>,
    dtype: DType,
) -> Result<B::Linear> {
    b.new_linear(HostMatrix::F32(weight), bias.map(HostVector::F32), dtype)
}

pub(super) fn read<B: Backend>(b: &B, x: &B::Tensor) -> Result<Array2<f32>> {
    b.block_on(b.read(x))
}
