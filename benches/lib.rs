//! What the benchmarks share: models of random weights (speed does not depend on the values), the work they are given,
//! and what is said of the machine.

use opt_core::{
    CacheDType, Load, Opt, Result,
    backends::{self, BackendOptions},
    checkpoint::Checkpoint,
    config::OptConfig,
    engine::{Forward, KvCache, Sequence, Want},
};
use std::{fs, hint::black_box, path::Path, sync::Barrier, thread, time::Instant};

/// The shape of facebook/opt-125m.
///
/// # Errors
/// None in practice: the configuration is the default one.
pub fn opt_125m() -> Result<OptConfig> {
    OptConfig::from_json(r#"{"model_type": "opt"}"#)
}

/// A model of the given shape with random weights, in memory.
///
/// # Errors
/// [`opt_core::ErrorKind::Checkpoint`] if the file is not what the configuration asks for, which would be a mistake
/// here.
pub fn random(config: &OptConfig) -> Result<Checkpoint> {
    let text = serde_json::to_string(config).unwrap_or_default();
    Checkpoint::from_bytes(&text, vec![random_file(config)])
}

/// The bytes of a bf16 safetensors file of random weights.
pub fn random_file(config: &OptConfig) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in config.tensor_shapes() {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let entry = serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        header.insert(format!("model.decoder.{name}"), entry);
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    // The data begins on a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = Vec::with_capacity(8 + header.len() + end);
    file.extend((header.len() as u64).to_le_bytes());
    file.extend(header);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..end / 2 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Of bf16: either sign, an exponent of 2^-6 and any fraction, so about +-0.02 to 0.03.
        let bits = (state as u16 & 0x807f) | (121 << 7);
        file.extend(bits.to_le_bytes());
    }
    file
}

/// The model on a backend by name, weights held as `dtype`.
///
/// # Errors
/// Those of loading.
pub fn load(checkpoint: &Checkpoint, backend: &str, dtype: opt_core::DType) -> Result<Opt> {
    let load = Load::with(backends::choose(backend, &BackendOptions::default())?).dtype(dtype);
    Opt::assemble(checkpoint, None, None, load)
}

/// `rows` token ids that mean nothing.
pub fn ids(rows: usize, config: &OptConfig) -> Vec<u32> {
    (0..rows).map(|i| (4 + i * 7919 % (config.vocab_size - 4)) as u32).collect()
}

/// Empty caches of so many sequences.
///
/// # Errors
/// Those of the backend.
pub fn caches(opt: &Opt, batch: usize) -> Result<Vec<KvCache>> {
    (0..batch).map(|_| opt.engine().new_cache(CacheDType::F32)).collect()
}

/// Runs `tokens` behind each cache and reads the most probable next token of each.
///
/// # Errors
/// Those of the engine.
pub fn step(opt: &Opt, caches: &mut [KvCache], tokens: &[u32]) -> Result<()> {
    let sequence =
        |cache| Sequence { cache: Some(cache), ..Sequence::new(tokens).want(Want::TopK { rows: 1, k: 1 }) };
    let sequences = caches.iter_mut().map(sequence).collect();
    opt.engine().forward_blocking(Forward { sequences, ..Forward::default() })?;
    Ok(())
}

/// The middle one, the upper of two; NaN of none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Threads that this machine runs at once.
pub fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes a second that all cores together read from memory, the best of some runs: the limit of decoding.
pub fn bandwidth() -> f64 {
    /// Numbers each thread reads: more than any cache holds.
    const NUMBERS: usize = 32 << 20;
    const RUNS: usize = 7;

    let threads = threads();
    let barrier = Barrier::new(threads);
    // The threads read a memory area each, a run at a time; the slowest ends a run.
    let read = || {
        let numbers: Vec<u64> = (0..NUMBERS as u64).collect();
        let mut seconds = Vec::new();
        for _ in 0..RUNS {
            barrier.wait();
            let started = Instant::now();
            // Several chains, so that additions do not limit the reading.
            let mut sums = [0_u64; 32];
            for chunk in numbers.chunks_exact(sums.len()) {
                sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum = sum.wrapping_add(*x));
            }
            black_box(sums);
            barrier.wait();
            seconds.push(started.elapsed().as_secs_f64());
        }
        seconds
    };
    let best = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(read)).collect();
        let seconds: Vec<Vec<f64>> = workers.into_iter().filter_map(|worker| worker.join().ok()).collect();
        let slowest = |run: usize| seconds.iter().filter_map(|s| s.get(run)).fold(0.0, |a: f64, b| a.max(*b));
        (1..RUNS).map(slowest).fold(f64::INFINITY, f64::min)
    });
    (threads * NUMBERS * size_of::<u64>()) as f64 / best
}

/// Processor, cores, memory and system, as far as this system says.
pub fn machine() -> String {
    let field = |file: &str, key: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split_once(':').map(|(_, value)| value.trim().to_owned()).filter(|value| !value.is_empty())
    };
    let processor = field("/proc/cpuinfo", "model name").unwrap_or_else(|| "an unnamed processor".to_owned());
    let kib: Option<f64> =
        field("/proc/meminfo", "MemTotal").and_then(|text| text.split(' ').next()?.parse().ok());
    let memory = kib.map_or_else(String::new, |kib| format!(", {:.0} GiB", kib / f64::from(1 << 20)));
    format!("{processor}, {} threads{memory}, {}", threads(), std::env::consts::OS)
}

/// Writes a file under another name and renames it then, so that it is whole or not there.
///
/// # Errors
/// One line that names the file.
pub fn save(file: &Path, text: &str) -> std::result::Result<(), String> {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = file.with_file_name(name);
    fs::write(&part, text).and_then(|()| fs::rename(&part, file)).map_err(|e| {
        let _ = fs::remove_file(&part);
        format!("{}: {e}", file.display())
    })
}
