//! Data for tuning: what files come to, what each step sees, and what is said of files that cannot be used.

mod common;

use common::{fixtures, novels};
use opt_core::{
    ErrorKind,
    config::OptConfig,
    tokenizer::{Bos, Tokenizer},
    tuning::{
        Example,
        data::{Batches, DataOptions, Dataset, Documents},
    },
};
use std::{
    collections::HashSet,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(novels()).unwrap()
}

fn config() -> OptConfig {
    OptConfig::from_json(&std::fs::read_to_string(novels().join("config.json")).unwrap()).unwrap()
}

fn options() -> DataOptions {
    DataOptions::new(&config(), Some(tokenizer()))
}

/// A folder with one file in it.
fn file(name: &str, content: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    (dir, path)
}

fn all(data: &Dataset) -> Vec<Example> {
    (0..data.len()).map(|i| data.get(i).unwrap()).collect()
}

/// `n` examples that can be told apart.
fn numbered(n: u32) -> Dataset {
    let examples = (0..n).map(|i| Example::new(vec![2, i % 500, i / 500]));
    Dataset::new(examples, &DataOptions::new(&OptConfig::default(), None)).unwrap()
}

fn number(example: &Example) -> u32 {
    example.ids()[1] + 500 * example.ids()[2]
}

#[derive(serde::Deserialize)]
struct Blocks {
    text: String,
    jsonl: Vec<String>,
    cases: Vec<BlockCase>,
}

#[derive(serde::Deserialize)]
struct BlockCase {
    documents: String,
    block: usize,
    blocks: Vec<Vec<u32>>,
}

#[test]
fn blocks_are_those_of_run_clm() {
    let fixture = std::fs::read(fixtures().join("tuning/blocks.json")).unwrap();
    let fixture: Blocks = serde_json::from_slice(&fixture).unwrap();
    let (_dir, text) = file("text.txt", &fixture.text);
    let lines: Vec<String> =
        fixture.jsonl.iter().map(|text| serde_json::json!({ "text": text }).to_string()).collect();
    let (_dir, jsonl) = file("texts.jsonl", lines.join("\n"));
    assert!(fixture.cases.len() >= 9);
    for case in fixture.cases {
        let options = options().seq_len(case.block);
        let data = match case.documents.as_str() {
            "file" => Dataset::open(&text, &options),
            "lines" => Dataset::open(&text, &options.documents(Documents::Lines)),
            _ => Dataset::open(&jsonl, &options.pack(true)),
        }
        .unwrap();
        let expected: Vec<Example> = case.blocks.into_iter().map(Example::new).collect();
        assert_eq!(all(&data), expected, "{} in blocks of {}", case.documents, case.block);
        assert_eq!(data.targets() as usize, expected.len() * (case.block - 1));
    }
}

#[test]
fn less_than_a_block_is_used_where_it_is_all() {
    let (_dir, path) = file("short.txt", "The old house");
    let data = Dataset::open(&path, &options().seq_len(100)).unwrap();
    assert_eq!(all(&data), [Example::new(tokenizer().encode("The old house", Bos::Model).unwrap())]);
    // Two files, of which together there is more than a block.
    let (_other, second) = file("more.txt", "The old house stood upon the hill.");
    let ids: Vec<u32> = ["The old house", "The old house stood upon the hill."]
        .iter()
        .flat_map(|text| tokenizer().encode(text, Bos::Model).unwrap())
        .collect();
    let data = Dataset::read(&[&path, &second], &options().seq_len(8), None).unwrap();
    assert_eq!(all(&data), [Example::new(ids[..8].to_vec())]);
}

#[test]
fn paragraphs_begin_with_bos() {
    let (_dir, path) = file("text.txt", "\nOne two\nthree\n\n \nFour five\n");
    let data = Dataset::open(&path, &options().documents(Documents::Paragraphs)).unwrap().get(0).unwrap();
    let ids: Vec<u32> = ["One two\nthree", "Four five"]
        .iter()
        .flat_map(|text| tokenizer().encode(text, Bos::Model).unwrap())
        .collect();
    assert_eq!(data.ids(), ids);
}

#[test]
fn lines_of_jsonl() {
    let lines = [
        r#"{"text": "The old house", "source": "none"}"#,
        "",
        r#"{"prompt": "The old", "completion": " house"}"#,
        r#"{"prompt": "", "completion": ""}"#,
        "  ",
        r#"{"ids": [7, 2, 9]}"#,
    ]
    .join("\r\n");
    let (_dir, path) = file("data.JSONL", lines);
    let data = Dataset::open(&path, &options()).unwrap();
    let encode = |text: &str, bos| tokenizer().encode(text, bos).unwrap();
    let (prompt, completion) = (encode("The old", Bos::Model), encode(" house", Bos::Never));
    let from = prompt.len();
    let expected = [
        Example::new(encode("The old house", Bos::Model)),
        Example::completion([prompt, completion, vec![2]].concat(), from),
        Example::completion(vec![2, 2], 1),
        Example::new(vec![7, 2, 9]),
    ];
    assert_eq!(all(&data), expected);
    assert_eq!(data.targets() as usize, expected.iter().map(|e| e.targets().count()).sum::<usize>());
    // The completion's tokens and the one that ends it.
    assert_eq!(expected[1].targets().map(|(_, id)| id).last(), Some(2));
    assert_eq!(expected[1].targets().count(), expected[1].ids().len() - from);
    // Without BOS, and with another end.
    let mut without = options().bos(Bos::Never);
    without.eos = Some(17);
    let (_dir, path) = file("data.jsonl", r#"{"prompt": "The old", "completion": " house"}"#);
    let example = Dataset::open(&path, &without).unwrap().get(0).unwrap();
    assert_eq!(example.ids().last(), Some(&17));
    assert_ne!(example.ids()[0], 2);
}

#[test]
fn long_examples_are_refused_or_cut() {
    let long = r#"{"prompt": "The old", "completion": " house stood upon the hill"}"#;
    let (_dir, path) = file("data.jsonl", format!("{{\"ids\": [2, 3]}}\n{long}"));
    let error = Dataset::open(&path, &options().seq_len(5)).unwrap_err().to_string();
    assert!(
        error.contains("data.jsonl: line 2: expected at most 5 tokens (the sequence length), found"),
        "{error}"
    );
    let data = Dataset::open(&path, &options().seq_len(5).truncate(true)).unwrap();
    let example = data.get(1).unwrap();
    assert_eq!(example.ids().len(), 5);
    // Nothing to learn is left.
    let error = Dataset::open(&path, &options().seq_len(2).truncate(true)).unwrap_err().to_string();
    assert!(error.contains("line 2: expected a token to learn after the"), "{error}");
}

/// Kind and message of each file that cannot be used.
#[test]
fn files_that_cannot_be_used() {
    use ErrorKind::{Option, Prompt};
    let prompt = |name: &'static str, content: &'static [u8], expected: &'static str| {
        (name, content, Prompt, expected)
    };
    for (name, content, kind, expected) in [
        prompt("a.txt", b"", "a.txt: expected something to learn from, found nothing"),
        prompt("a.jsonl", b"\n \n", "a.jsonl: expected something to learn from, found nothing"),
        prompt("a.txt", b"one\ntwo \xff\n", "a.txt: line 2: expected UTF-8 text, found the byte 0xff"),
        prompt("a.jsonl", b"{\"ids\": [1, 2]}\n{\"text\": \"\xc3\"}", "a.jsonl: line 2: expected UTF-8 text"),
        prompt("a.jsonl", b"{\"ids\": [1, 2]}\n\nhello", "a.jsonl: line 3: expected {\"text\""),
        prompt("a.jsonl", b"{}", "a.jsonl: line 1: expected {\"text\": \"...\"}, "),
        prompt("a.jsonl", b"{\"text\": \"a\", \"ids\": [1]}", "line 1: expected"),
        prompt("a.jsonl", b"{\"prompt\": \"a\"}", "found no \"completion\" beside the other"),
        prompt("a.jsonl", b"{\"text\": 1}", "line 1: \"text\": expected a string, found a number"),
        prompt("a.jsonl", b"{\"ids\": [1, 99999]}", "line 1: expected token ids below"),
        prompt("a.jsonl", b"{\"ids\": [1]}", "line 1: expected at least 2 tokens, found 1"),
        prompt("a.jsonl", b"{\"ids\": []}", "line 1: expected at least 2 tokens, found 0"),
        prompt("a.jsonl", b"{\"text\": \"\"}", "line 1: expected at least 2 tokens, found 1"),
        ("a.csv", b"text", Option, "a.csv: expected a file named .txt or .jsonl"),
        ("a", b"text", Option, "expected a file named .txt or .jsonl"),
    ] {
        let (_dir, path) = file(name, content);
        let error = Dataset::open(&path, &options()).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        let text = error.to_string();
        assert!(
            text.contains(expected) && !text.contains('\n'),
            "{name}: expected {expected:?}, found {text:?}"
        );
    }
    // A text of one token in all.
    let (_dir, path) = file("a.txt", "a");
    let error = Dataset::open(&path, &options().bos(Bos::Never)).unwrap_err().to_string();
    assert!(error.ends_with("a.txt: expected at least 2 tokens in all, found 1"), "{error}");
    let error = Dataset::open(path.with_extension("jsonl"), &options()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let folder = path.parent().unwrap().join("b.txt");
    std::fs::create_dir(&folder).unwrap();
    assert_eq!(Dataset::open(&folder, &options()).unwrap_err().kind(), ErrorKind::Io);
    // A completion among what is packed.
    let (_dir, path) = file("a.jsonl", r#"{"prompt": "a", "completion": " b"}"#);
    let error = Dataset::open(&path, &options().pack(true)).unwrap_err().to_string();
    assert!(error.contains(r#"to be packed, found a "completion""#), "{error}");
}

#[test]
fn models_without_tokenizer_take_ids() {
    let without = DataOptions::new(&config(), None);
    let (_dir, path) = file("a.jsonl", "{\"ids\": [5, 6, 7]}\n");
    assert_eq!(all(&Dataset::open(path, &without).unwrap()), [Example::new(vec![5, 6, 7])]);
    for (name, content) in [
        ("a.txt", "text"),
        ("a.jsonl", r#"{"text": "a"}"#),
        ("a.jsonl", r#"{"prompt": "a", "completion": "b"}"#),
    ] {
        let (_dir, path) = file(name, content);
        let error = Dataset::open(path, &without).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Tokenizer);
        assert!(error.to_string().contains("this model has no tokenizer: expected a .jsonl of"), "{error}");
    }
}

#[test]
fn sequence_lengths_that_the_model_does_not_have() {
    let context = config().max_position_embeddings;
    for length in [0, 1, context + 1] {
        let error = Dataset::new([Example::new(vec![2, 3])], &options().seq_len(length)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Option);
        let expected =
            format!("sequence length: expected 2 to {context} tokens (the context), found {length}");
        assert_eq!(error.to_string(), expected);
    }
    let error = Dataset::new([Example::completion(vec![2, 3, 4], 3)], &options()).unwrap_err().to_string();
    assert!(error.starts_with("example 0: expected a token to learn after the 3 of the prompt"), "{error}");
}

#[test]
fn each_epoch_has_its_own_order_of_all() {
    let data = numbered(1003);
    let batches = Batches::new(data, 7, 3).unwrap().shuffled(5);
    // 144 batches, the last of two examples.
    assert_eq!(batches.per_epoch(), 48);
    let epoch = |batches: &Batches, epoch: u64| -> Vec<u32> {
        let steps = epoch * 48..(epoch + 1) * 48;
        let steps = steps.map(|step| batches.step(step).unwrap());
        steps
            .inspect(|step| assert_eq!(step.epoch, epoch))
            .flat_map(|step| step.micro_batches.into_iter().flatten())
            .map(|example| number(&example))
            .collect()
    };
    let orders = [0, 1, 2].map(|i| epoch(&batches, i));
    for order in &orders {
        assert_eq!(order.len(), 1003);
        assert_eq!(order.iter().collect::<HashSet<_>>().len(), 1003);
    }
    assert_ne!(orders[0], orders[1]);
    assert_ne!(orders[1], orders[2]);
    // The same for the same seed, of a dataset made anew.
    let again = Batches::new(numbered(1003), 7, 3).unwrap().shuffled(5);
    assert_eq!(epoch(&again, 1), orders[1]);
    let other = Batches::new(numbered(1003), 7, 3).unwrap().shuffled(6);
    assert_ne!(epoch(&other, 1), orders[1]);
    // In order without a seed.
    let plain = Batches::new(numbered(1003), 7, 3).unwrap();
    assert!(epoch(&plain, 1).into_iter().eq(0..1003));
}

#[test]
fn a_step_needs_none_before_it() {
    let batches = Batches::new(numbered(100), 8, 2).unwrap().shuffled(1);
    let forward: Vec<_> = (0..30).map(|step| batches.step(step).unwrap()).collect();
    for step in [29, 0, 13, 7] {
        assert_eq!(batches.step(step as u64).unwrap(), forward[step]);
    }
    // Sizes: 100 examples are 13 batches and 7 steps.
    let sizes = |step: usize| forward[step].micro_batches.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!((sizes(0), sizes(5), sizes(6), sizes(7)), (vec![8, 8], vec![8, 8], vec![4], vec![8, 8]));
    assert_eq!(forward[0].targets(), 32);
    assert!(batches.step(u64::MAX / 2).is_ok());
    let error = Batches::new(numbered(3), 0, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Option);
    // Larger than all there is.
    let one = Batches::new(numbered(3), usize::MAX, usize::MAX).unwrap();
    assert_eq!((one.per_epoch(), one.step(9).unwrap().micro_batches[0].len()), (1, 3));
}

#[test]
fn a_part_is_held_out() {
    let data = numbered(1000);
    let [train, held_out] = data.split(0.1, 3).unwrap();
    assert_eq!((train.len(), held_out.len()), (900, 100));
    assert_eq!(train.targets() + held_out.targets(), data.targets());
    let numbers = |data: &Dataset| all(data).iter().map(number).collect::<Vec<_>>();
    let both: HashSet<u32> = numbers(&train).into_iter().chain(numbers(&held_out)).collect();
    assert_eq!(both.len(), 1000);
    // Not the first hundred.
    assert!(numbers(&held_out).iter().any(|n| *n > 500));
    let [_, again] = numbered(1000).split(0.1, 3).unwrap();
    assert_eq!(numbers(&again), numbers(&held_out));
    let [_, other] = numbered(1000).split(0.1, 4).unwrap();
    assert_ne!(numbers(&other), numbers(&held_out));
    // Parts are shuffled like anything else.
    let batches = Batches::new(train, 30, 1).unwrap().shuffled(3);
    let seen = (0..30).flat_map(|step| batches.step(step).unwrap().micro_batches.remove(0));
    assert_eq!(seen.map(|e| number(&e)).collect::<HashSet<_>>().len(), 900);
    // Evaluation goes through all of it.
    let sizes: Vec<usize> = held_out.batches(30).map(|batch| batch.unwrap().len()).collect();
    assert_eq!(sizes, [30, 30, 30, 10]);
    let [train, held_out] = numbered(2).split(0.001, 0).unwrap();
    assert_eq!((train.len(), held_out.len()), (1, 1));
    assert_eq!(numbered(1).split(0.5, 0).unwrap_err().kind(), ErrorKind::Prompt);
    for fraction in [0.0, 1.0, -1.0, f64::NAN] {
        assert_eq!(data.split(fraction, 0).unwrap_err().kind(), ErrorKind::Option);
    }
    assert_eq!(data.get(1000).unwrap_err().kind(), ErrorKind::Option);
}

/// Files of some size: progress is told, reading can be ended, and the process does not hold what it read.
#[test]
fn large_files() {
    let line =
        |i: u32| format!("{{\"ids\": [2, {}, {}, 5, 6, 7, 8, 9, 10, 11, 12, 13]}}\n", i % 500, i / 500);
    let (_dir, path) = file("large.jsonl", (0..200_000).map(line).collect::<String>());
    let size = path.metadata().unwrap().len();
    let mut reports = Vec::new();
    let mut progress = |progress: opt_core::Progress<'_>| {
        reports.push((progress.done, progress.total));
        ControlFlow::Continue(())
    };
    let paths: [&Path; 2] = [&path, &path];
    let data = Dataset::read(&paths, &options(), Some(&mut progress)).unwrap();
    assert_eq!((data.len(), data.targets()), (400_000, 400_000 * 11));
    assert!(reports.len() as u64 > 2 * size / (1 << 21), "{} reports", reports.len());
    assert!(reports.iter().all(|(done, total)| done <= total && *total == 2 * size));
    assert!(reports.is_sorted() && reports.iter().any(|(done, _)| *done > size));
    let ids = |i: u64| data.get(i).unwrap().ids()[1..3].to_vec();
    assert_eq!((ids(7), ids(123_456)), (vec![7, 0], vec![456, 246]));
    assert_eq!(ids(200_000 + 123_456), ids(123_456));

    let mut seen = 0;
    let mut stop = |_: opt_core::Progress<'_>| {
        seen += 1;
        if seen > 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let error = Dataset::read(&paths, &options(), Some(&mut stop)).unwrap_err();
    assert_eq!((error.kind(), seen), (ErrorKind::Cancelled, 3));
    let cancelled = options();
    cancelled.cancel.cancel();
    assert_eq!(Dataset::open(&path, &cancelled).unwrap_err().kind(), ErrorKind::Cancelled);
}
