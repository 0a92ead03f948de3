//! The gradients of attention.

use super::{Training, bound};
use crate::{
    gpu::Gpu,
    kernels::{HEAD_DIM_MOST, Variant},
    tensor::{Tensor, ranges},
};
use opt_backend::{Attend, Error, ErrorKind, Result, Span, check};
use std::sync::Arc;

/// Bytes of the statistics of a row and a head.
const STATS: u64 = 16;

impl Gpu {
    /// The gradients of attention within spans with respect to queries, keys and values.
    pub(super) fn attend_grad(
        self: &Arc<Self>,
        [q, k, v]: [&Tensor; 3],
        dy: &Tensor,
        attend: Attend<'_>,
    ) -> Result<[Tensor; 3]> {
        let op = "attend_grad";
        let shape = q.shape();
        check::spans(op, attend, shape)?;
        for other in [k, v, dy] {
            check::same_shape(op, other.shape(), shape)?;
        }
        let head_dim = q.width() / attend.heads.max(1);
        if head_dim > HEAD_DIM_MOST {
            let found = format_args!("expected heads of at most {HEAD_DIM_MOST} elements, found {head_dim}");
            return Err(Error::new(ErrorKind::Unsupported, op, found));
        }
        let spans = attend.spans.iter().filter(|span| span.len > 0);
        if q.is_empty() {
            return Ok([self.zeros(op, shape)?, self.zeros(op, shape)?, self.zeros(op, shape)?]);
        }
        let mut of_rows = vec![[0_u32; 2]; shape[0]];
        let mut apart = true;
        for span in spans.clone() {
            for of_row in &mut of_rows[span.rows()] {
                apart &= of_row[1] == 0;
                *of_row = [span.start as u32, (span.start + span.len) as u32];
            }
        }
        let out = [(); 3].map(|()| Tensor::new(self, op, shape));
        let [dq, dk, dv] = out;
        let out = [dq?, dk?, dv?];
        let in_one = ranges(&[q, k, v, dy, &out[0], &out[1], &out[2]]).len() == 1;
        let stats = STATS * (shape[0] * attend.heads) as u64;
        if apart && in_one && stats <= self.max_binding() {
            self.attend_grad_rows([q, k, v, dy], &out, &of_rows, attend.heads)?;
            return Ok(out);
        }
        // Span by span: a workgroup sees one buffer of each operand, and one span of each row.
        let out = [self.zeros(op, shape)?, self.zeros(op, shape)?, self.zeros(op, shape)?];
        for span in spans {
            let rows: Vec<usize> = span.rows().collect();
            if apart && *span == (Span { start: 0, len: shape[0] }) {
                let found = format_args!("a span of {} rows does not fit a binding", span.len);
                return Err(self.out_of_memory(op, found));
            }
            let [q, k, v, dy] = [q, k, v, dy].map(|x| self.take_rows(x, &rows));
            let whole = [Span { start: 0, len: span.len }];
            let of_span = Attend { spans: &whole, ..attend };
            let gradients = self.attend_grad([&q?, &k?, &v?], &dy?, of_span)?;
            let mut recorder = self.record(op, 0, 0)?;
            for (all, gradient) in out.iter().zip(&gradients) {
                all.copy_rows(self, &mut recorder, gradient, &(0..span.len), span.start);
            }
        }
        Ok(out)
    }

    /// The gradients where each operand is one buffer and each row has one span, its first row and its end.
    fn attend_grad_rows(
        self: &Arc<Self>,
        operands: [&Tensor; 4],
        [dq, dk, dv]: &[Tensor; 3],
        of_rows: &[[u32; 2]],
        heads: usize,
    ) -> Result<()> {
        let op = "attend_grad";
        let rows = 0..dq.rows();
        let head_dim = dq.width() / heads.max(1);
        let jobs = (rows.len() * heads) as u64;
        let stats = self.scratch(op, STATS * jobs)?;
        let mut bound_operands = Vec::with_capacity(4);
        for operand in operands {
            bound_operands.push(Some(bound(op, operand.slice(&rows))?));
        }
        let [dq, dk, dv] = [dq, dk, dv].map(|x| x.slice(&rows));
        let (dq, dk, dv) = (bound(op, dq)?, bound(op, dk)?, bound(op, dv)?);
        let head = head_dim as u32;
        let unit = if head.is_multiple_of(4) { 4 } else { 1 };
        let mut recorder = self.record(op, 2 * rows.len(), 2)?;
        let spans_at = recorder.data(of_rows.as_flattened());
        let uniforms = [
            rows.len() as u32,
            heads as u32,
            4 / unit * operands[0].quads() as u32,
            spans_at,
            (1.0 / (head_dim as f32).sqrt()).to_bits(),
        ];
        let variant = |rows| Variant::Train(Training::Attend { rows, head });
        let buffers = [&[None, Some(stats.whole()), Some(dq)], &bound_operands[..]].concat();
        recorder.dispatch(self, op, variant(true), &uniforms, &buffers, jobs)?;
        let buffers = [&[None, Some(stats.whole()), Some(dk), Some(dv)], &bound_operands[..]].concat();
        recorder.dispatch(self, op, variant(false), &uniforms, &buffers, jobs)
    }
}
