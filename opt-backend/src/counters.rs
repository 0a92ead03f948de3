use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

/// The ops of [`crate::Backend`] and [`crate::Train`] that have default bodies.
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
    LinearOf,
    NormOf,
    Zeros,
    Copy,
    Matmul,
    LinearGrad,
    LogitsGrad,
    LayerNormGrad,
    LayerNormGradParams,
    AttendGrad,
    Activate,
    ActivateGrad,
    CrossEntropy,
    SoftTargets,
    ScatterAdd,
    Concat,
    SumRows,
    AddRow,
    MulRow,
    Mul,
    Scale,
    Dropout,
    SumSquares,
    AdamW,
    AdamW8,
    Sgd,
}

impl Op {
    /// The ops of [`crate::Backend`], in the order of declaration.
    pub const RUN: [Op; 14] = [
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

    /// The ops of [`crate::Train`], in the order of declaration.
    pub const TRAIN: [Op; 26] = [
        Op::LinearOf,
        Op::NormOf,
        Op::Zeros,
        Op::Copy,
        Op::Matmul,
        Op::LinearGrad,
        Op::LogitsGrad,
        Op::LayerNormGrad,
        Op::LayerNormGradParams,
        Op::AttendGrad,
        Op::Activate,
        Op::ActivateGrad,
        Op::CrossEntropy,
        Op::SoftTargets,
        Op::ScatterAdd,
        Op::Concat,
        Op::SumRows,
        Op::AddRow,
        Op::MulRow,
        Op::Mul,
        Op::Scale,
        Op::Dropout,
        Op::SumSquares,
        Op::AdamW,
        Op::AdamW8,
        Op::Sgd,
    ];

    /// Every op, in the order of declaration.
    pub const ALL: [Op; Self::RUN.len() + Self::TRAIN.len()] = {
        let mut all = [Op::Gather; Self::RUN.len() + Self::TRAIN.len()];
        let (run, train) = all.split_at_mut(Self::RUN.len());
        run.copy_from_slice(&Self::RUN);
        train.copy_from_slice(&Self::TRAIN);
        all
    };
}

/// Counts what should be rare: calls of default bodies, transfers between host and device, and, where there is a
/// device with a queue, what is sent to it.
///
/// A backend holds one and hands it out through [`crate::Backend::counters`]; default bodies count themselves, and
/// the backend counts its own uploads and reads. A backend that lives on defaults shows here. Dispatches, submissions
/// and device memory stay 0 where they mean nothing.
#[derive(Debug)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
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

impl Default for Counters {
    fn default() -> Self {
        Self {
            defaults: std::array::from_fn(|_| AtomicU64::new(0)),
            uploads: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            dispatches: AtomicU64::new(0),
            submissions: AtomicU64::new(0),
            device_bytes: AtomicU64::new(0),
            device_peak: AtomicU64::new(0),
        }
    }
}

impl Default for Counts {
    fn default() -> Self {
        Counters::default().counts()
    }
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
