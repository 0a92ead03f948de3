//! Results on their way to the host.
//!
//! A read is recorded as a copy into a staging buffer and submitted with all that came before it; then the buffer is
//! mapped, and a callback wakes whoever awaits it. In a browser the event loop sees to that. Natively callbacks run
//! only while somebody polls the device. [`opt_backend::Backend::block_on`] polls from the calling thread. A future
//! that is awaited elsewhere must not block its executor, so when it is first found pending it leaves the waiting to
//! a thread of the backend, which is started then, waits for the submissions it is told of, and ends with the backend.

use crate::{
    fault::lock,
    gpu::Gpu,
    pool::{Buffer, Slice},
};
use opt_backend::{Error, ErrorKind, Result};
use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
};

#[derive(Default)]
struct Mapping {
    done: Option<std::result::Result<(), String>>,
    waker: Option<Waker>,
}

impl Mapping {
    /// Settles the mapping unless it is settled; returns who is to be woken.
    fn settle(mapping: &Mutex<Mapping>, outcome: std::result::Result<(), String>) {
        let mut mapping = lock(mapping);
        mapping.done.get_or_insert(outcome);
        let waker = mapping.waker.take();
        drop(mapping);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Bytes that are being read.
pub(crate) struct Pending {
    gpu: Arc<Gpu>,
    op: &'static str,
    size: u64,
    /// `None` once the bytes are out, or if there are none.
    staging: Option<Buffer>,
    mapping: Arc<Mutex<Mapping>>,
    index: Option<wgpu::SubmissionIndex>,
}

impl Gpu {
    /// Starts to read slices, end to end.
    pub(crate) fn read(self: &Arc<Self>, op: &'static str, slices: &[Slice<'_>]) -> Result<Pending> {
        let size: u64 = slices.iter().map(|slice| slice.size).sum();
        let mapping = Arc::new(Mutex::new(Mapping::default()));
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
            Mapping::settle(&mapping, result.map_err(|error| error.to_string()));
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
            let mut mapping = lock(&this.mapping);
            match mapping.done.take() {
                Some(outcome) => outcome,
                None => {
                    mapping.waker = Some(context.waker().clone());
                    drop(mapping);
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
            let view =
                staging.raw().slice(..this.size).get_mapped_range().map_err(|error| error.to_string())?;
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
        }
    }
}

#[cfg(not(target_arch = "wasm32"))]
pub(crate) use poller::Poller;

#[cfg(not(target_arch = "wasm32"))]
mod poller {
    use super::{Arc, Mapping, Mutex, lock};
    use std::sync::mpsc::{Sender, channel};

    type Job = (wgpu::SubmissionIndex, Arc<Mutex<Mapping>>);

    /// The thread that waits for submissions on behalf of futures.
    pub(crate) struct Poller {
        device: wgpu::Device,
        jobs: Mutex<Option<Sender<Job>>>,
    }

    impl Poller {
        pub(crate) fn new(device: wgpu::Device) -> Self {
            Self { device, jobs: Mutex::new(None) }
        }

        /// Has the mapping settled once submission `index` is done.
        pub(super) fn wait_for(&self, index: wgpu::SubmissionIndex, mapping: Arc<Mutex<Mapping>>) {
            let mut jobs = lock(&self.jobs);
            if jobs.is_none() {
                let (sender, receiver) = channel::<Job>();
                let device = self.device.clone();
                let thread = std::thread::Builder::new().name("opt-wgpu-poll".into());
                let started = thread.spawn(move || {
                    for (index, mapping) in receiver {
                        let wait = wgpu::PollType::Wait { submission_index: Some(index), timeout: None };
                        let polled = device.poll(wait);
                        // The callback has run by now; if it has not, it never will.
                        let outcome = polled.map(|_| ()).map_err(|error| error.to_string());
                        let outcome = outcome.and(Err("the device did not answer a read".to_owned()));
                        Mapping::settle(&mapping, outcome);
                    }
                });
                if started.is_ok() {
                    *jobs = Some(sender);
                }
            }
            let sent = match &*jobs {
                Some(sender) => sender.send((index.clone(), Arc::clone(&mapping))).is_ok(),
                None => false,
            };
            if !sent {
                // No thread is to be had: wait here.
                let _ = self.device.poll(wgpu::PollType::wait_indefinitely());
                Mapping::settle(&mapping, Err("the device did not answer a read".to_owned()));
            }
        }
    }
}
