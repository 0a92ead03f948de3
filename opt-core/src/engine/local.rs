use super::{
    BoxFuture, Engine, Forward, Front, Hidden, Input, KvCache, LoadedAdapter, Output, Want, Wardrobe,
    batch::{BatchPlan, Pending, Wear},
    find_adapter,
    states::{Pool, States, hand_out},
};
use crate::{
    CancelToken, Decoder, Error, ErrorKind, Progress, ProgressFn, Result,
    adapter::{Adapted, Adapter, Loaded},
    checkpoint::Checkpoint,
    config::OptConfig,
    decoder::{Rows, Trace},
    embedding::Pooling,
    quantize::Holding,
};
use ndarray::{Array2, s};
use opt_backend::{Backend, CacheDType, CacheSpec, Counts, DType, Info, Span, Train};
use std::{ops::Range, sync::Arc};

/// A decoder together with the backend that keeps its weights.
pub struct LocalEngine<B: Backend> {
    backend: Arc<B>,
    decoder: Decoder<B>,
    config: OptConfig,
    /// Adapters that sequences may wear; their terms lie beside the decoder's weights.
    wardrobe: Option<Box<dyn Wardrobe<B>>>,
    /// Pools states on the device, where that is worth it.
    pool: Option<Pool<B>>,
}

impl<B: Backend> LocalEngine<B> {
    /// Takes the weights of a checkpoint over, one tensor at a time, to be held as `dtype`.
    ///
    /// # Errors
    /// [`ErrorKind::Checkpoint`] for tensors missing or of another shape, [`ErrorKind::Cancelled`] through `progress`
    /// or `cancel`, [`ErrorKind::Backend`] if the device cannot hold them.
    pub fn load(
        backend: B,
        checkpoint: &Checkpoint,
        dtype: DType,
        cancel: Option<&CancelToken>,
        progress: Option<&mut ProgressFn<'_>>,
    ) -> Result<Self> {
        Self::load_as(backend, checkpoint, &Holding { dtype, ..Holding::default() }, cancel, progress)
    }

    /// [`LocalEngine::load`], with some weights quantized.
    pub(crate) fn load_as(
        backend: B,
        checkpoint: &Checkpoint,
        holding: &Holding,
        cancel: Option<&CancelToken>,
        mut progress: Option<&mut ProgressFn<'_>>,
    ) -> Result<Self> {
        let config = checkpoint.config().clone();
        check_fits(&backend.info(), checkpoint, holding)?;
        let mut done = 0;
        let total = config.tensor_shapes().iter().filter(|(_, shape)| shape.len() == 2).count() as u64;
        let mut taken = |name: &str| {
            // Counted are matrices; the norms between them take no time.
            if name.contains("layer_norm") {
                return Ok(());
            }
            if let Some(cancel) = cancel {
                cancel.check("loading")?;
            }
            if let Some(progress) = &mut progress
                && progress(Progress::new(name, done, total)).is_break()
            {
                return Err(Error::new(ErrorKind::Cancelled, "loading was cancelled"));
            }
            done += 1;
            Ok(())
        };
        let decoder = Decoder::load(&backend, checkpoint, holding, 0..config.num_hidden_layers, &mut taken)?;
        taken("")?;
        Ok(Self { backend: Arc::new(backend), decoder, config, wardrobe: None, pool: None })
    }

    /// Runs a batch. The caches are not yet told how many rows they grew by; what they must be told is in the plan.
    async fn run(&self, batch: &mut Forward<'_>, worn: &mut Vec<Wear>) -> Result<Vec<Output>> {
        for sequence in &mut batch.sequences {
            // An empty cache has virtual tokens of no use to another adapter.
            if let Some(cache) = sequence.cache.as_deref_mut()
                && cache.is_empty()
                && cache.adapter().map(|name| &**name) != sequence.adapter
            {
                cache.clear()?;
            }
        }
        let plan = self.check(batch)?;
        worn.clone_from(&plan.worn);
        let embedded = match &self.wardrobe {
            Some(wardrobe) => {
                wardrobe.embed(&self.backend, self.decoder.embed_table(), &plan.pieces(&batch.sequences))?
            }
            None => self.embed(&batch.sequences).await?,
        };
        self.enqueue(batch, plan, embedded)?.wait(&batch.sequences).await
    }

    /// The adapters that sequences may wear.
    fn adapters(&self) -> &[LoadedAdapter] {
        self.wardrobe.as_ref().map_or(&[], |wardrobe| wardrobe.adapters())
    }

    /// What a sequence wears, and what is to be put before its tokens in this pass.
    fn wear(&self, sequence: &super::Sequence<'_>) -> Result<Wear> {
        let adapter = sequence.adapter.map(|name| find_adapter(self.adapters(), name)).transpose()?;
        let name =
            adapter.and_then(|index| self.adapters().get(index)).map(|adapter| Arc::clone(&adapter.name));
        let held = sequence.cache.as_ref().map_or(0, |cache| cache.front() + cache.len());
        if let Some(cache) = sequence.cache.as_ref().filter(|_| held > 0)
            && cache.adapter() != name.as_ref()
        {
            let shown = |name: Option<&Arc<str>>| match name {
                Some(name) => format!("adapter {name:?}"),
                None => "no adapter".to_owned(),
            };
            let message = format!(
                "expected {} as in what the cache holds, found {}",
                shown(cache.adapter()),
                shown(name.as_ref())
            );
            return Err(Error::new(ErrorKind::Option, message));
        }
        let mut wear = Wear { adapter, name, ..Wear::default() };
        let front = match (&self.wardrobe, adapter) {
            (Some(wardrobe), Some(index)) => wardrobe.front(index),
            _ => Front::Nothing,
        };
        match front {
            _ if held > 0 => wear.front = sequence.cache.as_ref().map_or(0, |cache| cache.front()),
            Front::Nothing => {}
            Front::Prefix(layers) => {
                wear.front = layers.first().map_or(0, |layer| layer.keys.nrows());
                wear.seed = true;
            }
            Front::Prompt(tokens) => {
                wear.front = tokens;
                wear.run = tokens;
            }
        }
        Ok(wear)
    }

    /// Starts the work; what is left to wait for is in the result.
    fn enqueue(&self, batch: &mut Forward<'_>, plan: BatchPlan, embedded: B::Tensor) -> Result<Pending<'_>> {
        let backend = &*self.backend;

        let mut states: Vec<States<'_>> = Vec::new();
        let mut attentions = Vec::new();
        let layers = self.config.num_hidden_layers;
        let asked: Vec<_> = batch.sequences.iter().map(|s| (s.hidden, s.pooling)).collect();
        // Of the state of this index, whose rows lie where in what was computed of it.
        let whose = |index: usize, rows: &mut dyn Iterator<Item = Range<usize>>| -> Vec<_> {
            let each = asked.iter().enumerate().zip(rows);
            let wanting = each.filter(|((_, (hidden, _)), _)| hidden.includes(index, layers));
            wanting.map(|((at, (_, pooling)), rows)| (at, rows, *pooling)).collect()
        };
        let any_attentions = batch.sequences.iter().any(|sequence| sequence.attentions);
        let mut see = |index: usize, h: &B::Tensor| {
            let whose = whose(index, &mut plan.own());
            if !whose.is_empty() {
                states.push(hand_out(backend, self.pool, h, whose)?);
            }
            Ok(())
        };
        let (cancel, mut watch) = (batch.cancel, batch.watch.take());
        let mut before_layer = |layer: usize| {
            if let Some(cancel) = cancel {
                cancel.check("the forward pass")?;
            }
            if let Some(watch) = &mut watch
                && watch(Progress::new("layers", layer as u64, plan.depth as u64)).is_break()
            {
                return Err(Error::new(ErrorKind::Cancelled, "the forward pass was cancelled"));
            }
            Ok(())
        };
        let trace = Trace {
            hidden: Some(&mut see),
            attentions: any_attentions.then_some(&mut attentions),
            before_layer: &mut before_layer,
        };
        let wanted = (plan.wanted.len() < plan.positions.len()).then_some(&plan.wanted[..]);
        let rows = Rows { positions: &plan.positions, spans: &plan.spans, wanted, depth: plan.depth };
        let last = {
            let mut made = Vec::new();
            let mut caches = self.caches(&mut batch.sequences, &plan.worn, &mut made)?;
            self.decoder.forward(backend, embedded, rows, caches.get(), trace)?
        };

        let whose = whose(plan.depth, &mut plan.kept.iter().cloned());
        if !whose.is_empty() {
            states.push(hand_out(backend, self.pool, &last, whose)?);
        }
        let mut pending = Pending { hidden: states, attentions, ..Pending::default() };
        self.apply_head(batch, &plan, last, &mut pending)?;
        pending.plan = plan;
        Ok(pending)
    }

    /// The LM head on the rows that want it, each form of result for all its rows at once.
    fn apply_head<'s>(
        &'s self,
        batch: &Forward<'_>,
        plan: &BatchPlan,
        last: B::Tensor,
        pending: &mut Pending<'s>,
    ) -> Result<()> {
        let backend = &*self.backend;
        let rows_of = |matches: fn(&Want<'_>) -> bool| -> Vec<usize> {
            let each = batch.sequences.iter().zip(&plan.scored);
            each.filter(|(sequence, _)| matches(&sequence.want)).flat_map(|(_, rows)| rows.clone()).collect()
        };
        let everything = backend.shape(&last)[0];
        let select = |rows: &[usize], last: &B::Tensor| backend.take_rows(last, rows);

        let rows = rows_of(|want| matches!(want, Want::LogProbs { .. }));
        if !rows.is_empty() {
            let each = batch.sequences.iter();
            let targets: Vec<u32> = each
                .filter_map(|s| if let Want::LogProbs { targets } = s.want { Some(targets) } else { None })
                .flatten()
                .copied()
                .collect();
            pending.log_probs =
                Some(backend.log_probs(&select(&rows, &last)?, self.decoder.head(), &targets));
        }
        let rows = rows_of(|want| matches!(want, Want::TopK { .. }));
        if !rows.is_empty() {
            let k =
                batch.sequences.iter().map(|s| if let Want::TopK { k, .. } = s.want { k } else { 0 }).max();
            let logits = backend.logits(&select(&rows, &last)?, self.decoder.head())?;
            pending.top_k = Some(backend.top_k(&logits, k.unwrap_or(0)));
        }
        let rows = rows_of(|want| matches!(want, Want::Logits { .. }));
        if !rows.is_empty() {
            let last = if rows.len() == everything { last } else { select(&rows, &last)? };
            let logits = backend.logits(&last, self.decoder.head())?;
            pending.logits = Some(backend.read_owned(logits));
        }
        Ok(())
    }

    /// Token embeddings of all rows.
    async fn embed(&self, sequences: &[super::Sequence<'_>]) -> Result<B::Tensor> {
        let backend = &*self.backend;
        let ids: Vec<u32> = sequences
            .iter()
            .filter_map(|s| if let Input::Ids(ids) = s.input { Some(ids) } else { None })
            .flatten()
            .copied()
            .collect();
        let rows: usize = sequences.iter().map(|s| s.input.len()).sum();
        if ids.len() == rows {
            return self.decoder.embed(backend, &ids);
        }
        // Embeddings from outside are rare and come once a prompt: they are laid between the table's on the host.
        let width = self.config.word_embed_proj_dim;
        let table = if ids.is_empty() {
            Array2::zeros((0, width))
        } else {
            backend.read_owned(self.decoder.embed(backend, &ids)?).await?
        };
        let mut merged = Array2::zeros((rows, width));
        let (mut row, mut from_table) = (0, 0);
        for sequence in sequences {
            let len = sequence.input.len();
            let mut target = merged.slice_mut(s![row..row + len, ..]);
            match sequence.input {
                Input::Embeds(rows) => target.assign(&rows),
                Input::Ids(_) => {
                    target.assign(&table.slice(s![from_table..from_table + len, ..]));
                    from_table += len;
                }
            }
            row += len;
        }
        Ok(backend.upload(merged.view())?)
    }

    /// How many layers a batch needs.
    fn depth(&self, batch: &Forward<'_>) -> Result<usize> {
        let layers = self.config.num_hidden_layers;
        let mut depth = None;
        for sequence in &batch.sequences {
            let needs = match sequence.hidden {
                Hidden::Layer(found) if found > layers => {
                    let message = format_args!("layer: expected at most {layers}, found {found}");
                    return Err(Error::new(ErrorKind::Option, message));
                }
                Hidden::Layer(index)
                    if sequence.cache.is_none() && sequence.want.rows() == 0 && !sequence.attentions =>
                {
                    index
                }
                _ => layers,
            };
            depth = depth.max(Some(needs));
        }
        Ok(depth.unwrap_or(layers))
    }

    /// Checks the batch and lays its rows out.
    fn check(&self, batch: &Forward<'_>) -> Result<BatchPlan> {
        let config = &self.config;
        let fail = |message: String| Err(Error::new(ErrorKind::Prompt, message));
        let worn: Vec<Wear> =
            batch.sequences.iter().map(|sequence| self.wear(sequence)).collect::<Result<_>>()?;
        let lengths = batch.sequences.iter().zip(&worn).map(|(s, wear)| wear.run + s.input.len());
        let depth = self.depth(batch)?;
        let mut plan = BatchPlan { spans: Span::lay_out(lengths), worn, depth, ..Default::default() };
        for ((sequence, span), wear) in batch.sequences.iter().zip(&plan.spans).zip(&plan.worn) {
            let shape = [config.num_hidden_layers, config.num_attention_heads, config.head_dim()];
            if let Some(found) = sequence.cache.as_ref().map(|c| c.shape()).filter(|found| *found != shape) {
                let message = format!(
                    "expected a cache of this model: layers, heads, head_dim {shape:?}, found {found:?}"
                );
                return Err(Error::new(ErrorKind::Option, message));
            }
            let past = sequence.cache.as_ref().map_or(0, |cache| cache.len());
            let (len, front) = (sequence.input.len(), wear.front);
            let most = config.max_position_embeddings.saturating_sub(front);
            let context = match front {
                0 => "the context".to_owned(),
                front => format!("the context less {front} virtual tokens"),
            };
            if past + len > most {
                return fail(format!("expected at most {most} positions ({context}), found {}", past + len));
            }
            match sequence.input {
                Input::Ids(ids) => check_vocabulary(ids, config.vocab_size)?,
                Input::Embeds(rows) if rows.ncols() != config.word_embed_proj_dim => {
                    let (expected, found) = (config.word_embed_proj_dim, rows.ncols());
                    return fail(format!("expected embeddings of width {expected}, found {found}"));
                }
                Input::Embeds(_) => {}
            }
            if let Want::LogProbs { targets } = sequence.want {
                check_vocabulary(targets, config.vocab_size)?;
            }
            let rows = sequence.want.rows();
            if rows > len {
                return fail(format!("expected to be asked about at most {len} rows, found {rows}"));
            }
            plan.positions.extend((0..wear.run).map(|p| p as u32));
            let past = front + past;
            match sequence.positions {
                None => plan.positions.extend((past..past + len).map(|p| p as u32)),
                Some(positions) if positions.len() != len => {
                    return fail(format!(
                        "expected one position for each of {len} tokens, found {}",
                        positions.len()
                    ));
                }
                Some(positions) => {
                    if let Some(found) = positions.iter().find(|p| **p as usize >= most) {
                        return fail(format!("expected positions below {most} ({context}), found {found}"));
                    }
                    plan.positions.extend(positions.iter().map(|p| p + front as u32));
                }
            }
            let (first, end) = (plan.wanted.len(), span.start + span.len);
            let handed_out = sequence.hidden.includes(depth, config.num_hidden_layers);
            let kept = match sequence.pooling {
                _ if !handed_out => rows,
                // One row is enough, and it is the only one that is computed.
                Pooling::LastToken => rows.max(1).min(len),
                Pooling::FirstToken if rows == 0 && len > 0 => {
                    plan.wanted.push(end - len);
                    plan.kept.push(first..first + 1);
                    plan.scored.push(first..first);
                    continue;
                }
                _ => len,
            };
            plan.wanted.extend(end - kept..end);
            plan.kept.push(first..first + kept);
            plan.scored.push(first + kept - rows..first + kept);
        }
        Ok(plan)
    }
}

impl<B: Train> LocalEngine<Adapted<B>> {
    /// [`LocalEngine::load_as`], with adapters that sequences may wear.
    pub(crate) fn load_adapted(
        backend: B,
        checkpoint: &Checkpoint,
        holding: &Holding,
        adapters: &[Adapter],
        cancel: Option<&CancelToken>,
        progress: Option<&mut ProgressFn<'_>>,
    ) -> Result<Self> {
        let mut engine = Self::load_as(Adapted { inner: backend }, checkpoint, holding, cancel, progress)?;
        let loaded = Loaded::attach(&engine.backend, &mut engine.decoder, checkpoint, holding, adapters)?;
        engine.wardrobe = Some(Box::new(loaded));
        engine.pool_by(Adapted::pool);
        Ok(engine)
    }
}

/// Refuses, before anything is loaded, what a device cannot hold: the format of the weights, or their size.
fn check_fits(info: &Info, checkpoint: &Checkpoint, holding: &Holding) -> Result<()> {
    let who = format_args!("backend {} on {}", info.name, info.device).to_string();
    let dtype = holding.dtype;
    if !info.dtypes.contains(&dtype) {
        let can: Vec<String> = info.dtypes.iter().map(ToString::to_string).collect();
        let message = format!("{who}: expected weights held as one of {}, found {dtype}", can.join(", "));
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let needed = holding.total_bytes(checkpoint);
    match info.memory {
        Some(free) if free < needed => {
            let mib = |bytes: u64| bytes / (1 << 20);
            let packed = checkpoint.quantization().map(|layout| format!(" ({layout})")).unwrap_or_default();
            let message = format!(
                "{who}: expected {} MiB of free memory for the weights as {}{packed}, found {} MiB",
                mib(needed) + 1,
                holding.name(),
                mib(free)
            );
            Err(Error::new(ErrorKind::Backend, message))
        }
        _ => Ok(()),
    }
}

/// # Errors
/// [`ErrorKind::Prompt`] naming the first id that is not below `vocab_size`.
pub(crate) fn check_vocabulary(ids: &[u32], vocab_size: usize) -> Result<()> {
    match ids.iter().position(|id| *id as usize >= vocab_size) {
        None => Ok(()),
        Some(at) => {
            let found = format!(
                "expected token ids below the vocabulary size {vocab_size}, found {} at {at}",
                ids[at]
            );
            Err(Error::new(ErrorKind::Prompt, found))
        }
    }
}

/// The caches of a batch: every sequence has one, or none has.
struct Caches<'a, B: Backend> {
    caches: Option<Vec<&'a mut B::Cache>>,
}

impl<B: Backend> LocalEngine<B> {
    /// Lets states be pooled on the device. Not where results do not depend on what else is in a batch: a product with
    /// the rows of all sequences would, and the memory of such devices is the host's.
    pub(crate) fn pool_by(&mut self, pool: Pool<B>) {
        self.pool = Some(pool).filter(|_| !self.backend.info().deterministic);
    }

    fn cache_spec(&self, dtype: CacheDType) -> CacheSpec {
        let config = &self.config;
        CacheSpec {
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            head_dim: config.head_dim(),
            dtype,
            capacity_hint: 0,
        }
    }

    /// The caches of a batch, prefixes in them. `made` receives those of sequences that have none and need one.
    fn caches<'a>(
        &self,
        sequences: &'a mut [super::Sequence<'_>],
        worn: &[Wear],
        made: &'a mut Vec<B::Cache>,
    ) -> Result<Caches<'a, B>> {
        let backend = &*self.backend;
        let mut caches = Vec::with_capacity(sequences.len());
        if sequences.iter().all(|sequence| sequence.cache.is_none()) {
            if worn.iter().all(|wear| !wear.seed) {
                return Ok(Caches { caches: None });
            }
            let spec = self.cache_spec(CacheDType::default());
            made.extend(
                worn.iter().map(|_| backend.new_cache(spec)).collect::<opt_backend::Result<Vec<_>>>()?,
            );
            caches.extend(made.iter_mut());
        } else {
            for sequence in sequences {
                let Some(cache) = sequence.cache.as_deref_mut() else {
                    let message = "expected a cache for each sequence of the batch or for none";
                    return Err(Error::new(ErrorKind::Option, message));
                };
                let len = cache.front() + cache.len();
                let Some(inner) = cache.downcast::<B>() else {
                    return Err(Error::new(
                        ErrorKind::Option,
                        "expected a cache that this engine's backend made",
                    ));
                };
                // A pass that failed or was dropped half-way may have left rows of its first layers behind.
                if backend.cache_len(inner, 0) > len {
                    backend.cache_truncate(inner, len)?;
                }
                caches.push(inner);
            }
        }
        for (cache, wear) in caches.iter_mut().zip(worn).filter(|(_, wear)| wear.seed) {
            let front = self.wardrobe.as_ref().zip(wear.adapter).map(|(all, index)| all.front(index));
            if let Some(Front::Prefix(layers)) = front {
                for (index, layer) in layers.iter().enumerate() {
                    backend.cache_seed(cache, index, layer.keys.view(), layer.values.view())?;
                }
            }
        }
        Ok(Caches { caches: Some(caches) })
    }
}

impl<'a, B: Backend> Caches<'a, B> {
    fn get(&mut self) -> Option<&mut [&'a mut B::Cache]> {
        self.caches.as_deref_mut()
    }
}

impl<B: Backend> Engine for LocalEngine<B> {
    fn config(&self) -> &OptConfig {
        &self.config
    }

    fn info(&self) -> Info {
        self.backend.info()
    }

    fn counts(&self) -> Counts {
        self.backend.counters().counts()
    }

    fn adapters(&self) -> &[LoadedAdapter] {
        Self::adapters(self)
    }

    fn new_cache(&self, dtype: CacheDType) -> Result<KvCache> {
        KvCache::new(Arc::clone(&self.backend), self.cache_spec(dtype))
    }

    fn forward<'a>(&'a self, mut batch: Forward<'a>) -> BoxFuture<'a, Result<Vec<Output>>> {
        Box::pin(async move {
            let mut worn = Vec::new();
            let result = self.run(&mut batch, &mut worn).await;
            let mut worn = worn.into_iter();
            for sequence in &mut batch.sequences {
                let rows = sequence.input.len();
                let wear = worn.next();
                if let Some(cache) = sequence.cache.as_deref_mut() {
                    match (&result, wear) {
                        (Ok(_), Some(wear)) => cache.grow(rows, wear.name, wear.front),
                        (Ok(_), None) => cache.grow(rows, None, 0),
                        (Err(_), _) => cache.truncate(cache.len())?,
                    }
                }
            }
            result
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_weights_need_as_much_as_in_the_file() {
        let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/quantized/");
        let checkpoint = Checkpoint::open(format!("{fixtures}gptq_4bit")).unwrap();
        let needed = checkpoint.weight_bytes(DType::F16);
        let plain: usize = checkpoint.config().parameters() as usize * 2;
        assert!(needed * 2 < plain as u64, "{needed} of {plain}");
        let mut info = opt_backend::Reference::new().info();
        info.memory = Some(needed);
        let held = |dtype| Holding { dtype, ..Holding::default() };
        check_fits(&info, &checkpoint, &held(DType::F32)).unwrap_err();
        info.dtypes = vec![DType::F16];
        check_fits(&info, &checkpoint, &held(DType::F16)).unwrap();
        info.memory = Some(needed - 1);
        let error = check_fits(&info, &checkpoint, &held(DType::F16)).unwrap_err().to_string();
        assert!(error.contains("as f16 (GPTQ, 4 bits, groups of 32), found 0 MiB"), "{error}");
    }
}
