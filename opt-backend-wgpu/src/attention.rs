//! Appending to caches, and attention over them.
//!
//! A batch whose sequences all bring one row to an f32 cache (decoding) takes one dispatch: each workgroup writes its
//! own head's new key and value and attends. All else takes two, an append and then attention over what the caches
//! hold. Without caches the rows go through one that lives as long as the call.

use crate::{
    cache::{Cache, Pages, Room, Shape, Slabs, Store, check_fits},
    fault::lock,
    gpu::Gpu,
    kernels::{ATTEND_THREADS, PAGE, Variant, queries_most},
    pool::Buffer,
    recorder::Recorder,
    tensor::{Tensor, ranges},
};
use opt_backend::{Attend, Error, Result, Span, check};
use std::{collections::BTreeMap, ops::Range, sync::Arc};

/// Words of a job of `attend.wgsl`, without and with NEW.
const JOB: usize = 4;
const JOB_NEW: usize = 6;
/// Words of an item of `append.wgsl`.
const ITEM: usize = 4;

fn lost(op: &'static str) -> Error {
    Error::shape(op, "expected rows of at least one element")
}

/// The rows of one sequence and its pages.
struct Sequence {
    span: Span,
    /// Positions before them.
    past: usize,
    slab: usize,
    pages: Vec<u32>,
    copy: Option<(u32, u32)>,
}

/// Keys, values and what belongs to them.
struct New<'a> {
    op: &'static str,
    keys: &'a Tensor,
    values: &'a Tensor,
    shape: Shape,
}

/// Whatever sits in the same part of the tensors and the same slab goes into one dispatch.
type Groups = BTreeMap<(usize, usize), Vec<u32>>;

impl Gpu {
    /// Appends rows to one layer of a cache.
    pub(crate) fn append(
        &self,
        cache: &mut Cache,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        rows: Range<usize>,
    ) -> Result<()> {
        let op = "cache_append";
        check_fits(op, cache, layer, keys.width())?;
        check::same_shape(op, values.shape(), keys.shape())?;
        check::range(op, &rows, keys.rows())?;
        let span = Span { start: rows.start, len: rows.len() };
        let new = New { op, keys, values, shape: cache.store.shape };
        let store = Arc::clone(&cache.store);
        let mut caches = [cache];
        self.with_room(&store, &new, layer, &[span], &mut caches, |recorder, slabs, sequences| {
            self.record_append(recorder, slabs, &new, sequences)
        })
    }

    /// Attention of `q` over caches that `keys` and `values` are appended to first.
    pub(crate) fn attend(
        self: &Arc<Self>,
        [q, keys, values]: [&Tensor; 3],
        attend: Attend<'_>,
        caches: &mut [&mut Cache],
    ) -> Result<Tensor> {
        let op = "attend";
        check::spans(op, attend, q.shape())?;
        check::same_shape(op, keys.shape(), q.shape())?;
        check::same_shape(op, values.shape(), q.shape())?;
        check::caches(attend, caches.len())?;
        for cache in caches.iter() {
            check_fits(op, cache, attend.layer, q.width())?;
            check::heads(op, attend, cache.store.shape.heads)?;
        }
        // Caches of one shape and dtype share their slabs; almost always all do.
        let mut batches: Vec<(Arc<Store>, Vec<Span>, Vec<&mut Cache>)> = Vec::with_capacity(1);
        for (cache, span) in caches.iter_mut().zip(attend.spans) {
            match batches.iter_mut().find(|(store, ..)| Arc::ptr_eq(store, &cache.store)) {
                Some((_, spans, caches)) => {
                    spans.push(*span);
                    caches.push(cache);
                }
                None => batches.push((Arc::clone(&cache.store), vec![*span], vec![cache])),
            }
        }
        let out = Tensor::new(self, op, q.shape())?;
        for (store, spans, mut caches) in batches {
            let shape = store.shape;
            let new = New { op, keys, values, shape };
            let decode =
                shape.dtype == opt_backend::CacheDType::F32 && spans.iter().all(|span| span.len <= 1);
            self.with_room(&store, &new, attend.layer, &spans, &mut caches, |recorder, slabs, sequences| {
                if decode {
                    self.record_decode(recorder, slabs, &new, sequences, q, &out)
                } else {
                    self.record_append(recorder, slabs, &new, sequences)?;
                    self.record_attend(recorder, slabs, &new, sequences, q, &out)
                }
            })?;
        }
        Ok(out)
    }

    /// Gives all sequences room, has `record` record what fills it, and only then makes them longer.
    fn with_room(
        &self,
        store: &Store,
        new: &New<'_>,
        layer: usize,
        spans: &[Span],
        caches: &mut [&mut Cache],
        record: impl FnOnce(&mut Recorder, &Slabs, &[Sequence]) -> Result<()>,
    ) -> Result<()> {
        let op = new.op;
        let Some(slabs) = store.layers.get(layer) else { return check::layer(op, layer, store.layers.len()) };
        let mut slabs = lock(slabs);
        let rows: usize = spans.iter().map(|span| span.len).sum();
        let pages: usize =
            caches.iter().flat_map(|cache| cache.layers.get(layer)).map(|l| l.len / PAGE + 2).sum();
        let parts = ranges(&[new.keys]).len();
        let words =
            ITEM * (rows + PAGE * spans.len()) + (JOB_NEW + 1) * (rows + spans.len()) + 2 * pages + rows;
        let mut recorder = self.record(op, words * parts.max(1), 2 * parts.max(1) * (spans.len() + 1))?;

        let mut layers: Vec<(&mut Pages, usize)> = caches
            .iter_mut()
            .zip(spans)
            .filter_map(|(cache, span)| cache.layers.get_mut(layer).map(|pages| (pages, span.len)))
            .collect();
        let rooms = store.make_room(op, &mut slabs, &mut recorder, &mut layers)?;
        let sequences: Vec<Sequence> = spans
            .iter()
            .zip(&layers)
            .zip(&rooms)
            .map(|((&span, (pages, _)), room)| {
                let Room { slab, copy, .. } = *room;
                Sequence { span, past: pages.len, slab, pages: pages.pages.clone(), copy }
            })
            .collect();
        let recorded = record(&mut recorder, &slabs, &sequences);
        drop(recorder);
        if let Err(error) = recorded {
            store.undo(&mut slabs, &mut layers, rooms);
            return Err(error);
        }
        for (pages, new) in &mut layers {
            pages.len += *new;
        }
        store.settle(&mut slabs, rooms);
        Ok(())
    }

    fn record_append(
        &self,
        recorder: &mut Recorder,
        slabs: &Slabs,
        new: &New<'_>,
        sequences: &[Sequence],
    ) -> Result<()> {
        let parts = ranges(&[new.keys, new.values]);
        let mut groups = Groups::new();
        for sequence in sequences.iter().filter(|sequence| sequence.span.len > 0) {
            for (row, position) in sequence.span.rows().zip(sequence.past..) {
                let part = part_of(&parts, row);
                let items = groups.entry((part, sequence.slab)).or_default();
                let (page, slot) = (sequence.pages.get(position / PAGE).copied(), position % PAGE);
                let page = page.ok_or_else(|| lost(new.op))?;
                if let (Some((from, to)), true) = (sequence.copy, row == sequence.span.start) {
                    items.extend((0..slot as u32).flat_map(|slot| [from, to, slot, 1]));
                }
                items.extend([(row - parts[part].start) as u32, page, slot as u32, 0]);
            }
        }
        let shape = new.shape;
        let variant = Variant::Append { dtype: shape.dtype, quads: shape.quads() as u32 };
        for ((part, slab), items) in groups {
            let slab = slab_buffer(new.op, slabs, slab)?;
            let (Some(keys), Some(values)) = (new.keys.slice(&parts[part]), new.values.slice(&parts[part]))
            else {
                return Err(lost(new.op));
            };
            let count = items.len() / ITEM;
            let uniforms = [
                shape.heads as u32,
                shape.head_dim as u32,
                4 * new.keys.quads() as u32,
                recorder.data(&items),
                count as u32,
            ];
            let buffers = [None, Some(slab.whole()), Some(keys), Some(values)];
            recorder.dispatch(
                self,
                new.op,
                variant,
                &uniforms,
                &buffers,
                (2 * count * shape.heads) as u64,
            )?;
        }
        Ok(())
    }

    fn record_attend(
        &self,
        recorder: &mut Recorder,
        slabs: &Slabs,
        new: &New<'_>,
        sequences: &[Sequence],
        q: &Tensor,
        out: &Tensor,
    ) -> Result<()> {
        let shape = new.shape;
        let threads = self.attend_threads(shape, sequences);
        let limit = self.limits.max_compute_workgroup_storage_size as usize;
        let most = queries_most(shape.quads(), threads as usize, limit) as usize;
        let longest = sequences.iter().map(|sequence| sequence.span.len).max().unwrap_or(0);
        let queries = most.min(longest.next_power_of_two()).max(1);
        let parts = ranges(&[q, out]);
        let mut groups = Groups::new();
        for sequence in sequences.iter().filter(|sequence| sequence.span.len > 0) {
            let table_at = recorder.data(&sequence.pages);
            let mut row = sequence.span.start;
            let end = row + sequence.span.len;
            while row < end {
                let part = part_of(&parts, row);
                let rows = queries.min(end - row).min(parts[part].end - row);
                let seen = sequence.past + (row - sequence.span.start) + 1;
                let job = [(row - parts[part].start) as u32, rows as u32, seen as u32, table_at];
                groups.entry((part, sequence.slab)).or_default().extend(job);
                row += rows;
            }
        }
        let variant = Variant::Attend {
            dtype: shape.dtype,
            quads: shape.quads() as u32,
            queries: queries as u32,
            threads,
            new: false,
        };
        for ((part, slab), jobs) in groups {
            let slab = slab_buffer(new.op, slabs, slab)?;
            let (Some(from), Some(to)) = (q.slice(&parts[part]), out.slice(&parts[part])) else {
                return Err(lost(new.op));
            };
            let count = jobs.len() / JOB;
            let jobs_at = recorder.data(&jobs);
            let uniforms = attend_uniforms(shape, q, count, jobs_at);
            let buffers = [None, Some(from), Some(to), Some(slab.whole())];
            recorder.dispatch(self, new.op, variant, &uniforms, &buffers, (count * shape.heads) as u64)?;
        }
        Ok(())
    }

    /// Threads of a workgroup: as many as the longest sequence keeps busy, and at least one a quad of a head. On a
    /// software adapter more threads are more work.
    fn attend_threads(&self, shape: Shape, sequences: &[Sequence]) -> u32 {
        let [few, many] = ATTEND_THREADS;
        let longest = sequences.iter().map(|sequence| sequence.past + sequence.span.len).max().unwrap_or(0);
        let enough = longest <= few as usize || self.software;
        if enough && shape.quads() <= few as usize { few } else { many }
    }

    /// Append and attention in one, for sequences of one row.
    fn record_decode(
        &self,
        recorder: &mut Recorder,
        slabs: &Slabs,
        new: &New<'_>,
        sequences: &[Sequence],
        q: &Tensor,
        out: &Tensor,
    ) -> Result<()> {
        let shape = new.shape;
        let parts = ranges(&[q, out, new.keys, new.values]);
        let mut groups = Groups::new();
        for sequence in sequences.iter().filter(|sequence| sequence.span.len > 0) {
            let row = sequence.span.start;
            let part = part_of(&parts, row);
            let tail = sequence.past / PAGE;
            let page = sequence.pages.get(tail).copied().ok_or_else(|| lost(new.op))?;
            let shared = sequence.copy.map_or(page, |(from, _)| from);
            let table_at = recorder.data(sequence.pages.get(..tail).unwrap_or_default());
            recorder.data(&[shared]);
            let job = [(row - parts[part].start) as u32, 1, sequence.past as u32 + 1, table_at, page, shared];
            groups.entry((part, sequence.slab)).or_default().extend(job);
        }
        let threads = self.attend_threads(shape, sequences);
        let quads = shape.quads() as u32;
        let variant = Variant::Attend { dtype: shape.dtype, quads, queries: 1, threads, new: true };
        for ((part, slab), jobs) in groups {
            let slab = slab_buffer(new.op, slabs, slab)?;
            let rows = &parts[part];
            let tensors = [q, out, new.keys, new.values].map(|tensor| tensor.slice(rows));
            let [Some(from), Some(to), Some(keys), Some(values)] = tensors else { return Err(lost(new.op)) };
            let count = jobs.len() / JOB_NEW;
            let jobs_at = recorder.data(&jobs);
            let uniforms = attend_uniforms(shape, q, count, jobs_at);
            let buffers = [None, Some(from), Some(to), Some(slab.whole()), Some(keys), Some(values)];
            recorder.dispatch(self, new.op, variant, &uniforms, &buffers, (count * shape.heads) as u64)?;
        }
        Ok(())
    }
}

fn attend_uniforms(shape: Shape, q: &Tensor, jobs: usize, jobs_at: u32) -> [u32; 6] {
    let scale = (shape.head_dim as f32).sqrt().recip();
    let stride = 4 * q.quads() as u32;
    [shape.heads as u32, shape.head_dim as u32, stride, jobs as u32, jobs_at, scale.to_bits()]
}

/// The range that holds a row.
fn part_of(parts: &[Range<usize>], row: usize) -> usize {
    parts.iter().position(|part| part.contains(&row)).unwrap_or(0)
}

fn slab_buffer(op: &'static str, slabs: &Slabs, slab: usize) -> Result<Arc<Buffer>> {
    slabs.buffer(slab).ok_or_else(|| lost(op))
}

/// What a layer that is not there gives.
pub(crate) fn missing<T>(op: &'static str) -> Result<T> {
    Err(lost(op))
}
