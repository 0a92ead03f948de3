//! Losses, and sums over everything.

use super::{Training, bound};
use crate::{
    gpu::Gpu,
    kernels::Variant,
    pool::Buffer,
    tensor::{Tensor, ranges},
};
use opt_backend::{Result, Smoothing, check};
use std::sync::Arc;

/// Quads whose squares one workgroup sums.
const SQUARES_SHARE: usize = 4096;

impl Gpu {
    /// The cross-entropy of logits, and its gradient.
    pub(super) fn cross_entropy(
        self: &Arc<Self>,
        mut logits: Tensor,
        targets: &[u32],
        smoothing: Smoothing,
    ) -> Result<[Tensor; 2]> {
        let op = "cross_entropy";
        check::ids(op, targets, logits.width())?;
        check::targets(op, targets, logits.rows())?;
        if logits.is_empty() {
            return Ok([self.zeros(op, [1, 1])?, logits]);
        }
        logits.own(self, op)?;
        let losses = self.scratch(op, 4 * logits.rows() as u64)?;
        let ranges = ranges(&[&logits]);
        let mut recorder = self.record(op, targets.len(), ranges.len())?;
        let targets_at = recorder.data(targets);
        for rows in &ranges {
            let uniforms = [
                rows.len() as u32,
                logits.width() as u32,
                logits.quads() as u32,
                targets_at + rows.start as u32,
                rows.start as u32,
                smoothing.scale.to_bits(),
                smoothing.epsilon.to_bits(),
            ];
            let buffers = [None, Some(bound(op, logits.slice(rows))?), Some(losses.whole())];
            let variant = Variant::Train(Training::CrossEntropy);
            recorder.dispatch(self, op, variant, &uniforms, &buffers, rows.len() as u64)?;
        }
        drop(recorder);
        Ok([self.total(op, &losses, logits.rows(), smoothing.scale)?, logits])
    }

    /// The loss of a student's logits against a teacher's, and its gradient.
    pub(super) fn soft_targets(
        self: &Arc<Self>,
        mut student: Tensor,
        teacher: &Tensor,
        temperature: f32,
        scale: f32,
    ) -> Result<[Tensor; 2]> {
        let op = "soft_targets";
        check::same_shape(op, teacher.shape(), student.shape())?;
        if student.is_empty() {
            return Ok([self.zeros(op, [1, 1])?, student]);
        }
        student.own(self, op)?;
        let losses = self.scratch(op, 4 * student.rows() as u64)?;
        let ranges = ranges(&[&student, teacher]);
        let mut recorder = self.record(op, 0, ranges.len())?;
        for rows in &ranges {
            let uniforms = [
                rows.len() as u32,
                student.width() as u32,
                student.quads() as u32,
                rows.start as u32,
                temperature.to_bits(),
                scale.to_bits(),
            ];
            let student = bound(op, student.slice(rows))?;
            let buffers = [student, losses.whole(), bound(op, teacher.slice(rows))?].map(Some);
            let variant = Variant::Train(Training::SoftTargets);
            recorder.dispatch(self, op, variant, &uniforms, &buffers, rows.len() as u64)?;
        }
        drop(recorder);
        Ok([self.total(op, &losses, student.rows(), scale)?, student])
    }

    /// The sum of all squares.
    pub(super) fn sum_squares(self: &Arc<Self>, parts: &[&Tensor]) -> Result<Tensor> {
        let op = "sum_squares";
        let parts = parts.iter().filter(|part| !part.is_empty());
        let pieces: Vec<_> =
            parts.flat_map(|part| ranges(&[part]).into_iter().map(move |rows| (part, rows))).collect();
        let shares = |rows: usize, quads: usize| (rows * quads).div_ceil(SQUARES_SHARE);
        let count: usize = pieces.iter().map(|(part, rows)| shares(rows.len(), part.quads())).sum();
        if count == 0 {
            return self.zeros(op, [1, 1]);
        }
        let sums = self.scratch(op, 4 * count as u64)?;
        let mut recorder = self.record(op, 0, pieces.len())?;
        let mut first = 0;
        for (part, rows) in pieces {
            let groups = shares(rows.len(), part.quads());
            let uniforms = [(rows.len() * part.quads()) as u32, SQUARES_SHARE as u32, first as u32];
            let buffers = [sums.whole(), bound(op, part.slice(&rows))?].map(Some);
            let variant = Variant::Train(Training::Squares);
            recorder.dispatch(self, op, variant, &uniforms, &buffers, groups as u64)?;
            first += groups;
        }
        drop(recorder);
        self.total(op, &sums, count, 1.0)
    }

    /// The sum of the numbers in a buffer, times `factor`.
    fn total(
        self: &Arc<Self>,
        op: &'static str,
        numbers: &Buffer,
        count: usize,
        factor: f32,
    ) -> Result<Tensor> {
        let out = Tensor::new(self, op, [1, 1])?;
        let buffers = [bound(op, out.slice(&(0..1)))?, numbers.whole()].map(Some);
        let uniforms = [count as u32, factor.to_bits()];
        let variant = Variant::Train(Training::Total);
        self.record(op, 0, 1)?.dispatch(self, op, variant, &uniforms, &buffers, 1)?;
        Ok(out)
    }
}
