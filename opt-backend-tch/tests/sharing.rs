//! One backend used from many threads, several on one device, and forks that grow apart.

use opt_backend::{
    Attend, Backend, CacheDType, CacheSpec, DType, HostMatrix, Span, Then,
    ndarray::{Array2, ArrayView2, s},
    oracle,
};
use opt_backend_tch::Tch;
use std::{sync::Arc, thread};

const WIDTH: usize = 48;
const HEADS: usize = 3;

fn device() -> String {
    std::env::var("OPT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned())
}

fn backend(threads: usize) -> Tch {
    Tch::builder().device(device()).threads(threads).build().expect("the device is there")
}

/// Numbers around 0 that differ from seed to seed.
fn matrix(seed: usize, rows: usize, width: usize) -> Array2<f32> {
    let mut state = seed as u64 + 1;
    Array2::from_shape_simple_fn((rows, width), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

fn close(what: &str, found: ArrayView2<'_, f32>, expected: ArrayView2<'_, f32>) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    for (f, e) in found.iter().zip(&expected) {
        assert!((f - e).abs() <= 1e-4 * e.abs().max(1.0), "{what}: expected {e}, found {f}");
    }
}

fn spec(dtype: CacheDType) -> CacheSpec {
    CacheSpec { layers: 1, heads: HEADS, head_dim: WIDTH / HEADS, dtype, capacity_hint: 0 }
}

/// Queries, keys and values of one row at a time through three linears of one weight each, over a cache: what
/// `attend` gives must be what the oracle says.
struct Attention {
    weights: [Array2<f32>; 3],
    linears: [<Tch as Backend>::Linear; 3],
}

impl Attention {
    fn new(tch: &Tch) -> Self {
        let weights = [1, 2, 3].map(|seed| matrix(seed, WIDTH, WIDTH));
        let linears = weights
            .each_ref()
            .map(|w| tch.new_linear(HostMatrix::F32(w.view()), None, DType::F32).expect("a linear"));
        Self { weights, linears }
    }

    /// Feeds `x` in pieces that end at `cuts` and checks each piece.
    fn check(&self, tch: &Tch, what: &str, x: &Array2<f32>, cuts: &[usize]) {
        let [q, k, v] = self.weights.each_ref().map(|w| oracle::linear(x.view(), w.view(), None, None));
        let mut cache = tch.new_cache(spec(CacheDType::F32)).expect("a cache");
        let mut start = 0;
        for &end in cuts {
            let piece = tch.upload(x.slice(s![start..end, ..])).expect("uploads");
            let [a, b, c] = &self.linears;
            let [tq, tk, tv] = tch.qkv(&piece, a, b, c).expect("qkv");
            let spans = [Span { start: 0, len: end - start }];
            let attend = Attend { heads: HEADS, layer: 0, spans: &spans };
            let found = tch.attend(tq, tk, tv, attend, Some(&mut [&mut cache])).expect("attends");
            let found = tch.block_on(tch.read(&found)).expect("reads");
            let rows = |m: &Array2<f32>, from: usize| m.slice(s![from..end, ..]).to_owned();
            let (expected, _) =
                oracle::attend(rows(&q, start).view(), rows(&k, 0).view(), rows(&v, 0).view(), HEADS);
            close(&format!("{what}, rows {start}..{end}"), found.view(), expected.view());
            start = end;
        }
    }
}

#[test]
fn one_backend_serves_many_threads() {
    let tch = Arc::new(backend(2));
    // Shared weights, met by all threads at once: the first `qkv` also lays them side by side.
    let model = Arc::new(Attention::new(&tch));
    thread::scope(|scope| {
        for i in 0..6 {
            let (tch, model) = (Arc::clone(&tch), Arc::clone(&model));
            scope.spawn(move || {
                for round in 0..8 {
                    let x = matrix(100 * i + round, 40, WIDTH);
                    let cuts: Vec<usize> = (20..=40).collect();
                    model.check(&tch, &format!("thread {i}, round {round}"), &x, &cuts);
                }
            });
        }
    });
}

#[test]
fn several_backends_share_a_device() {
    let all: Vec<Tch> = [1, 2, 1].map(backend).into();
    thread::scope(|scope| {
        for (i, tch) in all.iter().enumerate() {
            scope.spawn(move || {
                let model = Attention::new(tch);
                for round in 0..8 {
                    let x = matrix(1000 + 100 * i + round, 30, WIDTH);
                    model.check(tch, &format!("backend {i}, round {round}"), &x, &[7, 29, 30]);
                }
            });
        }
    });
    // Each has the threads it was built with, whatever the others asked LibTorch for.
    if device() == "cpu" {
        assert_eq!(all.iter().map(|tch| tch.info().threads).collect::<Vec<_>>(), [1, 2, 1]);
        let x = all[0].upload(matrix(0, 4, 4).view()).expect("uploads");
        for (tch, expected) in all.iter().zip([1, 2, 1]) {
            let y = tch.upload(matrix(1, 4, 4).view()).expect("uploads");
            tch.add(y, &x).expect("adds");
            assert_eq!(tch::get_num_threads(), expected);
        }
    }
}

/// `qkv` of linears that are not alike, or that already belong to others, still gives each its own product.
#[test]
fn linears_joined_in_another_order() {
    let tch = backend(2);
    let model = Attention::new(&tch);
    let x = matrix(7, 5, WIDTH);
    let input = tch.upload(x.view()).expect("uploads");
    let expected = model.weights.each_ref().map(|w| oracle::linear(x.view(), w.view(), None, None));
    for order in [[0, 1, 2], [2, 1, 0], [0, 0, 0], [0, 1, 1], [0, 1, 2]] {
        let [a, b, c] = order.map(|i| &model.linears[i]);
        let found = tch.qkv(&input, a, b, c).expect("qkv");
        for (found, i) in found.iter().zip(order) {
            let found = tch.block_on(tch.read(found)).expect("reads");
            close(&format!("number {i} of {order:?}"), found.view(), expected[i].view());
        }
    }
    // Also by themselves, and when read back.
    for ((linear, weight), expected) in model.linears.iter().zip(&model.weights).zip(&expected) {
        let found = tch.linear(&input, linear, Then::Nothing).expect("linear");
        close("linear", tch.block_on(tch.read(&found)).expect("reads").view(), expected.view());
        assert_eq!(tch.block_on(tch.read_linear(linear)).expect("reads").weight, weight);
    }
}

/// Forks that grow at the same time, each on its own thread, from one storage.
#[test]
fn forks_grow_apart_on_threads() {
    for dtype in [CacheDType::F32, CacheDType::F16, CacheDType::Int8] {
        let tch = backend(1);
        let prefix = matrix(1, 70, WIDTH);
        let mut first = tch.new_cache(spec(dtype)).expect("a cache");
        tch.cache_seed(&mut first, 0, prefix.view(), prefix.view()).expect("seeds");
        let before = tch.block_on(tch.cache_read(&first, 0)).expect("reads");
        let forks: Vec<_> = (0..4).map(|_| tch.cache_fork(&first).expect("forks")).collect();
        thread::scope(|scope| {
            for (i, mut fork) in forks.into_iter().enumerate() {
                let (tch, before) = (&tch, &before);
                scope.spawn(move || {
                    // Alone in a cache, the same rows are held as the same numbers.
                    let mut alone = tch.new_cache(spec(dtype)).expect("a cache");
                    for step in 0..100 {
                        let row = matrix(1000 * i + step, 1, WIDTH);
                        for cache in [&mut fork, &mut alone] {
                            tch.cache_seed(cache, 0, row.view(), row.view()).expect("seeds");
                        }
                    }
                    let found = tch.block_on(tch.cache_read(&fork, 0)).expect("reads").keys;
                    let grown = tch.block_on(tch.cache_read(&alone, 0)).expect("reads").keys;
                    assert_eq!(found.slice(s![..70, ..]), before.keys, "{dtype:?}: the prefix of fork {i}");
                    assert_eq!(found.slice(s![70.., ..]), grown, "{dtype:?}: what fork {i} appended");
                });
            }
        });
        assert_eq!(
            tch.block_on(tch.cache_read(&first, 0)).expect("reads"),
            before,
            "{dtype:?}: the original"
        );
    }
}

/// Int8 and f16 hold what [`opt_backend::Reference`] holds, ties included.
#[test]
fn rounded_caches_hold_what_the_reference_holds() {
    let (tch, reference) = (backend(1), opt_backend::Reference::new());
    let mut rows = matrix(5, 33, WIDTH);
    rows.row_mut(3).fill(0.0);
    rows.row_mut(4).iter_mut().enumerate().for_each(|(i, v)| *v = i as f32 - 20.0);
    // Steps of 1: halves are ties.
    rows.row_mut(5)
        .iter_mut()
        .enumerate()
        .for_each(|(i, v)| *v = if i % 16 == 0 { 127.0 } else { i as f32 - 20.5 });
    for dtype in [CacheDType::F32, CacheDType::F16, CacheDType::Int8] {
        let mut found = tch.new_cache(spec(dtype)).expect("a cache");
        let mut expected = reference.new_cache(spec(dtype)).expect("a cache");
        tch.cache_seed(&mut found, 0, rows.view(), rows.view()).expect("seeds");
        reference.cache_seed(&mut expected, 0, rows.view(), rows.view()).expect("seeds");
        let found = tch.block_on(tch.cache_read(&found, 0)).expect("reads");
        let expected = reference.block_on(reference.cache_read(&expected, 0)).expect("reads");
        assert_eq!(found, expected, "{dtype:?}");
    }
}
