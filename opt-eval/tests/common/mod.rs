//! What the tests of this crate share.

// Each test binary uses its part.
#![allow(dead_code)]

use opt_core::{Load, Opt, Progress, checkpoint::Checkpoint, tokenizer::Tokenizer};
use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::OnceLock,
};

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A progress that is never in the way.
pub(crate) fn go(_: Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The folder of data sets that are not in the repository.
pub(crate) fn data() -> Option<PathBuf> {
    std::env::var_os("OPT_TEST_DATA").map(|dir| PathBuf::from(dir).join("eval")).filter(|dir| dir.is_dir())
}

/// The models of the fixtures: `opt-novels`, and a tiny one with its tokenizer.
pub(crate) fn opt(name: &str) -> &'static Opt {
    static MODELS: OnceLock<[Opt; 2]> = OnceLock::new();
    let [novels, tiny] = MODELS.get_or_init(|| {
        let novels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/opt-novels");
        let tokenizer = Tokenizer::from_dir(&novels).unwrap();
        let tiny = Checkpoint::open(fixtures().join("tiny")).unwrap();
        let load = Load::with(backend());
        let tiny = Opt::assemble(&tiny, Some(tokenizer), None, load).unwrap();
        [Opt::load(&novels, Load::with(backend())).unwrap(), tiny]
    });
    match name {
        "opt-novels" => novels,
        "tiny" => tiny,
        other => panic!("a model of the fixtures, not {other:?}"),
    }
}

/// Whether the tests run on another backend than the default one. Those in software take seconds for what others do in
/// milliseconds.
pub(crate) fn other_backend() -> bool {
    std::env::var("OPT_TEST_BACKEND").is_ok_and(|name| name != opt_core::backends::NAMES[0])
}

/// The backend that the tests run on: `OPT_TEST_BACKEND`, or the default one.
fn backend() -> opt_core::backends::Chosen {
    let name = std::env::var("OPT_TEST_BACKEND").unwrap_or_else(|_| opt_core::backends::NAMES[0].to_owned());
    opt_core::backends::choose(&name, &Default::default()).unwrap()
}

/// The plain files of the test data in folders as the hub has them, so that each split is a file of its own: `all`, and
/// `unk` with the WikiText that has `<unk>`.
pub(crate) fn laid_out() -> Option<tempfile::TempDir> {
    let data = data()?;
    let dir = tempfile::tempdir().unwrap();
    let all = dir.path().join("all");
    for (task, file) in [
        ("arc_easy", "arc_easy"),
        ("piqa", "piqa"),
        ("hellaswag", "hellaswag_val"),
        ("lambada_openai", "lambada_openai"),
    ] {
        let rows = fs::read(data.join(format!("{file}.jsonl"))).unwrap();
        for split in ["train", "validation", "test"] {
            write(&all.join(task).join(format!("{split}.jsonl")), &rows);
        }
    }
    for split in ["dev", "test"] {
        for entry in fs::read_dir(data.join("mmlu").join(split)).unwrap().flatten() {
            write(&all.join("mmlu").join(split).join(entry.file_name()), &fs::read(entry.path()).unwrap());
        }
    }
    write(&all.join("wikitext/test.raw"), &fs::read(data.join("wiki.test.raw")).unwrap());
    write(&dir.path().join("unk/wikitext/test.txt"), &fs::read(data.join("wikitext-2/test.txt")).unwrap());
    Some(dir)
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}
