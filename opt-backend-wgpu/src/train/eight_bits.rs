//! AdamW with moments in eight bits.

use super::{
    Training, bound,
    optimizer::{check_clip, clipping},
};
use crate::{
    gpu::Gpu,
    kernels::Variant,
    tensor::{Tensor, ranges},
};
use opt_backend::{AdamW, Clip, Moments8, Result, check, moments::BLOCK};
use std::{ops::Range, sync::Arc};

/// Blocks, and the rows that their elements lie in.
struct Run {
    blocks: Range<usize>,
    rows: Range<usize>,
    /// Parameters and gradient of these rows, where they do not lie in one buffer each.
    copies: Option<[Tensor; 2]>,
}

/// The largest multiple of what any device can bind that is no larger, within a buffer.
fn aligned(row: usize, buffer: &Range<usize>) -> usize {
    (row / Tensor::ROWS_ALIGNED * Tensor::ROWS_ALIGNED).max(buffer.start)
}

/// The rows of the elements of blocks.
fn rows_of(blocks: &Range<usize>, [rows, width]: [usize; 2]) -> Range<usize> {
    blocks.start * BLOCK / width..(blocks.end * BLOCK).div_ceil(width).min(rows)
}

impl Gpu {
    /// One step of AdamW with moments in eight bits.
    pub(super) fn adamw8(
        self: &Arc<Self>,
        param: &mut Tensor,
        gradient: &Tensor,
        moments: &mut Moments8<Tensor>,
        adam: AdamW,
        clip: Option<Clip<'_, Tensor>>,
    ) -> Result<()> {
        let op = "adamw8";
        check::same_shape(op, gradient.shape(), param.shape())?;
        check::moments8(op, moments.parts().map(Tensor::shape), param.shape())?;
        check_clip(clip.as_ref())?;
        if param.is_empty() {
            return Ok(());
        }
        param.own(self, op)?;
        for moment in [&mut moments.first, &mut moments.second, &mut moments.scales] {
            moment.own(self, op)?;
        }
        let moments = moments.parts();
        let buffers = ranges(&moments);
        let runs = self.runs(op, [param, gradient], &buffers)?;
        let (squares, max_norm) = clipping(op, clip.as_ref())?;
        let (step_size, root) = adam.corrections();
        let keep = 1.0 - adam.lr * adam.weight_decay;
        let floats = [keep, adam.beta1, adam.beta2, step_size, root, adam.eps, max_norm].map(f32::to_bits);
        let variant = Variant::Train(Training::AdamW8 { clip: squares.is_some() });
        let [rows, width] = param.shape();
        let mut recorder = self.record(op, 0, runs.len())?;
        for Run { blocks, rows: of_run, copies } in &runs {
            let (p, g, bound_rows) = match copies {
                Some([p, g]) => {
                    p.copy_rows(self, &mut recorder, param, of_run, 0);
                    g.copy_rows(self, &mut recorder, gradient, of_run, 0);
                    (p, g, 0..of_run.len())
                }
                None => (&*param, gradient, of_run.clone()),
            };
            let end = rows.saturating_mul(width).min(blocks.end * BLOCK);
            let buffer = buffers.iter().find(|buffer| buffer.contains(&blocks.start)).unwrap_or(blocks);
            let bound_blocks = aligned(blocks.start, buffer)..blocks.end;
            let numbers = [
                blocks.len(),
                blocks.start - bound_blocks.start,
                blocks.start * BLOCK - of_run.start * width,
                end - blocks.start * BLOCK,
                width,
                4 * param.quads(),
            ];
            let mut uniforms = numbers.map(|number| number as u32).to_vec();
            uniforms.extend(floats);
            let mut bindings = vec![Some(bound(op, p.slice(&bound_rows))?)];
            for moment in moments {
                bindings.push(Some(bound(op, moment.slice(&bound_blocks))?));
            }
            bindings.push(Some(bound(op, g.slice(&bound_rows))?));
            bindings.extend(squares.map(Some));
            recorder.dispatch(self, op, variant, &uniforms, &bindings, blocks.len() as u64)?;
            if copies.is_some() {
                param.copy_rows(self, &mut recorder, p, &(0..of_run.len()), of_run.start);
            }
        }
        Ok(())
    }

    /// All blocks, cut so that what a kernel binds lies in one buffer each: `moments` are the blocks of theirs. A block
    /// that begins in one buffer of the parameters and ends in another is a run by itself, on copies.
    fn runs(
        self: &Arc<Self>,
        op: &'static str,
        [param, gradient]: [&Tensor; 2],
        moments: &[Range<usize>],
    ) -> Result<Vec<Run>> {
        let shape @ [rows, width] = param.shape();
        let all = (rows * width).div_ceil(BLOCK);
        let mut runs = Vec::with_capacity(1);
        let seam = |block: usize| -> Result<Run> {
            let blocks = block..block + 1;
            let rows = rows_of(&blocks, shape);
            let copy = || Tensor::new(self, op, [rows.len(), width]);
            Ok(Run { copies: Some([copy()?, copy()?]), blocks, rows })
        };
        let mut next = 0;
        for buffer in ranges(&[param, gradient]) {
            let start = (buffer.start * width).div_ceil(BLOCK);
            let end = if buffer.end == rows { all } else { buffer.end * width / BLOCK };
            if start >= end {
                continue;
            }
            for block in next..start {
                runs.push(seam(block)?);
            }
            next = end;
            for of_moments in moments {
                let blocks = start.max(of_moments.start)..end.min(of_moments.end);
                if !blocks.is_empty() {
                    let rows = rows_of(&blocks, shape);
                    let rows = aligned(rows.start, &buffer)..rows.end;
                    runs.push(Run { blocks, rows, copies: None });
                }
            }
        }
        for block in next..all {
            runs.push(seam(block)?);
        }
        Ok(runs)
    }
}
