//! The device, its memory and its queue: what tensors, weights and caches share.

use crate::{
    fault::{Fault, lock},
    kernels::Extras,
    pool::{Buffer, Pool, Raw},
    recorder::Recorder,
};
use opt_backend::{Counters, Error, ErrorKind, Result};
use std::{
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
};

/// Bytes of uploads after which the queue is drained, so that its staging memory does not grow as large as a model.
const UPLOADS_PENDING: u64 = 64 << 20;
/// Bytes of one upload.
const UPLOAD_PIECE: usize = 8 << 20;

/// One device and everything that belongs to it.
pub(crate) struct Gpu {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) limits: wgpu::Limits,
    pub(crate) extras: Extras,
    /// Whether this is a CPU in the guise of a GPU: kernels are then chosen that do with few cores.
    pub(crate) software: bool,
    pub(crate) fault: Arc<Fault>,
    pub(crate) counters: Counters,
    /// Bytes that may be held at once, if someone said so.
    pub(crate) memory: Option<u64>,
    pub(crate) pool: Mutex<Pool>,
    pub(crate) recorder: Mutex<Recorder>,
    /// Number of the encoder that is open: grows with each submission.
    pub(crate) serial: AtomicU64,
    next_id: AtomicU64,
    uploads_pending: AtomicU64,
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) poller: crate::readback::Poller,
}

/// What a buffer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Use {
    /// Bound by kernels, copied from and to.
    Storage,
    /// Mapped for reading.
    Staging,
    /// Uniforms and small inputs of kernels.
    Arguments,
}

impl Use {
    fn usages(self) -> wgpu::BufferUsages {
        use wgpu::BufferUsages as U;
        match self {
            Use::Storage => U::STORAGE | U::COPY_SRC | U::COPY_DST,
            Use::Staging => U::MAP_READ | U::COPY_DST,
            Use::Arguments => U::UNIFORM | U::STORAGE | U::COPY_DST,
        }
    }
}

impl Gpu {
    pub(crate) fn new(
        device: wgpu::Device,
        queue: wgpu::Queue,
        extras: Extras,
        software: bool,
        fault: Arc<Fault>,
        memory: Option<u64>,
        submit_every: u32,
    ) -> Self {
        let limits = device.limits();
        Self {
            #[cfg(not(target_arch = "wasm32"))]
            poller: crate::readback::Poller::new(device.clone(), Arc::clone(&fault)),
            device,
            queue,
            limits,
            extras,
            software,
            fault,
            counters: Counters::default(),
            memory,
            pool: Mutex::new(Pool::new(memory)),
            recorder: Mutex::new(Recorder::new(submit_every)),
            serial: AtomicU64::new(1),
            next_id: AtomicU64::new(1),
            uploads_pending: AtomicU64::new(0),
        }
    }

    /// Most bytes that one binding, and so one buffer that kernels see, may have.
    pub(crate) fn max_binding(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size.min(self.limits.max_buffer_size) / 4 * 4
    }

    /// Creates a buffer, after making room under the memory cap if need be.
    pub(crate) fn create(&self, op: &'static str, size: u64, purpose: Use) -> Result<Raw> {
        self.fault.check(op)?;
        let size = size.max(4).next_multiple_of(4);
        let most = if purpose == Use::Staging { self.limits.max_buffer_size } else { self.max_binding() };
        if size > most {
            let found = format_args!("expected at most {most} bytes in a buffer, found {size}");
            return Err(self.out_of_memory(op, found));
        }
        if let Some(cap) = self.memory {
            let held = || self.counters.counts().device_bytes;
            if held().saturating_add(size) > cap {
                self.trim();
            }
            if held().saturating_add(size) > cap {
                let found = format_args!("expected room for {size} bytes, found {} of {cap} held", held());
                return Err(self.out_of_memory(op, found));
            }
        }
        let descriptor = wgpu::BufferDescriptor {
            label: Some(op),
            size,
            usage: purpose.usages(),
            mapped_at_creation: false,
        };
        let buffer = match self.scoped(|| self.device.create_buffer(&descriptor)) {
            Ok(buffer) => buffer,
            // Pooled memory may be what is in the way.
            Err(_) if self.trim() => self
                .scoped(|| self.device.create_buffer(&descriptor))
                .map_err(|error| self.allocation(op, size, &error))?,
            Err(error) => return Err(self.allocation(op, size, &error)),
        };
        self.fault.check(op)?;
        self.counters.hold(size);
        Ok(Raw { buffer, id: self.next_id.fetch_add(1, Ordering::Relaxed), size, used: 0 })
    }

    fn allocation(&self, op: &'static str, size: u64, error: &wgpu::Error) -> Error {
        let (kind, message) = self.fault.describe(error);
        Error::new(kind, op, format_args!("{size} bytes: {message}"))
    }

    pub(crate) fn out_of_memory(&self, op: &'static str, found: impl std::fmt::Display) -> Error {
        Error::new(ErrorKind::OutOfMemory, op, format_args!("adapter {}: {found}", self.fault.adapter()))
    }

    /// Gives the pool's free buffers back to the device; whether there were any.
    fn trim(&self) -> bool {
        let freed = lock(&self.pool).clear();
        let any = !freed.is_empty();
        for raw in freed {
            self.destroy(raw);
        }
        if let Ok(mut recorder) = self.recorder.try_lock() {
            recorder.forget(&mut lock(&self.pool));
        }
        any
    }

    /// Notes that a buffer is gone.
    pub(crate) fn destroy(&self, raw: Raw) {
        self.counters.release(raw.size);
        lock(&self.pool).bury(raw.id);
    }

    /// Runs `create` and catches the errors of memory and validation that it reports. In a browser errors arrive
    /// later, through the device's handler.
    pub(crate) fn scoped<T>(&self, create: impl FnOnce() -> T) -> std::result::Result<T, wgpu::Error> {
        if cfg!(target_arch = "wasm32") {
            return Ok(create());
        }
        let scopes =
            [wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation]
                .map(|filter| self.device.push_error_scope(filter));
        let created = create();
        let mut found = None;
        for scope in scopes.into_iter().rev() {
            // Native scopes have their answer at once.
            let mut popped = std::pin::pin!(scope.pop());
            if let Poll::Ready(Some(error)) = popped.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                found = Some(error);
            }
        }
        found.map_or(Ok(created), Err)
    }

    /// A buffer of its own, for weights.
    pub(crate) fn buffer(self: &Arc<Self>, op: &'static str, size: u64) -> Result<Buffer> {
        Ok(Buffer::new(self.create(op, size, Use::Storage)?, self, None))
    }

    /// A buffer from the pool, at least `size` bytes, holding anything.
    pub(crate) fn scratch(self: &Arc<Self>, op: &'static str, size: u64) -> Result<Buffer> {
        self.pooled(op, size, Use::Storage, u64::MAX)
    }

    /// A buffer from the pool that the open encoder does not use: what is written to it from the host goes ahead of
    /// everything in that encoder.
    pub(crate) fn fresh(self: &Arc<Self>, op: &'static str, size: u64) -> Result<Buffer> {
        self.pooled(op, size, Use::Storage, self.serial.load(Ordering::Acquire))
    }

    /// A buffer to map and read.
    pub(crate) fn staging(self: &Arc<Self>, op: &'static str, size: u64) -> Result<Buffer> {
        self.pooled(op, size, Use::Staging, u64::MAX)
    }

    fn pooled(self: &Arc<Self>, op: &'static str, size: u64, purpose: Use, before: u64) -> Result<Buffer> {
        let most = if purpose == Use::Staging { self.limits.max_buffer_size } else { self.max_binding() };
        let class = Pool::class(size).min(most.max(size));
        let free = lock(&self.pool).take((purpose, class), before);
        let raw = match free {
            Some(raw) => raw,
            None => self.create(op, class, purpose)?,
        };
        Ok(Buffer::new(raw, self, Some((purpose, class))))
    }

    /// Writes to a buffer that no unsubmitted command uses.
    pub(crate) fn write(&self, op: &'static str, buffer: &Buffer, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut at = offset;
        for piece in bytes.chunks(UPLOAD_PIECE) {
            self.scoped(|| self.queue.write_buffer(buffer.raw(), at, piece))
                .map_err(|error| self.allocation(op, piece.len() as u64, &error))?;
            at += piece.len() as u64;
            let pending = self.uploads_pending.fetch_add(piece.len() as u64, Ordering::Relaxed);
            if pending + piece.len() as u64 > UPLOADS_PENDING {
                self.uploads_pending.store(0, Ordering::Relaxed);
                self.queue.submit([]);
                self.counters.submission();
                self.wait();
            }
        }
        self.fault.check(op)
    }

    /// Waits until the device has done all that was submitted. In a browser it returns at once.
    pub(crate) fn wait(&self) {
        // What can fail here is a timeout, and none is set.
        let _ = self.device.poll(wgpu::PollType::wait_indefinitely());
    }

    /// Makes room for the commands of one op and returns the recorder: `words` of data for kernels and `dispatches`.
    pub(crate) fn record(
        &self,
        op: &'static str,
        words: usize,
        dispatches: usize,
    ) -> Result<std::sync::MutexGuard<'_, Recorder>> {
        self.fault.check(op)?;
        let mut recorder = lock(&self.recorder);
        recorder.make_room(self, op, words, dispatches)?;
        Ok(recorder)
    }
}
