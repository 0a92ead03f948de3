//! What a teacher made of a text, written once and learned from later without the teacher.
//!
//! ```text
//! {"format": "opt-teacher-outputs", "version": 1, "k": 64, "temperature": 2.0, ...}\n
//! for each example: u64 key, u64 targets, and for each target: f32 rest, k · u32 ids, k · f32 logits
//! ```
//!
//! All numbers are little-endian.

use super::{Example, Goal, data::Dataset, store::readable};
use crate::{
    Error, ErrorKind, Load, Progress, ProgressFn, Result,
    checkpoint::{Checkpoint, io},
};
use ndarray::{Array2, ArrayView1};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    fs::File,
    io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

const FORMAT: &str = "opt-teacher-outputs";
const VERSION: u32 = 1;
/// The most bytes that the first line has.
const HEAD: u64 = 1 << 16;

/// How outputs are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct OutputOptions {
    /// Logits that are kept of each target, the largest.
    pub k: usize,
    /// The temperature they will be learned from at.
    pub temperature: f32,
}

impl Default for OutputOptions {
    fn default() -> Self {
        Self { k: 64, temperature: super::DistillOptions::default().temperature }
    }
}

impl OutputOptions {
    /// Sets [`OutputOptions::k`].
    #[must_use]
    pub fn k(self, k: usize) -> Self {
        Self { k, ..self }
    }

    /// Sets [`OutputOptions::temperature`].
    #[must_use]
    pub fn temperature(self, temperature: f32) -> Self {
        Self { temperature, ..self }
    }
}

/// What the file says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Head {
    format: String,
    version: u32,
    k: usize,
    temperature: f32,
    vocab_size: usize,
    /// What tells the teacher's weights from others.
    teacher_weights: String,
    /// The number format that they were held in.
    teacher_held: String,
    examples: u64,
}

/// A teacher's soft targets for each example of some data, in a file: its `k` largest logits, and what is left of its
/// probability, which is spread evenly over the rest of the vocabulary.
///
/// At the temperature they were written for, the `k` probabilities and the mass of the rest are the teacher's own; what
/// is lost is how the rest is shared out. Hidden states are not kept: `alpha_hidden` and `alpha_cos` must be 0. A target
/// takes `8 · k + 4` bytes, 516 with the default k.
///
/// ```
/// use opt_core::{Load, checkpoint::Checkpoint};
/// use opt_core::tuning::{DistillOptions, Example, Method, OutputOptions, TeacherOutputs, Tuner, student_of};
/// use opt_core::tuning::data::{DataOptions, Dataset};
///
/// let teacher = Checkpoint::open("../models/opt-novels")?;
/// let data = Dataset::new([Example::new(vec![2, 100, 200, 300])], &DataOptions::new(teacher.config(), None))?;
/// let file = std::env::temp_dir().join(format!("teacher-{}.outputs", std::process::id()));
/// let keep = OutputOptions::default();
/// let outputs = TeacherOutputs::write(&file, &teacher, Load::default(), &data, keep, None)?;
///
/// let (student, _) = student_of(&teacher, 2)?;
/// let tuner = Tuner::from_checkpoint(student, Method::full(), Load::default())?;
/// let mut tuner = tuner.distill_from(outputs, DistillOptions::default())?;
/// assert!(tuner.step(&[&[data.get(0)?]], Default::default())?.loss > 0.0);
/// # std::fs::remove_file(&file).unwrap();
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct TeacherOutputs {
    path: PathBuf,
    head: Head,
    file: Arc<Mutex<File>>,
    /// By the key of an example where its first target is in the file, and how many there are.
    places: Arc<HashMap<u64, (u64, u64)>>,
}

impl TeacherOutputs {
    /// Runs the teacher over `data`, held and on the backend that `load` says, and writes what it makes of it to a file,
    /// which appears when it is complete. Examples are counted for `progress`.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a `k` that is 0 or more than the vocabulary and a temperature that is not above 0; those
    /// of [`crate::Opt::load`]; [`ErrorKind::Prompt`] for examples that the teacher cannot run;
    /// [`ErrorKind::Cancelled`]; [`ErrorKind::Io`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn write(
        path: impl AsRef<Path>,
        teacher: &Checkpoint,
        load: Load<'_>,
        data: &Dataset,
        options: OutputOptions,
        progress: Option<&mut ProgressFn<'_>>,
    ) -> Result<Self> {
        let path = path.as_ref();
        let OutputOptions { k, temperature } = options;
        let vocab_size = teacher.config().vocab_size;
        let fail = |message: String| Err(Error::new(ErrorKind::Option, message));
        if k == 0 || k > vocab_size {
            return fail(format!("k: expected 1 to {vocab_size} logits of a target, found {k}"));
        }
        if !(temperature.is_finite() && temperature > 0.0) {
            return fail(format!("temperature: expected a number above 0, found {temperature}"));
        }
        let head = Head {
            format: FORMAT.to_owned(),
            version: VERSION,
            k,
            temperature,
            vocab_size,
            teacher_weights: teacher.fingerprint()?,
            teacher_held: load.holding.name(),
            examples: data.len(),
        };
        let cancel = load.cancel.clone().unwrap_or_default();
        let teacher = crate::Opt::assemble(teacher, None, None, load)?;
        let mut progress = progress;
        let folder = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let place = |e| io("cannot write", path, e);
        let mut out = BufWriter::new(tempfile::NamedTempFile::new_in(folder).map_err(place)?);
        let line = serde_json::to_string(&head).unwrap_or_default();
        writeln!(out, "{line}").map_err(place)?;
        for index in 0..data.len() {
            cancel.check("writing the teacher's outputs")?;
            let example = data.get(index)?;
            let place_of = |e: Error| e.at(format_args!("example {}", index + 1));
            if !matches!(example.goal, Goal::Tokens(_)) {
                let message = "expected tokens to be predicted, found another goal";
                return Err(place_of(Error::new(ErrorKind::Prompt, message)));
            }
            let logits = logits_of(&teacher, &example, &cancel).map_err(place_of)?;
            out.write_all(&key(&example).to_le_bytes()).map_err(place)?;
            out.write_all(&(logits.nrows() as u64).to_le_bytes()).map_err(place)?;
            for row in logits.outer_iter() {
                out.write_all(&kept(row, options)).map_err(place)?;
            }
            let told = Progress::new("the teacher's outputs", index + 1, data.len());
            if progress.as_mut().is_some_and(|progress| progress(told).is_break()) {
                return Err(Error::new(ErrorKind::Cancelled, "writing the teacher's outputs was cancelled"));
            }
        }
        let file = out.into_inner().map_err(|e| place(e.into_error()))?;
        file.as_file().sync_all().and_then(|()| readable(file.path())).map_err(place)?;
        file.persist(path).map_err(|e| place(e.error))?;
        Self::open(path)
    }

    /// Opens what [`TeacherOutputs::write`] has written.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] and [`ErrorKind::Io`] for a file that cannot be read, [`ErrorKind::Checkpoint`] for one
    /// that is damaged or something else.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let read = |e| io("cannot read", path, e);
        let file = File::open(path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        reader.by_ref().take(HEAD).read_until(b'\n', &mut line).map_err(read)?;
        let damaged = |what: &str| {
            let message = format_args!("{}: expected a teacher's outputs, found {what}", path.display());
            Error::new(ErrorKind::Checkpoint, message)
        };
        let head = serde_json::from_slice(&line).ok().filter(|head: &Head| head.format == FORMAT);
        let head = head.ok_or_else(|| damaged("something else"))?;
        if head.version != VERSION {
            return Err(damaged(&format!("version {} of the format", head.version)));
        }
        if head.k == 0 || head.k > head.vocab_size || u32::try_from(head.vocab_size).is_err() {
            return Err(damaged(&format!("{} logits of a target", head.k)));
        }
        let mut places = HashMap::new();
        let mut place = line.len() as u64;
        for _ in 0..head.examples {
            let mut words = [[0; 8]; 2];
            reader.seek(SeekFrom::Start(place)).map_err(read)?;
            for word in &mut words {
                reader.read_exact(word).map_err(|e| match e.kind() {
                    std::io::ErrorKind::UnexpectedEof => damaged("a file that ends early"),
                    _ => read(e),
                })?;
            }
            let [key, targets] = words.map(u64::from_le_bytes);
            place += 16;
            places.insert(key, (place, targets));
            let end = targets.checked_mul(record(head.k)).and_then(|bytes| bytes.checked_add(place));
            place = end.filter(|end| *end <= length).ok_or_else(|| damaged("a file that ends early"))?;
        }
        if place != length {
            return Err(damaged("more than the first line says"));
        }
        let (file, places) = (Arc::new(Mutex::new(reader.into_inner())), Arc::new(places));
        Ok(Self { path: path.to_owned(), head, file, places })
    }

    /// Logits that are kept of each target.
    pub fn k(&self) -> usize {
        self.head.k
    }

    /// The temperature that they were written for.
    pub fn temperature(&self) -> f32 {
        self.head.temperature
    }

    /// Whether they are those of this teacher.
    ///
    /// # Errors
    /// Those of reading its weights.
    pub fn are_of(&self, teacher: &Checkpoint) -> Result<bool> {
        Ok(self.head.teacher_weights == teacher.fingerprint()?)
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.head.vocab_size
    }

    /// What a training that learns from them must have in common with the one it goes on with.
    pub(super) fn settings(&self) -> serde_json::Value {
        let Head { k, teacher_weights, teacher_held, .. } = &self.head;
        serde_json::json!({ "top_k": k, "teacher_weights": teacher_weights, "teacher_held": teacher_held })
    }

    /// Whether the teacher has seen all of this.
    ///
    /// # Errors
    /// [`ErrorKind::Prompt`] for the first example that it has not; those of reading the data.
    pub fn check(&self, data: &Dataset) -> Result<()> {
        for index in 0..data.len() {
            let found = self.place(&data.get(index)?);
            found.map_err(|e| e.at(format_args!("example {}", index + 1)))?;
        }
        Ok(())
    }

    /// Where the targets of an example begin in the file, and how many there are.
    fn place(&self, example: &Example) -> Result<(u64, usize)> {
        let targets = example.targets().count();
        match self.places.get(&key(example)) {
            Some((place, count)) if *count == targets as u64 => Ok((*place, targets)),
            _ => {
                let message = format_args!(
                    "{}: expected outputs for all examples, found none for one of {} tokens: it was written for other data",
                    self.path.display(),
                    example.ids().len()
                );
                Err(Error::new(ErrorKind::Prompt, message))
            }
        }
    }

    /// The teacher's logits of the targets of these examples, `[targets, vocab_size]`.
    ///
    /// # Errors
    /// [`ErrorKind::Prompt`] for an example that the teacher has not seen; [`ErrorKind::Io`].
    pub(super) fn logits(&self, examples: &[Example]) -> Result<Array2<f32>> {
        let found = examples.iter().map(|example| self.place(example)).collect::<Result<Vec<_>>>()?;
        let rows = found.iter().map(|(_, targets)| targets).sum();
        let mut logits = Array2::zeros((rows, self.head.vocab_size));
        let mut all = logits.outer_iter_mut();
        let size = record(self.head.k) as usize;
        for (place, targets) in found {
            let mut bytes = vec![0; targets * size];
            {
                let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
                let read = file.seek(SeekFrom::Start(place)).and_then(|_| file.read_exact(&mut bytes));
                read.map_err(|e| io("cannot read", &self.path, e))?;
            }
            for (record, mut row) in bytes.chunks_exact(size).zip(&mut all) {
                let word = |i: usize| -> [u8; 4] { std::array::from_fn(|b| record[4 * i + b]) };
                row.fill(f32::from_le_bytes(word(0)));
                for i in 1..=self.head.k {
                    let (id, logit) =
                        (u32::from_le_bytes(word(i)), f32::from_le_bytes(word(self.head.k + i)));
                    let entry = row.get_mut(id as usize);
                    *entry.ok_or_else(|| {
                        let message =
                            format_args!("{}: token {id} is outside the vocabulary", self.path.display());
                        Error::new(ErrorKind::Checkpoint, message)
                    })? = logit;
                }
            }
        }
        Ok(logits)
    }
}

/// Bytes of a target.
fn record(k: usize) -> u64 {
    4 + 8 * k as u64
}

/// FNV-1a of an example's tokens and of where its targets begin: its order in an epoch is another each time.
fn key(example: &Example) -> u64 {
    let from = if let Goal::Tokens(from) = example.goal { from } else { 0 };
    let words = [from as u32].into_iter().chain(example.ids.iter().copied());
    words.flat_map(u32::to_le_bytes).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The teacher's logits of an example's targets, `[targets, vocab_size]`.
#[cfg(not(target_arch = "wasm32"))]
fn logits_of(
    teacher: &crate::Opt,
    example: &Example,
    cancel: &crate::CancelToken,
) -> Result<ndarray::ArcArray2<f32>> {
    use crate::engine::{Forward, Sequence, Want};
    let rows = example.targets().count();
    // The last token is only ever a target.
    let run = &example.ids()[..example.ids().len().saturating_sub(1)];
    let sequences = vec![Sequence::new(run).want(Want::Logits { rows })];
    let outputs =
        teacher.engine().forward_blocking(Forward { sequences, cancel: Some(cancel), watch: None })?;
    let logits = outputs.into_iter().next().and_then(|output| output.logits);
    logits.ok_or_else(|| Error::new(ErrorKind::Backend, "expected logits, found none"))
}

/// A row of logits as it is written.
fn kept(row: ArrayView1<'_, f32>, options: OutputOptions) -> Vec<u8> {
    let OutputOptions { k, temperature } = options;
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    let logit = |id: u32| row.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
    if k < order.len() {
        // Of equal ones those of smaller ids.
        order.select_nth_unstable_by(k, |a, b| logit(*b).total_cmp(&logit(*a)).then(a.cmp(b)));
    }
    let (largest, rest) = order.split_at_mut(k);
    largest.sort_unstable();
    let mut bytes = Vec::with_capacity(record(k) as usize);
    bytes.extend(spread(rest.iter().map(|id| logit(*id)), temperature).to_le_bytes());
    bytes.extend(largest.iter().flat_map(|id| id.to_le_bytes()));
    bytes.extend(largest.iter().flat_map(|id| logit(*id).to_le_bytes()));
    bytes
}

/// The logit that, in the place of each of these, leaves their share of probability at a temperature as it is:
/// T log mean exp(logit / T).
fn spread(logits: impl Iterator<Item = f32> + Clone, temperature: f32) -> f32 {
    let (most, count) = logits.clone().fold((f32::NEG_INFINITY, 0_u32), |(most, n), z| (most.max(z), n + 1));
    if count == 0 || !most.is_finite() {
        return most.min(0.0);
    }
    let (most, temperature) = (f64::from(most), f64::from(temperature));
    let sum: f64 = logits.map(|z| ((f64::from(z) - most) / temperature).exp()).sum();
    (most + temperature * (sum / f64::from(count)).ln()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// exp(logit / T) over their sum.
    fn shares(logits: &[f32], temperature: f32) -> Vec<f64> {
        let all: Vec<f64> = logits.iter().map(|z| f64::from(z / temperature).exp()).collect();
        let sum: f64 = all.iter().sum();
        all.iter().map(|share| share / sum).collect()
    }

    #[test]
    fn the_largest_and_the_mass_of_the_rest_stay() {
        let logits = [0.5, 3.0, -1.0, 3.0, 2.0, -4.0, 0.0];
        let options = OutputOptions::default().k(3).temperature(2.0);
        let bytes = kept(ArrayView1::from(&logits), options);
        assert_eq!(bytes.len() as u64, record(3));
        let word = |i: usize| -> [u8; 4] { std::array::from_fn(|b| bytes[4 * i + b]) };
        assert_eq!([1, 2, 3].map(|i| u32::from_le_bytes(word(i))), [1, 3, 4]);
        assert_eq!([4, 5, 6].map(|i| f32::from_le_bytes(word(i))), [3.0, 3.0, 2.0]);
        let mut again = [f32::from_le_bytes(word(0)); 7];
        for (id, logit) in [(1, 3.0), (3, 3.0), (4, 2.0)] {
            again[id] = logit;
        }
        let (found, expected) = (shares(&again, 2.0), shares(&logits, 2.0));
        for id in [1, 3, 4] {
            assert!((found[id] - expected[id]).abs() < 1e-6, "{found:?}, {expected:?}");
        }
        assert!(found[0] == found[2] && found[2] == found[5]);
    }

    #[test]
    fn nothing_is_left_of_a_whole_vocabulary() {
        let bytes = kept(ArrayView1::from(&[1.0, 2.0]), OutputOptions::default().k(2));
        assert_eq!(bytes.len() as u64, record(2));
        assert_eq!(spread([-7.0, -7.0].into_iter(), 3.0), -7.0);
    }

    #[test]
    fn keys_tell_examples_apart() {
        let of = |ids: &[u32], from| key(&Example::completion(ids.to_vec(), from));
        assert_eq!(of(&[2, 5, 6], 1), of(&[2, 5, 6], 1));
        assert_ne!(of(&[2, 5, 6], 1), of(&[2, 5, 6], 2));
        assert_ne!(of(&[2, 5, 6], 1), of(&[2, 6, 5], 1));
    }
}
