use crate::{
    Error, ErrorKind, Generated, Progress, ProgressFn, Prompt, Request, Result, Session, StreamToken,
    TokenStream,
    adapter::{Adapter, AdapterSource},
    backends::{self, BackendOptions},
    checkpoint::Checkpoint,
    config::OptConfig,
    driver::{Active, Assistant, Driver, Slots},
    embedding::{Capture, EmbedPart},
    engine::{Engine, Forward, Hidden, KvCache, LoadedAdapter, Output, Sequence, Want, find_adapter},
    generation::{
        Extras, GenerationConfig, Method, ProcessorChain, Request as StrategyRequest, StopStrings, Stopping,
        strategy,
    },
    load::Load,
    prompt::{self, Overflow},
    stream::Head,
    tokenizer::Tokenizer,
};
use ndarray::{ArcArray2, Array2, Array3};
use opt_backend::{Info, MaybeSend, MaybeSync};
use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

/// A model with its tokenizer: the front door.
///
/// Cheap to clone; one value may be used from many threads at once.
///
/// ```
/// use opt_core::{Opt, generation::GenerationConfig};
///
/// let opt = Opt::open("../models/opt-novels")?;
/// let settings = GenerationConfig::default().max_new_tokens(12);
/// println!("{}", opt.generate("The old house stood", &settings)?.text());
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Opt {
    engine: Arc<dyn Engine>,
    tokenizer: Option<Tokenizer>,
    generation: Arc<GenerationConfig>,
    warnings: Arc<Vec<String>>,
    weights: Arc<str>,
    /// What requests wear that do not say.
    adapter: Option<LoadedAdapter>,
    token_bytes: Arc<OnceLock<Arc<Vec<Vec<u8>>>>>,
    #[cfg(all(feature = "constraint", not(target_arch = "wasm32")))]
    vocabulary: Arc<OnceLock<Arc<crate::constraint::Vocabulary>>>,
}

// Everywhere but on wasm32, these are Send and Sync.
const _: () = {
    const fn shared<T: MaybeSend + MaybeSync + 'static>() {}
    const fn owned<T: MaybeSend + 'static>() {}
    shared::<Opt>();
    owned::<TokenStream>();
    owned::<Session>();
};

impl Opt {
    /// Opens a directory in Hugging Face layout, or a single weights file beside its config.json, on the default
    /// backend.
    ///
    /// # Errors
    /// Those of [`Opt::load`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::load(path, Load::default())
    }

    /// Loads a model.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::Config`], [`ErrorKind::Checkpoint`] or [`ErrorKind::Tokenizer`], naming
    /// the file; [`ErrorKind::Cancelled`]; [`ErrorKind::Backend`]; [`ErrorKind::Option`] for weights that cannot be
    /// quantized as asked; those of [`Adapter::open`] and [`Adapter::check`].
    pub fn load(path: impl AsRef<Path>, load: Load<'_>) -> Result<Self> {
        let path = path.as_ref();
        let checkpoint = Checkpoint::open(path)?;
        let dir = if path.is_dir() {
            path.to_owned()
        } else {
            path.parent().map_or_else(PathBuf::new, Path::to_owned)
        };
        let tokenizer = match Tokenizer::from_dir(&dir) {
            Ok(tokenizer) => Some(tokenizer),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let file = dir.join("generation_config.json");
        let generation = if file.exists() { Some(GenerationConfig::from_file(&file)?) } else { None };
        Self::assemble(&checkpoint, tokenizer, generation, load)
    }

    /// Loads a model from a checkpoint at hand (such as one from bytes in memory), with the tokenizer and
    /// generation_config.json that belong to it.
    ///
    /// # Errors
    /// Those of [`Opt::load`].
    pub fn assemble(
        checkpoint: &Checkpoint,
        tokenizer: Option<Tokenizer>,
        generation: Option<GenerationConfig>,
        load: Load<'_>,
    ) -> Result<Self> {
        let mut warnings: Vec<String> = checkpoint.validate()?.iter().map(ToString::to_string).collect();
        let config = checkpoint.config();
        load.holding.check(checkpoint)?;
        let adapters: Vec<Adapter> =
            load.adapters.into_iter().map(AdapterSource::open).collect::<Result<_>>()?;
        for adapter in &adapters {
            warnings.extend(adapter.check(config)?);
        }
        if let Some(tokenizer) = tokenizer.as_ref().filter(|t| t.vocab_size() > config.vocab_size) {
            warnings.push(format!(
                "the tokenizer knows {} tokens, the model {}: some texts will not run",
                tokenizer.vocab_size(),
                config.vocab_size
            ));
        }
        // As in transformers: config.json counts only where there is no generation_config.json.
        let generation = generation.unwrap_or_else(|| GenerationConfig::from_model(config));
        let backend = match load.engine {
            Some(backend) => backend,
            None => backends::choose(backends::NAMES[0], &BackendOptions::default())?.0,
        };
        let progress = load.progress.map(|progress| progress as &mut ProgressFn<'_>);
        let weights = match checkpoint.quantization() {
            Some(layout) => layout,
            None => load.holding.name(),
        };
        let engine = backend.make(checkpoint, &load.holding, &adapters, load.cancel.as_ref(), progress)?;
        Ok(Self {
            engine,
            tokenizer,
            generation: Arc::new(generation),
            warnings: Arc::new(warnings),
            weights: weights.into(),
            adapter: None,
            token_bytes: Arc::default(),
            #[cfg(all(feature = "constraint", not(target_arch = "wasm32")))]
            vocabulary: Arc::default(),
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &OptConfig {
        self.engine.config()
    }

    /// The model's generation_config.json, or what config.json says in its place.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation
    }

    /// The tokenizer, if the model came with one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// How the weights are held: `f32`, `int8`, or what a quantized checkpoint is, as `GPTQ, 4 bits, groups of 128`.
    pub fn weights(&self) -> &str {
        &self.weights
    }

    /// What was odd but usable when the model was loaded, one line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What the backend found on this machine.
    pub fn info(&self) -> Info {
        self.engine.info()
    }

    /// The adapters that were loaded beside the model.
    pub fn adapters(&self) -> &[LoadedAdapter] {
        self.engine.adapters()
    }

    /// The same model wearing this adapter in all that it does, unless a request asks for another.
    ///
    /// ```no_run
    /// use opt_core::{Load, Opt};
    ///
    /// let opt = Opt::load("opt-125m", Load::default().adapter("adapters/poems").adapter("adapters/recipes"))?;
    /// let (poems, recipes) = (opt.adapted("poems")?, opt.adapted("recipes")?);
    /// # Ok::<(), opt_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for one that is not loaded.
    pub fn adapted(&self, name: &str) -> Result<Self> {
        let loaded = self.adapters();
        let adapter = loaded.get(find_adapter(loaded, name)?).cloned();
        Ok(Self { adapter, ..self.clone() })
    }

    /// The adapter that all of this wears; see [`Opt::adapted`].
    pub fn adapter(&self) -> Option<&str> {
        self.adapter.as_ref().map(|adapter| &*adapter.name)
    }

    /// Tokens that a sequence may have: the model's positions less the virtual tokens of the adapter it wears.
    pub fn context(&self) -> usize {
        let front = self.adapter.as_ref().map_or(0, |adapter| adapter.virtual_tokens);
        self.config().max_position_embeddings.saturating_sub(front)
    }

    /// The same model run by another engine, such as one that counts or logs around this one's ([`Opt::engine`]).
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for an engine of another vocabulary or context.
    pub fn with_engine(self, engine: Arc<dyn Engine>) -> Result<Self> {
        let shape = |config: &OptConfig| (config.vocab_size, config.max_position_embeddings);
        let (expected, found) = (shape(self.config()), shape(engine.config()));
        if expected != found {
            let message = format!("engine: expected (vocabulary, context) {expected:?}, found {found:?}");
            return Err(Error::new(ErrorKind::Option, message));
        }
        Ok(Self { engine, ..self })
    }

    /// The model on its backend, for work that the methods here do not cover.
    pub fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] if the model came without one.
    pub fn require_tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            let message = "texts and stop strings need a tokenizer (tokenizer.json, or vocab.json and merges.txt), and \
                           the model came without one; prompts can be given as token ids";
            Error::new(ErrorKind::Tokenizer, message)
        })
    }

    /// [`Opt::generate`], awaited.
    ///
    /// # Errors
    /// Those of [`Opt::generate`].
    pub async fn generate_async(
        &self,
        prompt: impl Into<Prompt>,
        config: &GenerationConfig,
    ) -> Result<Generated> {
        let mut all = self.stream(prompt, config)?.finish().await?;
        all.pop().ok_or_else(|| Error::new(ErrorKind::Backend, "expected one result, found none"))
    }

    /// [`Opt::generate_batch`], awaited.
    ///
    /// # Errors
    /// Those of [`Opt::generate_batch`].
    pub async fn generate_batch_async(
        &self,
        requests: impl IntoIterator<Item = impl Into<Request>>,
    ) -> Result<Vec<Generated>> {
        self.stream_batch(requests)?.finish().await
    }

    /// Continues a prompt, token by token.
    ///
    /// ```
    /// use opt_core::{Opt, generation::GenerationConfig};
    ///
    /// let opt = Opt::open("../models/opt-novels")?;
    /// for token in opt.stream("The river", &GenerationConfig::default().max_new_tokens(8))? {
    ///     print!("{}", token?.text);
    /// }
    /// # Ok::<(), opt_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Opt::generate`]; what fails later is an item of the stream.
    pub fn stream(&self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<TokenStream> {
        self.stream_batch([Request::new(prompt).config(config.clone())])
    }

    /// Continues several prompts as one batch, token by token.
    ///
    /// # Errors
    /// As [`Opt::generate_batch`].
    pub fn stream_batch(
        &self,
        requests: impl IntoIterator<Item = impl Into<Request>>,
    ) -> Result<TokenStream> {
        let requests: Vec<Request> = requests.into_iter().map(Into::into).collect();
        let only_one = requests.len() == 1;
        let mut active = Vec::with_capacity(requests.len());
        let mut heads = Vec::with_capacity(requests.len());
        for (index, request) in requests.into_iter().enumerate() {
            let prepared = self.prepare(request, None);
            let (request, head) = prepared
                .map_err(|e| if only_one { e } else { e.at(format_args!("request {}", index + 1)) })?;
            active.push(request);
            heads.push(head);
        }
        Ok(TokenStream::new(Driver::new(Arc::clone(&self.engine), active), self.tokenizer.clone(), heads))
    }

    /// [`Opt::generate_with`], awaited.
    ///
    /// # Errors
    /// Those of [`Opt::generate_with`].
    pub async fn generate_with_async(
        &self,
        requests: impl IntoIterator<Item = impl Into<Request>>,
        mut see: impl FnMut(&StreamToken) -> ControlFlow<()>,
        mut progress: impl FnMut(Progress<'_>) -> ControlFlow<()> + MaybeSend,
    ) -> Result<Vec<Generated>> {
        let mut stream = self.stream_batch(requests)?;
        while let Some(token) = stream.next_token_watched(&mut progress).await {
            if see(&token?).is_break() {
                stream.stop(crate::generation::FinishReason::Stop);
                break;
            }
        }
        stream.finish().await
    }

    /// An empty conversation that keeps its cache.
    pub fn session(&self) -> Session {
        Session::new(self.clone())
    }

    /// [`Opt::logits`], awaited.
    ///
    /// # Errors
    /// Those of [`Opt::logits`].
    pub async fn logits_async(&self, ids: &[u32]) -> Result<Array2<f32>> {
        let output = self.run_one(Sequence::new(ids).want(Want::Logits { rows: ids.len() })).await?;
        let logits = output.logits.map(ArcArray2::into_owned);
        logits.ok_or_else(|| Error::new(ErrorKind::Prompt, "expected at least one token, found none"))
    }

    /// [`Opt::hidden_states`], awaited.
    ///
    /// # Errors
    /// Those of [`Opt::logits`].
    pub async fn hidden_states_async(&self, ids: &[u32]) -> Result<Vec<Array2<f32>>> {
        let mut sequence = Sequence::new(ids);
        sequence.hidden = Hidden::All;
        Ok(self.run_one(sequence).await?.hidden)
    }

    /// [`Opt::attentions`], awaited.
    ///
    /// # Errors
    /// Those of [`Opt::logits`].
    pub async fn attentions_async(&self, ids: &[u32]) -> Result<Vec<Array3<f32>>> {
        let mut sequence = Sequence::new(ids);
        sequence.attentions = true;
        Ok(self.run_one(sequence).await?.attentions)
    }

    async fn run_one<'a>(&'a self, sequence: Sequence<'a>) -> Result<Output> {
        let sequence = sequence.adapter(self.adapter());
        if sequence.input.is_empty() {
            return Err(Error::new(ErrorKind::Prompt, "expected at least one token, found none"));
        }
        let batch = Forward { sequences: vec![sequence], ..Forward::default() };
        Ok(self.engine.forward(batch).await?.pop().unwrap_or_default())
    }

    /// Everything a request needs to run. `start` is a cache that holds the first tokens of the prompt.
    pub(crate) fn prepare(&self, request: Request, start: Option<KvCache>) -> Result<(Active, Head)> {
        if let Some(name) = request.adapter.as_deref().filter(|name| self.adapter() != Some(name)) {
            let request = Request { adapter: None, ..request.clone() };
            return self.adapted(name)?.prepare(request, start);
        }
        let Request { prompt, config, hooks, assistant, bos, overflow, .. } = request;
        let config = config.over(&self.generation);
        let (ids, embeds) = match prompt {
            Prompt::Text(text) => (self.require_tokenizer()?.encode(&text, bos)?, None),
            Prompt::Ids(ids) => (ids, None),
            Prompt::Embeds(rows) => (Vec::new(), Some(rows)),
        };
        let context = self.context();
        let new_tokens = config.max_new_tokens.unwrap_or(20);
        // The last token is not run, unless it is to be embedded.
        let longest = if request.embed.is_some() { context.saturating_sub(1) } else { context };
        let bos_id = self.tokenizer.as_ref().filter(|t| t.adds_bos()).and_then(Tokenizer::bos_id);
        // A prompt that is cut leaves room for what is to be generated; one token of it stays in any case.
        let limit = match overflow {
            Overflow::Error => context,
            _ if ids.len() <= context => context,
            _ => (longest + 1).saturating_sub(new_tokens).max(1),
        };
        let (ids, cut) = match embeds {
            None => prompt::fit(ids, limit, overflow, bos_id).map(|fitted| (fitted.ids, fitted.cut))?,
            Some(_) => (ids, 0),
        };

        let extras = Extras {
            top_alternatives: request.top_alternatives,
            keep_scores: request.keep_scores,
            keep_logits: request.keep_logits,
            has_assistant: assistant.is_some(),
            runs_last: request.embed.is_some(),
        };
        let embeds_len = embeds.as_ref().map_or(0, Array2::nrows);
        let model = OptConfig { max_position_embeddings: context, ..self.config().clone() };
        let (settings, warnings) = config.resolve(&model, &ids, embeds_len, &extras)?;
        if let Some(assistant) = &assistant {
            self.check_assistant(assistant, embeds_len, settings.max_length)?;
        }
        let stop = match &settings.stop_strings[..] {
            [] => None,
            strings => Some(StopStrings::new(strings, self.token_bytes()?)),
        };
        #[cfg(all(feature = "constraint", not(target_arch = "wasm32")))]
        if let Some(constraint) = &hooks.constraint {
            constraint.check(self.require_tokenizer()?, &settings)?;
        }
        let chain = ProcessorChain::new(&config, &settings, &hooks)?;
        let stopping = Stopping::new(&settings, stop, &hooks);
        // Contrastive search looks at the hidden states of the whole prompt, and so may an embedding, so that a kept
        // cache does not help them.
        let sees_prompt = matches!(settings.method, Method::Contrastive { .. })
            || matches!(request.embed, Some((_, EmbedPart::Whole)));
        let head = Head {
            prompt_ids: ids.clone(),
            cut,
            warnings,
            seed: settings.seed,
            longest: settings.max_length,
            branches: settings.branches(),
            returned: settings.num_return_sequences,
            sees_prompt,
            virtual_tokens: self.config().max_position_embeddings - context,
        };
        let max_time = settings.max_time;
        // Behind a cut every token stands at another position.
        let start = start.filter(|_| cut == 0 && !sees_prompt);
        let embed = match request.embed {
            Some((options, part)) => {
                Some(Capture::new(options, part, &ids, self.config().num_hidden_layers)?)
            }
            None => None,
        };
        let strategy = strategy(StrategyRequest { prompt: ids, embeds_len, settings, chain, stopping })?;
        let assistant = assistant.map(|Opt { engine, adapter, .. }| Assistant {
            engine,
            adapter: adapter.map(|adapter| adapter.name),
        });
        let active = Active {
            assistant,
            slots: Slots::new(embeds_len),
            embeds,
            start,
            cache_dtype: request.cache_dtype,
            use_cache: config.use_cache.unwrap_or(true),
            max_time,
            cancel: request.cancel,
            embed,
            ..Active::new(strategy, self.worn())
        };
        Ok((active, head))
    }

    /// The name of what all of this wears.
    pub(crate) fn worn(&self) -> Option<Arc<str>> {
        self.adapter.as_ref().map(|adapter| Arc::clone(&adapter.name))
    }

    /// The bytes of each token, made once for all requests with stop strings.
    fn token_bytes(&self) -> Result<Arc<Vec<Vec<u8>>>> {
        let strings = self.require_tokenizer()?.token_strings();
        let bytes = |id| strings.get(id).unwrap_or_default().to_vec();
        let make = || Arc::new((0..strings.len() as u32).map(bytes).collect());
        Ok(Arc::clone(self.token_bytes.get_or_init(make)))
    }

    /// The tokens as a trie, made once for all constraints.
    #[cfg(all(feature = "constraint", not(target_arch = "wasm32")))]
    pub(crate) fn vocabulary(&self) -> Result<Arc<crate::constraint::Vocabulary>> {
        if let Some(made) = self.vocabulary.get() {
            return Ok(Arc::clone(made));
        }
        let made = Arc::new(crate::constraint::Vocabulary::new(self.require_tokenizer()?)?);
        Ok(Arc::clone(self.vocabulary.get_or_init(|| made)))
    }

    fn check_assistant(&self, assistant: &Opt, embeds_len: usize, max_length: usize) -> Result<()> {
        let (ours, theirs) = (self.config().vocab_size, assistant.config().vocab_size);
        if ours != theirs {
            let message =
                format!("assistant model: expected a vocabulary of {ours} like the target's, found {theirs}");
            return Err(Error::new(ErrorKind::Option, message));
        }
        if embeds_len > 0 {
            let message = "assisted decoding: expected a prompt of token ids, found embeddings";
            return Err(Error::new(ErrorKind::Option, message));
        }
        // The last token is the target's, and the one before it is drafted but not run.
        let (least, found) = (max_length.saturating_sub(2), assistant.context());
        if found < least {
            let message = format!(
                "assistant model: expected a context of at least {least} tokens for this request, found {found}"
            );
            return Err(Error::new(ErrorKind::Option, message));
        }
        Ok(())
    }
}
