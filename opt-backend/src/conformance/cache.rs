//! Caches against a model that is nothing but arrays.

use super::{Outcome, Run, Verdict, compare::same_bits, data::Data, ensure};
use crate::{Attend, Backend, CacheDType, CacheLayer, CacheSpec, ErrorKind, Span, oracle};
use ndarray::{Array2, Axis, concatenate, s};

/// Lengths around the block sizes that backends choose.
const LENGTHS: [usize; 8] = [1, 63, 64, 65, 127, 128, 129, 500];

pub(super) fn run<B: Backend>(run: &mut Run<'_, B>) {
    run.case("cache", "empty", |b, _| {
        let mut pair = Pair::new(b, spec(CacheDType::F32))?;
        pair.truncate(b, 0)?;
        let mut fork = pair.fork(b)?;
        fork.truncate(b, 7)?;
        pair.check(b)?;
        fork.check(b)
    });
    run.case("cache", "no rows, and rows out of the middle", |b, data| {
        let mut pair = Pair::new(b, spec(CacheDType::F32))?;
        for range in [0..0, 9..9, 4..7, 0..1, 8..9, 0..9] {
            pair.append(b, data, 9, range, Some(1))?;
        }
        pair.check(b)?;
        pair.seed(b, data, 0, Some(0))?;
        pair.check(b)
    });
    for length in LENGTHS {
        run.case("cache", format_args!("fork at {length}"), |b, data| fork_at(b, data, length));
        run.case("cache", format_args!("truncate around {length}"), |b, data| truncate_at(b, data, length));
        run.case("cache", format_args!("seeded with {length}, then appended to"), |b, data| {
            let mut pair = Pair::new(b, spec(CacheDType::F32))?;
            pair.seed(b, data, length, None)?;
            pair.append(b, data, 3, 1..3, None)?;
            pair.seed(b, data, 2, None)?;
            pair.check(b)
        });
    }
    run.case("cache", "a read is of the cache as it was", |b, data| {
        let mut pair = Pair::new(b, spec(CacheDType::F32))?;
        pair.append(b, data, 66, 0..66, None)?;
        let pending = b.cache_read(&pair.cache, 1);
        let before = pair.model[1].clone();
        pair.truncate(b, 3)?;
        pair.append(b, data, 70, 0..70, None)?;
        ensure(b.block_on(pending)? == before, "what came back is not what was held when it was asked for")?;
        pair.check(b)
    });
    for seed in 0..6 {
        run.case("cache", format_args!("random sequence of operations {seed}"), random);
    }
    for dtype in [CacheDType::F16, CacheDType::Int8] {
        run.case("cache", format_args!("held as {dtype:?}"), |b, data| rounded(b, data, dtype));
    }
}

fn spec(dtype: CacheDType) -> CacheSpec {
    CacheSpec { layers: 3, heads: 2, head_dim: 5, dtype, capacity_hint: 32 }
}

/// A new cache; a format that the backend does not have is no failure.
pub(super) fn new_cache<B: Backend>(b: &B, spec: CacheSpec) -> Outcome<B::Cache> {
    b.new_cache(spec).map_err(|error| match error.kind() {
        ErrorKind::Unsupported if spec.dtype != CacheDType::F32 => Verdict::NotSupported(error.to_string()),
        _ => error.into(),
    })
}

/// A cache and what it should hold.
struct Pair<B: Backend> {
    cache: B::Cache,
    model: Vec<CacheLayer>,
    spec: CacheSpec,
}

impl<B: Backend> Pair<B> {
    fn new(b: &B, spec: CacheSpec) -> Outcome<Self> {
        let empty = || Array2::zeros((0, spec.heads * spec.head_dim));
        let model = (0..spec.layers).map(|_| CacheLayer { keys: empty(), values: empty() }).collect();
        Ok(Self { cache: new_cache(b, spec)?, model, spec })
    }

    fn width(&self) -> usize {
        self.spec.heads * self.spec.head_dim
    }

    fn layers(&self, layer: Option<usize>) -> std::ops::Range<usize> {
        layer.map_or(0..self.spec.layers, |layer| layer..layer + 1)
    }

    /// Appends rows `range` of `rows` new ones to one layer or all.
    fn append(
        &mut self,
        b: &B,
        data: &mut Data,
        rows: usize,
        range: std::ops::Range<usize>,
        layer: Option<usize>,
    ) -> Outcome {
        for layer in self.layers(layer) {
            let [keys, values] = [(); 2].map(|()| data.matrix(rows, self.width()));
            let uploaded = (b.upload(keys.view())?, b.upload(values.view())?);
            b.cache_append(&mut self.cache, layer, &uploaded.0, &uploaded.1, range.clone())?;
            self.extend(layer, &keys.slice(s![range.clone(), ..]), &values.slice(s![range.clone(), ..]));
        }
        Ok(())
    }

    fn seed(&mut self, b: &B, data: &mut Data, rows: usize, layer: Option<usize>) -> Outcome {
        for layer in self.layers(layer) {
            let [keys, values] = [(); 2].map(|()| data.matrix(self.width(), rows));
            // A transposed view: seeds come from anywhere.
            b.cache_seed(&mut self.cache, layer, keys.t(), values.t())?;
            self.extend(layer, &keys.t(), &values.t());
        }
        Ok(())
    }

    fn extend(
        &mut self,
        layer: usize,
        keys: &ndarray::ArrayView2<'_, f32>,
        values: &ndarray::ArrayView2<'_, f32>,
    ) {
        let held = &mut self.model[layer];
        for (held, new) in [(&mut held.keys, keys), (&mut held.values, values)] {
            *held = concatenate(Axis(0), &[held.view(), new.view()]).unwrap_or_default();
        }
    }

    fn truncate(&mut self, b: &B, len: usize) -> Outcome {
        b.cache_truncate(&mut self.cache, len)?;
        for layer in &mut self.model {
            let len = len.min(layer.keys.nrows());
            for held in [&mut layer.keys, &mut layer.values] {
                *held = held.slice(s![..len, ..]).to_owned();
            }
        }
        Ok(())
    }

    fn fork(&self, b: &B) -> Outcome<Self> {
        Ok(Self { cache: b.cache_fork(&self.cache)?, model: self.model.clone(), spec: self.spec })
    }

    /// Fails unless cache and model hold the same, bit for bit.
    fn check(&self, b: &B) -> Outcome {
        for (i, layer) in self.model.iter().enumerate() {
            let (found, expected) = (b.cache_len(&self.cache, i), layer.keys.nrows());
            ensure(
                found == expected,
                format_args!("layer {i}: expected {expected} positions, cache_len says {found}"),
            )?;
            let found = b.block_on(b.cache_read(&self.cache, i))?;
            same_bits(&format!("keys of layer {i}"), found.keys.view(), layer.keys.view())?;
            same_bits(&format!("values of layer {i}"), found.values.view(), layer.values.view())?;
        }
        Ok(())
    }

    /// One attention step over each layer: what `attend` sees must be what `cache_read` gives.
    fn attend(&mut self, b: &B, data: &mut Data) -> Outcome {
        for layer in 0..self.spec.layers {
            let [q, k, v] = [(); 3].map(|()| data.matrix(1, self.width()));
            let spans = [Span { start: 0, len: 1 }];
            let attend = Attend { heads: self.spec.heads, layer, spans: &spans };
            let uploaded = [b.upload(q.view())?, b.upload(k.view())?, b.upload(v.view())?];
            let [uq, uk, uv] = uploaded;
            let found = super::data::read(b, &b.attend(uq, uk, uv, attend, Some(&mut [&mut self.cache]))?)?;
            self.extend(layer, &k.view(), &v.view());
            let held = &self.model[layer];
            let (expected, _) =
                oracle::attend(q.view(), held.keys.view(), held.values.view(), self.spec.heads);
            data.tolerance().compare(&format!("attend, layer {layer}"), found.view(), expected.view())?;
        }
        Ok(())
    }
}

fn fork_at<B: Backend>(b: &B, data: &mut Data, length: usize) -> Outcome {
    let mut first = Pair::new(b, spec(CacheDType::F32))?;
    first.append(b, data, length, 0..length, None)?;
    let mut second = first.fork(b)?;
    second.append(b, data, 1, 0..1, None)?;
    first.check(b)?;
    first.append(b, data, 3, 0..3, None)?;
    second.check(b)?;
    // A fork of a fork, made after both sides grew; then all three grow by attention.
    let mut third = second.fork(b)?;
    for pair in [&mut third, &mut first, &mut second] {
        pair.attend(b, data)?;
    }
    let all = [&first, &second, &third];
    all.iter().try_for_each(|pair| pair.check(b))?;
    // The original goes; those forked from it stay.
    drop(second);
    third.append(b, data, 65, 0..65, None)?;
    first.truncate(b, length)?;
    first.append(b, data, 2, 0..2, None)?;
    third.check(b)?;
    first.check(b)
}

fn truncate_at<B: Backend>(b: &B, data: &mut Data, length: usize) -> Outcome {
    let mut pair = Pair::new(b, spec(CacheDType::F32))?;
    pair.append(b, data, length + 2, 0..length + 2, None)?;
    pair.truncate(b, length)?;
    pair.check(b)?;
    pair.truncate(b, length + 100)?;
    pair.append(b, data, 2, 0..2, None)?;
    pair.check(b)?;
    // Fork, shorten one side into what is shared, and let it grow anew.
    let mut fork = pair.fork(b)?;
    fork.truncate(b, length - 1)?;
    fork.append(b, data, 4, 0..4, None)?;
    pair.check(b)?;
    fork.check(b)?;
    fork.attend(b, data)?;
    pair.attend(b, data)?;
    pair.truncate(b, 0)?;
    pair.check(b)?;
    pair.append(b, data, 1, 0..1, None)?;
    fork.check(b)?;
    pair.check(b)
}

/// Up to five caches at a time; layers of different lengths.
fn random<B: Backend>(b: &B, data: &mut Data) -> Outcome {
    let mut live = vec![Pair::new(b, spec(CacheDType::F32))?];
    let mut history = String::new();
    for _ in 0..120 {
        let i = data.below(live.len());
        let layer = (data.below(4) == 0).then(|| data.below(live[i].spec.layers));
        let step = match data.below(10) {
            0..=3 => {
                let most = [3, 20, 150][data.below(3)];
                let rows = data.below(most);
                let start = data.below(rows + 1);
                live[i].append(b, data, rows, start..rows, layer)?;
                format!("append {} to {i} layer {layer:?}", rows - start)
            }
            4 => {
                let rows = data.below(70);
                live[i].seed(b, data, rows, layer)?;
                format!("seed {rows} to {i} layer {layer:?}")
            }
            5..=6 => {
                let len = data.below(live[i].model[0].keys.nrows() + 3);
                live[i].truncate(b, len)?;
                format!("truncate {i} to {len}")
            }
            7..=8 => {
                let fork = live[i].fork(b)?;
                live.push(fork);
                format!("fork {i}")
            }
            _ => {
                live[i].attend(b, data)?;
                format!("attend over {i}")
            }
        };
        history += &format!("{step}; ");
        if live.len() > 5 {
            let gone = data.below(live.len());
            live.swap_remove(gone);
            history += &format!("drop {gone}; ");
        }
        for (i, pair) in live.iter().enumerate() {
            pair.check(b).map_err(|verdict| match verdict {
                Verdict::Failed(message) => Verdict::Failed(format!("cache {i}: {message}; after {history}")),
                other => other,
            })?;
        }
    }
    Ok(())
}

/// Formats that round: what is read is near to what was appended, and stays the same from then on.
fn rounded<B: Backend>(b: &B, data: &mut Data, dtype: CacheDType) -> Outcome {
    let mut pair = Pair::new(b, spec(dtype))?;
    pair.append(b, data, 70, 0..70, None)?;
    pair.seed(b, data, 3, None)?;
    let read = |cache: &B::Cache| -> Outcome<Vec<CacheLayer>> {
        (0..pair.spec.layers).map(|i| Ok(b.block_on(b.cache_read(cache, i))?)).collect()
    };
    let held = read(&pair.cache)?;
    for (held, exact) in held.iter().zip(&pair.model) {
        for (held, exact) in [(&held.keys, &exact.keys), (&held.values, &exact.values)] {
            ensure(
                held.dim() == exact.dim(),
                format_args!("expected {:?}, found {:?}", exact.dim(), held.dim()),
            )?;
            for (held, exact) in held.outer_iter().zip(exact.outer_iter()) {
                let chunk = pair.spec.head_dim;
                let heads = held.exact_chunks(chunk).into_iter().zip(exact.exact_chunks(chunk));
                for (held, exact) in heads {
                    let largest = exact.iter().fold(0.0f32, |max, v| max.max(v.abs()));
                    let allowed = |v: f32| match dtype {
                        CacheDType::F32 => 0.0,
                        // Half a unit in the last place of 11 bits.
                        CacheDType::F16 => v.abs() / 2048.0 + 1e-7,
                        // Half a step of 127 a side, of the head's own scale (which may itself be held in f16).
                        CacheDType::Int8 => largest / 254.0 * 1.01 + 1e-7,
                    };
                    for (&h, &e) in held.iter().zip(exact) {
                        ensure(
                            (h - e).abs() <= allowed(e),
                            format_args!("appended {e}, read {h}, expected at most {} apart", allowed(e)),
                        )?;
                    }
                }
            }
        }
    }
    let mut fork = b.cache_fork(&pair.cache)?;
    b.cache_truncate(&mut fork, 65)?;
    let (again, shorter) = (read(&pair.cache)?, read(&fork)?);
    ensure(again == held, "a second read gives something else")?;
    let kept = shorter.iter().zip(&held).all(|(short, held)| {
        short.keys == held.keys.slice(s![..65, ..]) && short.values == held.values.slice(s![..65, ..])
    });
    ensure(kept, "a truncated fork does not hold what the original holds")
}
