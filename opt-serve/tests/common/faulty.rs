//! An engine around another one that is slow, fails or panics when it is told.

use opt_core::{
    CacheDType, Error, ErrorKind, Info, Opt, Result,
    config::OptConfig,
    engine::{BoxFuture, Engine, Forward, KvCache, LoadedAdapter, Output},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

pub const FINE: usize = 0;
pub const FAIL: usize = 1;
pub const PANIC: usize = 2;

/// What the engine is told.
#[derive(Default)]
pub struct Orders {
    /// What the next pass does; after it all is fine again.
    pub next: AtomicUsize,
    /// How long each pass takes, in milliseconds.
    pub pause: AtomicU64,
    /// Passes so far.
    pub passes: AtomicUsize,
}

impl Orders {
    pub fn next_pass(&self, what: usize) {
        self.next.store(what, Ordering::SeqCst);
    }

    pub fn pause(&self, milliseconds: u64) {
        self.pause.store(milliseconds, Ordering::SeqCst);
    }

    pub fn passes(&self) -> usize {
        self.passes.load(Ordering::SeqCst)
    }
}

struct Faulty {
    inner: Arc<dyn Engine>,
    orders: Arc<Orders>,
}

/// A model on such an engine.
pub fn faulty(opt: Opt) -> (Opt, Arc<Orders>) {
    let orders = Arc::new(Orders::default());
    let engine = Faulty { inner: Arc::clone(opt.engine()), orders: Arc::clone(&orders) };
    (opt.with_engine(Arc::new(engine)).unwrap(), orders)
}

impl Engine for Faulty {
    fn config(&self) -> &OptConfig {
        self.inner.config()
    }

    fn info(&self) -> Info {
        self.inner.info()
    }

    fn counts(&self) -> opt_backend::Counts {
        self.inner.counts()
    }

    fn adapters(&self) -> &[LoadedAdapter] {
        self.inner.adapters()
    }

    fn new_cache(&self, dtype: CacheDType) -> Result<KvCache> {
        self.inner.new_cache(dtype)
    }

    fn forward<'a>(&'a self, batch: Forward<'a>) -> BoxFuture<'a, Result<Vec<Output>>> {
        Box::pin(async move {
            self.orders.passes.fetch_add(1, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(self.orders.pause.load(Ordering::SeqCst)));
            match self.orders.next.swap(FINE, Ordering::SeqCst) {
                FAIL => Err(Error::new(ErrorKind::Backend, "the device is lost")),
                PANIC => panic!("the engine was told to panic"),
                _ => self.inner.forward(batch).await,
            }
        })
    }
}
