//! Decode steps of changing batches, which move caches into common storage and out again, beside the reference.

use opt_backend::{
    Attend, Backend, CacheDType, CacheSpec, Reference, Span,
    ndarray::{Array2, s},
};
use opt_backend_tch::Tch;

const HEADS: usize = 2;
const WIDTH: usize = 32;

struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % end as u64) as usize
    }

    fn matrix(&mut self, rows: usize) -> Array2<f32> {
        Array2::from_shape_simple_fn((rows, WIDTH), || self.below(2001) as f32 / 500.0 - 2.0)
    }
}

/// The same sequences on both backends.
struct Sequences {
    tch: Tch,
    reference: Reference,
    found: Vec<<Tch as Backend>::Cache>,
    expected: Vec<<Reference as Backend>::Cache>,
}

impl Sequences {
    fn new(dtype: CacheDType, count: usize) -> Self {
        let device = std::env::var("OPT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
        let tch = Tch::builder().device(device).threads(2).build().expect("the device is there");
        let reference = Reference::new();
        let spec = CacheSpec { layers: 1, heads: HEADS, head_dim: WIDTH / HEADS, dtype, capacity_hint: 0 };
        let found = (0..count).map(|_| tch.new_cache(spec).expect("a cache")).collect();
        let expected = (0..count).map(|_| reference.new_cache(spec).expect("a cache")).collect();
        Self { tch, reference, found, expected }
    }

    /// Attention of new rows of some of the sequences, in their order, on both backends.
    fn step(&mut self, random: &mut Random, members: &[usize], lengths: &[usize], what: &str) {
        let rows = lengths.iter().sum();
        let [q, k, v] = [(); 3].map(|()| random.matrix(rows));
        let spans = Span::lay_out(lengths.iter().copied());
        let attend = Attend { heads: HEADS, layer: 0, spans: &spans };
        fn run<B: Backend>(
            b: &B,
            qkv: [&Array2<f32>; 3],
            attend: Attend<'_>,
            caches: &mut [B::Cache],
            members: &[usize],
        ) -> Array2<f32> {
            let [q, k, v] = qkv.map(|x| b.upload(x.view()).expect("uploads"));
            let mut all: Vec<Option<&mut B::Cache>> = caches.iter_mut().map(Some).collect();
            let mut chosen: Vec<&mut B::Cache> =
                members.iter().map(|i| all[*i].take().expect("named once")).collect();
            b.block_on(b.read(&b.attend(q, k, v, attend, Some(&mut chosen)).expect("attends")))
                .expect("reads")
        }
        let found = run(&self.tch, [&q, &k, &v], attend, &mut self.found, members);
        let expected = run(&self.reference, [&q, &k, &v], attend, &mut self.expected, members);
        for (i, span) in spans.iter().enumerate() {
            let [f, e] = [&found, &expected].map(|m| m.slice(s![span.rows(), ..]));
            for (f, e) in f.iter().zip(e) {
                assert!(
                    (f - e).abs() <= 1e-4 * e.abs().max(1.0),
                    "{what}: span {i}: expected {e}, found {f}"
                );
            }
        }
    }

    fn check_caches(&self, what: &str) {
        for (i, (found, expected)) in self.found.iter().zip(&self.expected).enumerate() {
            let found = self.tch.block_on(self.tch.cache_read(found, 0)).expect("reads");
            let expected = self.reference.block_on(self.reference.cache_read(expected, 0)).expect("reads");
            assert_eq!(found, expected, "{what}: cache {i}");
        }
    }

    fn fork(&mut self, from: usize, to: usize) {
        self.found[to] = self.tch.cache_fork(&self.found[from]).expect("forks");
        self.expected[to] = self.reference.cache_fork(&self.expected[from]).expect("forks");
    }

    fn truncate(&mut self, which: usize, len: usize) {
        self.tch.cache_truncate(&mut self.found[which], len).expect("truncates");
        self.reference.cache_truncate(&mut self.expected[which], len).expect("truncates");
    }
}

/// Long enough to move together, to grow past the first capacity, and to part.
#[test]
fn batches_of_equal_and_unequal_lengths() {
    for lengths in [[5, 5, 5], [5, 9, 1], [60, 62, 61], [1, 100, 3]] {
        let mut random = Random(7);
        let mut all = Sequences::new(CacheDType::F32, 3);
        all.step(&mut random, &[0, 1, 2], &lengths, "prefill");
        for step in 0..90 {
            all.step(&mut random, &[0, 1, 2], &[1, 1, 1], &format!("{lengths:?}, step {step}"));
        }
        all.check_caches("together");
        // Alone, in another order, two of them, all with more than one row.
        for step in 0..12 {
            let what = format!("{lengths:?}, apart, step {step}");
            all.step(&mut random, &[1], &[1], &what);
            all.step(&mut random, &[2, 0], &[1, 1], &what);
            all.step(&mut random, &[0, 2], &[1, 1], &what);
            all.step(&mut random, &[0, 1, 2], &[2, 1, 0], &what);
        }
        all.check_caches("apart");
    }
}

#[test]
fn beams_fork_out_of_a_batch() {
    for dtype in [CacheDType::F32, CacheDType::F16, CacheDType::Int8] {
        let mut random = Random(11);
        let mut all = Sequences::new(dtype, 4);
        all.step(&mut random, &[0, 1, 2, 3], &[3, 3, 3, 3], "prefill");
        for step in 0..60 {
            let what = format!("{dtype:?}, step {step}");
            all.step(&mut random, &[0, 1, 2, 3], &[1; 4], &what);
            // Forked after the caches have moved together, every step for a while, then left alone again.
            if (10..20).contains(&step) || step % 13 == 0 {
                let (from, to) = (random.below(4), random.below(4));
                all.fork(from, to);
                all.check_caches(&what);
            }
        }
        all.check_caches("at the end");
    }
}

/// Anything in any order.
#[test]
fn random_histories() {
    for seed in 0..6 {
        let mut random = Random(100 + seed);
        let mut all = Sequences::new(CacheDType::F32, 5);
        for step in 0..150 {
            let what = format!("seed {seed}, step {step}");
            match random.below(12) {
                0 => {
                    let (from, to) = (random.below(5), random.below(5));
                    all.fork(from, to);
                }
                1 => {
                    let (which, len) = (random.below(5), random.below(40));
                    all.truncate(which, len);
                }
                2 => {
                    let (which, rows) = (random.below(5), random.below(30));
                    all.step(&mut random, &[which], &[rows], &what);
                }
                3 => {
                    // Runs of steps of one batch, so that it moves together.
                    let first = random.below(4);
                    let members: Vec<usize> = (first..5).collect();
                    for _ in 0..8 {
                        all.step(&mut random, &members, &vec![1; members.len()], &what);
                    }
                }
                _ => all.step(&mut random, &[0, 1, 2, 3, 4], &[1; 5], &what),
            }
        }
        all.check_caches(&format!("seed {seed}"));
    }
}
