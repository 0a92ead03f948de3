//! How a model is loaded, and backends that are ready for one.

use crate::{
    CancelToken, ProgressFn, Result,
    adapter::{Adapter, AdapterSource},
    backends::Chosen,
    checkpoint::Checkpoint,
    engine::{Engine, LocalEngine},
    quantize::{Holding, QuantSpec, QuantizedWeights, WalkJob},
};
#[cfg(feature = "quantize")]
use opt_backend::Info;
use opt_backend::{DType, MaybeSend, Train};
use std::sync::Arc;

/// A backend that is ready to take a checkpoint's weights over.
pub(crate) trait MakeEngine: MaybeSend {
    fn make(
        self: Box<Self>,
        checkpoint: &Checkpoint,
        holding: &Holding,
        adapters: &[Adapter],
        cancel: Option<&CancelToken>,
        progress: Option<&mut ProgressFn<'_>>,
    ) -> Result<Arc<dyn Engine>>;

    /// What it computes with.
    #[cfg(feature = "quantize")]
    fn info(&self) -> Info;

    /// Runs a checkpoint layer by layer.
    fn walk(&self, job: &mut WalkJob<'_>) -> Result<()>;

    /// Takes a checkpoint over to train it.
    #[cfg(not(target_arch = "wasm32"))]
    fn learn(
        self: Box<Self>,
        checkpoint: &Checkpoint,
        holding: &Holding,
        plan: crate::tuning::Plan,
        cancel: &CancelToken,
    ) -> Result<Box<dyn crate::tuning::Learn>>;
}

impl<B: Train> MakeEngine for B {
    fn make(
        self: Box<Self>,
        checkpoint: &Checkpoint,
        holding: &Holding,
        adapters: &[Adapter],
        cancel: Option<&CancelToken>,
        progress: Option<&mut ProgressFn<'_>>,
    ) -> Result<Arc<dyn Engine>> {
        if adapters.is_empty() {
            let mut engine = LocalEngine::load_as(*self, checkpoint, holding, cancel, progress)?;
            engine.pool_by(crate::engine::pool);
            return Ok(Arc::new(engine));
        }
        let engine = LocalEngine::load_adapted(*self, checkpoint, holding, adapters, cancel, progress)?;
        Ok(Arc::new(engine))
    }

    #[cfg(feature = "quantize")]
    fn info(&self) -> Info {
        opt_backend::Backend::info(self)
    }

    fn walk(&self, job: &mut WalkJob<'_>) -> Result<()> {
        job.run(self)
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn learn(
        self: Box<Self>,
        checkpoint: &Checkpoint,
        holding: &Holding,
        plan: crate::tuning::Plan,
        cancel: &CancelToken,
    ) -> Result<Box<dyn crate::tuning::Learn>> {
        Ok(Box::new(crate::tuning::Learner::load(*self, checkpoint, holding, plan, cancel)?))
    }
}

/// How to load a model: where to, held how, watched by whom.
///
/// ```no_run
/// use opt_core::{DType, Load, Opt};
/// let opt = Opt::load("models/opt-125m", Load::default().dtype(DType::BF16))?;
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Default)]
pub struct Load<'a> {
    pub(crate) engine: Option<Box<dyn MakeEngine>>,
    pub(crate) holding: Holding,
    pub(crate) adapters: Vec<AdapterSource>,
    pub(crate) cancel: Option<CancelToken>,
    pub(crate) progress: Option<&'a mut ProgressFn<'a>>,
}

impl<'a> Load<'a> {
    /// Loads on a backend of the caller's.
    pub fn on(backend: impl Train) -> Self {
        Self { engine: Some(Box::new(backend)), ..Self::default() }
    }

    /// Loads on a backend chosen by name; see [`choose`](crate::backends::choose).
    pub fn with(chosen: Chosen) -> Self {
        Self { engine: Some(chosen.0), ..Self::default() }
    }

    /// Sets how weights are held; f32 unless said otherwise, whatever the file holds.
    #[must_use]
    pub fn dtype(mut self, dtype: DType) -> Self {
        self.holding.dtype = dtype;
        self
    }

    /// Quantizes weights while they are loaded, one tensor at a time: the linears of the decoder layers and, by
    /// choice, the token table. What is left is held as [`Load::dtype`] says.
    #[must_use]
    pub fn quantize(mut self, spec: QuantSpec) -> Self {
        self.holding.spec = Some(spec);
        self
    }

    /// Takes these weights, by canonical name (`layers.0.fc1.weight`), in the place of the checkpoint's.
    #[must_use]
    pub fn replace(mut self, weights: Arc<QuantizedWeights>) -> Self {
        self.holding.given = Some(weights);
        self
    }

    /// Loads an adapter beside the model: an [`Adapter`], or the directory of one, by whose name it is then called. There
    /// may be several. Nothing wears one unless it asks for it: see [`Opt::adapted`](crate::Opt::adapted) and
    /// [`Request::adapter`](crate::Request::adapter).
    ///
    /// Low-rank terms stay beside the weights, which stay as they are, quantized or not.
    #[must_use]
    pub fn adapter(mut self, adapter: impl Into<AdapterSource>) -> Self {
        self.adapters.push(adapter.into());
        self
    }

    /// Lets `cancel` end the loading.
    #[must_use]
    pub fn cancel(mut self, cancel: CancelToken) -> Self {
        self.cancel = Some(cancel);
        self
    }

    /// Reports each tensor to `progress`, which can end the loading.
    #[must_use]
    pub fn progress(mut self, progress: &'a mut ProgressFn<'a>) -> Self {
        self.progress = Some(progress);
        self
    }
}
