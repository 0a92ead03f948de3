use crate::Result;
use ndarray::ArrayView2;
use opt_backend::{Backend, CacheLayer, CacheSpec, MaybeSend, MaybeSync};
use std::{any::Any, fmt, sync::Arc};

/// Keys and values of one sequence, on whatever backend made it.
///
/// Forking is cheap: the two sides share storage until one of them changes.
pub struct KvCache {
    inner: Box<dyn ErasedCache>,
    spec: CacheSpec,
    len: usize,
    /// Positions before those of the tokens: an adapter's.
    front: usize,
    /// What the tokens wore.
    adapter: Option<Arc<str>>,
}

impl KvCache {
    pub(super) fn new<B: Backend>(backend: Arc<B>, spec: CacheSpec) -> Result<Self> {
        let cache = backend.new_cache(spec)?;
        Ok(Self {
            inner: Box::new(BackendCache { backend, cache, layers: spec.layers }),
            spec,
            len: 0,
            front: 0,
            adapter: None,
        })
    }

    /// Layers, heads and width of a head.
    pub(super) fn shape(&self) -> [usize; 3] {
        [self.spec.layers, self.spec.heads, self.spec.head_dim]
    }

    /// Positions held, those of an adapter's virtual tokens not counted.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A second cache with the same content.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Backend`] if the device fails.
    pub fn fork(&self) -> Result<Self> {
        let Self { inner, spec, len, front, adapter } = self;
        Ok(Self { inner: inner.fork()?, spec: *spec, len: *len, front: *front, adapter: adapter.clone() })
    }

    /// Forgets all but the first `len` positions (and those of virtual tokens, which stay).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Backend`] if the device fails.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        self.inner.truncate(self.front.saturating_add(len))?;
        self.len = self.len.min(len);
        Ok(())
    }

    /// Keys and values of each layer, each `[positions, hidden_size]`, those of virtual tokens first.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Backend`] if the device fails.
    pub async fn read(&self) -> Result<Vec<CacheLayer>> {
        let mut layers = Vec::new();
        for layer in 0..self.inner.layers() {
            layers.push(self.inner.read(layer).await?);
        }
        Ok(layers)
    }

    /// Appends keys and values of every layer, each `[positions, hidden_size]`: restores what [`KvCache::read`] gave,
    /// or sets a trained prefix.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Backend`] if shapes do not fit or the device fails; the cache is then as before.
    pub fn seed(&mut self, layers: &[CacheLayer]) -> Result<()> {
        let fail = |message: String| opt_backend::Error::shape("cache_seed", message);
        if layers.len() != self.inner.layers() {
            let found = format!("expected {} layers, found {}", self.inner.layers(), layers.len());
            return Err(fail(found).into());
        }
        let rows = layers.first().map_or(0, |layer| layer.keys.nrows());
        if layers.iter().any(|layer| layer.keys.nrows() != rows || layer.keys.dim() != layer.values.dim()) {
            return Err(fail(format!("expected keys and values of {rows} positions in every layer")).into());
        }
        let before = self.len;
        for (index, layer) in layers.iter().enumerate() {
            if let Err(error) = self.inner.seed(index, layer.keys.view(), layer.values.view()) {
                self.truncate(before)?;
                return Err(error);
            }
        }
        self.len += rows;
        Ok(())
    }

    /// Positions of virtual tokens.
    pub(crate) fn front(&self) -> usize {
        self.front
    }

    /// What the tokens wore.
    pub(crate) fn adapter(&self) -> Option<&Arc<str>> {
        self.adapter.as_ref()
    }

    /// Says of what was appended so far that it was made wearing an adapter, with so many virtual tokens in front.
    pub(crate) fn wear(&mut self, adapter: Option<Arc<str>>, front: usize) {
        self.len = (self.len + self.front).saturating_sub(front);
        self.front = front;
        self.adapter = adapter;
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) -> Result<()> {
        self.inner.truncate(0)?;
        (self.len, self.front, self.adapter) = (0, 0, None);
        Ok(())
    }

    /// The backend's own cache, if this is one of `B`'s. Appending to it must be reported by [`KvCache::grow`].
    pub(super) fn downcast<B: Backend>(&mut self) -> Option<&mut B::Cache> {
        self.inner.as_any_mut().downcast_mut::<BackendCache<B>>().map(|cache| &mut cache.cache)
    }

    /// Counts new positions, and says what they wore and how many virtual tokens stand before all of them.
    pub(super) fn grow(&mut self, rows: usize, adapter: Option<Arc<str>>, front: usize) {
        self.len += rows;
        (self.front, self.adapter) = (front, adapter);
    }
}

impl fmt::Debug for KvCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvCache").field("len", &self.len).finish_non_exhaustive()
    }
}

trait ErasedCache: MaybeSend + MaybeSync {
    fn layers(&self) -> usize;
    fn fork(&self) -> Result<Box<dyn ErasedCache>>;
    fn truncate(&mut self, len: usize) -> Result<()>;
    fn read(&self, layer: usize) -> opt_backend::Readback<'_, CacheLayer>;
    fn seed(&mut self, layer: usize, keys: ArrayView2<'_, f32>, values: ArrayView2<'_, f32>) -> Result<()>;
    fn as_any_mut(&mut self) -> &mut dyn Any;
}

struct BackendCache<B: Backend> {
    backend: Arc<B>,
    cache: B::Cache,
    layers: usize,
}

impl<B: Backend> ErasedCache for BackendCache<B> {
    fn layers(&self) -> usize {
        self.layers
    }

    fn fork(&self) -> Result<Box<dyn ErasedCache>> {
        let cache = self.backend.cache_fork(&self.cache)?;
        Ok(Box::new(Self { backend: Arc::clone(&self.backend), cache, layers: self.layers }))
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        Ok(self.backend.cache_truncate(&mut self.cache, len)?)
    }

    fn read(&self, layer: usize) -> opt_backend::Readback<'_, CacheLayer> {
        self.backend.cache_read(&self.cache, layer)
    }

    fn seed(&mut self, layer: usize, keys: ArrayView2<'_, f32>, values: ArrayView2<'_, f32>) -> Result<()> {
        Ok(self.backend.cache_seed(&mut self.cache, layer, keys, values)?)
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
