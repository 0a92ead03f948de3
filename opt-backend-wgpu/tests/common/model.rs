//! A decoder of random weights over any backend: what the tests and the example run.

use opt_backend::{
    Activation, Attend, Backend, CacheDType, CacheSpec, DType, HostMatrix, HostVector, NormParams, Result,
    Span, Then, TopK,
    ndarray::{Array1, Array2, s},
    quant::{Groups, Levels, Quantized, Zeros},
};

/// The shape of a model.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub layers: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    pub vocabulary: usize,
    pub positions: usize,
}

struct Layer<B: Backend> {
    norms: [B::Norm; 2],
    qkv: [B::Linear; 3],
    out: B::Linear,
    fc1: B::Linear,
    fc2: B::Linear,
}

/// A pre-LN decoder with the embedding as its head.
pub struct Model<B: Backend> {
    shape: Shape,
    tokens: B::Table,
    positions: B::Table,
    layers: Vec<Layer<B>>,
    norm: B::Norm,
}

/// Numbers in -1..1 that look random and are always the same.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn below(&mut self, end: usize) -> usize {
        ((self.next() + 1.0) / 2.0 * end as f32) as usize % end.max(1)
    }

    pub fn matrix(&mut self, rows: usize, width: usize) -> Array2<f32> {
        Array2::from_shape_simple_fn((rows, width), || self.next())
    }

    fn weight(&mut self, out: usize, input: usize) -> Array2<f32> {
        let scale = 1.7 / (input as f32).sqrt();
        self.matrix(out, input) * scale
    }
}

/// How a model holds its weights.
#[derive(Debug, Clone, Copy)]
pub enum Weights {
    Plain(DType),
    /// Integers of so many bits, in groups of 32.
    Integers(u32),
}

impl From<DType> for Weights {
    fn from(dtype: DType) -> Self {
        Self::Plain(dtype)
    }
}

/// The nearest weight of so many bits.
pub fn quantize(weight: &Array2<f32>, bits: u32) -> Result<Quantized> {
    let (most, group) = ((1_i32 << (bits - 1)) - 1, 32.min(weight.ncols()));
    let groups = weight.ncols().div_ceil(group);
    let scales = Array2::from_shape_fn((weight.nrows(), groups), |(o, g)| {
        let end = weight.ncols().min((g + 1) * group);
        let largest = weight.slice(s![o, g * group..end]).fold(0f32, |most, v| most.max(v.abs()));
        DType::F16.round(largest / most as f32)
    });
    let codes = Array2::from_shape_fn(weight.dim(), |(o, i)| {
        let scale = scales[[o, i / group]].max(1e-30);
        ((weight[[o, i]] / scale).round() as i32).clamp(-most - 1, most) + most + 1
    });
    let codes = codes.mapv(|code| code as u8);
    Quantized::new(
        codes,
        scales,
        Zeros::Same(1 << (bits - 1)),
        Levels::Integers { bits },
        Groups::Runs(group),
    )
}

impl<B: Backend> Model<B> {
    pub fn new(b: &B, shape: Shape, weights: impl Into<Weights>) -> Result<Self> {
        let weights = weights.into();
        let mut numbers = Numbers(7);
        let width = shape.heads * shape.head_dim;
        let linear = |numbers: &mut Numbers, out: usize, input: usize| {
            let weight = numbers.weight(out, input);
            let bias = Array1::from_shape_simple_fn(out, || 0.1 * numbers.next());
            let bias = Some(HostVector::F32(bias.view()));
            match weights {
                Weights::Plain(dtype) => b.new_linear(HostMatrix::F32(weight.view()), bias, dtype),
                Weights::Integers(bits) => b.new_quantized_linear(&quantize(&weight, bits)?, bias),
            }
        };
        let norm = || b.new_norm(NormParams { width, eps: 1e-5, weight: None, bias: None });
        let table = |numbers: &mut Numbers, entries: usize| {
            let rows = numbers.matrix(entries, width);
            match weights {
                Weights::Plain(dtype) => b.new_table(HostMatrix::F32(rows.view()), dtype),
                Weights::Integers(bits) => b.new_quantized_table(&quantize(&rows, bits.max(8))?),
            }
        };
        let mut layers = Vec::new();
        for _ in 0..shape.layers {
            let n = &mut numbers;
            layers.push(Layer {
                norms: [norm()?, norm()?],
                qkv: [linear(n, width, width)?, linear(n, width, width)?, linear(n, width, width)?],
                out: linear(n, width, width)?,
                fc1: linear(n, shape.ffn, width)?,
                fc2: linear(n, width, shape.ffn)?,
            });
        }
        Ok(Self {
            shape,
            tokens: table(&mut numbers, shape.vocabulary)?,
            positions: table(&mut numbers, shape.positions)?,
            layers,
            norm: norm()?,
        })
    }

    pub fn new_cache(&self, b: &B) -> Result<B::Cache> {
        let Shape { layers, heads, head_dim, .. } = self.shape;
        b.new_cache(CacheSpec { layers, heads, head_dim, dtype: CacheDType::F32, capacity_hint: 0 })
    }

    /// Logits of every row of a batch of sequences, each `(ids, first position)`.
    pub fn logits(
        &self,
        b: &B,
        sequences: &[(&[u32], usize)],
        caches: &mut [&mut B::Cache],
    ) -> Result<B::Tensor> {
        let ids: Vec<u32> = sequences.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
        let positions: Vec<u32> = sequences
            .iter()
            .flat_map(|(ids, first)| (*first..first + ids.len()).map(|position| position as u32))
            .collect();
        let spans = Span::lay_out(sequences.iter().map(|(ids, _)| ids.len()));
        let mut h = b.add_gathered(b.gather(&self.tokens, &ids)?, &self.positions, &positions)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let x = b.layer_norm(&h, &layer.norms[0])?;
            let [q, k, v] = b.qkv(&x, &layer.qkv[0], &layer.qkv[1], &layer.qkv[2])?;
            let attend = Attend { heads: self.shape.heads, layer: index, spans: &spans };
            let mixed = b.attend(q, k, v, attend, Some(caches))?;
            h = b.linear(&mixed, &layer.out, Then::Add(h))?;
            let x = b.layer_norm(&h, &layer.norms[1])?;
            let wide = b.linear(&x, &layer.fc1, Then::Activate(Activation::Relu))?;
            h = b.linear(&wide, &layer.fc2, Then::Add(h))?;
        }
        b.logits(&b.layer_norm(&h, &self.norm)?, &self.tokens)
    }

    /// The k best next tokens of each row.
    pub fn step(
        &self,
        b: &B,
        sequences: &[(&[u32], usize)],
        caches: &mut [&mut B::Cache],
        k: usize,
    ) -> Result<Vec<TopK>> {
        b.block_on(b.top_k(&self.logits(b, sequences, caches)?, k))
    }
}
