//! Runs the program on a few texts, and on this repository's documentation.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Whether it succeeded, what it printed, and what it said beside.
fn run(arguments: &[&str]) -> (bool, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_retrieval"));
    let ran = command.current_dir(ROOT).args(arguments).output().expect("it starts");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (ran.status.success(), text(ran.stdout), text(ran.stderr))
}

fn output(arguments: &[&str]) -> String {
    let (ok, out, err) = run(arguments);
    assert!(ok, "{arguments:?}: {err}");
    out
}

/// The one line that refuses.
fn refusal(arguments: &[&str]) -> String {
    let (ok, out, err) = run(arguments);
    assert!(!ok, "{arguments:?}: {out}");
    assert_eq!(err.lines().count(), 1, "{err}");
    err
}

const SEA: &str = "\
The ship left the harbour at dawn with a fair wind in her sails. The captain stood upon the deck and watched
the land grow small behind them.

All night the waves beat against the side, and the sailors could not sleep. At last a boat was lowered
into the sea, and four men rowed towards the island.
";
const COURT: &str = "\
The judge read the letter to the court in a low voice. The lawyer for the prisoner rose at once and said that the
paper was a forgery.

Nobody in the room believed the witness. The jury came back within the hour, and the old man was set free.
";
const GARDEN: &str = "\
She planted roses along the garden wall, and the gardener watered them every evening. In June the flowers
opened, white and red.

The apple tree by the gate bore no fruit that year. A bird had built its nest in the branches.
";

/// Three texts, one of them in a folder of its own, and what nobody asked for.
fn texts() -> TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    fs::create_dir(dir.path().join("land")).expect("a folder");
    for (name, text) in [
        ("sea.txt", SEA),
        ("land/court.md", COURT),
        ("land/garden.TXT", GARDEN),
        ("notes.html", "<p>The sea.</p>"),
    ] {
        fs::write(dir.path().join(name), text).expect("a text");
    }
    dir
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// The subfolders that indexes are in.
fn generations(index: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(index).expect("an index").map(|entry| entry.expect("an entry").path());
    entries.filter(|path| path.is_dir()).collect()
}

#[test]
fn finds_answers_groups_and_replaces() {
    let dir = texts();
    let home = tempfile::tempdir().expect("a folder");
    let index = home.path().join("deep/index");
    let (from, into) = (text(dir.path()), text(&index));
    let made = output(&["index", from, "--into", into, "--tokens", "40", "--overlap", "8"]);
    assert!(made.starts_with("6 passages of "), "{made}");

    for (question, path, words) in [
        ("The waves beat against the boat all night, and four men rowed.", "sea.txt", "four men rowed"),
        ("The lawyer said the letter was a forgery.", "land/court.md", "the paper was a forgery"),
        ("A bird built a nest in the apple tree.", "land/garden.TXT", "built its nest"),
    ] {
        for how in [&[][..], &["--exact"]] {
            let found = output(&[&["query", into, question, "-k", "2"], how].concat());
            let lines: Vec<&str> = found.lines().collect();
            assert!(lines.len() == 4 && lines[0].contains(path) && lines[1].contains(words), "{found}");
            // The place that is named is where it stands.
            let (_, place) = lines[0].rsplit_once(':').expect("a place");
            let (start, end) = place.split_once('-').expect("a range");
            let whole = fs::read_to_string(dir.path().join(path)).expect("the text");
            let part = &whole[start.parse().expect("a number")..end.parse().expect("a number")];
            assert_eq!(part.split_whitespace().collect::<Vec<_>>().join(" "), lines[1].trim());
            let scores: Vec<f32> = [lines[0], lines[2]]
                .iter()
                .map(|line| line.split(' ').nth(1).expect("a score").parse().expect("a number"))
                .collect();
            assert!(scores[0] > scores[1] && scores[0] < 1.0, "{found}");
        }
    }

    let question = "Where did the sailors row?";
    let said = output(&["answer", into, question, "-k", "3", "--new-tokens", "12"]);
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines.len() == 5 && lines[0] == question && lines[1].contains(':'), "{said}");
    assert!(!lines[4].trim().is_empty(), "{said}");
    // In a prompt that is almost full no passage is whole, and at last there is room for none.
    let said = output(&["answer", into, question, "-k", "6", "--new-tokens", "390"]);
    assert!(said.lines().filter(|line| line.starts_with("  ")).count() >= 1, "{said}");

    let grouped = output(&["clusters", into, "-k", "2", "--show", "1"]);
    let sizes = |text: &str| -> Vec<usize> {
        let sizes =
            text.lines().filter_map(|line| line.strip_prefix("cluster ")?.split(' ').nth(1)?.parse().ok());
        sizes.collect()
    };
    let found = sizes(&grouped);
    assert!(found.len() == 2 && found.iter().sum::<usize>() == 6 && found[1] > 0, "{grouped}");
    // As many groups as passages: each is a group.
    assert_eq!(sizes(&output(&["clusters", into, "-k", "6"])), [1; 6]);

    // What a reader of Parquet looks for first and last.
    let before = generations(&index);
    assert_eq!(before.len(), 1);
    let parquet = fs::read(before[0].join("passages.parquet")).expect("a Parquet file");
    assert!(parquet.starts_with(b"PAR1") && parquet.ends_with(b"PAR1"));

    // A second index that fails leaves the first one, one that does not takes its place.
    let new = dir.path().join("new.txt");
    fs::write(&new, b"not UTF-8: \xff").expect("a file");
    let refused = refusal(&["index", from, "--into", into]);
    assert!(refused.contains("new.txt") && refused.contains("UTF-8"), "{refused}");
    assert_eq!(generations(&index), before);
    fs::write(&new, "The soldiers marched over the hill to the sound of drums.").expect("a text");
    fs::remove_file(dir.path().join("sea.txt")).expect("it was there");
    output(&["index", from, "--into", into, "--tokens", "40", "--pooling", "mean"]);
    let after = generations(&index);
    assert!(after.len() == 1 && after != before, "{after:?}");
    // The index knows how its vectors were made.
    let found = output(&["query", into, "Soldiers marched to the sound of drums.", "-k", "5"]);
    assert!(found.lines().next().is_some_and(|line| line.contains("new.txt:0-57")), "{found}");
    assert!(!found.contains("sea.txt"), "{found}");
    // And is refused by name where others are asked for.
    let refused = refusal(&["query", into, "drums", "-k", "1", "--pooling", "last"]);
    assert!(
        refused.contains("another model or pooling: pooling: expected mean, found last token"),
        "{refused}"
    );
}

#[test]
fn recall_on_the_documentation() {
    let home = tempfile::tempdir().expect("a folder");
    let index = text(home.path());
    output(&["index", "docs", "--into", index, "--tokens", "48", "--overlap", "0"]);
    let measured = output(&["recall", index, "-k", "2", "--queries", "100"]);
    let rows: Vec<Vec<f64>> = measured
        .lines()
        .skip(2)
        .map(|line| line.split_whitespace().filter_map(|word| word.parse().ok()).collect())
        .collect();
    let [memory, sqlite, arroy] = &rows[..] else { panic!("{measured}") };
    assert_eq!((memory[0], sqlite[0], memory[1]), (1.0, 1.0, sqlite[1]), "{measured}");
    // By chance two of a few hundred would be right.
    assert!(arroy[0] > 0.9, "{measured}");
    assert!(memory[1] > 0.5 && arroy[1] > 0.45, "{measured}");
    assert!(rows.iter().all(|row| row[2] > 0.0), "{measured}");
}

#[test]
fn what_cannot_be_meant() {
    let (dir, home) = (texts(), tempfile::tempdir().expect("a folder"));
    let index = home.path().join("index");
    let (from, into) = (text(dir.path()), text(&index));
    let empty = tempfile::tempdir().expect("a folder");
    let nothing = text(empty.path());

    let said = refusal(&["index", nothing, "--into", into]);
    assert!(said.ends_with("expected .txt or .md files with text, found none\n"), "{said}");
    let said = refusal(&["index", "no such folder", "--into", into]);
    assert!(said.starts_with("error: no such folder: "), "{said}");
    let said = refusal(&["index", from, "--into", into, "--tokens", "512"]);
    assert!(said.ends_with("--tokens: expected at most 511, found 512\n"), "{said}");
    let said = refusal(&["index", from, "--into", into, "--overlap", "128"]);
    assert!(said.ends_with("--overlap: expected at most 127, found 128\n"), "{said}");
    assert!(!index.exists());
    // It would be a pity about what is in there.
    let said = refusal(&["index", from, "--into", from]);
    assert!(said.contains("expected an index or an empty folder, found other files"), "{said}");
    let said = refusal(&["query", nothing, "the sea"]);
    assert!(said.contains("not an index (`retrieval index` makes one)"), "{said}");

    output(&["index", from, "--into", into]);
    for command in [
        &["query", into, "the sea"][..],
        &["answer", into, "the sea"],
        &["recall", into],
        &["clusters", into],
    ] {
        let said = refusal(&[command, &["-k", "4"]].concat());
        assert!(said.ends_with("-k: expected at most 3, the number of passages, found 4\n"), "{said}");
    }
    let said = refusal(&["query", into, " ", "-k", "1"]);
    assert!(said.contains("the question: the text is empty"), "{said}");
    let said = refusal(&["query", into, "the sea", "-k", "1", "--layer", "3"]);
    assert!(said.contains("layer: expected 6, found 3"), "{said}");

    // Another model: the same files with one number changed that its states depend on.
    let other = tempfile::tempdir().expect("a folder");
    let model = Path::new(ROOT).join("models/opt-novels");
    for file in fs::read_dir(&model).expect("a model") {
        let file = file.expect("a file");
        if file.path().is_dir() {
            continue;
        }
        let mut bytes = fs::read(file.path()).expect("its content");
        if file.file_name() == "config.json" {
            let config = String::from_utf8(bytes).expect("text").replace("\"relu\"", "\"gelu\"");
            bytes = config.into_bytes();
        }
        fs::write(other.path().join(file.file_name()), bytes).expect("a copy");
    }
    let said = refusal(&["--model", text(other.path()), "query", into, "the sea", "-k", "1"]);
    assert!(said.contains("made by another model or pooling: "), "{said}");

    fs::write(index.join("current.json"), "{}").expect("it was there");
    let said = refusal(&["query", into, "the sea"]);
    assert!(said.contains("not a usable index: missing field"), "{said}");
}
