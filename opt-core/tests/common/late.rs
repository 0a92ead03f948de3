//! A backend as a browser has it: what is read arrives later, and only if the program returns to its event loop.

use ndarray::{Array2, ArrayView2};
use opt_backend::{
    Attend, Backend, BoxFuture, CacheLayer, CacheSpec, Counters, DType, Error, ErrorKind, HostLinear,
    HostMatrix, HostNorm, HostVector, Info, Layout, MaybeSend, NormParams, Readback, Reference,
    ReferenceCache, Result, TargetScore, Then, TopK, Train, ndarray,
};
use std::{
    collections::VecDeque,
    future::poll_fn,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, Wake, Waker},
};

/// Values on their way from the device, the oldest first.
#[derive(Clone, Default)]
pub struct Events {
    #[allow(clippy::type_complexity)]
    coming: Arc<Mutex<VecDeque<(Arc<AtomicBool>, Waker)>>>,
    arrived: Arc<AtomicUsize>,
}

impl Events {
    /// The event loop of one thread: runs the futures at once, polls each only when it was woken, and lets one value
    /// arrive when none can go on. The results, in order.
    ///
    /// # Panics
    /// If nothing is on its way and a future still waits.
    pub fn run<T>(&self, futures: Vec<BoxFuture<'_, T>>) -> Vec<T> {
        struct Woken(AtomicBool);
        impl Wake for Woken {
            fn wake(self: Arc<Self>) {
                self.0.store(true, SeqCst);
            }
        }
        let mut results: Vec<Option<T>> = futures.iter().map(|_| None).collect();
        let mut open: Vec<_> = futures
            .into_iter()
            .map(|future| (Arc::new(Woken(AtomicBool::new(true))), Some(future)))
            .collect();
        while results.iter().any(Option::is_none) {
            let mut polled = false;
            for ((woken, future), result) in open.iter_mut().zip(&mut results) {
                let Some(running) = future.as_mut().filter(|_| woken.0.swap(false, SeqCst)) else { continue };
                polled = true;
                let waker = Waker::from(Arc::clone(woken));
                if let Poll::Ready(value) = running.as_mut().poll(&mut Context::from_waker(&waker)) {
                    *result = Some(value);
                    *future = None;
                }
            }
            if !polled {
                let next = self.coming.lock().unwrap().pop_front();
                let (here, waker) = next.expect("a future waits for something that never comes");
                here.store(true, SeqCst);
                self.arrived.fetch_add(1, SeqCst);
                waker.wake();
            }
        }
        results.into_iter().map(Option::unwrap).collect()
    }

    /// [`Events::run`], of one future.
    ///
    /// # Panics
    /// As [`Events::run`].
    pub fn await_one<'a, T: 'a>(&self, future: impl Future<Output = T> + Send + 'a) -> T {
        self.run(vec![Box::pin(future) as BoxFuture<'a, T>]).remove(0)
    }

    /// How many values have arrived so far.
    pub fn arrived(&self) -> usize {
        self.arrived.load(SeqCst)
    }

    /// The value of a readback, once it has arrived.
    fn later<'a, T: Send + 'a>(&self, readback: Readback<'a, T>) -> Readback<'a, T> {
        let events = self.clone();
        Box::pin(async move {
            let here = Arc::new(AtomicBool::new(false));
            let mut asked = false;
            poll_fn(|context| {
                if here.load(SeqCst) {
                    return Poll::Ready(());
                }
                if !std::mem::replace(&mut asked, true) {
                    events.coming.lock().unwrap().push_back((Arc::clone(&here), context.waker().clone()));
                }
                Poll::Pending
            })
            .await;
            readback.await
        })
    }
}

/// [`Reference`], except that no value can be waited for.
pub struct Late {
    device: Reference,
    events: Events,
}

impl Late {
    /// A device whose values arrive on that loop.
    pub fn on(events: &Events) -> Self {
        Self { device: Reference::new(), events: events.clone() }
    }
}

impl Train for Late {
    fn matmul(
        &self,
        a: &Array2<f32>,
        b: &Array2<f32>,
        layout: Layout,
        dtype: DType,
        into: Option<Array2<f32>>,
    ) -> Result<Array2<f32>> {
        self.device.matmul(a, b, layout, dtype, into)
    }
}

impl Backend for Late {
    type Tensor = Array2<f32>;
    type Linear = HostLinear;
    type Norm = HostNorm;
    type Table = Array2<f32>;
    type Cache = ReferenceCache;

    fn block_on<T: MaybeSend>(&self, _: Readback<'_, T>) -> Result<T> {
        Err(Error::new(ErrorKind::Unsupported, "block_on", "nothing can be waited for here"))
    }

    fn read<'a>(&'a self, x: &Array2<f32>) -> Readback<'a, Array2<f32>> {
        self.events.later(self.device.read(x))
    }

    fn read_linear<'a>(&'a self, linear: &HostLinear) -> Readback<'a, HostLinear> {
        self.events.later(self.device.read_linear(linear))
    }

    fn read_norm<'a>(&'a self, norm: &HostNorm) -> Readback<'a, HostNorm> {
        self.events.later(self.device.read_norm(norm))
    }

    fn read_table<'a>(&'a self, table: &Array2<f32>, rows: Range<usize>) -> Readback<'a, Array2<f32>> {
        self.events.later(self.device.read_table(table, rows))
    }

    fn cache_read<'a>(&'a self, cache: &ReferenceCache, layer: usize) -> Readback<'a, CacheLayer> {
        self.events.later(self.device.cache_read(cache, layer))
    }

    fn log_probs<'a>(
        &'a self,
        x: &Array2<f32>,
        head: &Array2<f32>,
        targets: &[u32],
    ) -> Readback<'a, Vec<TargetScore>> {
        self.events.later(self.device.log_probs(x, head, targets))
    }

    fn top_k<'a>(&'a self, logits: &Array2<f32>, k: usize) -> Readback<'a, Vec<TopK>> {
        self.events.later(self.device.top_k(logits, k))
    }

    // Everything else happens on the device.

    fn info(&self) -> Info {
        self.device.info()
    }

    fn counters(&self) -> &Counters {
        self.device.counters()
    }

    fn shape(&self, x: &Array2<f32>) -> [usize; 2] {
        self.device.shape(x)
    }

    fn upload(&self, x: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
        self.device.upload(x)
    }

    fn new_linear(
        &self,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<HostLinear> {
        self.device.new_linear(weight, bias, dtype)
    }

    fn new_norm(&self, params: NormParams<'_>) -> Result<HostNorm> {
        self.device.new_norm(params)
    }

    fn new_table(&self, rows: HostMatrix<'_>, dtype: DType) -> Result<Array2<f32>> {
        self.device.new_table(rows, dtype)
    }

    fn table_shape(&self, table: &Array2<f32>) -> [usize; 2] {
        self.device.table_shape(table)
    }

    fn new_cache(&self, spec: CacheSpec) -> Result<ReferenceCache> {
        self.device.new_cache(spec)
    }

    fn cache_len(&self, cache: &ReferenceCache, layer: usize) -> usize {
        self.device.cache_len(cache, layer)
    }

    fn cache_append(
        &self,
        cache: &mut ReferenceCache,
        layer: usize,
        keys: &Array2<f32>,
        values: &Array2<f32>,
        rows: Range<usize>,
    ) -> Result<()> {
        self.device.cache_append(cache, layer, keys, values, rows)
    }

    fn cache_truncate(&self, cache: &mut ReferenceCache, len: usize) -> Result<()> {
        self.device.cache_truncate(cache, len)
    }

    fn cache_fork(&self, cache: &ReferenceCache) -> Result<ReferenceCache> {
        self.device.cache_fork(cache)
    }

    fn gather(&self, table: &Array2<f32>, ids: &[u32]) -> Result<Array2<f32>> {
        self.device.gather(table, ids)
    }

    fn add_gathered(&self, x: Array2<f32>, table: &Array2<f32>, ids: &[u32]) -> Result<Array2<f32>> {
        self.device.add_gathered(x, table, ids)
    }

    fn layer_norm(&self, x: &Array2<f32>, norm: &HostNorm) -> Result<Array2<f32>> {
        self.device.layer_norm(x, norm)
    }

    fn linear(&self, x: &Array2<f32>, linear: &HostLinear, then: Then<Array2<f32>>) -> Result<Array2<f32>> {
        self.device.linear(x, linear, then)
    }

    fn add(&self, x: Array2<f32>, y: &Array2<f32>) -> Result<Array2<f32>> {
        self.device.add(x, y)
    }

    fn attend(
        &self,
        q: Array2<f32>,
        k: Array2<f32>,
        v: Array2<f32>,
        attend: Attend<'_>,
        caches: Option<&mut [&mut ReferenceCache]>,
    ) -> Result<Array2<f32>> {
        self.device.attend(q, k, v, attend, caches)
    }

    fn take_rows(&self, x: &Array2<f32>, rows: &[usize]) -> Result<Array2<f32>> {
        self.device.take_rows(x, rows)
    }

    fn logits(&self, x: &Array2<f32>, head: &Array2<f32>) -> Result<Array2<f32>> {
        self.device.logits(x, head)
    }
}
