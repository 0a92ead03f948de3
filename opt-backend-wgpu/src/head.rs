//! What is read instead of logits: the best token, the k best, log-probabilities. The device reduces a row to a few
//! numbers for each part of it, and the host joins the parts.

use crate::{
    gpu::Gpu,
    kernels::{SORTED, Variant},
    pool::Buffer,
    readback::Pending,
    tensor::{Tensor, quads, ranges},
    weights::Matrix,
};
use opt_backend::{Error, Result, TargetScore, TopK, check, oracle};
use std::sync::Arc;

/// Quads of a row that one workgroup of `stats.wgsl` takes.
const STATS_PART: usize = 1024;
/// Bytes of a record of `stats.wgsl`.
const RECORD: usize = 32;
/// Candidates a part keeps at most; for larger k the logits are read instead.
const KEEP_MOST: usize = 512;
/// Pairs of a row that are left to the host to join.
const PAIRS_LEFT: usize = 4096;
/// Bytes of logits that [`Gpu::log_probs`] holds at a time.
const LOGITS_HELD: u64 = 32 << 20;

fn lost(op: &'static str) -> Error {
    Error::shape(op, "expected rows of at least one element")
}

/// What `stats.wgsl` says of a part of a row, or of several joined.
#[derive(Clone, Copy)]
struct Stats {
    key: u32,
    id: u32,
    largest: f32,
    sum: f64,
    target: f32,
}

impl Stats {
    fn decode(record: &[u8]) -> Self {
        let word = |i: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&record[4 * i..4 * i + 4]);
            u32::from_le_bytes(bytes)
        };
        Self {
            key: word(0),
            id: word(1),
            largest: f32::from_bits(word(2)),
            sum: f64::from(f32::from_bits(word(3))),
            target: f32::from_bits(word(4)),
        }
    }

    /// This part and the next.
    fn join(self, other: Self) -> Self {
        let best = if other.key > self.key { other } else { self };
        let largest = self.largest.max(other.largest);
        let scaled = |part: Self| part.sum * f64::from(part.largest - largest).exp();
        Self { key: best.key, id: best.id, largest, sum: scaled(self) + scaled(other), target: self.target }
    }

    fn log_sum_exp(self) -> f32 {
        if self.largest == f32::INFINITY {
            return f32::INFINITY;
        }
        (f64::from(self.largest) + self.sum.ln()) as f32
    }
}

/// The number that `keys.wgsl` made the key of.
fn from_key(key: u32) -> f32 {
    match key {
        0 => f32::NAN,
        key if key & 0x8000_0000 != 0 => f32::from_bits(key & 0x7fff_ffff),
        key => f32::from_bits(!key),
    }
}

/// Joins the records of each row.
fn join(bytes: &[u8], parts: usize) -> Vec<Stats> {
    let rows = bytes.chunks_exact(RECORD * parts.max(1));
    rows.filter_map(|row| row.chunks_exact(RECORD).map(Stats::decode).reduce(Stats::join)).collect()
}

impl Gpu {
    /// Records the statistics of rows of logits into `out` from record `at`; returns the number of parts of a row.
    fn stats(
        self: &Arc<Self>,
        op: &'static str,
        logits: &Tensor,
        targets: Option<&[u32]>,
        out: &Buffer,
        at: usize,
    ) -> Result<()> {
        let ranges = ranges(&[logits]);
        let parts = stats_parts(logits.width());
        let mut recorder = self.record(op, targets.map_or(0, <[u32]>::len), ranges.len())?;
        let targets_at = targets.map_or(0, |targets| recorder.data(targets));
        for rows in ranges {
            let uniforms = [
                rows.len() as u32,
                logits.width() as u32,
                logits.quads() as u32,
                STATS_PART as u32,
                parts as u32,
                targets_at + rows.start as u32,
                (at + rows.start * parts) as u32,
            ];
            let slice = logits.slice(&rows).ok_or_else(|| lost(op))?;
            let buffers = [None, Some(slice), Some(out.whole())];
            let variant = Variant::Stats { targets: targets.is_some() };
            recorder.dispatch(self, op, variant, &uniforms, &buffers, (rows.len() * parts) as u64)?;
        }
        Ok(())
    }

    /// For each row its target's log-probability under a head.
    pub(crate) fn log_probs(
        self: &Arc<Self>,
        x: &Tensor,
        head: &Matrix,
        targets: &[u32],
    ) -> Result<impl Future<Output = Result<Vec<TargetScore>>> + use<>> {
        let op = "log_probs";
        check::ids(op, targets, head.shape[0])?;
        check::width(op, x.width(), head.shape[1])?;
        check::targets(op, targets, x.rows())?;
        let parts = stats_parts(head.shape[0]);
        let row_bytes = 16 * quads(head.shape[0]) as u64;
        let held = LOGITS_HELD.min(self.max_binding()) / row_bytes.max(1);
        let chunk = (held as usize / Tensor::ROWS_ALIGNED * Tensor::ROWS_ALIGNED).max(Tensor::ROWS_ALIGNED);
        let bytes = (x.rows() * parts * RECORD) as u64;
        let out = self.scratch(op, bytes)?;
        let mut first = 0;
        while first < x.rows() {
            let end = x.rows().min(first + chunk);
            let logits = self.logits(op, &x.view(first..end), head)?;
            self.stats(op, &logits, Some(&targets[first..end]), &out, first * parts)?;
            first = end;
        }
        let pending = self.read(op, &[out.slice(0, bytes)])?;
        let targets = targets.to_vec();
        Ok(async move {
            let rows = join(&pending.await?, parts);
            let score = |(row, target): (Stats, u32)| TargetScore {
                log_prob: (f64::from(row.target) - f64::from(row.log_sum_exp())) as f32,
                greedy: row.id == target,
            };
            Ok(rows.into_iter().zip(targets).map(score).collect())
        })
    }

    /// The k largest of each row.
    pub(crate) fn top_k(
        self: &Arc<Self>,
        logits: &Tensor,
        k: usize,
    ) -> Result<impl Future<Output = Result<Vec<TopK>>> + use<>> {
        let op = "top_k";
        let [rows, width] = logits.shape();
        let k = k.min(width);
        let parts = stats_parts(width);
        let plan = if rows == 0 || width == 0 {
            Plan::Empty(rows)
        } else if k > KEEP_MOST || (k > 1 && self.software) {
            // A software adapter's memory is the host's, which sorts faster.
            Plan::Logits(self.read(op, &logits.slices())?)
        } else {
            let bytes = (rows * parts * RECORD) as u64;
            let stats = self.scratch(op, bytes)?;
            self.stats(op, logits, None, &stats, 0)?;
            let mut slices = vec![stats.slice(0, bytes)];
            let sorted = if k > 1 { Some(self.sort(op, logits, k)?) } else { None };
            let pairs = sorted.as_ref().map_or(0, |(_, pairs)| *pairs);
            if let Some((buffer, pairs)) = &sorted {
                slices.push(buffer.slice(0, (rows * pairs * 8) as u64));
            }
            Plan::Reduced { pending: self.read(op, &slices)?, stats: bytes as usize, pairs }
        };
        Ok(async move {
            match plan {
                Plan::Empty(rows) => {
                    let empty = TopK { ids: Vec::new(), logits: Vec::new(), log_sum_exp: f32::NEG_INFINITY };
                    Ok(vec![empty; rows])
                }
                Plan::Logits(pending) => {
                    let logits = Tensor::decode(op, [rows, width], &pending.await?)?;
                    Ok(logits.outer_iter().map(|row| oracle::top_k(row, k)).collect())
                }
                Plan::Reduced { pending, stats, pairs } => {
                    let bytes = pending.await?;
                    let (stats, kept) = bytes.split_at(stats.min(bytes.len()));
                    let mut kept = kept.chunks_exact((8 * pairs).max(1));
                    let each = join(stats, parts).into_iter().map(|row| {
                        let (keys, ids) = match kept.next() {
                            Some(pairs) => best(pairs, k),
                            None => (vec![row.key; k], vec![row.id; k]),
                        };
                        let logits = keys.into_iter().map(from_key).collect();
                        TopK { ids, logits, log_sum_exp: row.log_sum_exp() }
                    });
                    Ok(each.collect())
                }
            }
        })
    }

    /// The k largest of each 1024 logits of a row, reduced until a row has few pairs left; the pairs of all rows, and
    /// how many a row has.
    fn sort(self: &Arc<Self>, op: &'static str, logits: &Tensor, k: usize) -> Result<(Buffer, usize)> {
        let [rows, width] = logits.shape();
        let mut parts = width.div_ceil(SORTED);
        let mut out = self.scratch(op, (rows * parts * k * 8) as u64)?;
        let ranges = ranges(&[logits]);
        let mut recorder = self.record(op, 0, ranges.len() + 8)?;
        for range in ranges {
            let stride = 4 * logits.quads();
            let at = (range.start * parts * k) as u32;
            let uniforms = [range.len() as u32, width as u32, stride as u32, parts as u32, k as u32, at];
            let from = logits.slice(&range).ok_or_else(|| lost(op))?;
            let to = out.slice(0, (rows * parts * k * 8) as u64);
            let groups = (range.len() * parts) as u64;
            recorder.dispatch(
                self,
                op,
                Variant::Sort { merge: false },
                &uniforms,
                &[Some(from), Some(to)],
                groups,
            )?;
        }
        while parts * k > PAIRS_LEFT && parts > 1 {
            let pairs = parts * k;
            let merged = pairs.div_ceil(SORTED);
            let next = self.scratch(op, (rows * merged * k * 8) as u64)?;
            let uniforms = [rows as u32, pairs as u32, pairs as u32, merged as u32, k as u32, 0];
            let buffers = [Some(out.slice(0, (rows * pairs * 8) as u64)), Some(next.whole())];
            let groups = (rows * merged) as u64;
            recorder.dispatch(self, op, Variant::Sort { merge: true }, &uniforms, &buffers, groups)?;
            (out, parts) = (next, merged);
        }
        Ok((out, parts * k))
    }
}

enum Plan {
    Empty(usize),
    Logits(Pending),
    Reduced { pending: Pending, stats: usize, pairs: usize },
}

/// Parts of a row of logits.
fn stats_parts(width: usize) -> usize {
    quads(width).div_ceil(STATS_PART)
}

/// Keys and ids of the best k of a row's pairs.
fn best(pairs: &[u8], k: usize) -> (Vec<u32>, Vec<u32>) {
    let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    let mut pairs: Vec<(u32, u32)> =
        pairs.chunks_exact(8).map(|pair| (word(&pair[..4]), word(&pair[4..]))).collect();
    pairs.sort_unstable_by_key(|&(key, id)| (std::cmp::Reverse(key), id));
    pairs.into_iter().take(k).unzip()
}
