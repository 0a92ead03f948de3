use crate::{Error, ErrorKind, Result, parallel};
use ndarray::{Array2, ArrayView2, linalg::general_mat_mul, s};

/// The sum of x xᵀ over the inputs x of a linear: what GPTQ and layer-wise errors need to know of them.
#[derive(Debug, Clone)]
pub struct Gram {
    /// Upper triangle only, `[in, in]`.
    sum: Array2<f32>,
    rows: usize,
    samples: usize,
}

/// Columns of the sum that are worked on at a time; what lies below the diagonal blocks is not computed.
const BLOCK: usize = 256;

impl Gram {
    /// The sum over no inputs of this width.
    pub fn new(inputs: usize) -> Self {
        Self { sum: Array2::zeros((inputs, inputs)), rows: 0, samples: 0 }
    }

    /// Adds the rows of `x`, `[rows, in]`.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for another width.
    pub fn add(&mut self, x: ArrayView2<'_, f32>) -> Result<()> {
        let inputs = self.inputs();
        if x.ncols() != inputs {
            let message = format_args!("expected inputs of width {inputs}, found {}", x.ncols());
            return Err(Error::new(ErrorKind::Option, message));
        }
        self.rows += x.nrows();
        self.samples += 1;
        let starts: Vec<usize> = (0..inputs).step_by(BLOCK).collect();
        let bands = self.sum.axis_chunks_iter_mut(ndarray::Axis(0), BLOCK);
        parallel::for_each(parallel::cores(), starts.into_iter().zip(bands), |(start, mut band)| {
            let left = x.slice(s![.., start..start + band.nrows()]);
            general_mat_mul(
                1.0,
                &left.t(),
                &x.slice(s![.., start..]),
                1.0,
                &mut band.slice_mut(s![.., start..]),
            );
        });
        Ok(())
    }

    /// Width of the inputs.
    pub fn inputs(&self) -> usize {
        self.sum.nrows()
    }

    /// How many inputs were added.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How often inputs were added: one sequence at a time, the number of sequences.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// The sum `[in, in]`, both triangles.
    pub fn full(&self) -> Array2<f32> {
        let mut full = self.sum.clone();
        for i in 0..full.nrows() {
            // The column below the diagonal is the row right of it.
            let row = full.slice(s![i, i + 1..]).to_owned();
            full.slice_mut(s![i + 1.., i]).assign(&row);
        }
        full
    }

    /// Σ ‖W x‖² over the inputs, for `weight` `[out, in]`.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for another width.
    pub fn energy(&self, weight: ArrayView2<'_, f32>) -> Result<f64> {
        self.check(weight)?;
        Ok(energy(&self.full(), weight))
    }

    /// ‖(W - Ŵ) X‖² / ‖W X‖² over the inputs; 0 where both are.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for shapes that differ.
    pub fn relative_error(
        &self,
        weight: ArrayView2<'_, f32>,
        approximate: ArrayView2<'_, f32>,
    ) -> Result<f64> {
        if weight.dim() != approximate.dim() {
            let message = format_args!("expected shape {:?}, found {:?}", weight.dim(), approximate.dim());
            return Err(Error::new(ErrorKind::Option, message));
        }
        self.check(weight)?;
        let full = self.full();
        let difference = energy(&full, (&weight - &approximate).view());
        Ok(if difference == 0.0 { 0.0 } else { difference / energy(&full, weight) })
    }

    fn check(&self, weight: ArrayView2<'_, f32>) -> Result<()> {
        if weight.ncols() == self.inputs() {
            return Ok(());
        }
        let message = format_args!("expected {} inputs, found {}", self.inputs(), weight.ncols());
        Err(Error::new(ErrorKind::Option, message))
    }
}

/// Σ w G wᵀ over the rows w of a weight.
fn energy(gram: &Array2<f32>, weight: ArrayView2<'_, f32>) -> f64 {
    let product = weight.dot(gram);
    let both = product.iter().zip(weight);
    both.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>().max(0.0)
}
