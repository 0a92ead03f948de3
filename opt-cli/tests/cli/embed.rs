//! `opt embed` beside what transformers and sentence-transformers found, and what becomes of runs that end early.

use super::{score::arrays, *};
use serde_json::json;
use std::{
    fs,
    process::Child,
    time::{Duration, Instant},
};

const POOLED: [(&str, &str); 5] = [
    ("mean", "mean"),
    ("weighted-mean", "weighted_mean"),
    ("last", "last_token"),
    ("max", "max"),
    ("first", "first_token"),
];

/// `opt embed` of a file, on a model.
fn embed(model: &Path, input: &Path, more: &[&str]) -> Command {
    let mut command = opt();
    command.args(["embed", "--input"]).arg(input).arg("--model").arg(model).args(more);
    command
}

/// `opt embed` of lines on stdin.
fn embed_lines(model: &Path, lines: &[Value], more: &[&str]) -> Ran {
    let input: String = lines.iter().map(|line| format!("{line}\n")).collect();
    run_with_stdin(&mut embed(model, Path::new("-"), more), input.as_bytes())
}

/// Shape and numbers of a .npy file in f32.
fn npy(path: &Path) -> (String, Vec<f64>) {
    let bytes = fs::read(path).expect("an array");
    let start = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = String::from_utf8(bytes[10..start].to_vec()).expect("a header");
    let numbers = bytes[start..].chunks_exact(4);
    (header, numbers.map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes")).into()).collect())
}

#[test]
fn recorded_vectors() {
    let arrays = arrays(&fixture("embeddings/models.safetensors"));
    let dir = tempfile::tempdir().expect("a directory");
    let output = dir.path().join("vectors.npy");
    let path = output.to_str().expect("a name");
    for model in fixture_json("embeddings/models.json").as_array().expect("models") {
        let name = model["name"].as_str().expect("a name");
        let sequences = model["sequences"].as_array().expect("sequences");
        let lines: Vec<Value> = sequences.iter().map(|ids| json!({ "ids": ids })).collect();
        for (pooling, mode) in POOLED {
            for layer in [0, -2, -1i64] {
                let states = model["states"].as_i64().expect("a number");
                let index = if layer < 0 { layer + states } else { layer };
                let expected = arrays(&format!("{name}.{index}.{mode}"));
                let layer = layer.to_string();
                let flags = ["--layer", &layer, "--pooling", pooling];
                let found = embed_lines(&tiny(name), &lines, &flags).json();
                assert_eq!(found.len(), lines.len());
                let all: Vec<f64> = found.iter().flat_map(|line| numbers(&line["embedding"])).collect();
                close(&all, &expected, &format!("{name} {index} {mode}"));
                for (index, line) in found.iter().enumerate() {
                    assert_eq!((keys(line), &line["index"]), (vec!["embedding", "index"], &json!(index)));
                }
                if pooling == "mean" {
                    let ran = embed_lines(&tiny(name), &lines, &[&flags[..], &["--output", path]].concat());
                    assert_eq!(ran.done().stdout, "");
                    let (header, found) = npy(&output);
                    let width = expected.len() / lines.len();
                    assert!(header.contains(&format!(
                        "'<f4', 'fortran_order': False, 'shape': ({}, {width})",
                        lines.len()
                    )));
                    let single = |all: &[f64]| all.iter().map(|v| *v as f32).collect::<Vec<f32>>();
                    assert_eq!(single(&found), single(&all));
                }
            }
        }
    }
    assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1);
}

#[test]
fn texts_as_sentence_transformers_encodes_them() {
    let arrays = arrays(&fixture("embeddings/texts.safetensors"));
    let recorded = fixture_json("embeddings/texts.json");
    let texts = recorded["texts"].as_array().expect("texts");
    let most = recorded["max_tokens"].to_string();
    let dir = tempfile::tempdir().expect("a directory");
    let input = dir.path().join("lines.txt");
    let lines: String = texts.iter().map(|text| format!("{}\r\n", text.as_str().expect("a text"))).collect();
    fs::write(&input, format!("\u{feff}{lines}")).expect("it is written");
    let novels = root().join("models/opt-novels");
    let output = dir.path().join("vectors.jsonl");
    for (pooling, mode) in POOLED {
        let flags = ["--pooling", pooling, "--normalize", "--max-tokens", &most, "--truncate", "right"];
        let ran = run(embed(&novels, &input, &flags).arg("--json").arg("--output").arg(&output));
        let summary = ran.json().remove(0);
        let tokens: u64 = ids(&recorded["tokens"])
            .into_iter()
            .map(|n| n.min(recorded["max_tokens"].as_u64().unwrap()))
            .sum();
        assert_eq!(summary["lines"], texts.len());
        assert_eq!((&summary["tokens"], &summary["truncated"]), (&json!(tokens), &json!(1)));
        assert_eq!((&summary["pooling"], &summary["normalized"]), (&json!(pooling), &json!(true)));
        let text = fs::read_to_string(&output).expect("lines");
        let all = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        let all: Vec<f64> = all.flat_map(|line| numbers(&line["embedding"])).collect();
        close(&all, &arrays(mode), mode);
    }
    let ran = run(&mut embed(&novels, &input, &["--max-tokens", &most]));
    ran.refused(1, &["lines.txt: line 5: ", "too long", "at most 32 tokens, found 64"]);
}

#[test]
fn pairs_are_their_text_and_names_go_along() {
    let novels = root().join("models/opt-novels");
    let lines = [
        json!({ "text": "The river ran.", "id": "a", "metadata": { "year": 1890 } }),
        json!({ "context": "The river", "continuation": " ran.", "id": 7 }),
        json!({ "text": "Dawn." }),
    ];
    let found = embed_lines(&novels, &lines, &[]).json();
    assert_eq!(found[0]["embedding"], found[1]["embedding"]);
    assert_eq!((&found[0]["id"], &found[1]["id"], found[2].get("id")), (&json!("a"), &json!(7), None));
    let without = embed_lines(&novels, &lines, &["--no-bos"]).json();
    assert_ne!(found[0]["embedding"], without[0]["embedding"]);

    let pinecone = embed_lines(&novels, &lines, &["--export", "pinecone"]).json();
    assert_eq!(pinecone[0]["metadata"], json!({ "year": 1890, "text": "The river ran." }));
    assert_eq!(pinecone[0]["values"], found[0]["embedding"]);
    let names: Vec<&Value> = pinecone.iter().map(|line| &line["id"]).collect();
    assert_eq!(names, ["a", "7", "2"]);
    let weaviate = embed_lines(&novels, &lines, &["--export", "weaviate", "--class", "Novel"]).json();
    assert_eq!(keys(&weaviate[0]), ["class", "id", "properties", "vector"]);
    assert_eq!((&weaviate[0]["class"], &weaviate[0]["vector"]), (&json!("Novel"), &found[0]["embedding"]));
    // Python's uuid.uuid5(uuid.NAMESPACE_DNS, "7").
    assert_eq!(weaviate[1]["id"], "a9f96b98-dd44-5216-ab0d-dbfc6b262edf");
}

#[test]
fn without_pooling_there_are_matrices() {
    let lines = [json!({ "ids": [2, 7, 9] }), json!({ "ids": [5] })];
    let found = embed_lines(&tiny("proj_post"), &lines, &["--pooling", "none"]).json();
    for (found, tokens) in found.iter().zip([3, 1]) {
        let rows = found["embedding"].as_array().expect("rows");
        assert_eq!(rows.len(), tokens);
        rows.iter().for_each(|row| assert_eq!(numbers(row).len(), 16));
    }
    let first = embed_lines(&tiny("proj_post"), &lines, &["--pooling", "first"]).json();
    assert_eq!(found[0]["embedding"][0], first[0]["embedding"]);
    let dir = tempfile::tempdir().expect("a directory");
    let output = dir.path().join("tokens.jsonl");
    let flags = ["--pooling", "none", "--output", output.to_str().expect("a name")];
    embed_lines(&tiny("proj_post"), &lines, &flags).done();
    let text = fs::read_to_string(&output).expect("lines");
    let same: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(same, found);
    let output = dir.path().join("tokens.npy");
    let flags = ["--pooling", "none", "--output", output.to_str().expect("a name")];
    embed_lines(&tiny("proj_post"), &lines, &flags).refused(2, &["pooling none", "JSON lines"]);
}

#[test]
fn lines_that_cannot_be_embedded_are_named() {
    let model = tiny("pre_ln");
    let good = json!({ "ids": [2, 7] });
    let bad = [
        (json!({ "ids": [] }), "at least one token"),
        (json!({ "ids": [2, 97] }), "97"),
        (json!({ "ids": vec![5; 65] }), "expected at most 64 tokens, found 65"),
        (json!({ "ids": [2, -1] }), "-1"),
        (json!({ "text": "no tokenizer here" }), "tokenizer"),
        (json!({ "context": "alone" }), "continuation"),
        (json!({ "ids": [2], "text": "both" }), "expected"),
        (json!([1, 2]), "expected"),
        (json!({ "ids": [2], "id": 1.5 }), "id: expected a string or a whole number, found 1.5"),
        (json!({ "ids": [2], "metadata": [] }), "metadata: expected an object"),
    ];
    for (line, part) in bad {
        embed_lines(&model, &[good.clone(), line], &["--json"]).refused(1, &["stdin: line 2: ", part]);
    }
    let dir = tempfile::tempdir().expect("a directory");
    let write = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).expect("it is written");
        path
    };
    let novels = root().join("models/opt-novels");
    for (name, content, parts) in [
        ("a.txt", &b"Dawn.\n\nDusk.\n"[..], ["a.txt: line 2: ", "the text is empty"]),
        ("b.txt", b"Dawn.\n\xff\n", ["b.txt: line 2: ", "UTF-8"]),
        ("c.jsonl", b"{\"text\": \"Dawn.\"}\n\n{\"text\": \n", ["c.jsonl: line 3: ", "expected JSON"]),
        ("d.jsonl", b"{\"text\": \"\"}\n", ["d.jsonl: line 1: ", "the text is empty"]),
        ("e.txt", b"", ["e.txt: ", "at least one line of text"]),
        ("f.jsonl", b"\n", ["f.jsonl: ", "at least one line of JSON"]),
    ] {
        let input = write(name, content);
        let output = dir.path().join("out.npy");
        let ran = run(embed(&novels, &input, &["--output"]).arg(&output));
        ran.refused(1, &parts);
        assert!(!output.exists() && !dir.path().join("out.npy.part").exists());
    }
    run(&mut embed(&model, Path::new("missing.jsonl"), &[])).refused(1, &["missing.jsonl: cannot be read"]);
}

#[test]
fn wrong_usage() {
    let model = tiny("pre_ln");
    let lines = [json!({ "ids": [2, 7] })];
    run(opt().arg("embed")).refused(2, &["--input"]);
    for (flags, part) in [
        (&["--layer", "3"][..], "layer: expected -3 to 2, found 3"),
        (&["--layer", "-4"], "layer: expected -3 to 2, found -4"),
        (&["--output", "vectors.csv"], "expected a name that ends in .npy, .jsonl or .parquet"),
        (&["--export", "pinecone", "--output", "vectors.npy"], "--export"),
        (&["--export", "weaviate", "--class", "novel"], "capital"),
        (&["--resume"], "--output"),
        (&["--pooling", "sum"], "--pooling"),
        (&["--max-tokens", "0"], "--max-tokens"),
    ] {
        embed_lines(&model, &lines, flags).refused(2, &[part]);
    }
}

/// Lines of a long input.
const LINES: u32 = 1200;

/// A model, an input that takes a while, and where its vectors go.
struct Long {
    dir: tempfile::TempDir,
    input: PathBuf,
    output: PathBuf,
    part: PathBuf,
}

impl Long {
    fn new(extension: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let line = |i: u32| {
            let ids: Vec<u32> = (0..40 + i % 20).map(|j| 3 + (i * 7 + j * j) % 90).collect();
            format!("{}\n", json!({ "ids": ids, "id": format!("nr {i}") }))
        };
        let input = dir.path().join("lines.jsonl");
        fs::write(&input, (0..LINES).map(line).collect::<String>()).expect("it is written");
        let output = dir.path().join(format!("vectors.{extension}"));
        let part = dir.path().join(format!("vectors.{extension}.part"));
        Self { dir, input, output, part }
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command =
            embed(&tiny("pre_ln"), &self.input, &["--batch-tokens", "128", "--json", "--output"]);
        command.arg(&self.output).args(more);
        command
    }

    /// A run of which some vectors are there.
    fn begun(&self) -> Child {
        let mut child = self
            .command(&[])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let begun = Instant::now();
        while fs::metadata(&self.part).map_or(0, |part| part.len()) < 20_000 {
            assert!(begun.elapsed() < Duration::from_secs(60), "nothing is written");
            assert!(child.try_wait().expect("a child").is_none(), "it ended too early");
            std::thread::sleep(Duration::from_millis(2));
        }
        child
    }
}

#[test]
fn a_killed_run_is_resumed() {
    for extension in ["npy", "jsonl", "parquet"] {
        let long = Long::new(extension);
        let summary = run(&mut long.command(&[])).json().remove(0);
        assert_eq!((&summary["resumed"], &summary["lines"]), (&json!(0), &json!(LINES)));
        let whole = fs::read(&long.output).expect("vectors");
        assert!(!long.part.exists());
        fs::remove_file(&long.output).expect("it is removed");

        let mut child = long.begun();
        child.kill().expect("it is killed");
        child.wait().expect("it ends");
        assert!(long.part.exists() && !long.output.exists());
        // Begun anew by mistake, it would be lost.
        run(&mut long.command(&[])).refused(1, &["an unfinished output", "--resume"]);
        // What was being written.
        let torn = [&fs::read(&long.part).expect("a part")[..], &[1, 0, 0, 0, 9, 9]].concat();
        fs::write(&long.part, torn).expect("it is written");

        let summary = run(&mut long.command(&["--resume"])).json().remove(0);
        let resumed = summary["resumed"].as_u64().expect("a number");
        assert!(resumed > 0 && resumed < u64::from(LINES), "{resumed}");
        assert_eq!(
            (&summary["lines"], fs::read(&long.output).expect("vectors") == whole),
            (&json!(LINES), true)
        );
        assert_eq!(fs::read_dir(long.dir.path()).expect("a directory").count(), 2);
        // With nothing to go on with it begins, and what was there is replaced.
        let summary = run(&mut long.command(&["--resume"])).json().remove(0);
        assert_eq!(summary["resumed"], 0);
        assert!(fs::read(&long.output).expect("vectors") == whole);
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_is_resumed_with_what_it_was_begun_with() {
    let long = Long::new("npy");
    let child = long.begun();
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill is there");
    assert!(sent.success());
    let ran = Ran::from(child.wait_with_output().expect("it ends"));
    assert_eq!((ran.code, &ran.stdout[..]), (Some(130), ""), "{}", ran.stderr);
    assert!(
        ran.stderr.contains(&format!("of {LINES} lines are in")) && ran.stderr.ends_with("interrupted\n"),
        "{}",
        ran.stderr
    );

    for (flags, part) in [
        (&["--layer", "1"][..], "layer: expected 2, found 1"),
        (&["--pooling", "max"], "pooling: expected mean, found max"),
        (&["--normalize"], "normalized: expected no, found yes"),
        (&["--output-dtype", "f16"], "--output-dtype: expected f32, found f16"),
        (&["--truncate", "left"], "--truncate: expected error, found left"),
        (&["--max-tokens", "63"], "--max-tokens: expected 64, found 63"),
    ] {
        let mut command = long.command(flags);
        run(command.arg("--resume")).refused(1, &["vectors.npy.part: ", part]);
    }
    let mut other = embed(&tiny("remove_final_ln"), &long.input, &["--json", "--resume", "--output"]);
    run(other.arg(&long.output)).refused(1, &["another model of the same shape"]);
    let before = fs::read_to_string(&long.input).expect("lines");
    fs::write(&long.input, before.replacen("nr 900", "nr 901", 1)).expect("it is written");
    run(&mut long.command(&["--resume"])).refused(1, &["input: expected items:1200"]);
    fs::write(&long.input, before).expect("it is written");
    run(&mut long.command(&["--resume"])).done();
    assert!(long.output.exists() && !long.part.exists());

    fs::write(&long.part, "something else\n").expect("it is written");
    run(&mut long.command(&["--resume"])).refused(1, &["expected an unfinished output of `opt embed`"]);
}
