//! Embeddings beside transformers' hidden states pooled by sentence-transformers.

#[path = "../common/mod.rs"]
mod common;

mod files;
mod generated;
mod index;

use common::{
    Arrays,
    backend::{self, assert_same_array},
    fixtures, json, model, named,
    tiny::{Tiny, random_ids},
};
use ndarray::{Array2, Axis, aview2, s};
use opt_core::{
    CancelToken, ErrorKind, Opt, Progress, Prompt,
    adapter::Adapter,
    embedding::{EmbedOptions, Embedder, Embedding, Pooling, Precision},
    engine::{Forward, Hidden, Sequence, Want},
    prompt::Overflow,
};
use serde::Deserialize;
use std::ops::ControlFlow;

#[derive(Deserialize)]
struct Recorded {
    name: String,
    states: usize,
    sequences: Vec<Vec<u32>>,
}

const POOLED: [(Pooling, &str); 5] = [
    (Pooling::Mean, "mean"),
    (Pooling::WeightedMean, "weighted_mean"),
    (Pooling::LastToken, "last_token"),
    (Pooling::Max, "max"),
    (Pooling::FirstToken, "first_token"),
];

fn options() -> EmbedOptions {
    EmbedOptions::default()
}

fn embedder(opt: &Opt, options: EmbedOptions) -> Embedder {
    Embedder::new(opt, options).unwrap()
}

/// The vectors, one below the other.
fn stacked(embeddings: &[Embedding]) -> Array2<f32> {
    let rows: Vec<_> = embeddings.iter().map(|e| e.rows.view()).collect();
    ndarray::concatenate(Axis(0), &rows).unwrap()
}

#[test]
fn every_layer_and_pooling_of_every_kind_of_model() {
    let arrays = Arrays::read(fixtures().join("embeddings/models.safetensors"));
    let models: Vec<Recorded> = json(fixtures().join("embeddings/models.json"));
    assert_eq!(models.len(), 6);
    for Recorded { name, states, sequences } in models {
        let opt = model(&name).opt();
        assert_eq!(states, opt.config().num_hidden_layers + 1);
        for layer in 0..states as i32 {
            for (pooling, mode) in POOLED {
                let what = format!("{name}.{layer}.{mode}");
                let expected = arrays.matrix(&what);
                let with = options().layer(layer).pooling(pooling);
                let from_end = with.clone().layer(layer - states as i32);
                let together = embedder(&opt, with.clone()).embed_batch(sequences.clone()).unwrap();
                common::assert_close(stacked(&together).view(), expected.view(), &what);
                let embedder = embedder(&opt, from_end);
                assert_eq!((embedder.layer(), embedder.width()), (layer as usize, expected.ncols()));
                for (ids, together) in sequences.iter().zip(&together) {
                    let alone = embedder.embed(&ids[..]).unwrap();
                    assert_same_array(alone.rows.view(), together.rows.view());
                    assert_eq!((alone.tokens, alone.cut), (ids.len(), 0));
                }
            }
        }
    }
}

#[derive(Deserialize)]
struct Texts {
    texts: Vec<String>,
    max_tokens: usize,
    tokens: Vec<usize>,
}

#[test]
fn texts_as_sentence_transformers_encodes_them() {
    let arrays = Arrays::read(fixtures().join("embeddings/texts.safetensors"));
    let Texts { texts, max_tokens, tokens } = json(fixtures().join("embeddings/texts.json"));
    let opt = named("opt-novels");
    for (pooling, mode) in POOLED {
        let with = options().pooling(pooling).normalize(true).max_tokens(max_tokens);
        let found =
            embedder(&opt, with.clone().overflow(Overflow::TruncateRight)).embed_batch(&texts).unwrap();
        common::assert_close(stacked(&found).view(), arrays.matrix(mode).view(), mode);
        for (found, tokens) in found.iter().zip(&tokens) {
            assert_eq!(
                (found.tokens, found.cut),
                (*tokens.min(&max_tokens), tokens.saturating_sub(max_tokens))
            );
            let length: f32 = found.vector().iter().map(|v| v * v).sum();
            assert!((length - 1.0).abs() < 1e-5);
        }
        let error = embedder(&opt, with).embed_batch(&texts).unwrap_err();
        assert_eq!(
            error.to_string(),
            "input 5: the prompt is too long: expected at most 32 tokens, found 64"
        );
    }
}

#[test]
fn without_pooling_there_is_a_vector_for_each_token() {
    let opt = Tiny::default().opt();
    let inputs: Vec<Vec<u32>> = [5usize, 1, 17].iter().map(|len| random_ids(*len as u64, *len, 61)).collect();
    for layer in 0..3 {
        let embedder = embedder(&opt, options().layer(layer).pooling(Pooling::None));
        let found = embedder.embed_batch(inputs.clone()).unwrap();
        for (ids, found) in inputs.iter().zip(found) {
            let states = opt.hidden_states(ids).unwrap();
            assert_same_array(found.rows.view(), states[layer as usize].view());
            assert_eq!(found.vector().len(), ids.len() * 32);
        }
    }
}

/// Around and above the size of a batch, of every size; reports, and an end.
#[test]
fn many_inputs_come_back_in_order() {
    let opt = Tiny { context: 700, ..Tiny::default() }.opt();
    let lengths = [1usize, 2, 511, 512, 513, 1, 700, 3, 200, 300, 12, 13, 600, 5];
    let inputs: Vec<Prompt> =
        lengths.iter().map(|len| Prompt::Ids(random_ids(*len as u64, *len, 61))).collect();
    for (pooling, batch) in [(Pooling::Mean, 512), (Pooling::LastToken, 64), (Pooling::Max, 2000)] {
        let embedder = embedder(&opt, options().pooling(pooling).batch_tokens(batch).layer(1));
        let mut reports = Vec::new();
        let mut progress = |report: Progress<'_>| {
            reports.push((report.done, report.total));
            ControlFlow::Continue(())
        };
        let cancel = CancelToken::new();
        let found = embedder.embed_with(&inputs, &cancel, &mut progress).unwrap();
        assert_eq!(found.len(), inputs.len());
        for (input, together) in inputs.iter().zip(&found) {
            let alone = embedder.embed(input.clone()).unwrap();
            assert_same_array(alone.rows.view(), together.rows.view());
        }
        assert_eq!(reports.last(), Some(&(14, 14)));
        assert!(reports.is_sorted() && reports.len() > 1, "{reports:?}");
        let mut stop = |_: Progress<'_>| ControlFlow::Break(());
        let error = embedder.embed_with(&inputs, &cancel, &mut stop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        cancel.cancel();
        let error = embedder.embed_with(&inputs, &cancel, &mut stop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
    }
}

#[test]
fn half_precision_is_rounded_after_all_else() {
    let opt = named("opt-novels");
    let text = "The river ran through the valley.";
    let of = |with: EmbedOptions| embedder(&opt, with).embed(text).unwrap().rows;
    for normalize in [false, true] {
        let full = of(options().normalize(normalize));
        let half = of(options().normalize(normalize).precision(Precision::F16));
        assert!(half.iter().all(|v| opt_backend::half::f16::from_f32(*v).to_f32() == *v));
        for (half, full) in half.iter().zip(&full) {
            assert!((half - full).abs() <= full.abs() / 1024.0 + 1e-6, "{half} of {full}");
        }
    }
}

/// Virtual tokens are not among those that are pooled, whatever comes with an adapter.
#[test]
fn adapters_of_every_kind() {
    let load = ["plain", "prefix", "prompt"].iter().fold(backend::load(), |load, name| {
        load.adapter(Adapter::open(fixtures().join("adapters").join(name)).unwrap())
    });
    let opt = model("pre_ln").load(load);
    let ids = random_ids(3, 9, 97);
    let bare = embedder(&opt, options()).embed(&ids[..]).unwrap();
    for name in ["plain", "prefix", "prompt"] {
        let worn = opt.adapted(name).unwrap();
        let states = worn.hidden_states(&ids).unwrap();
        for (layer, state) in states.iter().enumerate().skip(1) {
            for (pooling, mode) in POOLED {
                let with = options().layer(layer as i32).pooling(pooling);
                let found = embedder(&worn, with).embed_batch([&ids[..4], &ids[..]]).unwrap();
                assert_eq!(found[1].tokens, 9);
                let expected = pooling.pool(state.view());
                common::assert_close(
                    found[1].rows.view(),
                    expected.view(),
                    &format!("{name} {layer} {mode}"),
                );
            }
        }
        let found = embedder(&worn, options()).embed(&ids[..]).unwrap();
        let off: f32 = found.vector().iter().zip(bare.vector()).map(|(a, b)| (a - b).abs()).sum();
        assert!(off > 0.1, "{name}");
    }
}

#[test]
fn quantized_weights_go_the_same_way() {
    let tiny = Tiny { hidden: 64, embed: 64, ..Tiny::default() };
    let opt = tiny.load(backend::load_exact().quantize(opt_core::quantize::QuantSpec::int8()));
    let ids = random_ids(5, 12, 61);
    let states = opt.hidden_states(&ids).unwrap();
    for (layer, state) in states.iter().enumerate() {
        let found = embedder(&opt, options().layer(layer as i32)).embed(&ids[..]).unwrap();
        let expected = Pooling::Mean.pool(state.view());
        common::assert_close(found.rows.view(), expected.view(), "int8");
    }
}

/// What is asked for is all that is computed and read.
#[test]
fn only_the_layers_that_are_needed_are_run() {
    let opt = Tiny { layers: 4, ..Tiny::default() }.opt();
    let ids = random_ids(1, 30, 61);
    let seen = |hidden, want| {
        let mut layers = Vec::new();
        let mut watch = |at: Progress<'_>| {
            layers.push((at.done, at.total));
            ControlFlow::Continue(())
        };
        let sequences = vec![Sequence { hidden, ..Sequence::new(&ids[..]).want(want) }];
        let batch = Forward { sequences, cancel: None, watch: Some(&mut watch) };
        let output = opt.engine().forward_blocking(batch).unwrap().remove(0);
        (layers.len(), output)
    };
    let all = opt.hidden_states(&ids).unwrap();
    for (layer, state) in all.iter().enumerate() {
        let (ran, output) = seen(Hidden::Layer(layer), Want::Nothing);
        assert_eq!((ran, output.hidden.len()), (layer, 1));
        assert_same_array(output.hidden[0].view(), state.view());
        // Logits need all of them.
        let (ran, output) = seen(Hidden::Layer(layer), Want::Logits { rows: 2 });
        assert_eq!(ran, 4);
        assert_same_array(output.hidden[0].view(), state.view());
        let logits = opt.logits(&ids).unwrap();
        assert_same_array(output.logits.unwrap().view(), logits.slice(s![28.., ..]));
    }
    let too_far = Sequence { hidden: Hidden::Layer(5), ..Sequence::new(&ids[..]) };
    let batch = Forward { sequences: vec![too_far], ..Forward::default() };
    let error = opt.engine().forward_blocking(batch).unwrap_err();
    assert_eq!(error.to_string(), "layer: expected at most 4, found 5");
}

/// A row a sequence where the device has memory of its own, whatever the pooling, and one readback a batch.
#[test]
fn pooled_on_the_device_a_row_a_sequence_is_read() {
    let tiny = Tiny::default();
    let opt = tiny.opt();
    let deterministic = opt.info().deterministic;
    let inputs: Vec<Vec<u32>> = (0..6).map(|i| random_ids(i, 4 + 3 * i as usize, 61)).collect();
    let rows: usize = inputs.iter().map(Vec::len).sum();
    for layer in 0..3 {
        for (pooling, mode) in POOLED {
            let embedder = embedder(&opt, options().layer(layer).pooling(pooling));
            let before = opt.engine().counts();
            embedder.embed_batch(inputs.clone()).unwrap();
            let counts = opt.engine().counts().since(&before);
            if backend::name() == "reference" || backend::name() == "cpu" {
                assert!(deterministic);
                continue;
            }
            assert_eq!(counts.reads, 1, "{mode} {layer}: {counts}");
            let whole = (4 * 32 * rows) as u64;
            assert_eq!(pooling == Pooling::Max, counts.bytes >= whole, "{mode} {layer}: {counts}");
            assert_eq!(counts.defaults.iter().sum::<u64>(), 0, "{mode} {layer}: {counts}");
        }
    }
}

/// Several layers at once, pooled and not, beside sequences that want something else.
#[test]
fn sequences_of_one_batch_ask_for_different_states() {
    let opt = Tiny::default().opt();
    let ids: Vec<Vec<u32>> = (0..6).map(|i| random_ids(i, 3 + 2 * i as usize, 61)).collect();
    let states: Vec<Vec<Array2<f32>>> = ids.iter().map(|ids| opt.hidden_states(ids).unwrap()).collect();
    let asked = [
        (Hidden::Layer(1), Pooling::Mean, 0),
        (Hidden::All, Pooling::WeightedMean, 0),
        (Hidden::Layer(0), Pooling::None, 0),
        (Hidden::Last, Pooling::FirstToken, 2),
        (Hidden::None, Pooling::Mean, 1),
        (Hidden::Last, Pooling::LastToken, 3),
    ];
    let sequences = ids.iter().zip(asked).map(|(ids, (hidden, pooling, rows))| Sequence {
        hidden,
        pooling,
        ..Sequence::new(&ids[..]).want(Want::Logits { rows })
    });
    let batch = Forward { sequences: sequences.collect(), ..Forward::default() };
    let found = opt.engine().forward_blocking(batch).unwrap();
    for (((found, states), (hidden, pooling, rows)), ids) in found.iter().zip(&states).zip(asked).zip(&ids) {
        let expected: Vec<Array2<f32>> = match hidden {
            Hidden::Layer(layer) => vec![states[layer].clone()],
            Hidden::All => states.clone(),
            Hidden::Last => vec![states[2].clone()],
            _ => Vec::new(),
        };
        assert_eq!(found.hidden.len(), expected.len());
        for (found, expected) in found.hidden.iter().zip(expected) {
            common::assert_close(found.view(), pooling.pool(expected.view()).view(), "pooled");
        }
        let logits = opt.logits(ids).unwrap();
        if let Some(found) = found.logits.as_ref().filter(|_| rows > 0) {
            assert_same_array(found.view(), logits.slice(s![ids.len() - rows.., ..]));
        }
    }
}

#[test]
fn embeddings_in_the_place_of_ids() {
    let tiny = Tiny { embed: 16, ..Tiny::default() };
    let opt = tiny.opt();
    let ids = random_ids(4, 7, 61);
    let embedder = embedder(&opt, options());
    let expected = embedder.embed(&ids[..]).unwrap();
    let found = embedder.embed(tiny.embeddings(&ids)).unwrap();
    common::assert_close(found.rows.view(), expected.rows.view(), "embeddings");
    let error = embedder.embed(Array2::<f32>::zeros((2, 5))).unwrap_err();
    assert_eq!(error.to_string(), "embeddings: expected 1 to 96 tokens of width 16, found 2 of width 5");
}

#[test]
fn what_cannot_be_embedded_is_one_line() {
    let opt = Tiny::default().opt();
    for (with, part) in [
        (options().layer(3), "layer: expected -3 to 2, found 3"),
        (options().layer(-4), "layer: expected -3 to 2, found -4"),
        (options().max_tokens(0), "max_tokens: expected at least 1, found 0"),
        (options().batch_tokens(0), "batch_tokens: expected at least 1, found 0"),
    ] {
        let error = Embedder::new(&opt, with).err().unwrap();
        assert_eq!((error.kind(), error.to_string()), (ErrorKind::Option, part.to_owned()));
    }
    let embedder = embedder(&opt, options());
    let cases: [(Prompt, ErrorKind, &str); 4] = [
        (Vec::new().into(), ErrorKind::Prompt, "at least one token"),
        (vec![1; 97].into(), ErrorKind::Prompt, "expected at most 96 tokens, found 97"),
        (vec![4, 61].into(), ErrorKind::Prompt, "below the vocabulary size 61, found 61 at 1"),
        ("a text".into(), ErrorKind::Tokenizer, "need a tokenizer"),
    ];
    for (input, kind, part) in cases {
        let error = embedder.embed_batch([Prompt::Ids(vec![1]), input.clone()]).unwrap_err();
        assert_eq!(error.kind(), kind);
        let text = error.to_string();
        assert!(text.starts_with("input 2: ") && text.contains(part) && !text.contains('\n'), "{text}");
        assert_eq!(embedder.check(&input).unwrap_err().kind(), kind);
    }
    let novels = named("opt-novels");
    let error = Embedder::new(&novels, options()).unwrap().embed("").unwrap_err();
    assert_eq!(error.to_string(), "the text is empty: expected at least one character");

    // States beyond what half precision holds, and none at all.
    let at_0 = |precision| Embedder::new(&opt, options().layer(0).precision(precision)).unwrap();
    let rows = Array2::<f32>::from_elem((2, 32), 1e6);
    at_0(Precision::F32).embed(rows.clone()).unwrap();
    let error = at_0(Precision::F16).embed(rows).unwrap_err().to_string();
    assert!(error.starts_with("f16: expected numbers of at most 65504, found "), "{error}");
    let error = at_0(Precision::F32).embed(Array2::from_elem((2, 32), f32::NAN)).unwrap_err();
    assert_eq!(error.to_string(), "hidden states: expected finite numbers, found NaN");
}

#[test]
fn pooling_of_numbers_that_are_none() {
    let states = [[1.0f32, f32::NAN], [3.0, 2.0]];
    for (pooling, _) in POOLED.iter().filter(|(pooling, _)| *pooling != Pooling::LastToken) {
        assert!(pooling.pool(aview2(&states))[[0, 1]].is_nan(), "{pooling}");
    }
    let none = Array2::<f32>::zeros((0, 3));
    for (pooling, _) in POOLED {
        assert_eq!(pooling.pool(none.view()).dim(), (0, 3));
    }
}
