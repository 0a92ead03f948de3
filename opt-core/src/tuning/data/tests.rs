//! What cannot be seen from outside: where data lies, and that pieces do not change tokens.

use super::*;

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir("../models/opt-novels").unwrap()
}

fn options() -> DataOptions {
    DataOptions::new(&OptConfig::default(), Some(tokenizer())).seq_len(16)
}

/// A text with what is hard to cut: line breaks of both kinds, runs of white space, no white space at all.
fn text() -> String {
    let mut text = String::from("\u{feff}Chapter I.\r\n\r\n");
    for i in 0..200 {
        text += &format!("It's line {i} of  \u{201c}many\u{201d} \u{1f600}lines,\n");
        if i % 3 == 0 {
            text += &format!("\n  {}\t \nand</s> on\r\n", "word".repeat(i));
        }
    }
    text
}

fn all(data: &Dataset) -> Vec<Example> {
    (0..data.len()).map(|i| data.get(i).unwrap()).collect()
}

#[test]
fn pieces_and_files_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("text.txt");
    std::fs::write(&file, text()).unwrap();
    let whole = text().trim_start_matches('\u{feff}').replace("\r\n", "\n");
    let ids = tokenizer().encode(&whole, Bos::Model).unwrap();
    let expected: Vec<Example> = ids.chunks_exact(16).map(|ids| Example::new(ids.to_vec())).collect();
    assert!(expected.len() > 100);
    for piece in [1, 17, 200, 1 << 18] {
        for in_memory in [None, Some(64)] {
            let options = DataOptions { piece, in_memory, ..options() };
            let data = Dataset::open(&file, &options).unwrap();
            assert_eq!(data.store.on_disk(), in_memory.is_some());
            assert_eq!(all(&data), expected, "pieces of {piece}");
            assert_eq!(data.targets(), expected.len() as u64 * 15);
        }
    }
}

#[test]
fn nothing_is_left_in_the_scratch_folder() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let file = dir.path().join("text.txt");
    std::fs::write(&file, text()).unwrap();
    let options = DataOptions { in_memory: Some(64), ..options() }.scratch(scratch.path());
    let data = Dataset::open(&file, &options).unwrap();
    assert!(data.store.on_disk());
    drop(data);
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0);
    // A folder that is not there is an error once a file is needed.
    let missing = scratch.path().join("missing");
    let error = Dataset::open(&file, &options.scratch(missing)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("the temporary file of token ids"), "{error}");
}

/// What is read from a file comes from the right place, whatever the order and the thread.
#[test]
fn examples_from_a_file() {
    let examples: Vec<Example> = (0..500)
        .map(|i| Example::completion((0..2 + i % 9).map(|j| i * 10 + j).collect(), 1 + i as usize % 2))
        .filter(|example| example.targets().count() > 0)
        .collect();
    let options = DataOptions { in_memory: Some(0), ..options() };
    let data = Dataset::new(examples.clone(), &options).unwrap();
    assert!(data.store.on_disk());
    assert_eq!(data.targets() as usize, examples.iter().map(|e| e.targets().count()).sum::<usize>());
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (data, examples) = (&data, &examples);
            scope.spawn(move || {
                let order = Permutation::new(data.len(), seed, 0);
                for place in 0..data.len() {
                    let number = order.at(place);
                    assert_eq!(data.get(number).unwrap(), examples[number as usize]);
                }
            });
        }
    });
}
