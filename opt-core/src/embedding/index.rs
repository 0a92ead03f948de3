use super::{Embedder, Embedding, Identity, Precision};
use crate::{Error, ErrorKind, Result};
use opt_backend::half::f16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{cmp::Ordering, collections::HashMap, fmt};

/// How alike two vectors are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Metric {
    /// The cosine of the angle between them, -1 to 1; 0 for a vector of zeros.
    #[default]
    Cosine,
    /// Their dot product.
    Dot,
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cosine => "cosine",
            Self::Dot => "dot",
        })
    }
}

/// Vectors in memory, searched one by one: exact, and fast enough for some hundred thousand.
///
/// It belongs to the embedder that made its vectors: one of another model, layer or pooling is refused when it is opened.
///
/// ```
/// use opt_core::{Opt, embedding::{EmbedOptions, Embedder, Index, Metric}};
/// use serde_json::json;
///
/// let opt = Opt::open("../models/opt-novels")?;
/// let embedder = Embedder::new(&opt, EmbedOptions::default())?;
/// let mut index = Index::new(&embedder, Metric::Cosine)?;
/// let texts = ["The ship sailed at dawn.", "He was a lawyer of some fame."];
/// for (text, embedding) in texts.iter().zip(embedder.embed_batch(texts)?) {
///     index.insert(*text, &embedding, Some(json!({ "words": text.split(' ').count() })))?;
/// }
/// let query = embedder.embed("The ship sailed in the morning.")?;
/// let hits = index.search(query.vector(), 1)?;
/// assert_eq!((hits[0].id, hits[0].metadata.unwrap()["words"].as_u64()), (texts[0], Some(5)));
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Index {
    identity: Identity,
    metric: Metric,
    precision: Precision,
    /// One after the other.
    vectors: Vec<f32>,
    entries: Vec<Entry>,
    /// Where the vector of an id is.
    places: HashMap<String, usize>,
}

/// What is known of a vector.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    metadata: Option<Value>,
}

/// A vector that was found.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Hit<'a> {
    /// What it was called.
    pub id: &'a str,
    /// How alike it is to what was looked for, by the index's metric.
    pub score: f32,
    /// What was stored with it.
    pub metadata: Option<&'a Value>,
}

/// What a saved index says of itself.
const FORMAT: &str = "opt-index-1";

impl Index {
    /// [`Index::new`], awaited.
    ///
    /// # Errors
    /// Those of [`Index::new`].
    pub async fn new_async(embedder: &Embedder, metric: Metric) -> Result<Self> {
        let precision = embedder.options().precision;
        Ok(Self::empty(embedder.identity_async().await?, metric, precision))
    }

    fn empty(identity: Identity, metric: Metric, precision: Precision) -> Self {
        Self { identity, metric, precision, vectors: Vec::new(), entries: Vec::new(), places: HashMap::new() }
    }

    /// Number of vectors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no vector.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// By what it is searched.
    pub fn metric(&self) -> Metric {
        self.metric
    }

    /// What its vectors can be compared with.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The ids, in the order in which they came.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| &*entry.id)
    }

    /// The vector of an id, `[width]`.
    pub fn vector(&self, id: &str) -> Option<&[f32]> {
        let place = *self.places.get(id)?;
        self.vectors.chunks_exact(self.identity.width).nth(place)
    }

    /// Puts a vector in, in the place of what had this id before.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for an embedding of another width, or one that is not pooled.
    pub fn insert(
        &mut self,
        id: impl Into<String>,
        embedding: &Embedding,
        metadata: Option<Value>,
    ) -> Result<()> {
        let id = id.into();
        let vector = embedding.vector();
        self.check(vector).map_err(|e| e.at(format_args!("id {id:?}")))?;
        let width = self.identity.width;
        match self.places.get(&id).copied() {
            Some(place) => {
                if let (Some(held), Some(entry)) =
                    (self.vectors.chunks_exact_mut(width).nth(place), self.entries.get_mut(place))
                {
                    held.copy_from_slice(vector);
                    entry.metadata = metadata;
                }
            }
            None => {
                self.places.insert(id.clone(), self.entries.len());
                self.vectors.extend_from_slice(vector);
                self.entries.push(Entry { id, metadata });
            }
        }
        Ok(())
    }

    /// Takes a vector out; whether it was there.
    pub fn remove(&mut self, id: &str) -> bool {
        let Some(place) = self.places.remove(id) else { return false };
        let width = self.identity.width;
        self.entries.remove(place);
        self.vectors.drain(place * width..(place + 1) * width);
        self.places.values_mut().filter(|other| **other > place).for_each(|other| *other -= 1);
        true
    }

    /// The `k` vectors that are most like `query`, `[width]`, best first; among equals what came first.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a query of another width, or with numbers that are none.
    pub fn search(&self, query: &[f32], k: usize) -> Result<Vec<Hit<'_>>> {
        self.check(query).map_err(|e| e.at("query"))?;
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let length = dot(query, query).sqrt();
        let score = |vector: &[f32]| {
            let product = dot(query, vector);
            match self.metric {
                Metric::Dot => product,
                Metric::Cosine => match length * dot(vector, vector).sqrt() {
                    lengths if lengths > 0.0 => product / lengths,
                    _ => 0.0,
                },
            }
        };
        let order =
            |a: &(usize, f64), b: &(usize, f64)| -> Ordering { b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)) };
        let mut scores: Vec<(usize, f64)> =
            self.vectors.chunks_exact(self.identity.width).map(score).enumerate().collect();
        if k < scores.len() {
            scores.select_nth_unstable_by(k, order);
            scores.truncate(k);
        }
        scores.sort_unstable_by(order);
        let hit = |(place, score): (usize, f64)| {
            let entry = self.entries.get(place)?;
            Some(Hit { id: &entry.id, score: score as f32, metadata: entry.metadata.as_ref() })
        };
        Ok(scores.into_iter().filter_map(hit).collect())
    }

    fn check(&self, vector: &[f32]) -> Result<()> {
        let fail = |message: String| Err(Error::new(ErrorKind::Option, message));
        let width = self.identity.width;
        if vector.len() != width {
            return fail(format!("expected one vector of {width} numbers, found {} numbers", vector.len()));
        }
        match vector.iter().find(|value| !value.is_finite()) {
            Some(found) => fail(format!("expected finite numbers, found {found}")),
            None => Ok(()),
        }
    }

    /// The index as a safetensors file: `vectors` `[vectors, width]`, f32 or f16 as the embedder made them; `entries`,
    /// JSON with ids and metadata; in the file's metadata what the vectors can be compared with.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] if there is no room for it in a file.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let write = || -> std::result::Result<Vec<u8>, Box<dyn std::error::Error + Send + Sync>> {
            let entries = serde_json::to_vec(&self.entries)?;
            let (dtype, data) = match self.precision {
                Precision::F32 => (Dtype::F32, self.vectors.iter().flat_map(|v| v.to_le_bytes()).collect()),
                Precision::F16 => {
                    let halves = self.vectors.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes());
                    (Dtype::F16, halves.collect::<Vec<u8>>())
                }
            };
            let tensors = [
                ("vectors", TensorView::new(dtype, vec![self.entries.len(), self.identity.width], &data)?),
                ("entries", TensorView::new(Dtype::U8, vec![entries.len()], &entries)?),
            ];
            let metadata = [
                ("format", FORMAT.to_owned()),
                ("metric", self.metric.to_string()),
                ("identity", serde_json::to_string(&self.identity)?),
            ];
            let metadata = metadata.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            Ok(safetensors::serialize(tensors, Some(metadata))?)
        };
        write().map_err(|e| Error::because(ErrorKind::Option, "the index cannot be written", e))
    }

    /// Reads what [`Index::to_bytes`] gave, awaited, with an embedder like the one that made it.
    ///
    /// # Errors
    /// [`ErrorKind::Checkpoint`] if it is damaged, or was built by another model, at another layer or with another
    /// pooling; [`ErrorKind::Backend`].
    pub async fn from_bytes_async(embedder: &Embedder, bytes: &[u8]) -> Result<Self> {
        let damaged = |what: &dyn fmt::Display| {
            Error::new(ErrorKind::Checkpoint, format_args!("not a usable index: {what}"))
        };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| damaged(&e))?;
        let file = SafeTensors::deserialize(bytes).map_err(|e| damaged(&e))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let text = |name: &str| metadata.get(name).map(String::as_str).unwrap_or_default();
        if text("format") != FORMAT {
            return Err(damaged(&format_args!("expected format {FORMAT}, found {:?}", text("format"))));
        }
        let identity: Identity =
            serde_json::from_str(text("identity")).map_err(|e| damaged(&format_args!("identity: {e}")))?;
        let metric: Metric = serde_json::from_value(Value::from(text("metric")))
            .map_err(|e| damaged(&format_args!("metric: {e}")))?;
        let ours = embedder.identity_async().await?;
        identity.check(&ours).map_err(|e| e.at("the index was built by another embedder"))?;

        let tensor = |name: &str| file.tensor(name).map_err(|e| damaged(&format_args!("{name}: {e}")));
        let entries: Vec<Entry> = serde_json::from_slice(tensor("entries")?.data())
            .map_err(|e| damaged(&format_args!("entries: {e}")))?;
        let vectors = tensor("vectors")?;
        if vectors.shape() != [entries.len(), identity.width] {
            let expected = [entries.len(), identity.width];
            return Err(damaged(&format_args!(
                "vectors: expected {expected:?}, found {:?}",
                vectors.shape()
            )));
        }
        let data = vectors.data();
        let (precision, vectors): (_, Vec<f32>) = match vectors.dtype() {
            Dtype::F32 => {
                (Precision::F32, data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
            }
            Dtype::F16 => (
                Precision::F16,
                data.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
            ),
            other => return Err(damaged(&format_args!("vectors: expected F32 or F16, found {other:?}"))),
        };
        if let Some(found) = vectors.iter().find(|value| !value.is_finite()) {
            return Err(damaged(&format_args!("vectors: expected finite numbers, found {found}")));
        }
        let mut index = Self::empty(identity, metric, precision);
        for (place, entry) in entries.iter().enumerate() {
            if index.places.insert(entry.id.clone(), place).is_some() {
                return Err(damaged(&format_args!("entries: id {:?} is there twice", entry.id)));
            }
        }
        (index.vectors, index.entries) = (vectors, entries);
        Ok(index)
    }
}

#[cfg(not(target_arch = "wasm32"))]
impl Index {
    /// An empty index for what this embedder makes. It runs a few tokens, to know the model again.
    ///
    /// # Errors
    /// [`ErrorKind::Backend`].
    pub fn new(embedder: &Embedder, metric: Metric) -> Result<Self> {
        opt_backend::block_on(Self::new_async(embedder, metric))
    }

    /// [`Index::from_bytes_async`], waiting for it.
    ///
    /// # Errors
    /// Those of [`Index::from_bytes_async`].
    pub fn from_bytes(embedder: &Embedder, bytes: &[u8]) -> Result<Self> {
        opt_backend::block_on(Self::from_bytes_async(embedder, bytes))
    }

    /// Writes it to a file; an existing one is replaced once the new one is whole.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<std::path::Path>) -> Result<()> {
        use std::io::Write;
        let mut file = super::export::Whole::create(path.as_ref())?;
        let bytes = self.to_bytes()?;
        file.write_all(&bytes).map_err(|e| file.failed(e))?;
        file.keep()
    }

    /// Reads a file that [`Index::save`] wrote, with an embedder like the one that made it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] and [`ErrorKind::Io`] if it cannot be read; those of [`Index::from_bytes_async`]. All name
    /// the file.
    pub fn open(embedder: &Embedder, path: impl AsRef<std::path::Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|e| {
            let kind = match e.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Io,
            };
            Error::because(kind, format_args!("{}: cannot read the index", path.display()), e)
        })?;
        Self::from_bytes(embedder, &bytes).map_err(|e| e.at(path.display()))
    }
}
