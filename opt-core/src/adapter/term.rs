//! The arithmetic of low-rank terms on the host.

use super::{
    file::Parts,
    target::{Part, Target, TargetKind},
};
use crate::{Error, ErrorKind, Result};
use ndarray::{Array1, Array2, ArrayD, ArrayView1, ArrayView2, ArrayViewMut2, Ix1, Ix2};

/// The low-rank term of one module.
pub(crate) struct Term<'a> {
    pub(crate) target: &'a Target,
    /// `[rank, in]`.
    pub(crate) a: ArrayView2<'a, f32>,
    /// `[out, rank]`.
    pub(crate) b: ArrayView2<'a, f32>,
    /// `[out]`, of DoRA.
    pub(crate) magnitude: Option<ArrayView1<'a, f32>>,
    /// `[out]`.
    pub(crate) own_bias: Option<ArrayView1<'a, f32>>,
}

impl Parts<'_> {
    /// The term of this module, if it has one.
    pub(crate) fn term(&self, module: &str) -> Result<Option<Term<'_>>> {
        let Some(target) = self.targets.iter().find(|target| target.module == module) else {
            return Ok(None);
        };
        let vector = |part: Part| self.tensors.get(&part).map(|tensor| vector(tensor)).transpose();
        let needed = |part: Part| match self.tensors.get(&part) {
            Some(tensor) => matrix(tensor),
            None => Err(Error::new(ErrorKind::Checkpoint, format_args!("{module} has half a low-rank term"))),
        };
        Ok(Some(Term {
            target,
            a: needed(Part::A(module.to_owned()))?,
            b: needed(Part::B(module.to_owned()))?,
            magnitude: vector(Part::Magnitude(module.to_owned()))?,
            own_bias: vector(Part::OwnBias(module.to_owned()))?,
        }))
    }

    /// What stands in the place of the model's tensor of this name.
    pub(crate) fn instead(&self, tensor: &str) -> Option<&ArrayD<f32>> {
        self.tensors.get(&Part::Instead(tensor.to_owned())).copied()
    }

    /// [`Parts::instead`], for a vector.
    pub(crate) fn instead_vector(&self, tensor: &str) -> Result<Option<ArrayView1<'_, f32>>> {
        self.instead(tensor).map(vector).transpose()
    }

    /// [`Parts::instead`], for a matrix.
    pub(crate) fn instead_matrix(&self, tensor: &str) -> Result<Option<ArrayView2<'_, f32>>> {
        self.instead(tensor).map(matrix).transpose()
    }

    /// The trained tensor of a prefix or prompt.
    pub(crate) fn virtual_rows(&self) -> Result<Option<ArrayView2<'_, f32>>> {
        self.tensors.get(&Part::Virtual).map(|tensor| matrix(tensor)).transpose()
    }
}

impl Term<'_> {
    /// The scale.
    pub(crate) fn scale(&self) -> f32 {
        self.target.scale as f32
    }

    /// Row `out` of s B A, `[in]`.
    fn row(&self, out: usize) -> Array1<f32> {
        let mut row = Array1::zeros(self.a.ncols());
        for (factor, a) in self.b.row(out).iter().zip(self.a.outer_iter()) {
            row.scaled_add(self.scale() * factor, &a);
        }
        row
    }

    /// DoRA's factor of each output, m / ‖W + s B A‖, `[out]`, for the weight `[out, in]`; `None` for plain LoRA.
    pub(crate) fn gain(&self, weight: ArrayView2<'_, f32>) -> Option<Array1<f32>> {
        let magnitude = self.magnitude?;
        let norm = |(out, w): (usize, ArrayView1<'_, f32>)| {
            let sum: f64 = self.row(out).iter().zip(w).map(|(d, w)| f64::from(d + w).powi(2)).sum();
            sum.sqrt()
        };
        let gains = weight.outer_iter().enumerate().map(norm).zip(magnitude);
        Some(gains.map(|(norm, m)| (f64::from(*m) / norm) as f32).collect())
    }

    /// Puts the term into the weight `[out, in]`: g (W + s B A).
    pub(crate) fn merge(&self, mut weight: ArrayViewMut2<'_, f32>) -> Option<Array1<f32>> {
        let gain = self.gain(weight.view());
        for (out, mut row) in weight.outer_iter_mut().enumerate() {
            row += &self.row(out);
            if let Some(gain) = gain.as_ref().and_then(|gain| gain.get(out)) {
                row *= *gain;
            }
        }
        gain
    }

    /// Takes the term out again: W / g - s B A.
    pub(crate) fn unmerge(&self, mut weight: ArrayViewMut2<'_, f32>, gain: Option<&Array1<f32>>) {
        for (out, mut row) in weight.outer_iter_mut().enumerate() {
            if let Some(gain) = gain.and_then(|gain| gain.get(out)) {
                row /= *gain;
            }
            row -= &self.row(out);
        }
    }

    /// Whether the weight that the term belongs to is stored `[in, out]`, as a table is.
    pub(crate) fn is_transposed(&self) -> bool {
        self.target.kind == TargetKind::Embedding
    }

    /// B times the scale, and DoRA's factors, `[out, rank]`.
    pub(crate) fn scaled_b(&self, gain: Option<&Array1<f32>>) -> Array2<f32> {
        let mut b = self.b.mapv(|v| v * self.scale());
        if let Some(gain) = gain {
            b.outer_iter_mut().zip(gain).for_each(|(mut row, gain)| row *= *gain);
        }
        b
    }
}

fn vector(tensor: &ArrayD<f32>) -> Result<ArrayView1<'_, f32>> {
    tensor.view().into_dimensionality::<Ix1>().map_err(axes)
}

fn matrix(tensor: &ArrayD<f32>) -> Result<ArrayView2<'_, f32>> {
    tensor.view().into_dimensionality::<Ix2>().map_err(axes)
}

fn axes(error: ndarray::ShapeError) -> Error {
    Error::because(ErrorKind::Checkpoint, "a tensor of an adapter", error)
}
