//! Products with weights: a matrix-vector kernel for few rows, a tiled one for many.

use crate::{
    gpu::Gpu,
    kernels::{Format, TILE, Variant},
    pool::Buffer,
    recorder::Recorder,
    tensor::{Tensor, quads, ranges},
    weights::{Held, Linear, Matrix, MatrixPart},
};
use opt_backend::{Activation, Error, ErrorKind, Result, Then, check};
use std::{ops::Range, sync::Arc};

/// Rows from which on tiles of 64 pay. Below, weights are read once for every eight rows.
const TILED_FROM: usize = 17;

/// Columns, those of an LM head, that keep a GPU busy though few threads share each.
const MANY_COLUMNS: usize = 16384;

/// The number of an activation in `activation.wgsl`.
pub(crate) fn number(op: &'static str, activation: Activation) -> Result<u32> {
    Ok(match activation {
        Activation::Linear => 0,
        Activation::Relu => 1,
        Activation::Gelu => 2,
        Activation::GeluTanh => 3,
        Activation::Gelu10 => 4,
        Activation::QuickGelu => 5,
        Activation::Silu => 6,
        Activation::Sigmoid => 7,
        Activation::Tanh => 8,
        Activation::Relu6 => 9,
        Activation::Relu2 => 10,
        Activation::LeakyRelu => 11,
        Activation::Mish => 12,
        Activation::Laplace => 13,
        other => return Err(Error::new(ErrorKind::Unsupported, op, format_args!("no kernel for {other}"))),
    })
}

/// What becomes of a product.
#[derive(Clone, Copy, Default)]
struct After<'a> {
    activation: u32,
    residual: Option<&'a Tensor>,
}

fn lost(op: &'static str) -> Error {
    Error::shape(op, "expected rows of at least one element")
}

/// The uniforms of a product, and what a kernel for `format` needs besides where weights are quantized.
fn with_packed(uniforms: &[u32], matrix: &Matrix, part: &MatrixPart, format: Format) -> Vec<u32> {
    let mut uniforms = uniforms.to_vec();
    if let (Held::Packed(layout), Format::Packed(packed)) = (&matrix.held, format) {
        let vectors = layout.group_vectors(packed);
        let zeros_at = layout.zeros_at(part.rows.len());
        uniforms.extend([layout.groups, vectors, zeros_at].map(|number| number as u32));
    }
    uniforms
}

impl Gpu {
    /// The columns of `x` in the order in which a matrix has them, if that is another.
    fn arranged(self: &Arc<Self>, op: &'static str, x: &Tensor, matrix: &Matrix) -> Result<Option<Tensor>> {
        matrix.order.as_ref().map(|order| self.arrange(op, x, order)).transpose()
    }

    /// `x Wᵀ + b`, then what `then` says.
    pub(crate) fn linear(
        self: &Arc<Self>,
        x: &Tensor,
        linear: &Linear,
        then: Then<Tensor>,
    ) -> Result<Tensor> {
        let op = "linear";
        let [outputs, inputs] = linear.weight.shape;
        check::width(op, x.width(), inputs)?;
        let after = match &then {
            Then::Nothing => After::default(),
            Then::Activate(activation) => After { activation: number(op, *activation)?, residual: None },
            Then::Add(residual) => {
                check::same_shape(op, residual.shape(), [x.rows(), outputs])?;
                After { activation: 0, residual: Some(residual) }
            }
            other => {
                return Err(Error::new(ErrorKind::Unsupported, op, format_args!("cannot do {other:?}")));
            }
        };
        self.product(op, x, &linear.weight, after)
    }

    /// `x Tᵀ`.
    pub(crate) fn logits(self: &Arc<Self>, op: &'static str, x: &Tensor, table: &Matrix) -> Result<Tensor> {
        check::width(op, x.width(), table.shape[1])?;
        self.product(op, x, table, After::default())
    }

    /// Queries, keys and values of one input, in one dispatch where the three are alike and rows are few.
    pub(crate) fn qkv(self: &Arc<Self>, x: &Tensor, linears: [&Linear; 3]) -> Result<[Tensor; 3]> {
        let op = "qkv";
        for linear in linears {
            check::width(op, x.width(), linear.weight.shape[1])?;
        }
        let matrices = linears.map(|linear| &linear.weight);
        let alike = matrices.iter().all(|matrix| matrix.alike(matrices[0]));
        // Once for the three, if it can be.
        let arranged = if alike { self.arranged(op, x, matrices[0])? } else { None };
        let in_order = alike.then(|| arranged.as_ref().unwrap_or(x));
        let rows = x.rows();
        if let [[q], [k], [v]] = matrices.map(|matrix| &matrix.parts[..])
            && (1..TILED_FROM).contains(&rows)
            && let Some(x) = in_order
            && k.bias_at == q.bias_at
            && v.bias_at == q.bias_at
            && let Some((outs, stride)) = Tensor::several::<3>(self, op, [rows, matrices[0].shape[0]])?
            && let (Some(x_rows), Some(out)) = (x.slice(&(0..rows)), outs[0].shared())
            && ranges(&[x]).len() == 1
        {
            let block = (rows as u32).min(8).next_power_of_two();
            let lanes = self.lanes(matrices[0], block);
            let column_groups = quads(matrices[0].shape[0]).div_ceil(lanes.teams());
            let uniforms = [
                rows as u32,
                x.quads() as u32,
                matrices[0].shape[0] as u32,
                outs[0].quads() as u32,
                0,
                q.bias_at,
                0,
                column_groups as u32,
                stride as u32,
            ];
            let uniforms = with_packed(&uniforms, matrices[0], q, lanes.format);
            let variant = lanes.variant(block, false, true);
            let mut buffers = vec![x_rows, out, q.buffer.whole(), k.buffer.whole(), v.buffer.whole()];
            buffers.extend([q, k, v].iter().filter_map(|part| part.parameters.as_ref()).map(Buffer::whole));
            let buffers: Vec<_> = buffers.into_iter().map(Some).collect();
            let groups = (rows.div_ceil(block as usize) * 3 * column_groups) as u64;
            self.record(op, 0, 1)?.dispatch(self, op, variant, &uniforms, &buffers, groups)?;
            return Ok(outs);
        }
        let each = |matrix: &Matrix| match in_order {
            Some(x) => self.product_in_order(op, x, matrix, After::default()),
            None => self.product(op, x, matrix, After::default()),
        };
        Ok([each(matrices[0])?, each(matrices[1])?, each(matrices[2])?])
    }

    fn product(
        self: &Arc<Self>,
        op: &'static str,
        x: &Tensor,
        matrix: &Matrix,
        after: After<'_>,
    ) -> Result<Tensor> {
        let arranged = self.arranged(op, x, matrix)?;
        self.product_in_order(op, arranged.as_ref().unwrap_or(x), matrix, after)
    }

    /// The product with `x` in the order of the matrix's columns.
    fn product_in_order(
        self: &Arc<Self>,
        op: &'static str,
        x: &Tensor,
        matrix: &Matrix,
        after: After<'_>,
    ) -> Result<Tensor> {
        let out = Tensor::new(self, op, [x.rows(), matrix.shape[0]])?;
        let mut operands = vec![x, &out];
        operands.extend(after.residual);
        let ranges = ranges(&operands);
        let mut recorder = self.record(op, 0, ranges.len() * matrix.parts.len())?;
        for rows in &ranges {
            for part in &matrix.parts {
                self.product_part(&mut recorder, op, x, (matrix, part), &out, after, rows)?;
            }
        }
        drop(recorder);
        Ok(out)
    }

    #[allow(clippy::too_many_arguments)] // one dispatch, and all that it binds
    fn product_part(
        &self,
        recorder: &mut Recorder,
        op: &'static str,
        x: &Tensor,
        (matrix, part): (&Matrix, &MatrixPart),
        out: &Tensor,
        After { activation, residual }: After<'_>,
        rows: &Range<usize>,
    ) -> Result<()> {
        let columns = part.rows.len();
        let tiled = rows.len() >= TILED_FROM && !self.software;
        let block = (rows.len() as u32).min(8).next_power_of_two();
        let lanes = self.lanes(matrix, block);
        let column_groups =
            if tiled { columns.div_ceil(TILE) } else { quads(columns).div_ceil(lanes.teams()) };
        let uniforms = [
            rows.len() as u32,
            x.quads() as u32,
            columns as u32,
            out.quads() as u32,
            (part.rows.start / 4) as u32,
            part.bias_at,
            activation,
            column_groups as u32,
            0,
        ];
        let format = if tiled { matrix.format().single() } else { lanes.format };
        let uniforms = with_packed(&uniforms, matrix, part, format);
        let (Some(x), Some(out)) = (x.slice(rows), out.slice(rows)) else { return Err(lost(op)) };
        let mut buffers = vec![Some(x), Some(out), Some(part.buffer.whole())];
        if let Some(residual) = residual {
            buffers.push(Some(residual.slice(rows).ok_or_else(|| lost(op))?));
        }
        buffers.extend(part.parameters.as_ref().map(|parameters| Some(parameters.whole())));
        let with_residual = residual.is_some();
        let (variant, row_groups) = if tiled {
            (Variant::MatMul { format, residual: with_residual }, rows.len().div_ceil(TILE))
        } else {
            (lanes.variant(block, with_residual, false), rows.len().div_ceil(block as usize))
        };
        recorder.dispatch(self, op, variant, &uniforms, &buffers, (row_groups * column_groups) as u64)
    }
}

/// How the threads of the matrix-vector kernel share the work.
#[derive(Clone, Copy)]
struct Lanes {
    threads: u32,
    /// Threads that share the depth of four columns.
    lanes: u32,
    /// What they read at once.
    format: Format,
}

impl Lanes {
    /// Quads of columns that a workgroup computes.
    fn teams(self) -> usize {
        (self.threads / self.lanes) as usize
    }

    fn variant(self, rows: u32, residual: bool, three: bool) -> Variant {
        let Self { threads, lanes, format } = self;
        Variant::MatVec { format, rows, threads, lanes, residual, three }
    }
}

impl Gpu {
    /// A GPU needs many threads in flight to keep memory busy: all lanes go to few columns where columns are few, and
    /// deep products of few rows take more threads, as long as their sums fit workgroup memory. A software adapter
    /// has few cores and pays for every barrier: there each thread keeps its columns to itself.
    fn lanes(&self, matrix: &Matrix, rows: u32) -> Lanes {
        let format = matrix.format();
        let (threads, lanes) = if self.software {
            (64, 1)
        } else if matrix.shape[0] >= MANY_COLUMNS {
            (64, 16)
        } else if rows <= 2 && matrix.steps() > 256 {
            (256, 256)
        } else {
            (64, 64)
        };
        // Of much that a loop does at once, its compiler keeps little in registers.
        let format = if self.software && (rows > 2 || format.looks_up()) { format.single() } else { format };
        Lanes { threads, lanes, format }
    }
}
