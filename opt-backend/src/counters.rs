use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

/// The ops of [`crate::Backend`] that have default bodies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // each is the method of that name
pub enum Op {
    Gather,
    AddGathered,
    LayerNorm,
    Linear,
    Qkv,
    Add,
    Attend,
    AttentionWeights,
    TakeRows,
    Logits,
    LogProbs,
    TopK,
    NewQuantizedLinear,
    NewQuantizedTable,
}

impl Op {
    /// Every op, in the order of declaration.
    pub const ALL: [Op; 14] = [
        Op::Gather,
        Op::AddGathered,
        Op::LayerNorm,
        Op::Linear,
        Op::Qkv,
        Op::Add,
        Op::Attend,
        Op::AttentionWeights,
        Op::TakeRows,
        Op::Logits,
        Op::LogProbs,
        Op::TopK,
        Op::NewQuantizedLinear,
        Op::NewQuantizedTable,
    ];
}

/// Counts what should be rare: calls of default bodies, transfers between host and device, and, where there is a
/// device with a queue, what is sent to it.
///
/// A backend holds one and hands it out through [`crate::Backend::counters`]; default bodies count themselves, and
/// the backend counts its own uploads and reads. A backend that lives on defaults shows here. Dispatches, submissions
/// and device memory stay 0 where they mean nothing.
#[derive(Debug, Default)]
pub struct Counters {
    defaults: [AtomicU64; Op::ALL.len()],
    uploads: AtomicU64,
    reads: AtomicU64,
    bytes: AtomicU64,
    dispatches: AtomicU64,
    submissions: AtomicU64,
    device_bytes: AtomicU64,
    device_peak: AtomicU64,
}

/// A reading of [`Counters`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Calls of default bodies, in the order of [`Op::ALL`].
    pub defaults: [u64; Op::ALL.len()],
    /// Transfers to the device, weights not counted.
    pub uploads: u64,
    /// Transfers to the host.
    pub reads: u64,
    /// Bytes of both.
    pub bytes: u64,
    /// Kernels started.
    pub dispatches: u64,
    /// Times that work was handed to the device's queue.
    pub submissions: u64,
    /// Bytes of device memory held now: weights, caches, activations and pools.
    pub device_bytes: u64,
    /// The most that were held at once.
    pub device_peak: u64,
}

impl Counters {
    /// Counts one call of the default body of `op`.
    pub fn default_body(&self, op: Op) {
        self.defaults[op as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one transfer of `bytes` to the device.
    pub fn upload(&self, bytes: usize) {
        self.uploads.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts one transfer of `bytes` to the host.
    pub fn read(&self, bytes: usize) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts `kernels` started on the device.
    pub fn dispatch(&self, kernels: u64) {
        self.dispatches.fetch_add(kernels, Ordering::Relaxed);
    }

    /// Counts one hand-over of work to the device's queue.
    pub fn submission(&self) {
        self.submissions.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that `bytes` of device memory are held from now on.
    pub fn hold(&self, bytes: u64) {
        let held = self.device_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.device_peak.fetch_max(held, Ordering::Relaxed);
    }

    /// Notes that `bytes` of device memory, held before, are free again.
    pub fn release(&self, bytes: u64) {
        self.device_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// The counts so far.
    pub fn counts(&self) -> Counts {
        Counts {
            defaults: std::array::from_fn(|i| self.defaults[i].load(Ordering::Relaxed)),
            uploads: self.uploads.load(Ordering::Relaxed),
            reads: self.reads.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            dispatches: self.dispatches.load(Ordering::Relaxed),
            submissions: self.submissions.load(Ordering::Relaxed),
            device_bytes: self.device_bytes.load(Ordering::Relaxed),
            device_peak: self.device_peak.load(Ordering::Relaxed),
        }
    }
}

impl Counts {
    /// Calls of the default body of `op`.
    pub fn default_bodies(&self, op: Op) -> u64 {
        self.defaults[op as usize]
    }

    /// What happened between `earlier` and this reading. Memory is that of this reading.
    pub fn since(&self, earlier: &Counts) -> Counts {
        Counts {
            defaults: std::array::from_fn(|i| self.defaults[i] - earlier.defaults[i]),
            uploads: self.uploads - earlier.uploads,
            reads: self.reads - earlier.reads,
            bytes: self.bytes - earlier.bytes,
            dispatches: self.dispatches - earlier.dispatches,
            submissions: self.submissions - earlier.submissions,
            device_bytes: self.device_bytes,
            device_peak: self.device_peak,
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} uploads, {} reads, {} bytes", self.uploads, self.reads, self.bytes)?;
        if self.dispatches > 0 {
            write!(f, ", {} dispatches, {} submissions", self.dispatches, self.submissions)?;
        }
        f.write_str("; default bodies:")?;
        let called: Vec<String> = Op::ALL
            .iter()
            .filter(|op| self.default_bodies(**op) > 0)
            .map(|op| format!(" {op:?} {}", self.default_bodies(*op)))
            .collect();
        f.write_str(&if called.is_empty() { " none".to_owned() } else { called.join(",") })
    }
}
