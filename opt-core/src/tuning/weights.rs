//! What is trained and what is not: weights as [`Taped`](super::tape::Taped) holds them.

use super::tape::Taped;
use ndarray::{Array2, ArrayView2, Axis};
use opt_backend::{
    Backend, DType, Error, ErrorKind, HostMatrix, HostVector, NormParams, Result, Train, quant::Quantized,
};
use std::{collections::HashMap, sync::Arc};

/// One trainable tensor; vectors are `[1, width]`.
pub(crate) struct Param<B: Backend> {
    /// Its canonical name, or that of what an adapter adds, such as `layers.0.fc1.lora_A`.
    pub(crate) name: String,
    pub(crate) value: Arc<B::Tensor>,
    /// The sum over the passes since the last step.
    pub(crate) gradient: Option<B::Tensor>,
}

/// The place of a [`Param`] in its tape's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ParamId(pub(super) usize);

/// The start of a low-rank side path: out = W x + scale (B A x + b).
pub(crate) struct LoraStart {
    /// `[r, in]`; beside the embeddings of tokens its transpose, a table `[vocab_size, r]`.
    pub(crate) a: Array2<f32>,
    /// `[out, r]`.
    pub(crate) b: Array2<f32>,
    /// `[1, out]`, where there is one.
    pub(crate) bias: Option<Array2<f32>>,
    /// α / r, or α / √r.
    pub(crate) scale: f32,
    /// Of what goes into A.
    pub(crate) dropout: f32,
    /// DoRA's magnitudes `[1, out]`.
    pub(crate) magnitude: Magnitude,
}

/// DoRA (arXiv 2402.09353): rows are scaled to a length that is learned.
pub(crate) enum Magnitude {
    /// No DoRA.
    Free,
    /// Starts as the lengths of the weight's rows.
    OfWeight,
    /// Goes on from these.
    Given(Array2<f32>),
}

/// What a trained prefix or prompt starts from.
#[allow(clippy::large_enum_variant)] // one of a tape
pub(crate) enum VirtualStart {
    /// Keys and values of all layers: row `i · 2 · layers + 2 · l` holds the keys of token i and layer l, the row
    /// after it the values; `[tokens · 2 · layers, hidden_size]`.
    Prefix(Array2<f32>),
    /// What is projected to these: W₂ tanh(W₁ e + b₁) + b₂ (arXiv 2101.00190).
    ProjectedPrefix {
        /// `[tokens, token_dim]`.
        embedding: Array2<f32>,
        /// `[encoder_hidden_size, token_dim]` and `[1, encoder_hidden_size]`.
        first: [Array2<f32>; 2],
        /// `[2 · layers · hidden_size, encoder_hidden_size]` and its bias as `[2 · layers, hidden_size]`.
        second: [Array2<f32>; 2],
    },
    /// Embeddings in front of the tokens', `[tokens, word_embed_proj_dim]`.
    Prompt(Array2<f32>),
}

/// What is to be trained, and how.
pub(crate) struct Plan {
    /// What trained matrices are multiplied in; they are held and updated in f32.
    pub(crate) dtype: DType,
    /// Of the results of attention and feed-forward blocks, as the config says.
    pub(crate) dropout: f32,
    /// Whether the tensor of this canonical name is trained.
    #[allow(clippy::type_complexity)]
    pub(crate) trains: Box<dyn Fn(&str) -> bool + Send + Sync>,
    /// What trained tensors start from where that is not the checkpoint's value; vectors are `[1, width]`.
    pub(crate) instead: HashMap<String, Array2<f32>>,
    /// Side paths by the name of what they are beside, such as `layers.0.fc1`.
    pub(crate) lora: HashMap<String, LoraStart>,
    /// Whether a table that is both embedding and LM head is trained as one of them, the other staying as it is.
    pub(crate) table_apart: bool,
    /// Virtual tokens.
    pub(crate) tokens: Option<VirtualStart>,
    /// A token whose embedding gets no gradient.
    pub(crate) padding: Option<u32>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            dropout: 0.0,
            trains: Box::new(|_| false),
            instead: HashMap::new(),
            lora: HashMap::new(),
            table_apart: false,
            tokens: None,
            padding: None,
        }
    }
}

impl Plan {
    /// Positions that a trained prefix takes, of a model of `layers` layers.
    pub(super) fn prefix_len(&self, layers: usize) -> usize {
        match &self.tokens {
            Some(VirtualStart::Prefix(rows)) => rows.nrows() / (2 * layers).max(1),
            Some(VirtualStart::ProjectedPrefix { embedding, .. }) => embedding.nrows(),
            Some(VirtualStart::Prompt(_)) | None => 0,
        }
    }
}

/// A matrix that is trained or as the backend holds it.
pub(super) enum Weight<T> {
    Frozen(T),
    Trained(ParamId),
}

pub(crate) struct LinearParts<B: Backend> {
    /// A frozen one has its bias inside, unless that is listed here.
    pub(super) weight: Weight<B::Linear>,
    pub(super) bias: Bias<B>,
    pub(super) lora: Option<Lora>,
}

/// A bias that is not part of a frozen linear.
pub(super) enum Bias<B: Backend> {
    /// It is, or there is none.
    Inside,
    Trained(ParamId),
    /// Kept apart since the product is scaled before it is added.
    Apart(Arc<B::Tensor>),
}

pub(super) struct Lora {
    pub(super) a: ParamId,
    pub(super) b: ParamId,
    pub(super) bias: Option<ParamId>,
    pub(super) scale: f32,
    pub(super) dropout: f32,
    pub(super) dora: Option<Dora>,
}

pub(super) struct Dora {
    pub(super) magnitude: ParamId,
    /// Squared lengths of the frozen weight's rows.
    pub(super) squares: Vec<f64>,
}

pub(crate) enum NormParts<B: Backend> {
    Frozen(B::Norm),
    /// Weight and bias, of which at least one is trained, and ε.
    Trained([Vector<B>; 2], f32),
}

/// A vector `[1, width]` that is trained or not.
pub(crate) enum Vector<B: Backend> {
    Fixed(Arc<B::Tensor>),
    Trained(ParamId),
}

pub(crate) struct TableParts<B: Backend> {
    pub(super) rows: Weight<B::Table>,
    /// What the LM head multiplies by, where that is not `rows`.
    pub(super) head: Option<Weight<B::Table>>,
    /// What is added to entries, and to logits.
    pub(super) beside_rows: Option<Lora>,
    pub(super) beside_head: Option<Lora>,
}

/// Virtual tokens that are trained.
#[derive(Debug, Clone, Copy)]
pub(super) enum Virtual {
    Prefix {
        rows: ParamId,
        layers: usize,
    },
    /// Weight and bias of both layers of the projection; `hidden` is the model's width.
    ProjectedPrefix {
        embedding: ParamId,
        first: [ParamId; 2],
        second: [ParamId; 2],
        hidden: usize,
    },
    Prompt(ParamId),
}

impl Virtual {
    pub(super) fn is_prefix(&self) -> bool {
        !matches!(self, Virtual::Prompt(_))
    }
}

impl<B: Backend> LinearParts<B> {
    /// Whether it is one op: no side path, no bias apart.
    pub(super) fn is_whole(&self) -> bool {
        let bias = match self.bias {
            Bias::Inside => true,
            Bias::Trained(_) => self.trains_weight(),
            Bias::Apart(_) => false,
        };
        bias && self.lora.is_none()
    }

    pub(super) fn trains_weight(&self) -> bool {
        matches!(self.weight, Weight::Trained(_))
    }

    /// Whether anything of it is trained.
    pub(super) fn is_trained(&self) -> bool {
        self.trains_weight() || matches!(self.bias, Bias::Trained(_)) || self.lora.is_some()
    }
}

impl<B: Backend> TableParts<B> {
    /// What the LM head multiplies by.
    pub(super) fn multiplied(&self) -> &Weight<B::Table> {
        self.head.as_ref().unwrap_or(&self.rows)
    }
}

impl<B: Train> Taped<B> {
    /// Says what the checkpoint calls the tensor that is handed over next.
    pub(crate) fn taking(&self, name: &str) {
        name.clone_into(&mut self.state().loading);
    }

    fn loading(&self) -> String {
        self.state().loading.clone()
    }

    pub(super) fn new_param(&self, name: String, value: ArrayView2<'_, f32>) -> Result<ParamId> {
        let value = self.plan.instead.get(&name).map_or(value, |instead| instead.view());
        let value = Arc::new(self.backend.upload(value)?);
        let mut state = self.state();
        state.params.push(Param { name, value, gradient: None });
        Ok(ParamId(state.params.len() - 1))
    }

    fn new_vector(&self, name: String, value: HostVector<'_>) -> Result<ParamId> {
        self.new_param(name, value.to_f32().insert_axis(Axis(0)).view())
    }

    pub(super) fn take_linear(
        &self,
        weight: LinearSource<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<Arc<LinearParts<B>>> {
        let name = self.loading();
        let stem = name.strip_suffix(".weight").unwrap_or(&name);
        let bias_name = format!("{stem}.bias");
        let trains_bias = bias.is_some() && (self.plan.trains)(&bias_name);
        let start = self.plan.lora.get(stem);
        let dora = start.is_some_and(|start| !matches!(start.magnitude, Magnitude::Free));
        let lora = start.map(|start| self.take_lora(stem, start, &weight)).transpose()?;
        if (self.plan.trains)(&name) {
            let LinearSource::Plain(weight) = weight else {
                let message = format_args!("{name}: quantized weights cannot be trained themselves");
                return Err(Error::new(ErrorKind::Unsupported, "new_linear", message));
            };
            let weight = self.new_param(name.clone(), weight.to_f32().view())?;
            let bias = match bias {
                None => Bias::Inside,
                Some(bias) if trains_bias => Bias::Trained(self.new_vector(bias_name, bias)?),
                Some(bias) => {
                    Bias::Apart(Arc::new(self.backend.upload(bias.to_f32().insert_axis(Axis(0)).view())?))
                }
            };
            return Ok(Arc::new(LinearParts { weight: Weight::Trained(weight), bias, lora }));
        }
        let (inside, bias) = match bias {
            Some(bias) if trains_bias => (None, Bias::Trained(self.new_vector(bias_name, bias)?)),
            Some(bias) if dora => {
                let bias = self.backend.upload(bias.to_f32().insert_axis(Axis(0)).view())?;
                (None, Bias::Apart(Arc::new(bias)))
            }
            inside => (inside, Bias::Inside),
        };
        let linear = match weight {
            LinearSource::Plain(weight) => self.backend.new_linear(weight, inside, dtype)?,
            LinearSource::Quantized(weight) => self.backend.new_quantized_linear(weight, inside)?,
        };
        Ok(Arc::new(LinearParts { weight: Weight::Frozen(linear), bias, lora }))
    }

    /// Takes the side path of `stem` over. For embeddings, A is a table as the weight is.
    fn take_lora(&self, stem: &str, start: &LoraStart, weight: &LinearSource<'_>) -> Result<Lora> {
        let (shape, rank) = (weight.shape(), start.b.ncols());
        let shapes = [start.a.dim(), start.b.dim()];
        let expected = match (stem, shape) {
            ("embed_tokens", [entries, width]) => [(entries, rank), (width, rank)],
            (_, [out, input]) => [(rank, input), (out, rank)],
        };
        if shapes != expected {
            let message = format_args!("{stem}: expected side paths for {shape:?}, found {shapes:?}");
            return Err(Error::shape("lora", message));
        }
        let a = self.new_param(format!("{stem}.lora_A"), start.a.view())?;
        let b = self.new_param(format!("{stem}.lora_B"), start.b.view())?;
        let bias = start.bias.as_ref().map(|bias| self.new_param(format!("{stem}.lora_B.bias"), bias.view()));
        let bias = bias.transpose()?;
        let dora = match &start.magnitude {
            Magnitude::Free => None,
            magnitude => {
                let squares = weight.row_squares();
                let lengths = || squares.iter().map(|s| s.sqrt() as f32).collect::<ndarray::Array1<f32>>();
                let first = match magnitude {
                    Magnitude::Given(given) => given.clone(),
                    _ => lengths().insert_axis(Axis(0)),
                };
                let magnitude = self.new_param(format!("{stem}.lora_magnitude_vector"), first.view())?;
                Some(Dora { magnitude, squares })
            }
        };
        let (scale, dropout) = (start.scale, start.dropout);
        Ok(Lora { a, b, bias, scale, dropout, dora })
    }

    pub(super) fn take_norm(&self, params: NormParams<'_>) -> Result<Arc<NormParts<B>>> {
        let name = self.loading();
        let bias_name = format!("{}.bias", name.strip_suffix(".weight").unwrap_or(&name));
        match (params.weight, params.bias) {
            (Some(weight), Some(bias)) if (self.plan.trains)(&name) || (self.plan.trains)(&bias_name) => {
                let parts = [self.norm_part(name, weight)?, self.norm_part(bias_name, bias)?];
                Ok(Arc::new(NormParts::Trained(parts, params.eps)))
            }
            _ => Ok(Arc::new(NormParts::Frozen(self.backend.new_norm(params)?))),
        }
    }

    fn norm_part(&self, name: String, value: HostVector<'_>) -> Result<Vector<B>> {
        if (self.plan.trains)(&name) {
            return Ok(Vector::Trained(self.new_vector(name, value)?));
        }
        let value = self.backend.upload(value.to_f32().insert_axis(Axis(0)).view())?;
        Ok(Vector::Fixed(Arc::new(value)))
    }

    /// The vector's value.
    pub(super) fn vector(&self, vector: &Vector<B>) -> Result<Arc<B::Tensor>> {
        match vector {
            Vector::Fixed(value) => Ok(value.clone()),
            Vector::Trained(id) => self.param(*id),
        }
    }

    pub(super) fn take_table(&self, rows: LinearSource<'_>, dtype: DType) -> Result<Arc<TableParts<B>>> {
        let name = self.loading();
        let stem = name.strip_suffix(".weight").unwrap_or(&name);
        let beside = |stem: &str| {
            let start = self.plan.lora.get(stem);
            start.map(|start| self.take_lora(stem, start, &rows)).transpose()
        };
        let apart = self.plan.table_apart && stem == "embed_tokens";
        let beside_rows = if stem == "lm_head" { None } else { beside(stem)? };
        let beside_head = if stem == "lm_head" || apart { beside("lm_head")? } else { None };
        let trains = (self.plan.trains)(&name);
        // What is learned for the one is not meant for the other, which needs a table of its own then.
        let head = match apart && (self.plan.trains)("lm_head.weight") {
            true => Some(self.take_rows_of("lm_head.weight", &rows, true, dtype)?),
            false if apart && trains => Some(self.take_rows_of(&name, &rows, false, dtype)?),
            false => None,
        };
        let rows = self.take_rows_of(&name, &rows, trains, dtype)?;
        Ok(Arc::new(TableParts { rows, head, beside_rows, beside_head }))
    }

    fn take_rows_of(
        &self,
        name: &str,
        rows: &LinearSource<'_>,
        trains: bool,
        dtype: DType,
    ) -> Result<Weight<B::Table>> {
        Ok(match rows {
            LinearSource::Plain(rows) if trains => {
                Weight::Trained(self.new_param(name.to_owned(), rows.to_f32().view())?)
            }
            // What an adapter trains whole goes into a file of its own, and starts from what the packed rows say.
            LinearSource::Quantized(rows) if trains && !self.plan.lora.is_empty() => {
                Weight::Trained(self.new_param(name.to_owned(), rows.dequantize().view())?)
            }
            LinearSource::Quantized(_) if trains => {
                let message = format_args!("{name}: quantized weights cannot be trained themselves");
                return Err(Error::new(ErrorKind::Unsupported, "new_table", message));
            }
            LinearSource::Plain(rows) => Weight::Frozen(self.backend.new_table(*rows, dtype)?),
            LinearSource::Quantized(rows) => Weight::Frozen(self.backend.new_quantized_table(rows)?),
        })
    }

    /// Takes the plan's virtual tokens over, for a model of `layers` layers.
    pub(crate) fn take_tokens(&self, layers: usize) -> Result<()> {
        let param = |name: &str, value: &Array2<f32>| self.new_param(name.to_owned(), value.view());
        let tokens = match &self.plan.tokens {
            None => return Ok(()),
            Some(VirtualStart::Prefix(rows)) => {
                Virtual::Prefix { rows: param("prompt_embeddings", rows)?, layers }
            }
            Some(VirtualStart::Prompt(rows)) => Virtual::Prompt(param("prompt_embeddings", rows)?),
            Some(VirtualStart::ProjectedPrefix { embedding, first, second }) => Virtual::ProjectedPrefix {
                embedding: param("embedding.weight", embedding)?,
                first: [param("transform.0.weight", &first[0])?, param("transform.0.bias", &first[1])?],
                second: [param("transform.2.weight", &second[0])?, param("transform.2.bias", &second[1])?],
                hidden: second[1].ncols(),
            },
        };
        // Nobody else sets it.
        let _ = self.tokens.set(tokens);
        Ok(())
    }
}

/// A matrix as a checkpoint has it.
pub(super) enum LinearSource<'a> {
    Plain(HostMatrix<'a>),
    Quantized(&'a Quantized),
}

impl LinearSource<'_> {
    fn shape(&self) -> [usize; 2] {
        match self {
            LinearSource::Plain(weight) => weight.shape(),
            LinearSource::Quantized(weight) => weight.shape(),
        }
    }

    fn row_squares(&self) -> Vec<f64> {
        let of = |rows: Array2<f32>| {
            rows.outer_iter().map(|row| row.iter().map(|&v| f64::from(v).powi(2)).sum()).collect()
        };
        match self {
            LinearSource::Plain(weight) => of(weight.to_f32()),
            LinearSource::Quantized(weight) => of(weight.dequantize()),
        }
    }
}
