//! A small OPT, written once over any backend.

use super::{Kit, data::Data};
use crate::{
    Activation, Attend, Backend, CacheDType, CacheSpec, DType, HostMatrix, HostVector, NormParams, Result,
    Span, Then,
};
use ndarray::{Array1, Array2};

/// The shape and the variants of a model.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) name: &'static str,
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    pub(super) ffn: usize,
    /// LayerNorm before each block (all OPT but 350m), or after.
    pub(super) norm_first: bool,
    pub(super) activation: Activation,
    pub(super) bias: bool,
}

pub(super) const VOCABULARY: usize = 101;
pub(super) const POSITIONS: usize = 96;
pub(super) const LAYERS: usize = 2;

/// The models that are run: one pre-LN, one post-LN, one bare with the head_dim of OPT-2.7B.
pub(super) const SHAPES: [Shape; 3] = [
    Shape {
        name: "pre-LN, relu",
        heads: 3,
        head_dim: 8,
        ffn: 40,
        norm_first: true,
        activation: Activation::Relu,
        bias: true,
    },
    Shape {
        name: "post-LN, gelu",
        heads: 4,
        head_dim: 16,
        ffn: 257,
        norm_first: false,
        activation: Activation::Gelu,
        bias: true,
    },
    Shape {
        name: "pre-LN, no biases, head_dim 80",
        heads: 1,
        head_dim: 80,
        ffn: 33,
        norm_first: true,
        activation: Activation::Gelu,
        bias: false,
    },
];

struct Layer<B: Backend> {
    attention_norm: B::Norm,
    q: B::Linear,
    k: B::Linear,
    v: B::Linear,
    out: B::Linear,
    ffn_norm: B::Norm,
    fc1: B::Linear,
    fc2: B::Linear,
}

/// Random weights of a shape, on a backend. The same shape gives the same weights on each.
pub(super) struct Model<B: Backend> {
    shape: Shape,
    tokens: B::Table,
    positions: B::Table,
    layers: Vec<Layer<B>>,
    final_norm: Option<B::Norm>,
}

/// New tokens of some sequences, laid end to end.
pub(super) struct Batch {
    pub(super) ids: Vec<u32>,
    pub(super) positions: Vec<u32>,
    pub(super) spans: Vec<Span>,
}

impl Batch {
    /// Of `(first position, ids)` per sequence.
    pub(super) fn new(sequences: &[(usize, &[u32])]) -> Self {
        Self {
            ids: sequences.iter().flat_map(|(_, ids)| ids.iter().copied()).collect(),
            positions: sequences
                .iter()
                .flat_map(|(start, ids)| (*start..start + ids.len()).map(|position| position as u32))
                .collect(),
            spans: Span::lay_out(sequences.iter().map(|(_, ids)| ids.len())),
        }
    }
}

impl<B: Backend> Model<B> {
    /// Weights held as `dtype` (norms in f32).
    pub(super) fn new(b: &B, shape: Shape, dtype: DType, kit: Kit) -> Result<Self> {
        let mut data = Data::new(shape.name, kit);
        let hidden = shape.heads * shape.head_dim;
        let linear = |data: &mut Data, input: usize, out: usize| {
            let weight: Array2<f32> = data.weight(out, input);
            let bias: Option<Array1<f32>> = shape.bias.then(|| data.vector(out) * 0.3);
            let bias = bias.as_ref().map(|bias| HostVector::F32(bias.view()));
            b.new_linear(HostMatrix::F32(weight.view()), bias, dtype)
        };
        let norm = |data: &mut Data| {
            let weight = data.vector(hidden).mapv_into(|v| 1.0 + 0.2 * v);
            let bias = data.vector(hidden).mapv_into(|v| 0.2 * v);
            let [weight, bias] = [&weight, &bias].map(|v| shape.bias.then(|| HostVector::F32(v.view())));
            b.new_norm(NormParams { width: hidden, eps: 1e-5, weight, bias })
        };
        let table = |data: &mut Data, entries: usize| {
            b.new_table(HostMatrix::F32(data.matrix(entries, hidden).view()), dtype)
        };
        Ok(Self {
            shape,
            tokens: table(&mut data, VOCABULARY)?,
            positions: table(&mut data, POSITIONS)?,
            layers: (0..LAYERS)
                .map(|_| {
                    Ok(Layer {
                        attention_norm: norm(&mut data)?,
                        q: linear(&mut data, hidden, hidden)?,
                        k: linear(&mut data, hidden, hidden)?,
                        v: linear(&mut data, hidden, hidden)?,
                        out: linear(&mut data, hidden, hidden)?,
                        ffn_norm: norm(&mut data)?,
                        fc1: linear(&mut data, hidden, shape.ffn)?,
                        fc2: linear(&mut data, shape.ffn, hidden)?,
                    })
                })
                .collect::<Result<_>>()?,
            final_norm: shape.norm_first.then(|| norm(&mut data)).transpose()?,
        })
    }

    pub(super) fn new_cache(&self, b: &B) -> Result<B::Cache> {
        let Shape { heads, head_dim, .. } = self.shape;
        b.new_cache(CacheSpec { layers: LAYERS, heads, head_dim, dtype: CacheDType::F32, capacity_hint: 16 })
    }

    /// Hidden states `[rows, hidden]` under the LM head.
    pub(super) fn hidden(
        &self,
        b: &B,
        batch: &Batch,
        mut caches: Option<&mut [&mut B::Cache]>,
    ) -> Result<B::Tensor> {
        let x = b.gather(&self.tokens, &batch.ids)?;
        let mut h = b.add_gathered(x, &self.positions, &batch.positions)?;
        let first = self.shape.norm_first;
        for (number, layer) in self.layers.iter().enumerate() {
            let normed = if first { Some(b.layer_norm(&h, &layer.attention_norm)?) } else { None };
            let [q, k, v] = b.qkv(normed.as_ref().unwrap_or(&h), &layer.q, &layer.k, &layer.v)?;
            let attend = Attend { heads: self.shape.heads, layer: number, spans: &batch.spans };
            let mixed = b.attend(q, k, v, attend, caches.as_deref_mut())?;
            h = b.linear(&mixed, &layer.out, Then::Add(h))?;
            if !first {
                h = b.layer_norm(&h, &layer.attention_norm)?;
            }
            let normed = if first { Some(b.layer_norm(&h, &layer.ffn_norm)?) } else { None };
            let then = Then::Activate(self.shape.activation);
            let inner = b.linear(normed.as_ref().unwrap_or(&h), &layer.fc1, then)?;
            h = b.linear(&inner, &layer.fc2, Then::Add(h))?;
            if !first {
                h = b.layer_norm(&h, &layer.ffn_norm)?;
            }
        }
        match &self.final_norm {
            Some(norm) => b.layer_norm(&h, norm),
            None => Ok(h),
        }
    }

    /// Logits `[rows, vocabulary]` of rows that [`Model::hidden`] gave.
    pub(super) fn logits(&self, b: &B, hidden: &B::Tensor) -> Result<B::Tensor> {
        b.logits(hidden, &self.tokens)
    }

    /// The table that is embedding and LM head.
    pub(super) fn head(&self) -> &B::Table {
        &self.tokens
    }

    /// Logits of a batch, in host memory.
    pub(super) fn run(
        &self,
        b: &B,
        batch: &Batch,
        caches: Option<&mut [&mut B::Cache]>,
    ) -> Result<Array2<f32>> {
        let hidden = self.hidden(b, batch, caches)?;
        b.block_on(b.read_owned(self.logits(b, &hidden)?))
    }
}
