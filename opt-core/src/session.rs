use crate::{
    Error, ErrorKind, Generated, Opt, Prompt, Request, Result, TokenStream,
    driver::Driver,
    engine::{Forward, KvCache, Sequence},
    generation::GenerationConfig,
    tokenizer::Bos,
};
use bytemuck::cast_slice;
use ndarray::Array2;
use opt_backend::CacheLayer;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{collections::HashMap, sync::Arc};

/// A conversation whose keys and values are kept, so that each turn runs only what is new.
///
/// ```
/// use opt_core::{Opt, generation::GenerationConfig};
///
/// let opt = Opt::open("../models/opt-novels")?;
/// let mut session = opt.session();
/// session.append("It was a dark night.")?;
/// let mut other_end = session.fork()?;
/// let settings = GenerationConfig::default().max_new_tokens(8);
/// session.generate(" The door", &settings)?;
/// other_end.generate(" Suddenly", &settings)?;
/// # Ok::<(), opt_core::Error>(())
/// ```
pub struct Session {
    opt: Opt,
    ids: Vec<u32>,
    /// Holds the first `cache.len()` of `ids`; `None` while nothing has been run.
    cache: Option<KvCache>,
}

/// What a saved session says of itself.
const FORMAT: &str = "opt-session-1";

impl Session {
    pub(crate) fn new(opt: Opt) -> Self {
        Self { opt, ids: Vec::new(), cache: None }
    }

    /// All tokens so far, of both sides.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Their text without special tokens.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] for a model without one.
    pub fn text(&self) -> Result<String> {
        self.opt.require_tokenizer()?.decode(&self.ids, true)
    }

    /// [`Session::append`], awaited.
    ///
    /// # Errors
    /// Those of [`Session::append`].
    pub async fn append_async(&mut self, prompt: impl Into<Prompt>) -> Result<()> {
        let mut ids = self.ids.clone();
        ids.extend(self.encode(prompt.into(), Bos::Model)?);
        let context = self.opt.context();
        if ids.len() > context {
            let message =
                format!("session: expected at most {context} tokens (the context), found {}", ids.len());
            return Err(Error::new(ErrorKind::Prompt, message));
        }
        let mut cache = match self.cache.take() {
            Some(cache) => cache,
            None => self.opt.engine().new_cache(Default::default())?,
        };
        let mut result = Ok(Vec::new());
        let before = cache.len();
        for piece in ids[before..].chunks(crate::driver::MAX_ROWS) {
            let mut sequence = Sequence::new(piece).adapter(self.opt.adapter());
            sequence.cache = Some(&mut cache);
            let batch = Forward { sequences: vec![sequence], ..Forward::default() };
            result = self.opt.engine().forward(batch).await;
            if result.is_err() {
                cache.truncate(before)?;
                break;
            }
        }
        self.cache = Some(cache);
        result?;
        self.ids = ids;
        Ok(())
    }

    /// [`Session::generate`], awaited.
    ///
    /// # Errors
    /// Those of [`Session::generate`].
    pub async fn generate_async(
        &mut self,
        prompt: impl Into<Prompt>,
        config: &GenerationConfig,
    ) -> Result<Generated> {
        self.run_async(Request::new(prompt).config(config.clone())).await
    }

    /// [`Session::run`], awaited.
    ///
    /// # Errors
    /// Those of [`Session::run`].
    pub async fn run_async(&mut self, request: Request) -> Result<Generated> {
        let stream = self.start(request)?;
        self.absorb_async(stream).await
    }

    /// Begins a turn whose tokens are to be seen as they are made. Hand the stream back to [`Session::absorb`], read
    /// to its end or not, for the turn to become part of the conversation.
    ///
    /// # Errors
    /// As [`Opt::stream`].
    pub fn start(&mut self, mut request: Request) -> Result<TokenStream> {
        let mut ids = self.ids.clone();
        let prompt = std::mem::replace(&mut request.prompt, Prompt::Ids(Vec::new()));
        ids.extend(self.encode(prompt, request.bos)?);
        // The last token must be run for its logits, even if its keys and values are there.
        let mut start = self.cache.as_ref().map(KvCache::fork).transpose()?;
        if let Some(cache) = start.as_mut().filter(|cache| cache.len() >= ids.len()) {
            cache.truncate(ids.len().saturating_sub(1))?;
        }
        request.prompt = Prompt::Ids(ids);
        let (active, head) = self.opt.prepare(request, start)?;
        let driver = Driver::new(Arc::clone(self.opt.engine()), vec![active]);
        Ok(TokenStream::new(driver, self.opt.tokenizer().cloned(), vec![head]))
    }

    /// [`Session::absorb`], awaited.
    ///
    /// # Errors
    /// Those of [`Session::absorb`].
    pub async fn absorb_async(&mut self, stream: TokenStream) -> Result<Generated> {
        let not_ours = || {
            let message = "session: expected the stream of a turn of this conversation, with nothing added since, \
                           found another";
            Error::new(ErrorKind::Option, message)
        };
        if !stream.continues(self.opt.engine(), &self.ids) {
            return Err(not_ours());
        }
        let turns = stream.finish_with_slots().await?;
        let (generated, mut slots) = turns.into_iter().next().ok_or_else(not_ours)?;
        let mut ids = generated.prompt_ids.clone();
        ids.extend(generated.ids());
        let ran = slots.take_prefix(&ids)?.and_then(|slot| slot.cache);
        // A turn that ran nothing, or without a cache, leaves what there was.
        let shared = self.ids.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        let kept = self.cache.as_ref().map_or(0, |cache| cache.len().min(shared));
        match ran {
            Some(cache) if cache.len() >= kept => self.cache = Some(cache),
            _ => self.cache.as_mut().map_or(Ok(()), |cache| cache.truncate(kept))?,
        }
        self.ids = ids;
        Ok(generated)
    }

    /// A second conversation with the same past; the two then go their own ways.
    ///
    /// # Errors
    /// [`ErrorKind::Backend`] if the device fails.
    pub fn fork(&self) -> Result<Self> {
        let cache = self.cache.as_ref().map(KvCache::fork).transpose()?;
        Ok(Self { opt: self.opt.clone(), ids: self.ids.clone(), cache })
    }

    /// Forgets all but the first `len` tokens.
    ///
    /// # Errors
    /// [`ErrorKind::Backend`] if the device fails.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        self.ids.truncate(len);
        self.cache.as_mut().map_or(Ok(()), |cache| cache.truncate(len))
    }

    /// Tokens, keys and values as a safetensors file, awaited: what [`Session::save`] writes, for those who keep it
    /// elsewhere than in a file.
    ///
    /// # Errors
    /// [`ErrorKind::Backend`] if the device fails.
    pub async fn to_bytes_async(&self) -> Result<Vec<u8>> {
        let layers = match &self.cache {
            Some(cache) => cache.read().await?,
            None => Vec::new(),
        };
        let probe = self.probe().await?;
        let mut metadata =
            HashMap::from([("format".to_owned(), FORMAT.to_owned()), ("config".to_owned(), self.shape())]);
        if let Some(adapter) = self.opt.adapter() {
            metadata.insert("adapter".to_owned(), adapter.to_owned());
        }
        let write = || -> std::result::Result<Vec<u8>, Box<dyn std::error::Error + Send + Sync>> {
            let mut tensors = vec![
                ("ids".to_owned(), TensorView::new(Dtype::U32, vec![self.ids.len()], cast_slice(&self.ids))?),
                ("probe".to_owned(), TensorView::new(Dtype::F32, vec![probe.len()], cast_slice(&probe))?),
            ];
            for (index, layer) in layers.iter().enumerate() {
                for (name, rows) in [("keys", &layer.keys), ("values", &layer.values)] {
                    let data = rows.as_slice().ok_or("keys and values do not lie in order")?;
                    let view = TensorView::new(Dtype::F32, rows.shape().to_vec(), cast_slice(data))?;
                    tensors.push((format!("layers.{index}.{name}"), view));
                }
            }
            Ok(safetensors::serialize(tensors, Some(metadata))?)
        };
        write().map_err(|e| Error::because(ErrorKind::Backend, "the session cannot be written", e))
    }

    /// Reads what [`Session::to_bytes_async`] gave, with the same model.
    ///
    /// # Errors
    /// [`ErrorKind::Checkpoint`] if it is damaged or of another model, [`ErrorKind::Backend`] if the device fails.
    pub async fn from_bytes_async(opt: &Opt, bytes: &[u8]) -> Result<Self> {
        let damaged = |what: &str| Error::new(ErrorKind::Checkpoint, format!("not a usable session: {what}"));
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| damaged(&e.to_string()))?;
        let file = SafeTensors::deserialize(bytes).map_err(|e| damaged(&e.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if metadata.get("format").map(String::as_str) != Some(FORMAT) {
            return Err(damaged(&format!("expected format {FORMAT}, found {:?}", metadata.get("format"))));
        }
        let mut session = Self::new(opt.clone());
        if metadata.get("config") != Some(&session.shape()) {
            return Err(damaged("it was saved with a model of another shape"));
        }
        let adapter = metadata.get("adapter").map(String::as_str);
        if adapter != opt.adapter() {
            let shown = |name: Option<&str>| name.map_or("none".to_owned(), |name| format!("{name:?}"));
            let message = format!("expected adapter {}, found {}", shown(opt.adapter()), shown(adapter));
            return Err(damaged(&message));
        }
        // Virtual tokens are in the cache as well.
        let front = opt.config().max_position_embeddings - opt.context();
        let numbers = |name: &str, dtype: Dtype| {
            let view = file.tensor(name).map_err(|e| damaged(&format!("{name}: {e}")))?;
            if view.dtype() != dtype {
                return Err(damaged(&format!("{name}: expected {dtype:?}, found {:?}", view.dtype())));
            }
            Ok((view.shape().to_vec(), bytemuck::allocation::pod_collect_to_vec::<u8, u32>(view.data())))
        };
        let floats = |name: &str| {
            let (shape, bits) = numbers(name, Dtype::F32)?;
            let floats: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            Ok::<_, Error>((shape, floats))
        };
        let (_, probe) = floats("probe")?;
        let ours = session.probe().await?;
        // The dtype may have changed in between; another model differs by far more than rounding.
        let length =
            |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let off = length(&mut probe.iter().zip(&ours).map(|(a, b)| a - b));
        let near = off <= 0.2 * length(&mut ours.iter().copied());
        if probe.len() != ours.len() || !near {
            return Err(damaged("it was saved with another model of the same shape"));
        }
        session.ids = numbers("ids", Dtype::U32)?.1;
        crate::engine::check_vocabulary(&session.ids, opt.config().vocab_size)?;
        let mut layers = Vec::new();
        if file.tensor("layers.0.keys").is_ok() {
            for index in 0..opt.config().num_hidden_layers {
                let matrix = |part: &str| {
                    let name = format!("layers.{index}.{part}");
                    let (shape, data) = floats(&name)?;
                    let &[rows, width] = &shape[..] else {
                        return Err(damaged(&format!("{name}: {shape:?}")));
                    };
                    if rows > session.ids.len() + front || rows < front || width != opt.config().hidden_size {
                        return Err(damaged(&format!("{name}: unexpected shape {shape:?}")));
                    }
                    Array2::from_shape_vec((rows, width), data).map_err(|e| damaged(&e.to_string()))
                };
                layers.push(CacheLayer { keys: matrix("keys")?, values: matrix("values")? });
            }
            let mut cache = opt.engine().new_cache(Default::default())?;
            cache.seed(&layers)?;
            let name =
                opt.adapters().iter().map(|loaded| &loaded.name).find(|name| Some(&***name) == adapter);
            cache.wear(name.cloned(), front);
            session.cache = Some(cache);
        }
        Ok(session)
    }

    /// What must be equal for keys and values to mean the same.
    fn shape(&self) -> String {
        let config = self.opt.config();
        let shapes: Vec<String> =
            config.tensor_shapes().iter().map(|(name, shape)| format!("{name}{shape:?}")).collect();
        format!("{} {} {}", config.num_attention_heads, config.activation_function, shapes.join(" "))
    }

    /// A few logits, less their mean, by which the model is told from another of the same shape.
    async fn probe(&self) -> Result<Vec<f32>> {
        let config = self.opt.config();
        let count = self.opt.context().min(4) as u32;
        let ids: Vec<u32> = (0..count).map(|id| id % config.vocab_size.max(1) as u32).collect();
        let logits = self.opt.logits_async(&ids).await?;
        let rows = logits.outer_iter().flat_map(|row| {
            let mean = row.mean().unwrap_or(0.0);
            row.iter().take(64).map(|logit| logit - mean).collect::<Vec<_>>()
        });
        Ok(rows.collect())
    }

    fn encode(&self, prompt: Prompt, first: Bos) -> Result<Vec<u32>> {
        match prompt {
            // BOS belongs before the first turn only.
            Prompt::Text(text) => {
                let bos = if self.ids.is_empty() { first } else { Bos::Never };
                self.opt.require_tokenizer()?.encode(&text, bos)
            }
            Prompt::Ids(ids) => Ok(ids),
            Prompt::Embeds(_) => {
                let message = "session: expected text or token ids, found embeddings";
                Err(Error::new(ErrorKind::Prompt, message))
            }
        }
    }
}
