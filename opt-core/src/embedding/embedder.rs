use super::EmbedOptions;
use crate::{
    CancelToken, Error, ErrorKind, Opt, Progress, ProgressFn, Prompt, Result,
    engine::{Forward, Hidden, Input, Sequence, check_vocabulary},
    prompt::fit,
};
use ndarray::Array2;
use std::ops::ControlFlow;

/// Makes vectors of texts.
///
/// ```
/// use opt_core::{Opt, embedding::{EmbedOptions, Embedder}};
///
/// let opt = Opt::open("../models/opt-novels")?;
/// let embedder = Embedder::new(&opt, EmbedOptions::default().normalize(true))?;
/// let found = embedder.embed("The river ran through the valley.")?;
/// assert_eq!(found.vector().len(), embedder.width());
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Embedder {
    opt: Opt,
    options: EmbedOptions,
    layer: usize,
}

/// What came of one text.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Embedding {
    /// The vector, `[1, width]`; without pooling one for each token, `[tokens, width]`.
    pub rows: Array2<f32>,
    /// How many tokens were run.
    pub tokens: usize,
    /// How many were cut off, for the text was too long.
    pub cut: usize,
}

impl Embedding {
    /// All numbers: the vector, or without pooling one vector after the other.
    pub fn vector(&self) -> &[f32] {
        self.rows.as_slice().unwrap_or_default()
    }
}

/// An input that can be run.
pub(super) enum Ready<'a> {
    Ids { ids: Vec<u32>, cut: usize },
    Embeds(&'a Array2<f32>),
}

impl Ready<'_> {
    fn input(&self) -> Input<'_> {
        match self {
            Ready::Ids { ids, .. } => Input::Ids(ids),
            Ready::Embeds(rows) => Input::Embeds(rows.view()),
        }
    }
}

impl Embedder {
    /// An embedder on a model, wearing what the model wears ([`Opt::adapted`]).
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a layer that the model does not have, and limits of 0.
    pub fn new(opt: &Opt, options: EmbedOptions) -> Result<Self> {
        let layer = options.resolve(opt.config().num_hidden_layers)?;
        Ok(Self { opt: opt.clone(), options, layer })
    }

    /// The model.
    pub fn opt(&self) -> &Opt {
        &self.opt
    }

    /// How texts become vectors.
    pub fn options(&self) -> &EmbedOptions {
        &self.options
    }

    /// The index of the state that is looked at: 0 to the number of layers.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// The width of a vector: `word_embed_proj_dim` at the last layer, `hidden_size` at all others.
    pub fn width(&self) -> usize {
        let config = self.opt.config();
        if self.layer == config.num_hidden_layers { config.word_embed_proj_dim } else { config.hidden_size }
    }

    /// How many tokens an input is run with, and how many are cut off. It runs nothing: many inputs can be checked
    /// before long work begins.
    ///
    /// # Errors
    /// Those of [`Embedder::embed`], but for what fails on the device.
    pub fn check(&self, input: &Prompt) -> Result<(usize, usize)> {
        Ok(match self.ready(input)? {
            Ready::Ids { ids, cut } => (ids.len(), cut),
            Ready::Embeds(rows) => (rows.nrows(), 0),
        })
    }

    /// [`Embedder::embed`], awaited.
    ///
    /// # Errors
    /// Those of [`Embedder::embed`].
    pub async fn embed_async(&self, input: impl Into<Prompt>) -> Result<Embedding> {
        let input = input.into();
        let ready = self.ready(&input)?;
        let mut found = self.run(std::slice::from_ref(&ready), &CancelToken::new()).await?;
        found.pop().ok_or_else(|| Error::new(ErrorKind::Backend, "expected one embedding, found none"))
    }

    /// [`Embedder::embed_batch`], awaited.
    ///
    /// # Errors
    /// Those of [`Embedder::embed_batch`].
    pub async fn embed_batch_async(
        &self,
        inputs: impl IntoIterator<Item = impl Into<Prompt>>,
    ) -> Result<Vec<Embedding>> {
        let inputs: Vec<Prompt> = inputs.into_iter().map(Into::into).collect();
        self.embed_with_async(&inputs, &CancelToken::new(), &mut |_| ControlFlow::Continue(())).await
    }

    /// [`Embedder::embed_with`], awaited.
    ///
    /// # Errors
    /// Those of [`Embedder::embed_with`].
    pub async fn embed_with_async(
        &self,
        inputs: &[Prompt],
        cancel: &CancelToken,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Vec<Embedding>> {
        let ready = inputs
            .iter()
            .enumerate()
            .map(|(index, input)| self.ready(input).map_err(|e| e.at(format_args!("input {}", index + 1))));
        let ready: Vec<Ready<'_>> = ready.collect::<Result<_>>()?;
        let mut found = Vec::with_capacity(ready.len());
        let mut rest = &ready[..];
        while !rest.is_empty() {
            // As many as fit, but at least one.
            let mut tokens = 0usize;
            let fits = |ready: &&Ready<'_>| {
                tokens = tokens.saturating_add(ready.input().len());
                tokens <= self.options.batch_tokens
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (batch, later) = rest.split_at(count);
            rest = later;
            found.extend(self.run(batch, cancel).await?);
            if progress(Progress::new("inputs", found.len() as u64, inputs.len() as u64)).is_break() {
                return Err(Error::new(ErrorKind::Cancelled, "embedding was cancelled"));
            }
        }
        Ok(found)
    }

    /// An input as it is run.
    pub(super) fn ready<'a>(&self, input: &'a Prompt) -> Result<Ready<'a>> {
        let fail = |message: String| Err(Error::new(ErrorKind::Prompt, message));
        let context = self.opt.context();
        let limit = self.options.max_tokens.map_or(context, |most| most.min(context));
        let tokenizer = self.opt.tokenizer();
        let ids = match input {
            // A BOS alone is no text's vector.
            Prompt::Text(text) if text.is_empty() => {
                return fail("the text is empty: expected at least one character".to_owned());
            }
            Prompt::Text(text) => self.opt.require_tokenizer()?.encode(text, self.options.bos)?,
            Prompt::Ids(ids) => ids.clone(),
            Prompt::Embeds(rows) => {
                let (found, width) = rows.dim();
                let expected = self.opt.config().word_embed_proj_dim;
                if found == 0 || found > limit || width != expected {
                    return fail(format!(
                        "embeddings: expected 1 to {limit} tokens of width {expected}, found {found} of width {width}"
                    ));
                }
                return Ok(Ready::Embeds(rows));
            }
        };
        check_vocabulary(&ids, self.opt.config().vocab_size)?;
        let bos = tokenizer.filter(|t| t.adds_bos()).and_then(|t| t.bos_id());
        let fitted = fit(ids, limit, self.options.overflow, bos)?;
        Ok(Ready::Ids { ids: fitted.ids, cut: fitted.cut })
    }

    /// The tokens of an input, and how many are cut off.
    pub(crate) fn ids(&self, input: &Prompt) -> Result<(Vec<u32>, usize)> {
        match self.ready(input)? {
            Ready::Ids { ids, cut } => Ok((ids, cut)),
            Ready::Embeds(_) => {
                Err(Error::new(ErrorKind::Prompt, "expected a text or token ids, found embeddings"))
            }
        }
    }

    /// Runs inputs as one batch.
    async fn run(&self, inputs: &[Ready<'_>], cancel: &CancelToken) -> Result<Vec<Embedding>> {
        let sequences = inputs.iter().map(|input| Sequence {
            hidden: Hidden::Layer(self.layer),
            pooling: self.options.pooling,
            ..Sequence::new(input.input()).adapter(self.opt.adapter())
        });
        let batch = Forward { sequences: sequences.collect(), cancel: Some(cancel), watch: None };
        let outputs = self.opt.engine().forward(batch).await?;
        let each = inputs.iter().zip(outputs);
        each.map(|(input, mut output)| {
            let rows = self.options.finish(output.hidden.pop().unwrap_or_default())?;
            let cut = if let Ready::Ids { cut, .. } = input { *cut } else { 0 };
            Ok(Embedding { rows, tokens: input.input().len(), cut })
        })
        .collect()
    }
}

#[cfg(not(target_arch = "wasm32"))]
impl Embedder {
    /// Makes the vector of one text (or of token ids, used exactly as given; or of embeddings in their place).
    ///
    /// # Errors
    /// [`ErrorKind::Prompt`] for an input that is empty, too long or outside the vocabulary,
    /// [`ErrorKind::Tokenizer`] for a text where there is no tokenizer, [`ErrorKind::Option`] for numbers that
    /// [`Precision::F16`](super::Precision::F16) cannot hold, [`ErrorKind::Backend`].
    pub fn embed(&self, input: impl Into<Prompt>) -> Result<Embedding> {
        opt_backend::block_on(self.embed_async(input))
    }

    /// Makes the vectors of many inputs of any lengths, in order. Each is what it is alone: bit for bit on a backend
    /// that is deterministic ([`Info`](crate::Info)), and else up to rounding.
    ///
    /// # Errors
    /// As [`Embedder::embed`], naming the input; all are checked before the first is run.
    pub fn embed_batch(&self, inputs: impl IntoIterator<Item = impl Into<Prompt>>) -> Result<Vec<Embedding>> {
        opt_backend::block_on(self.embed_batch_async(inputs))
    }

    /// [`Embedder::embed_batch`], which `cancel` and `progress` can end.
    ///
    /// # Errors
    /// Those of [`Embedder::embed_batch`], and [`ErrorKind::Cancelled`].
    pub fn embed_with(
        &self,
        inputs: &[Prompt],
        cancel: &CancelToken,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Vec<Embedding>> {
        opt_backend::block_on(self.embed_with_async(inputs, cancel, progress))
    }
}
