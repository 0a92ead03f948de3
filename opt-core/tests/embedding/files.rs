//! Files that other programs read.

use super::*;
use opt_core::embedding::{
    Index, Metric,
    export::{Exporter, Format, Layout, Record, RecordId, Whole},
};
use serde_json::{Map, Value, json};
use std::{fs, path::Path, process::Command};

/// A Python that may have numpy, pyarrow and faiss.
fn python() -> std::ffi::OsString {
    std::env::var_os("OPT_TEST_PYTHON").unwrap_or_else(|| "python3".into())
}

fn write(path: &Path, layout: Layout, records: &[Record<'_>]) {
    let mut exporter = Exporter::new(Whole::create(path).unwrap(), layout).unwrap();
    records.iter().for_each(|record| exporter.write(record).unwrap());
    assert!(!path.exists(), "it is not whole yet");
    exporter.finish().unwrap().keep().unwrap();
}

#[test]
fn numpy_pyarrow_and_faiss_read_what_is_written() {
    let opt = Tiny::default().opt();
    let embedder = embedder(&opt, options().precision(Precision::F16));
    let inputs: Vec<Vec<u32>> = (0..300).map(|i| random_ids(i, 4 + i as usize % 7, 61)).collect();
    let found = embedder.embed_batch(inputs).unwrap();
    let ids: Vec<RecordId> = (0..300).map(|i| RecordId::Text(format!("nr {i}"))).collect();
    let texts: Vec<String> = (0..300).map(|i| format!("Ein Text – №{i}\n\"mit\" allem")).collect();
    let metadata: Map<String, Value> = json!({ "year": 1890, "tags": ["a"] }).as_object().unwrap().clone();
    let records: Vec<Record<'_>> = found
        .iter()
        .enumerate()
        .map(|(i, embedding)| {
            Record::new(i as u64, embedding.rows.view())
                .id((i % 3 != 0).then_some(&ids[i]))
                .text((i % 5 != 0).then_some(&texts[i][..]))
                .metadata((i % 7 == 0).then_some(&metadata))
        })
        .collect();

    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let layout = |format| Layout::of(&embedder, format, 300);
    assert_eq!(layout(Format::Npy).precision, Precision::F16);
    for (name, precision) in [("f32", Precision::F32), ("f16", Precision::F16)] {
        write(&file(&format!("{name}.npy")), layout(Format::Npy).precision(precision), &records);
        if cfg!(feature = "parquet") {
            let layout = layout(Format::Parquet).precision(precision);
            write(&file(&format!("{name}.parquet")), layout, &records);
        } else {
            let error = Exporter::new(Vec::new(), layout(Format::Parquet)).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
        }
    }
    write(&file("empty.npy"), Layout::new(Format::Npy, 32, 0), &[]);
    write(&file("lines.jsonl"), layout(Format::Jsonl), &records);

    let mut index = Index::new(&embedder, Metric::Dot).unwrap();
    for (i, embedding) in found.iter().enumerate() {
        index.insert(i.to_string(), embedding, None).unwrap();
    }
    let query = embedder.embed(&[9u32, 8, 7, 6][..]).unwrap();
    let hits = index.search(query.vector(), 10).unwrap();
    let expected = json!({
        "vectors": found.iter().map(Embedding::vector).collect::<Vec<_>>(),
        "ids": records.iter().map(|r| r.id.map_or_else(|| r.index.to_string(), RecordId::to_string)).collect::<Vec<_>>(),
        "texts": records.iter().map(|r| r.text).collect::<Vec<_>>(),
        "metadata": records.iter().map(|r| r.metadata).collect::<Vec<_>>(),
        "query": query.vector(),
        "found": hits.iter().map(|hit| hit.id.parse::<usize>().unwrap()).collect::<Vec<_>>(),
        "scores": hits.iter().map(|hit| hit.score).collect::<Vec<_>>(),
    });
    fs::write(file("expected.json"), expected.to_string()).unwrap();

    let script = fixtures().join("read_embeddings.py");
    let ran = match Command::new(python()).arg(script).arg(dir.path()).output() {
        Ok(ran) => ran,
        Err(error) => return backend::skipped(format_args!("no Python reads the exports: {error}")),
    };
    let [out, err] = [&ran.stdout, &ran.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    if ran.status.code() == Some(77) {
        return backend::skipped(format_args!("no Python reads the exports (set OPT_TEST_PYTHON): {out}"));
    }
    assert!(ran.status.success(), "{out}{err}");
    for line in out.lines().filter(|line| line.starts_with("no ")) {
        backend::skipped(format_args!("of reading the exports in Python: {line}"));
    }
}

/// What is not whole leaves nothing, and what was there before stays.
#[test]
fn a_file_that_was_begun_is_not_seen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vectors.npy");
    fs::write(&path, "before").unwrap();
    let row = Array2::<f32>::zeros((1, 4));
    let mut exporter = Exporter::new(Whole::create(&path).unwrap(), Layout::new(Format::Npy, 4, 2)).unwrap();
    exporter.write(&Record::new(0, row.view())).unwrap();
    let error = exporter.finish().err().unwrap().to_string();
    assert_eq!(error, "expected 2 records, found 1");
    assert_eq!(fs::read_to_string(&path).unwrap(), "before");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let error = Whole::create(dir.path().join("missing/vectors.npy")).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("vectors.npy: cannot be written"), "{error}");
}
