//! The OPT decoder (arXiv 2205.01068; transformers' `modeling_opt.py`), written once for every backend.
//!
//! Rows are tokens. The rows of all sequences of a batch lie end to end, and spans say whose they are; only
//! attention looks at them, since everything else works row by row.

use crate::{
    Result,
    checkpoint::Checkpoint,
    config::{LAYER_NORM_EPS, OptConfig, POSITION_OFFSET},
    quantize::{Held, Holding},
};
use ndarray::Array3;
use opt_backend::{Activation, Attend, Backend, NormParams, Readback, Span, Then};
use std::ops::Range;

/// The weights of a model, where `B` keeps them.
pub(crate) struct Decoder<B: Backend> {
    pub(crate) style: Style,
    embed_tokens: B::Table,
    embed_positions: B::Table,
    project_in: Option<B::Linear>,
    pub(crate) layers: Vec<Layer<B>>,
    final_layer_norm: Option<B::Norm>,
    project_out: Option<B::Linear>,
    /// `None` where the head is the token table.
    lm_head: Option<B::Table>,
}

/// What all layers have in common beside their weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Style {
    heads: usize,
    pre_norm: bool,
    activation: Activation,
}

impl Style {
    pub(crate) fn new(config: &OptConfig) -> Result<Self> {
        Ok(Self {
            heads: config.num_attention_heads,
            pre_norm: config.do_layer_norm_before,
            activation: config.activation()?,
        })
    }
}

/// The weights of one decoder layer.
pub(crate) struct Layer<B: Backend> {
    attn_norm: B::Norm,
    q: B::Linear,
    k: B::Linear,
    v: B::Linear,
    out: B::Linear,
    ffn_norm: B::Norm,
    fc1: B::Linear,
    fc2: B::Linear,
}

/// Looks at the state before a layer on its way; an error ends the pass.
type See<'a, B> = &'a mut dyn FnMut(usize, &<B as Backend>::Tensor) -> Result<()>;

/// Linears of a layer by what they read: the first three read the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reads {
    /// `q_proj`, `k_proj` and `v_proj`.
    Qkv,
    /// `out_proj`.
    Out,
    /// `fc1`.
    Fc1,
    /// `fc2`.
    Fc2,
}

/// Is shown the input of each linear of a layer, `[rows, in]`; an error ends the pass.
pub(crate) type SeeInput<'a, B> = &'a mut dyn FnMut(Reads, &<B as Backend>::Tensor) -> Result<()>;

/// Where a layer runs.
pub(crate) struct At<'a> {
    pub(crate) style: Style,
    /// The layer's index.
    pub(crate) index: usize,
    pub(crate) spans: &'a [Span],
    /// The rows of which the result is needed; `None` is all.
    pub(crate) wanted: Option<&'a [usize]>,
}

/// What a layer hands out of its inside, beside its result.
pub(crate) struct Inside<'a, 's, 'b, B: Backend> {
    pub(crate) attentions: Option<&'a mut Vec<Readback<'b, Vec<Array3<f32>>>>>,
    pub(crate) inputs: Option<SeeInput<'s, B>>,
}

/// The rows of a batch.
pub(crate) struct Rows<'a> {
    /// Position of each row.
    pub(crate) positions: &'a [u32],
    /// Which rows belong to which sequence.
    pub(crate) spans: &'a [Span],
    /// The rows of which the result is needed; `None` is all.
    pub(crate) wanted: Option<&'a [usize]>,
    /// How many of the layers to run.
    pub(crate) depth: usize,
}

/// What a forward pass hands out of its inside, beside its result.
pub(crate) struct Trace<'a, 'b, B: Backend> {
    /// Called with the index of each layer that is run and the state before it: the embeddings, then the output of each
    /// layer but the last.
    pub(crate) hidden: Option<See<'a, B>>,
    /// Receives the attention weights of each layer: for each span, `[heads, rows, positions]`.
    pub(crate) attentions: Option<&'a mut Vec<Readback<'b, Vec<Array3<f32>>>>>,
    /// Called before each layer with its index; an error ends the pass.
    pub(crate) before_layer: &'a mut dyn FnMut(usize) -> Result<()>,
}

impl<B: Backend> Decoder<B> {
    /// Token embeddings `[rows, word_embed_proj_dim]`.
    pub(crate) fn embed(&self, backend: &B, ids: &[u32]) -> Result<B::Tensor> {
        Ok(backend.gather(&self.embed_tokens, ids)?)
    }

    /// The token table.
    pub(crate) fn embed_table(&self) -> &B::Table {
        &self.embed_tokens
    }

    /// The state before the first layer, `[rows, hidden_size]`, of embedded tokens at these positions.
    pub(crate) fn start(&self, b: &B, embedded: B::Tensor, positions: &[u32]) -> Result<B::Tensor> {
        let positions: Vec<u32> = positions.iter().map(|p| p + POSITION_OFFSET as u32).collect();
        let h = match &self.project_in {
            Some(project) => b.linear(&embedded, project, Then::Nothing)?,
            None => embedded,
        };
        Ok(b.add_gathered(h, &self.embed_positions, &positions)?)
    }

    /// Runs the decoder over embedded tokens.
    ///
    /// With caches (one per span) each sequence continues what its cache holds. Of the rows that are not wanted, the
    /// last layer that is run only feeds the caches. Returns what the LM head sees, `[wanted, word_embed_proj_dim]`; of
    /// a pass that ends before the last layer the state there, `[wanted, hidden_size]`.
    pub(crate) fn forward<'b>(
        &self,
        b: &'b B,
        embedded: B::Tensor,
        rows: Rows<'_>,
        mut caches: Option<&mut [&mut B::Cache]>,
        trace: Trace<'_, 'b, B>,
    ) -> Result<B::Tensor> {
        let Trace { mut hidden, mut attentions, before_layer } = trace;
        let Rows { positions, spans, wanted, depth } = rows;
        let mut h = self.start(b, embedded, positions)?;
        let depth = depth.min(self.layers.len());
        if let (0, Some(wanted)) = (depth, wanted) {
            h = b.take_rows(&h, wanted)?;
        }
        for (index, layer) in self.layers.iter().enumerate().take(depth) {
            before_layer(index)?;
            if let Some(see) = &mut hidden {
                see(index, &h)?;
            }
            let wanted = wanted.filter(|_| index + 1 == depth);
            let at = At { style: self.style, index, spans, wanted };
            let inside = Inside { attentions: attentions.as_deref_mut(), inputs: None };
            h = layer.forward(b, h, at, caches.as_deref_mut(), inside)?;
        }
        if depth < self.layers.len() { Ok(h) } else { self.finish(b, h) }
    }

    /// What the LM head sees, `[rows, word_embed_proj_dim]`, of the state after the last layer.
    pub(crate) fn finish(&self, b: &B, mut h: B::Tensor) -> Result<B::Tensor> {
        if let Some(norm) = &self.final_layer_norm {
            h = b.layer_norm(&h, norm)?;
        }
        if let Some(project) = &self.project_out {
            h = b.linear(&h, project, Then::Nothing)?;
        }
        Ok(h)
    }

    /// The LM head, `[vocab_size, word_embed_proj_dim]`.
    pub(crate) fn head(&self) -> &B::Table {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// Hands the weights of a checkpoint to a backend one by one, to be held as `holding` says. Of the layers only
    /// those in `layers`, which is all of them for a model that is to be run.
    ///
    /// `taken` is told each tensor's name before it is taken; an error from it ends the loading.
    pub(crate) fn load(
        backend: &B,
        checkpoint: &Checkpoint,
        holding: &Holding,
        layers: Range<usize>,
        taken: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Self> {
        let config: &OptConfig = checkpoint.config();
        let (hidden, embed) = (config.hidden_size, config.word_embed_proj_dim);
        let mut loader = Loader { backend, checkpoint, holding, taken };
        let positions = config.max_position_embeddings + POSITION_OFFSET;
        Ok(Self {
            style: Style::new(config)?,
            embed_tokens: loader.table("embed_tokens", [config.vocab_size, embed])?,
            embed_positions: loader.table("embed_positions", [positions, hidden])?,
            project_in: config
                .has_projections()
                .then(|| loader.linear("project_in", [hidden, embed], false))
                .transpose()?,
            layers: layers.map(|i| loader.layer(i, config)).collect::<Result<_>>()?,
            final_layer_norm: config
                .has_final_layer_norm()
                .then(|| loader.norm("final_layer_norm", config))
                .transpose()?,
            project_out: config
                .has_projections()
                .then(|| loader.linear("project_out", [embed, hidden], false))
                .transpose()?,
            lm_head: (!config.tie_word_embeddings)
                .then(|| loader.table("lm_head", [config.vocab_size, embed]))
                .transpose()?,
        })
    }
}

impl<B: Backend> Layer<B> {
    /// Hands the weights of one layer to a backend.
    pub(crate) fn load(
        backend: &B,
        checkpoint: &Checkpoint,
        holding: &Holding,
        index: usize,
    ) -> Result<Self> {
        let mut taken = |_: &str| Ok(());
        Loader { backend, checkpoint, holding, taken: &mut taken }.layer(index, checkpoint.config())
    }

    /// Runs the layer over the state `h`, `[rows, hidden_size]`; the result has the wanted rows.
    pub(crate) fn forward<'b>(
        &self,
        b: &'b B,
        mut h: B::Tensor,
        at: At<'_>,
        caches: Option<&mut [&mut B::Cache]>,
        inside: Inside<'_, '_, 'b, B>,
    ) -> Result<B::Tensor> {
        let At { style: Style { heads, pre_norm, activation }, index, spans, wanted } = at;
        let Inside { attentions, mut inputs } = inside;
        let mut reads = |reads: Reads, x: &B::Tensor| match &mut inputs {
            Some(see) => see(reads, x),
            None => Ok(()),
        };
        // Attention: h = h + out(attend(q, k, v)), normalised before or after.
        let x = if pre_norm { Some(b.layer_norm(&h, &self.attn_norm)?) } else { None };
        let x = x.as_ref().unwrap_or(&h);
        reads(Reads::Qkv, x)?;
        let [q, k, v] = b.qkv(x, &self.q, &self.k, &self.v)?;
        let attend = Attend { heads, layer: index, spans };
        let mut mixed = match attentions {
            None => b.attend(q, k, v, attend, caches)?,
            Some(attentions) => {
                let (mixed, weights) = b.attention_weights(q, k, v, attend, caches)?;
                attentions.push(weights);
                mixed
            }
        };
        // From here on rows no longer mix, so that after the last attention unwanted ones need not be computed.
        if let Some(wanted) = wanted {
            mixed = b.take_rows(&mixed, wanted)?;
            h = b.take_rows(&h, wanted)?;
        }
        reads(Reads::Out, &mixed)?;
        h = b.linear(&mixed, &self.out, Then::Add(h))?;
        if !pre_norm {
            h = b.layer_norm(&h, &self.attn_norm)?;
        }
        // Feed-forward: h = h + fc2(activation(fc1(h))), normalised before or after.
        let x = if pre_norm { Some(b.layer_norm(&h, &self.ffn_norm)?) } else { None };
        let x = x.as_ref().unwrap_or(&h);
        reads(Reads::Fc1, x)?;
        let wide = b.linear(x, &self.fc1, Then::Activate(activation))?;
        reads(Reads::Fc2, &wide)?;
        h = b.linear(&wide, &self.fc2, Then::Add(h))?;
        if !pre_norm {
            h = b.layer_norm(&h, &self.ffn_norm)?;
        }
        Ok(h)
    }
}

/// A weight of a decoder.
pub(crate) enum WeightMut<'a, B: Backend> {
    Linear(&'a mut B::Linear),
    Norm(&'a mut B::Norm),
    Table(&'a mut B::Table),
}

impl<B: Backend> Decoder<B> {
    /// Shows every weight, with the canonical name of its module: `layers.0.fc1`.
    pub(crate) fn visit_mut(
        &mut self,
        see: &mut dyn FnMut(&str, WeightMut<'_, B>) -> Result<()>,
    ) -> Result<()> {
        see("embed_tokens", WeightMut::Table(&mut self.embed_tokens))?;
        see("embed_positions", WeightMut::Table(&mut self.embed_positions))?;
        for (name, linear) in [("project_in", &mut self.project_in), ("project_out", &mut self.project_out)] {
            linear.as_mut().map_or(Ok(()), |linear| see(name, WeightMut::Linear(linear)))?;
        }
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let Layer { attn_norm, q, k, v, out, ffn_norm, fc1, fc2 } = layer;
            let linears = [
                ("self_attn.q_proj", q),
                ("self_attn.k_proj", k),
                ("self_attn.v_proj", v),
                ("self_attn.out_proj", out),
                ("fc1", fc1),
                ("fc2", fc2),
            ];
            for (name, linear) in linears {
                see(&format!("layers.{index}.{name}"), WeightMut::Linear(linear))?;
            }
            for (name, norm) in [("self_attn_layer_norm", attn_norm), ("final_layer_norm", ffn_norm)] {
                see(&format!("layers.{index}.{name}"), WeightMut::Norm(norm))?;
            }
        }
        self.final_layer_norm
            .as_mut()
            .map_or(Ok(()), |norm| see("final_layer_norm", WeightMut::Norm(norm)))?;
        self.lm_head.as_mut().map_or(Ok(()), |head| see("lm_head", WeightMut::Table(head)))
    }
}

/// Takes tensors out of a checkpoint; each is released once the backend has its own copy.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    checkpoint: &'a Checkpoint,
    holding: &'a Holding,
    taken: &'a mut dyn FnMut(&str) -> Result<()>,
}

impl<B: Backend> Loader<'_, B> {
    fn layer(&mut self, index: usize, config: &OptConfig) -> Result<Layer<B>> {
        let (hidden, ffn, bias) = (config.hidden_size, config.ffn_dim, config.enable_bias);
        let layer = format!("layers.{index}");
        let attention = format!("{layer}.self_attn");
        Ok(Layer {
            q: self.linear(&format!("{attention}.q_proj"), [hidden, hidden], bias)?,
            k: self.linear(&format!("{attention}.k_proj"), [hidden, hidden], bias)?,
            v: self.linear(&format!("{attention}.v_proj"), [hidden, hidden], bias)?,
            out: self.linear(&format!("{attention}.out_proj"), [hidden, hidden], bias)?,
            attn_norm: self.norm(&format!("{layer}.self_attn_layer_norm"), config)?,
            fc1: self.linear(&format!("{layer}.fc1"), [ffn, hidden], bias)?,
            fc2: self.linear(&format!("{layer}.fc2"), [hidden, ffn], bias)?,
            ffn_norm: self.norm(&format!("{layer}.final_layer_norm"), config)?,
        })
    }

    fn table(&mut self, name: &str, shape: [usize; 2]) -> Result<B::Table> {
        let name = format!("{name}.weight");
        (self.taken)(&name)?;
        Ok(match self.holding.weight(self.checkpoint, &name, shape)? {
            Held::Plain(rows) => self.backend.new_table(rows.matrix()?, self.holding.dtype)?,
            Held::Quantized(rows) => self.backend.new_quantized_table(&rows)?,
        })
    }

    fn linear(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Result<B::Linear> {
        let weight_name = format!("{name}.weight");
        (self.taken)(&weight_name)?;
        let weight = self.holding.weight(self.checkpoint, &weight_name, shape)?;
        let bias = bias.then(|| self.checkpoint.tensor(&format!("{name}.bias"), &shape[..1])).transpose()?;
        let bias = bias.as_ref().map(|bias| bias.vector()).transpose()?;
        Ok(match weight {
            Held::Plain(weight) => self.backend.new_linear(weight.matrix()?, bias, self.holding.dtype)?,
            Held::Quantized(weight) => self.backend.new_quantized_linear(&weight, bias)?,
        })
    }

    fn norm(&mut self, name: &str, config: &OptConfig) -> Result<B::Norm> {
        let width = config.hidden_size;
        let affine = config.layer_norm_elementwise_affine;
        (self.taken)(&format!("{name}.weight"))?;
        let part = |part: &str| {
            affine.then(|| self.checkpoint.tensor(&format!("{name}.{part}"), &[width])).transpose()
        };
        let (weight, bias) = (part("weight")?, part("bias")?);
        Ok(self.backend.new_norm(NormParams {
            width,
            eps: LAYER_NORM_EPS,
            weight: weight.as_ref().map(|w| w.vector()).transpose()?,
            bias: bias.as_ref().map(|b| b.vector()).transpose()?,
        })?)
    }
}
