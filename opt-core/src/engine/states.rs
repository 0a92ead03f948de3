//! Hidden states on their way from the device to the sequences that asked for them.

use crate::{Result, embedding::Pooling};
use ndarray::{Array2, ArrayView2, s};
use opt_backend::{Backend, Layout, Readback, Train};
use std::ops::Range;

/// `weights` `[vectors, rows]` times states `[rows, width]`, on a device.
pub(crate) type Pool<B> =
    fn(&B, ArrayView2<'_, f32>, &<B as Backend>::Tensor) -> opt_backend::Result<<B as Backend>::Tensor>;

/// [`Pool`] of a backend that can be trained on.
pub(crate) fn pool<B: Train>(
    backend: &B,
    weights: ArrayView2<'_, f32>,
    states: &B::Tensor,
) -> opt_backend::Result<B::Tensor> {
    let weights = backend.upload(weights)?;
    backend.matmul(&weights, states, Layout::Times, opt_backend::DType::F32, None)
}

/// Whose some rows are: the index of the sequence, where they lie, and what is to be done with them.
pub(super) type Whose = (usize, Range<usize>, Pooling);

/// States of one layer.
pub(super) struct States<'a> {
    rows: Readback<'a, Array2<f32>>,
    whose: Vec<Whose>,
}

/// Begins to read states of one layer.
///
/// What is a row for each sequence already (the first or the last token's) is picked on the device, and so are weighted
/// sums made there where the device has memory of its own: then a row a sequence is read. All else is read as it is and
/// pooled on the host.
pub(super) fn hand_out<'a, B: Backend>(
    backend: &'a B,
    pool: Option<Pool<B>>,
    states: &B::Tensor,
    whose: Vec<Whose>,
) -> Result<States<'a>> {
    let [rows, _] = backend.shape(states);
    let done = |whose: &[Whose]| -> Vec<Whose> {
        whose.iter().enumerate().map(|(at, (sequence, ..))| (*sequence, at..at + 1, Pooling::None)).collect()
    };
    let picked: Option<Vec<usize>> = whose.iter().map(|(_, rows, pooling)| pooling.row(rows)).collect();
    if let Some(picked) = picked {
        if picked.iter().copied().eq(0..rows) {
            return Ok(States { rows: backend.read(states), whose: done(&whose) });
        }
        let taken = backend.take_rows(states, &picked)?;
        return Ok(States { rows: backend.read_owned(taken), whose: done(&whose) });
    }
    if let (Some(pool), Some(weights)) = (pool, weights(&whose, rows)) {
        let pooled = pool(backend, weights.view(), states)?;
        return Ok(States { rows: backend.read_owned(pooled), whose: done(&whose) });
    }
    Ok(States { rows: backend.read(states), whose })
}

/// A matrix `[sequences, rows]` that pools each sequence's rows, where all are weighted sums of at least one.
fn weights(whose: &[Whose], rows: usize) -> Option<Array2<f32>> {
    let mut matrix = Array2::zeros((whose.len(), rows));
    for (mut row, (_, at, pooling)) in matrix.outer_iter_mut().zip(whose) {
        let weights = pooling.weights(at.len()).filter(|weights| !weights.is_empty())?;
        row.iter_mut().skip(at.start).zip(weights).for_each(|(to, weight)| *to = weight);
    }
    Some(matrix)
}

impl States<'_> {
    /// Waits for them and hands each sequence its own.
    pub(super) async fn deal(self, to: &mut [Vec<Array2<f32>>]) -> Result<()> {
        let states = self.rows.await?;
        for (sequence, rows, pooling) in self.whose {
            if let Some(to) = to.get_mut(sequence) {
                to.push(pooling.pool(states.slice(s![rows, ..])));
            }
        }
        Ok(())
    }
}
