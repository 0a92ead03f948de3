use crate::DType;

/// What a backend found on this machine; `opt backends` prints it.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Info {
    /// The backend's name, as users choose it: `cpu`, `tch`, ...
    pub name: String,
    /// The processor, device or adapter.
    pub device: String,
    /// Threads that compute, 0 where that means nothing.
    pub threads: usize,
    /// The vector instruction set in use.
    pub simd: Option<String>,
    /// Formats in which weights can be held.
    pub dtypes: Vec<DType>,
    /// Bytes of memory that are free for a model when asked, where the device says so. Models that need more are
    /// refused before anything is loaded.
    pub memory: Option<u64>,
    /// Largest number of bytes one tensor can be bound with; `None` is without limit.
    pub max_binding: Option<u64>,
    /// Whether the result of a row is bit-equal whatever batch, chunk and thread count it is computed in.
    pub deterministic: bool,
    /// Anything else worth printing, as (name, value).
    pub details: Vec<(String, String)>,
}

impl Info {
    /// Info with the two fields that no backend can do without.
    pub fn new(name: impl Into<String>, device: impl Into<String>) -> Self {
        Self { name: name.into(), device: device.into(), ..Self::default() }
    }
}

/// Bytes of main memory that are free for use, where the system says so (Linux).
pub fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}
