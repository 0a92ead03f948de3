//! Search among vectors in memory.

use super::*;
use opt_core::{
    Load,
    embedding::{Index, Metric},
};
use serde_json::json;

fn inputs() -> Vec<Vec<u32>> {
    (0..40).map(|i| random_ids(i, 2 + i as usize % 9, 61)).collect()
}

fn filled(embedder: &Embedder, metric: Metric) -> Index {
    let mut index = Index::new(embedder, metric).unwrap();
    for (i, embedding) in embedder.embed_batch(inputs()).unwrap().iter().enumerate() {
        let metadata = (i % 2 == 0).then(|| json!({ "number": i }));
        index.insert(format!("text {i}"), embedding, metadata).unwrap();
    }
    index
}

#[test]
fn what_is_most_alike_comes_first() {
    let opt = Tiny::default().opt();
    let embedder = embedder(&opt, options());
    let vectors = stacked(&embedder.embed_batch(inputs()).unwrap()).mapv(f64::from);
    let query = embedder.embed(&random_ids(77, 6, 61)[..]).unwrap();
    let q = query.rows.row(0).mapv(f64::from);
    for metric in [Metric::Cosine, Metric::Dot] {
        let mut scores: Vec<(usize, f64)> = vectors
            .outer_iter()
            .map(|v| match metric {
                Metric::Cosine => v.dot(&q) / (v.dot(&v) * q.dot(&q)).sqrt(),
                _ => v.dot(&q),
            })
            .enumerate()
            .collect();
        scores.sort_by(|a, b| b.1.total_cmp(&a.1));
        let index = filled(&embedder, metric);
        assert_eq!((index.len(), index.metric()), (40, metric));
        for k in [0, 1, 5, 40, 1000] {
            let hits = index.search(query.vector(), k).unwrap();
            assert_eq!(hits.len(), k.min(40));
            for (hit, (i, score)) in hits.iter().zip(&scores) {
                assert_eq!(hit.id, format!("text {i}"));
                assert!((f64::from(hit.score) - score).abs() < 1e-5 * score.abs().max(1.0));
                assert_eq!(
                    hit.metadata.map(|m| m["number"].as_u64()),
                    (i % 2 == 0).then_some(Some(*i as u64))
                );
            }
        }
    }
}

#[test]
fn vectors_come_go_and_change() {
    let opt = Tiny::default().opt();
    let embedder = embedder(&opt, options());
    let mut index = filled(&embedder, Metric::Cosine);
    let [first, other] = [1u64, 90].map(|seed| embedder.embed(&random_ids(seed, 7, 61)[..]).unwrap());
    index.insert("text 3", &first, None).unwrap();
    assert_eq!((index.len(), index.vector("text 3")), (40, Some(first.vector())));
    assert!(index.remove("text 0") && !index.remove("text 0"));
    assert_eq!(
        (index.len(), index.vector("text 0"), index.vector("text 3")),
        (39, None, Some(first.vector()))
    );
    index.insert("new", &other, Some(json!([1, 2]))).unwrap();
    let hits = index.search(other.vector(), 1).unwrap();
    assert_eq!((hits[0].id, hits[0].metadata), ("new", Some(&json!([1, 2]))));
    assert_eq!(index.ids().last(), Some("new"));
    // Equal ones in the order in which they came.
    index.insert("again", &other, None).unwrap();
    let ids: Vec<&str> = index.search(other.vector(), 2).unwrap().iter().map(|hit| hit.id).collect();
    assert_eq!(ids, ["new", "again"]);

    let tokens =
        Embedder::new(&opt, options().pooling(Pooling::None)).unwrap().embed(&[1u32, 2][..]).unwrap();
    let error = index.insert("two", &tokens, None).unwrap_err().to_string();
    assert_eq!(error, "id \"two\": expected one vector of 32 numbers, found 64 numbers");
    let error = index.search(&[1.0], 3).unwrap_err().to_string();
    assert_eq!(error, "query: expected one vector of 32 numbers, found 1 numbers");
    let error = index.search(&[f32::NAN; 32], 3).unwrap_err().to_string();
    assert_eq!(error, "query: expected finite numbers, found NaN");
}

#[test]
fn an_index_is_saved_and_opened_again() {
    let opt = Tiny::default().opt();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("texts.index");
    for precision in [Precision::F32, Precision::F16] {
        let embedder = embedder(&opt, options().precision(precision).normalize(true));
        let index = filled(&embedder, Metric::Dot);
        index.save(&path).unwrap();
        let size = std::fs::metadata(&path).unwrap().len();
        let again = Index::open(&embedder, &path).unwrap();
        assert!(index.ids().eq(again.ids()));
        let query = embedder.embed(&[5u32, 6, 7][..]).unwrap();
        assert_eq!(index.search(query.vector(), 9).unwrap(), again.search(query.vector(), 9).unwrap());
        assert_eq!(index.identity(), again.identity());
        assert!(size > (40 * 32 * precision.size()) as u64, "{size}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let empty = Index::new(&embedder(&opt, options()), Metric::Cosine).unwrap();
    let bytes = empty.to_bytes().unwrap();
    assert!(Index::from_bytes(&embedder(&opt, options()), &bytes).unwrap().is_empty());
}

#[test]
fn an_index_of_another_embedder_is_refused_by_name() {
    let tiny = Tiny { embed: 16, ..Tiny::default() };
    let load = || backend::load();
    let opt = tiny.load(load());
    let bytes = filled(&embedder(&opt, options()), Metric::Cosine).to_bytes().unwrap();
    let open = |opt: &Opt, with: EmbedOptions| Index::from_bytes(&embedder(opt, with), &bytes);
    open(&opt, options().layer(2).batch_tokens(7).precision(Precision::F16)).unwrap();
    // The same weights, rounded.
    open(&tiny.load(load().dtype(opt_core::DType::F16)), options()).unwrap();

    let other = Tiny { seed: 2, ..tiny.clone() }.load(load());
    let deeper = Tiny { layers: 3, ..tiny.clone() }.load(load());
    let never = options().bos(opt_core::tokenizer::Bos::Never);
    for (opt, with, expected) in [
        (&opt, options().layer(1), "layer: expected 2, found 1"),
        (&opt, options().pooling(Pooling::Max), "pooling: expected mean, found max"),
        (&opt, options().normalize(true), "normalized: expected no, found yes"),
        (&opt, never, "BOS: expected before texts, found none"),
        (
            &other,
            options(),
            "model: expected the same weights, found those of another model of the same shape",
        ),
        (
            &deeper,
            options(),
            "model: expected 2 layers of 32 with 2 heads, vocabulary 61, found 3 layers of 32 with 2 heads, \
             vocabulary 61",
        ),
    ] {
        let error = open(opt, with).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Checkpoint);
        assert_eq!(error.to_string(), format!("the index was built by another embedder: {expected}"));
    }

    // Wearing an adapter it is another model; wearing another one too.
    let plain = |load: Load<'static>, names: &[&str]| {
        let load = names.iter().fold(load, |load, name| {
            load.adapter(Adapter::open(fixtures().join("adapters").join(name)).unwrap())
        });
        model("pre_ln").load(load)
    };
    let opt = plain(load(), &["plain", "prefix"]);
    let worn = opt.adapted("plain").unwrap();
    let bytes = Index::new(&embedder(&worn, options()), Metric::Dot).unwrap().to_bytes().unwrap();
    Index::from_bytes(&embedder(&worn, options()), &bytes).unwrap();
    for (opt, found) in [(opt.clone(), "no adapter"), (opt.adapted("prefix").unwrap(), "adapter \"prefix\"")]
    {
        let error = Index::from_bytes(&embedder(&opt, options()), &bytes).unwrap_err().to_string();
        let expected = format!("model: expected it with adapter \"plain\", found it with {found}");
        assert!(error.ends_with(&expected), "{error}");
    }
}

#[test]
fn damaged_indexes() {
    let opt = Tiny::default().opt();
    let embedder = embedder(&opt, options());
    let bytes = filled(&embedder, Metric::Cosine).to_bytes().unwrap();
    let refused = |bytes: &[u8]| {
        let error = Index::from_bytes(&embedder, bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Checkpoint, "{error}");
        assert!(!error.to_string().contains('\n'), "{error}");
        error.to_string()
    };
    for len in [0, 7, 8, 100, bytes.len() - 1] {
        refused(&bytes[..len]);
    }
    let text = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|part| part == from.as_bytes()).expect(from);
        let mut changed = bytes.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        refused(&changed)
    };
    assert!(text("opt-index-1", "opt-index-9").contains("format"));
    assert!(text("\"cosine\"", "\"cosinf\"").contains("metric"));
    assert!(text("text 1\"", "text 2\"").contains("twice"));
    assert!(text("{\"id\"", "{\"ie\"").contains("entries"));
    let mut changed = bytes.clone();
    let at = bytes.len() - 4;
    // Which of the two tensors is the last is not said; one of them must be refused for it.
    changed[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    refused(&changed);
    let error = Index::open(&embedder, "missing.index").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().starts_with("missing.index: cannot read"), "{error}");
}
