//! What does not fit one binding or one dimension of a dispatch.

mod common;

use common::model::Numbers;
use opt_backend::{
    Activation, Attend, Backend, CacheDType, CacheSpec, DType, ErrorKind, HostMatrix, HostVector, NormParams,
    Op, Reference, Span, Then,
    conformance::{Suite, Tolerance},
    ndarray::{Array2, ArrayView2, s},
    oracle,
};

fn close(found: ArrayView2<'_, f32>, expected: ArrayView2<'_, f32>, what: &str) {
    assert_eq!(found.dim(), expected.dim(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= 6e-5 * e.abs().max(1.0), "{what}: element {i}: expected {e}, found {f}");
    }
}

/// Everything whose rows fit, with bindings so small that weights, tables, activations and slabs are split.
#[test]
fn split_by_small_bindings() {
    let Some(builder) = common::builder() else { return };
    let builder = builder.max_binding(128 << 10);
    let suite = Suite::new(move || builder.clone().build().expect("the adapter was there a moment ago"));
    let ops = [
        "upload",
        "read",
        "new_linear",
        "gather",
        "add_gathered",
        "layer_norm",
        "linear",
        "qkv",
        "add",
        "take_rows",
        "logits",
        "log_probs",
        "cache",
        "kept",
        "errors",
        "model",
        "quantized",
    ];
    let overridden: Vec<Op> = Op::RUN.into_iter().filter(|op| *op != Op::AttentionWeights).collect();
    let report = suite.tolerance(Tolerance::GPU_F32).no_defaults(&overridden).quick().only(&ops).run();
    println!("128 KiB a binding: {report}");
    assert!(report.passed > 300);
}

/// The shapes of OPT-6.7b scaled down by 16 in each direction, under limits scaled down alike: fc1 is as large as
/// several bindings, the table too.
#[test]
fn linears_larger_than_a_binding() {
    let Some(builder) = common::builder() else { return };
    let b = builder.max_binding(512 << 10).build().expect("the adapter was there a moment ago");
    let mut numbers = Numbers(3);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let weight = numbers.matrix(1024, 256) * 0.1;
        let held = weight.mapv(|v| dtype.round(v));
        let linear = b.new_linear(HostMatrix::F32(weight.view()), None, dtype).expect("it is split");
        for rows in [1, 3, 40, 700] {
            // 700 rows of 1024 elements: the result does not fit a binding either.
            let x = numbers.matrix(rows, 256);
            let tensor = b.upload(x.view()).expect("upload");
            let out = b.linear(&tensor, &linear, opt_backend::Then::Nothing).expect("linear");
            let expected = oracle::linear(x.view(), held.view(), None, None);
            close(b.block_on(b.read(&out)).expect("read").view(), expected.view(), "linear");
        }
    }
}

/// OPT's own table in f32, 147 MiB, under the 128 MiB that any device allows.
#[test]
fn the_real_table_at_default_limits() {
    let Some(builder) = common::builder() else { return };
    let b = builder.default_limits().build().expect("the adapter was there a moment ago");
    let (entries, width) = (50272, 768);
    let rows =
        Array2::from_shape_fn((entries, width), |(i, j)| ((i * 31 + j * 17) % 1009) as f32 / 1009.0 - 0.5);
    let table = b.new_table(HostMatrix::F32(rows.view()), DType::F32).expect("it is split");
    let ids = [0, 43_689, 43_690, 43_691, 43_692, 50_271];
    let found = b.block_on(b.read(&b.gather(&table, &ids).expect("gather"))).expect("read");
    for (id, found) in ids.iter().zip(found.outer_iter()) {
        assert_eq!(found, rows.row(*id as usize), "entry {id}");
    }
    let x = rows.slice(s![100..102, ..]).to_owned() * 3.0;
    let logits = b.logits(&b.upload(x.view()).expect("upload"), &table).expect("logits");
    let expected = oracle::linear(x.view(), rows.view(), None, None);
    close(b.block_on(b.read(&logits)).expect("read").view(), expected.view(), "logits");
    for k in [1, 5, 700] {
        let found = b.block_on(b.top_k(&logits, k)).expect("top_k");
        let read = b.block_on(b.read(&logits)).expect("read");
        for (found, row) in found.iter().zip(read.outer_iter()) {
            let expected = oracle::top_k(row, k);
            assert_eq!((&found.ids, &found.logits), (&expected.ids, &expected.logits), "top {k}");
        }
    }
}

/// The shapes of OPT-1.3b scaled down by 8 in each direction, under the default limits scaled down alike, by 64: the
/// table of 393 MiB in f32 is as large as four bindings, fc1 and fc2 fit one each.
#[test]
fn the_table_of_1_3b_scaled_down_with_its_limits() {
    let Some(builder) = common::builder() else { return };
    let b = builder.max_binding((128 << 20) / 64).build().expect("the adapter was there a moment ago");
    let (hidden, ffn, entries) = (2048 / 8, 8192 / 8, 50272 / 8);
    let mut numbers = Numbers(13);
    let up = |x: &Array2<f32>| b.upload(x.view()).expect("upload");
    for dtype in [DType::F32, DType::F16] {
        let held = (numbers.matrix(entries, hidden) * 0.3).mapv(|v| dtype.round(v));
        let table = b.new_table(HostMatrix::F32(held.view()), dtype).expect("it is split");
        // The entries at both sides of each seam are among them, wherever the seams are.
        let ids: Vec<u32> = (0..entries as u32).collect();
        let found = b.block_on(b.read(&b.gather(&table, &ids).expect("gather"))).expect("read");
        assert!(found == held, "{dtype}: gather");
        for rows in [1, 3, 20] {
            let what = |op: &str| format!("{dtype}, {rows} rows: {op}");
            let x = numbers.matrix(rows, hidden);
            let expected = oracle::linear(x.view(), held.view(), None, None);
            let x = up(&x);
            let logits = b.logits(&x, &table).expect("logits");
            let found = b.block_on(b.read(&logits)).expect("read");
            close(found.view(), expected.view(), &what("logits"));

            let targets: Vec<u32> = (0..rows).map(|row| (row * 331 + 6000) as u32 % entries as u32).collect();
            let scores = b.block_on(b.log_probs(&x, &table, &targets)).expect("log_probs");
            assert_eq!(scores.len(), rows);
            for ((score, row), &target) in scores.iter().zip(expected.outer_iter()).zip(&targets) {
                let expected = oracle::target_score(row, target);
                let distance = (score.log_prob - expected.log_prob).abs();
                assert!(distance <= 1e-4 * expected.log_prob.abs().max(1.0), "{}", what("log_probs"));
                assert_eq!(score.greedy, expected.greedy, "{}", what("greedy"));
            }
            for k in [1, 5, 700] {
                // Of the logits that were read, so that no two trade places by rounding.
                for (top, row) in
                    b.block_on(b.top_k(&logits, k)).expect("top_k").iter().zip(found.outer_iter())
                {
                    let expected = oracle::top_k(row, k);
                    assert_eq!(
                        (&top.ids, &top.logits),
                        (&expected.ids, &expected.logits),
                        "{}",
                        what("top_k")
                    );
                    assert!(
                        (top.log_sum_exp - expected.log_sum_exp).abs() <= 1e-4,
                        "{}",
                        what("log_sum_exp")
                    );
                }
            }
        }

        for (name, out, width, activation) in
            [("fc1", ffn, hidden, Some(Activation::Relu)), ("fc2", hidden, ffn, None)]
        {
            let weight = (numbers.matrix(out, width) * 0.1).mapv(|v| dtype.round(v));
            let bias = numbers.matrix(1, out).mapv(|v| dtype.round(v)).row(0).to_owned();
            let linear = b
                .new_linear(HostMatrix::F32(weight.view()), Some(HostVector::F32(bias.view())), dtype)
                .expect("linear");
            // 1000 rows of 1024 elements are as large as two bindings.
            for rows in [1, 3, 40, 1000] {
                let x = numbers.matrix(rows, width);
                let then = activation.map_or(Then::Nothing, Then::Activate);
                let found = b.block_on(b.read(&b.linear(&up(&x), &linear, then).expect(name))).expect("read");
                let expected = oracle::linear(x.view(), weight.view(), Some(bias.view()), activation);
                close(found.view(), expected.view(), &format!("{dtype}, {rows} rows: {name}"));
            }
        }
    }
}

/// More workgroups than a dimension has.
#[test]
fn many_rows() {
    let Some(builder) = common::builder() else { return };
    let b = builder.default_limits().build().expect("the adapter was there a moment ago");
    let mut numbers = Numbers(5);
    let x = numbers.matrix(70_000, 3);
    let tensor = b.upload(x.view()).expect("upload");
    let norm = b.new_norm(NormParams { width: 3, eps: 1e-5, weight: None, bias: None }).expect("norm");
    let found = b.block_on(b.read(&b.layer_norm(&tensor, &norm).expect("layer_norm"))).expect("read");
    close(found.view(), oracle::layer_norm(x.view(), None, None, 1e-5).view(), "layer_norm");
    let found = b.block_on(b.top_k(&tensor, 1)).expect("top_k");
    for (i, (found, row)) in found.iter().zip(x.outer_iter()).enumerate() {
        assert_eq!(found.ids, oracle::top_k(row, 1).ids, "row {i}");
    }
}

/// Sequences that outgrow a slab move to another; what they hold stays what a backend of plain arrays holds.
#[test]
fn caches_in_several_slabs() {
    let Some(builder) = common::builder() else { return };
    // 32 pages of 2 KiB a slab.
    let b = builder.max_binding(64 << 10).build().expect("the adapter was there a moment ago");
    let reference = Reference::new();
    let (heads, width) = (2, 8);
    let spec = CacheSpec { layers: 2, heads, head_dim: 4, dtype: CacheDType::F32, capacity_hint: 0 };
    let mut caches = vec![(b.new_cache(spec).expect("cache"), reference.new_cache(spec).expect("cache"))];
    let mut numbers = Numbers(11);
    for step in 0..160 {
        match numbers.below(6) {
            0 if caches.len() < 8 => {
                let (a, r) = &caches[numbers.below(caches.len())];
                let fork = (b.cache_fork(a).expect("fork"), reference.cache_fork(r).expect("fork"));
                caches.push(fork);
            }
            1 => {
                let at = numbers.below(caches.len());
                let (a, r) = &mut caches[at];
                let len = numbers.below(b.cache_len(a, 0) + 1).max(b.cache_len(a, 0) / 2);
                b.cache_truncate(a, len).expect("truncate");
                reference.cache_truncate(r, len).expect("truncate");
            }
            _ => {
                // All at once, of unequal lengths, in one layer or the other.
                let layer = numbers.below(2);
                let most = [1, 1, 40][numbers.below(3)];
                let room = |len: usize| 600usize.saturating_sub(len);
                let lengths: Vec<usize> = caches
                    .iter()
                    .map(|(a, _)| (numbers.below(most) + 1).min(room(b.cache_len(a, layer))))
                    .collect();
                let spans = Span::lay_out(lengths);
                let rows = spans.iter().map(|span| span.len).sum();
                let [q, k, v] = [(); 3].map(|()| numbers.matrix(rows, width));
                let attend = Attend { heads, layer, spans: &spans };
                let up = |x: &Array2<f32>| b.upload(x.view()).expect("upload");
                let (mut ours, mut theirs): (Vec<_>, Vec<_>) = caches.iter_mut().map(|(a, r)| (a, r)).unzip();
                let found = b.attend(up(&q), up(&k), up(&v), attend, Some(&mut ours)).expect("attend");
                let expected = reference.attend(q, k, v, attend, Some(&mut theirs)).expect("attend");
                let found = b.block_on(b.read(&found)).expect("read");
                close(found.view(), expected.view(), &format!("step {step}"));
            }
        }
    }
    let longest = caches.iter().map(|(a, _)| b.cache_len(a, 0)).max();
    let total: usize = caches.iter().map(|(a, _)| b.cache_len(a, 0).div_ceil(32)).sum();
    println!("longest {longest:?}, {total} pages in layer 0");
    for layer in 0..2 {
        for (a, r) in &caches {
            let found = b.block_on(b.cache_read(a, layer)).expect("cache_read");
            assert_eq!(found, reference.block_on(reference.cache_read(r, layer)).expect("cache_read"));
        }
    }
    // One sequence that no slab can hold is an error that says so, and the cache is as it was.
    let (cache, _) = &mut caches[0];
    let held = b.cache_len(cache, 0);
    let rows = b.upload(Array2::zeros((32 * 33, width)).view()).expect("upload");
    let error = b.cache_append(cache, 0, &rows, &rows, 0..32 * 33).expect_err("33 pages in 32");
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
    assert_eq!(b.cache_len(cache, 0), held);
}
