//! Results on their way to the host.
//!
//! A read is recorded as a copy into a staging buffer and submitted with all that came before it; then the buffer is
//! mapped, and a callback wakes whoever awaits it. In a browser the event loop sees to that. Natively callbacks run
//! only while somebody polls the device. [`opt_backend::Backend::block_on`] polls from the calling thread. A future
//! that is awaited elsewhere must not block its executor, so when it is first found pending it leaves the waiting to
//! a thread of the backend, which is started then, waits for the submissions it is told of, and ends with the backend.

use crate::{
    fault::{lock, one_line},
    gpu::Gpu,
    pool::{Buffer, Slice},
};
use opt_backend::{Error, ErrorKind, Result};
use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Condvar, Mutex},
    task::{Context, Poll, Waker},
};

type Outcome = std::result::Result<(), String>;

/// A mapping that was asked for: settled once, by its callback or by whoever finds that there will be none.
#[derive(Default)]
struct Mapping {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Stays set when the outcome is taken.
    settled: bool,
    outcome: Option<Outcome>,
    waker: Option<Waker>,
}

impl Mapping {
    /// Settles the mapping unless it is settled, and wakes who waits for it.
    fn settle(&self, outcome: Outcome) {
        let mut state = lock(&self.state);
        if !state.settled {
            state.settled = true;
            state.outcome = Some(outcome);
        }
        let waker = state.waker.take();
        drop(state);
        self.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits so long for the mapping to be settled; returns whether it is.
    #[cfg(not(target_arch = "wasm32"))]
    fn settled_within(&self, time: std::time::Duration) -> bool {
        let state = lock(&self.state);
        let waited = self.changed.wait_timeout_while(state, time, |state| !state.settled);
        waited.unwrap_or_else(std::sync::PoisonError::into_inner).0.settled
    }
}

/// Bytes that are being read.
pub(crate) struct Pending {
    gpu: Arc<Gpu>,
    op: &'static str,
    size: u64,
    /// `None` once the bytes are out, or if there are none.
    staging: Option<Buffer>,
    mapping: Arc<Mapping>,
    index: Option<wgpu::SubmissionIndex>,
}

impl Gpu {
    /// Starts to read slices, end to end.
    pub(crate) fn read(self: &Arc<Self>, op: &'static str, slices: &[Slice<'_>]) -> Result<Pending> {
        let size: u64 = slices.iter().map(|slice| slice.size).sum();
        let mapping = Arc::<Mapping>::default();
        let mut pending = Pending {
            gpu: Arc::clone(self),
            op,
            size,
            staging: None,
            mapping: Arc::clone(&mapping),
            index: None,
        };
        self.fault.check(op)?;
        if size == 0 {
            return Ok(pending);
        }
        let staging = self.staging(op, size)?;
        let mut recorder = self.record(op, 0, 0)?;
        let mut at = 0;
        for slice in slices {
            recorder.copy(self, *slice, staging.slice(at, slice.size));
            at += slice.size;
        }
        pending.index = recorder.submit(self, op)?;
        drop(recorder);
        staging.raw().slice(..size).map_async(wgpu::MapMode::Read, move |result| {
            mapping.settle(result.map_err(one_line));
        });
        pending.staging = Some(staging);
        Ok(pending)
    }
}

impl Future for Pending {
    type Output = Result<Vec<u8>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let Some(staging) = &this.staging else {
            return Poll::Ready(this.gpu.fault.check(this.op).map(|()| Vec::new()));
        };
        let outcome = {
            let mut state = lock(&this.mapping.state);
            match state.outcome.take() {
                Some(outcome) => outcome,
                None => {
                    state.waker = Some(context.waker().clone());
                    drop(state);
                    // A lost device may never call back.
                    if let Err(error) = this.gpu.fault.check(this.op) {
                        return Poll::Ready(Err(error));
                    }
                    #[cfg(not(target_arch = "wasm32"))]
                    if let Some(index) = this.index.take() {
                        this.gpu.poller.wait_for(index, Arc::clone(&this.mapping));
                    }
                    return Poll::Pending;
                }
            }
        };
        let adapter = this.gpu.fault.adapter();
        let failed =
            |message: String| Error::new(ErrorKind::Device, this.op, format!("adapter {adapter}: {message}"));
        let bytes = outcome.and_then(|()| {
            let view = staging.raw().slice(..this.size).get_mapped_range().map_err(one_line)?;
            Ok(view.to_vec())
        });
        let bytes = match (bytes, this.gpu.fault.check(this.op)) {
            (Ok(bytes), Ok(())) => bytes,
            (_, Err(error)) => return Poll::Ready(Err(error)),
            (Err(message), Ok(())) => return Poll::Ready(Err(failed(message))),
        };
        staging.raw().unmap();
        this.staging = None;
        Poll::Ready(Ok(bytes))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(staging) = &mut self.staging {
            // Mapped, or about to be: of no use to anybody else.
            staging.do_not_reuse();
            self.mapping.settle(Err("nobody waits for this read".to_owned()));
        }
    }
}

#[cfg(not(target_arch = "wasm32"))]
pub(crate) use poller::Poller;

#[cfg(not(target_arch = "wasm32"))]
mod poller {
    use super::{Arc, Mapping, Mutex, lock};
    use crate::fault::{Fault, one_line};
    use std::{
        sync::mpsc::{Sender, channel},
        thread::{self, JoinHandle},
        time::{Duration, Instant},
    };

    /// How long a callback may be due before the read is given up.
    const PATIENCE: Duration = Duration::from_secs(10);

    type Job = (wgpu::SubmissionIndex, Arc<Mapping>);

    /// The thread that waits for submissions on behalf of futures.
    pub(crate) struct Poller {
        device: wgpu::Device,
        fault: Arc<Fault>,
        worker: Mutex<Option<Worker>>,
    }

    struct Worker {
        jobs: Sender<Job>,
        thread: JoinHandle<()>,
    }

    impl Poller {
        pub(crate) fn new(device: wgpu::Device, fault: Arc<Fault>) -> Self {
            Self { device, fault, worker: Mutex::new(None) }
        }

        /// Has the mapping settled once submission `index` is done.
        pub(super) fn wait_for(&self, index: wgpu::SubmissionIndex, mapping: Arc<Mapping>) {
            let mut worker = lock(&self.worker);
            if worker.is_none() {
                let (jobs, receiver) = channel::<Job>();
                let (device, fault) = (self.device.clone(), Arc::clone(&self.fault));
                let thread = thread::Builder::new().name("opt-wgpu-poll".into()).spawn(move || {
                    for (index, mapping) in receiver {
                        see_through(&device, &fault, index, &mapping);
                    }
                });
                *worker = thread.ok().map(|thread| Worker { jobs, thread });
            }
            let sent = match &*worker {
                Some(worker) => worker.jobs.send((index.clone(), Arc::clone(&mapping))).is_ok(),
                None => false,
            };
            drop(worker);
            if !sent {
                // No thread is to be had: wait here.
                see_through(&self.device, &self.fault, index, &mapping);
            }
        }
    }

    impl Drop for Poller {
        /// Waits for the thread, which holds the device: left to itself it could be taking the device down while the
        /// process ends, and drivers crash where that meets the destructors of their own libraries.
        fn drop(&mut self) {
            let Some(Worker { jobs, thread }) = lock(&self.worker).take() else { return };
            drop(jobs);
            // What a callback wakes may drop the backend on the thread itself.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }

    /// Waits for submission `index` and then until the mapping is settled.
    ///
    /// `poll` takes the callbacks that are due under a lock and calls them after it is released, so whichever thread
    /// polls may find that another has taken a callback and not yet called it. The end of the submission therefore
    /// does not say that the callback has run; only a fault of the device or much time says that it will not.
    fn see_through(device: &wgpu::Device, fault: &Fault, index: wgpu::SubmissionIndex, mapping: &Mapping) {
        let wait = wgpu::PollType::Wait { submission_index: Some(index), timeout: None };
        if let Err(error) = device.poll(wait) {
            return mapping.settle(Err(one_line(error)));
        }
        let since = Instant::now();
        let mut pause = Duration::from_millis(1);
        while !mapping.settled_within(pause) {
            // Who awaits the read asks for the fault itself.
            if fault.check("read").is_err() || since.elapsed() > PATIENCE {
                return mapping.settle(Err("the device did not answer a read".to_owned()));
            }
            let _ = device.poll(wgpu::PollType::Poll);
            pause = (2 * pause).min(Duration::from_millis(50));
        }
    }
}
