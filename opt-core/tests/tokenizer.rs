//! Tokenizers against transformers (tests/fixtures/tokenizer/make.py), streaming, and files that cannot be used.

use opt_core::{
    ErrorKind,
    tokenizer::{Bos, Detokenizer, Tokenizer, TokenizerFiles},
};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::Write;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

const NOVELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/opt-novels");

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_dir(NOVELS).unwrap());

/// The shared test data; `None`, saying so, where it is not there.
fn data(part: &str) -> Option<PathBuf> {
    let root = std::env::var_os("OPT_TEST_DATA").map(PathBuf::from);
    let root = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"));
    let path = root.join(part);
    if !path.exists() {
        let _ = writeln!(std::io::stderr(), "skipped: {} is not there (set OPT_TEST_DATA)", path.display());
        return None;
    }
    Some(path)
}

#[derive(Deserialize)]
struct Fixture {
    encode: Vec<Encode>,
    decode: Vec<Decode>,
}

#[derive(Deserialize)]
struct Encode {
    text: String,
    ids: Vec<u32>,
    bare: Vec<u32>,
}

#[derive(Deserialize)]
struct Decode {
    ids: Vec<u32>,
    text: String,
    skip: String,
    clean: String,
}

fn fixture(name: &str) -> Fixture {
    let path = format!("{}/tests/fixtures/tokenizer/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn compare(tokenizer: &Tokenizer, fixture: &Fixture) {
    assert!(fixture.encode.len() > 100 && fixture.decode.len() > 50);
    for Encode { text, ids, bare } in &fixture.encode {
        assert_eq!(&tokenizer.encode(text, Bos::Model).unwrap(), ids, "{text:?}");
        assert_eq!(&tokenizer.encode(text, Bos::Never).unwrap(), bare, "{text:?}");
    }
    for Decode { ids, text, skip, .. } in &fixture.decode {
        assert_eq!(&tokenizer.decode(ids, false).unwrap(), text, "{ids:?}");
        assert_eq!(&tokenizer.decode(ids, true).unwrap(), skip, "{ids:?}");
        assert_eq!(&streamed(tokenizer.detokenizer(false), ids), text, "{ids:?}");
        assert_eq!(&streamed(tokenizer.detokenizer(true), ids), skip, "{ids:?}");
    }
}

fn streamed(mut stream: Detokenizer, ids: &[u32]) -> String {
    let mut text: String = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    text += &stream.finish().unwrap();
    text
}

fn novels_files() -> TokenizerFiles {
    TokenizerFiles::read(Path::new(NOVELS)).unwrap()
}

fn edited(edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut json: Value = serde_json::from_slice(&novels_files().tokenizer_json.unwrap()).unwrap();
    edit(&mut json);
    serde_json::to_vec(&json).unwrap()
}

/// opt-novels as vocab.json and merges.txt.
fn novels_as_vocab_and_merges() -> TokenizerFiles {
    let json: Value = serde_json::from_slice(&novels_files().tokenizer_json.unwrap()).unwrap();
    let mut merges = String::from("#version: 0.2\n");
    for pair in json["model"]["merges"].as_array().unwrap() {
        merges += &format!("{} {}\n", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
    }
    let mut files = TokenizerFiles::default();
    files.vocab_json = Some(serde_json::to_vec(&json["model"]["vocab"]).unwrap());
    files.merges_txt = Some(merges.into_bytes());
    files
}

#[test]
fn novels_equals_transformers() {
    compare(&TOKENIZER, &fixture("opt-novels"));
    let t = &*TOKENIZER;
    assert_eq!((t.bos_id(), t.eos_id(), t.pad_id(), t.unk_id()), (Some(2), Some(2), Some(1), Some(3)));
    assert_eq!((t.vocab_size(), t.adds_bos()), (8192, true));
    assert_eq!(Tokenizer::from_file(format!("{NOVELS}/tokenizer.json")).unwrap().eos_id(), Some(2));
}

#[test]
fn opt_equals_transformers() {
    let Some(dir) = data("opt-tokenizer") else { return };
    let fixture = fixture("opt");
    compare(&Tokenizer::from_dir(&dir).unwrap(), &fixture);

    let mut vocab_and_merges = TokenizerFiles::default();
    vocab_and_merges.vocab_json = Some(fs::read(dir.join("vocab.json")).unwrap());
    vocab_and_merges.merges_txt = Some(fs::read(dir.join("merges.txt")).unwrap());
    compare(&Tokenizer::from_files(&vocab_and_merges).unwrap(), &fixture);
    for (name, slot) in [
        ("tokenizer_config.json", &mut vocab_and_merges.tokenizer_config_json),
        ("special_tokens_map.json", &mut vocab_and_merges.special_tokens_map_json),
    ] {
        *slot = Some(fs::read(dir.join(name)).unwrap());
    }
    let t = Tokenizer::from_files(&vocab_and_merges).unwrap();
    compare(&t, &fixture);

    // reference/architecture.md, made with the real files.
    assert_eq!(
        t.encode("Today is a beautiful day and I want to", Bos::Model).unwrap(),
        [2, 5625, 16, 10, 2721, 183, 8, 38, 236, 7]
    );
    assert_eq!(
        t.encode("Paris is the capital of France and", Bos::Model).unwrap(),
        [2, 32826, 16, 5, 812, 9, 1470, 8]
    );
    assert_eq!(t.encode("", Bos::Model).unwrap(), [2]);
    let ids = [0, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588, 2];
    assert_eq!(t.decode(&ids, false).unwrap(), "<s>Hello world! cécé herlolip</s>");
    for (token, special) in
        [("<s>", false), ("<pad>", true), ("</s>", true), ("<unk>", false), ("<mask>", false)]
    {
        assert_eq!(t.is_special(t.token_to_id(token).unwrap()), special, "{token}");
    }
    assert_eq!((t.vocab_size(), t.token_to_id("<mask>")), (50_265, Some(50_264)));
    // The model's table has rows past the tokenizer.
    assert_eq!(t.decode(&[50_264, 50_265, 50_271, 812], true).unwrap(), "<mask> capital");
}

#[test]
fn characters_without_decoder_rules() {
    let Some(dir) = data("models/llmviz-gpt-nano-sort") else { return };
    let t = Tokenizer::from_dir(dir).unwrap();
    assert_eq!(t.encode("CBA", Bos::Model).unwrap(), [2, 1, 0]);
    assert!(!t.adds_bos());
    assert_eq!(t.encode("A", Bos::Always).unwrap_err().kind(), ErrorKind::Tokenizer);
    assert_eq!(t.decode(&[2, 1, 0, 7], true).unwrap(), "CBA");
    assert_eq!(streamed(t.detokenizer(true), &[2, 1, 0, 7]), "CBA");
    assert_eq!(t.token_strings().iter().collect::<Vec<_>>(), [(0, &b"A"[..]), (1, b"B"), (2, b"C")]);
}

#[test]
fn bos_once_whoever_asks_for_it() {
    let plain = TOKENIZER.encode("The house", Bos::Never).unwrap();
    let with_bos: Vec<u32> = [2].into_iter().chain(plain.clone()).collect();
    let no_template = edited(|json| json["post_processor"] = Value::Null);
    let config =
        |add: Value| Some(json!({"bos_token": "</s>", "add_bos_token": add}).to_string().into_bytes());

    let mut files = novels_files();
    for (template, add, model) in [
        (true, json!(true), &with_bos),
        (true, Value::Null, &with_bos),
        (false, json!(true), &with_bos),
        (false, json!(false), &plain),
        (false, Value::Null, &plain),
    ] {
        files.tokenizer_json =
            if template { novels_files().tokenizer_json } else { Some(no_template.clone()) };
        files.tokenizer_config_json = config(add.clone());
        let t = Tokenizer::from_files(&files).unwrap();
        assert_eq!(&t.encode("The house", Bos::Model).unwrap(), model, "{template} {add}");
        assert_eq!(t.adds_bos(), model == &with_bos, "{template} {add}");
        assert_eq!(t.encode("The house", Bos::Always).unwrap(), with_bos, "{template} {add}");
        assert_eq!(t.encode("The house", Bos::Never).unwrap(), plain, "{template} {add}");
    }
}

#[test]
fn vocab_and_merges_follow_their_config() {
    let mut files = novels_as_vocab_and_merges();
    let t = Tokenizer::from_files(&files).unwrap();
    let fixture = fixture("opt-novels");
    // Bare files mean OPT, where `<s>` and `<unk>` are not special; opt-novels' tokenizer.json has them so.
    for case in fixture.encode.iter().filter(|c| !c.text.contains("<s>") && !c.text.contains("<unk>")) {
        assert_eq!(t.encode(&case.text, Bos::Model).unwrap(), case.ids, "{:?}", case.text);
    }
    assert!(!t.is_special(0) && t.is_special(1) && t.is_special(2));

    let config = json!({
        "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "pad_token": null,
        "added_tokens_decoder": {
            "8192": {"content": "<new>", "special": false},
            "8193": {"content": "<newer>", "special": true, "lstrip": true},
        },
        "additional_special_tokens": ["<unk>"],
    });
    files.tokenizer_config_json = Some(config.to_string().into_bytes());
    let t = Tokenizer::from_files(&files).unwrap();
    assert_eq!((t.bos_id(), t.eos_id(), t.pad_id(), t.adds_bos()), (Some(0), Some(2), None, false));
    assert_eq!(t.encode("<new>  <newer><unk>", Bos::Model).unwrap(), [8192, 8193, 3]);
    assert_eq!(t.decode(&[8192, 8193, 3], true).unwrap(), "<new>");
    assert_eq!(t.vocab_size(), 8194);
}

#[test]
fn clean_up_only_where_the_config_asks() {
    let mut files = novels_files();
    files.tokenizer_config_json = Some(br#"{"clean_up_tokenization_spaces": true}"#.to_vec());
    let t = Tokenizer::from_files(&files).unwrap();
    let mut differing = 0;
    for Decode { ids, text, clean, .. } in fixture("opt-novels").decode {
        assert_eq!(t.decode(&ids, false).unwrap(), clean, "{ids:?}");
        assert_eq!(streamed(t.detokenizer(false), &ids), clean, "{ids:?}");
        differing += usize::from(text != clean);
    }
    assert!(differing > 0);
}

#[test]
fn a_split_character_is_held_back() {
    let ids = TOKENIZER.encode("a😀b", Bos::Never).unwrap();
    assert!(ids.len() > 3, "the emoji must be split for this to test anything: {ids:?}");
    let mut stream = TOKENIZER.detokenizer(true);
    let deltas: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    assert!(deltas.iter().all(|d| ["a", "", "😀", "b"].contains(&d.as_str())), "{deltas:?}");
    assert_eq!(deltas.concat() + &stream.finish().unwrap(), "a😀b");

    // Cut off within the character: one replacement at the end, and the next text starts clean.
    let mut stream = TOKENIZER.detokenizer(true);
    let cut: String = ids[..ids.len() - 2].iter().map(|id| stream.push(*id).unwrap()).collect();
    assert_eq!((cut.as_str(), stream.finish().unwrap().as_str()), ("a", "\u{FFFD}"));
    assert_eq!(stream.push(ids[0]).unwrap(), "a");
}

#[test]
fn token_strings_join_to_the_text() {
    let strings = TOKENIZER.token_strings();
    assert_eq!(strings.len(), 8192);
    for case in fixture("opt-novels").decode {
        let bytes: Vec<u8> =
            case.ids.iter().flat_map(|id| strings.get(*id).unwrap_or_default()).copied().collect();
        assert_eq!(String::from_utf8_lossy(&bytes), case.text);
    }
    assert!(strings.is_special(2) && !strings.is_special(4));
    assert_eq!((strings.get(8192), strings.get(u32::MAX)), (None, None));
}

#[test]
fn held_by_threads() {
    fn check<T: Clone + Send + Sync + 'static>() {}
    check::<Tokenizer>();
    check::<Detokenizer>();
}

/// A tokenizer in SentencePiece's manner: spaces as `▁`, bytes as `<0xHH>`, the first space of a text dropped.
fn sentence_piece() -> Tokenizer {
    let mut vocab = json!({"▁": 0, "▁the": 1, "he": 2, "é": 3, "▁x": 4});
    for byte in 0..=255_u32 {
        vocab[format!("<0x{byte:02X}>")] = json!(byte + 5);
    }
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "byte_fallback": true, "vocab": vocab, "merges": []},
    });
    Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
}

#[test]
fn other_decoders_stream_through_a_window() {
    let t = sentence_piece();
    let byte = |b: u8| u32::from(b) + 5;
    let emoji: Vec<u32> = "😀".bytes().map(byte).collect();
    let mut ids = vec![1, 4, 3, 0, 2];
    ids.extend(&emoji);
    ids.extend([1, 1, 9999, 2]);
    assert_eq!(t.decode(&ids, true).unwrap(), "the xé he😀 the thehe");
    let mut stream = t.detokenizer(true);
    let deltas: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    assert_eq!(deltas, ["the", " x", "é", " ", "he", "", "", "", "😀", " the", " the", "", "he"]);
    assert_eq!(stream.finish().unwrap(), "");
    assert_eq!(t.token_strings().get(1), Some(&b" the"[..]));
    assert_eq!(t.token_strings().get(byte(0xF0)), Some(&[0xF0][..]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn streamed_equals_decoded(ids in prop::collection::vec(prop_oneof![0..8300_u32, 0..260_u32], 0..60), skip: bool) {
        prop_assert_eq!(streamed(TOKENIZER.detokenizer(skip), &ids), TOKENIZER.decode(&ids, skip).unwrap());
    }

    #[test]
    fn text_survives(text in "\\PC{0,40}|[ \\n\\ta-z'.0-9é中😀]{0,60}") {
        prop_assume!(!text.contains('<'));
        let ids = TOKENIZER.encode(&text, Bos::Model).unwrap();
        prop_assert_eq!(ids[0], 2);
        prop_assert_eq!(TOKENIZER.decode(&ids, true).unwrap(), text);
    }

    #[test]
    fn damaged_files_are_errors(cut in 0.0..1.0_f64, byte: u8, at in 0.0..1.0_f64) {
        let small = small_byte_level();
        let place = |f: f64| (small.len() as f64 * f) as usize;
        prop_assert!(Tokenizer::from_bytes(&small[..place(cut)]).is_err());
        let mut changed = small.clone();
        changed[place(at)] = byte;
        opt_core::tokenizer::fuzz(&changed);
    }
}

fn small_byte_level() -> Vec<u8> {
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "normalizer": {"type": "NFC"},
        "added_tokens": [{"id": 0, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": {"</s>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4}, "merges": [["a", "b"]]},
    })
    .to_string()
    .into_bytes()
}

fn error(files: &TokenizerFiles) -> String {
    let error = Tokenizer::from_files(files).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Tokenizer, "{error}");
    assert!(!error.to_string().contains('\n'), "{error}");
    error.to_string()
}

#[test]
fn unusable_files_say_why() {
    let json = |bytes: Vec<u8>| {
        let mut files = TokenizerFiles::default();
        files.tokenizer_json = Some(bytes);
        files
    };
    assert!(error(&json(b"{".to_vec())).starts_with("tokenizer.json is damaged: EOF"));
    assert!(error(&json(b"[]".to_vec())).starts_with("tokenizer.json is damaged: "));
    assert!(error(&json(b"{}".to_vec())).contains("missing field `model`"));
    assert_eq!(
        error(&json(edited(|j| j["model"]["merges"][5] = json!(["Ġ", "zzzz"])))),
        "tokenizer.json: merge 5 names \"zzzz\", which the vocabulary lacks"
    );
    // Both parts are tokens but the whole is not, and longer than any token.
    let longest = "a".repeat(300);
    let long = edited(|j| {
        j["model"]["vocab"][&longest] = json!(8000);
        j["model"]["merges"][0] = json!([longest, longest]);
    });
    assert!(error(&json(long)).contains("merge 0 makes"));
    assert_eq!(
        error(&json(edited(|j| j["model"]["vocab"]["zzz"] = json!(4_000_000_000_u32)))),
        "tokenizer.json: token \"zzz\" has id 4000000000, expected at most 1048576"
    );
    assert!(
        error(&json(edited(|j| j["post_processor"]["special_tokens"] = json!({})))).contains("no ids for")
    );

    let mut files = novels_as_vocab_and_merges();
    files.merges_txt = Some(b"#version: 0.2\nt h e\n".to_vec());
    assert_eq!(error(&files), "merges.txt: line 2 is not two tokens");
    files.merges_txt = Some(b"t h\nno zzz\n".to_vec());
    assert!(error(&files).starts_with("merges.txt: line 2 names"));
    files.merges_txt = Some(vec![0xFF, 0xFE]);
    assert!(error(&files).starts_with("merges.txt is not UTF-8"));
    files.vocab_json = Some(b"{\"a\": -1}".to_vec());
    assert!(error(&files).starts_with("vocab.json is damaged"));
    assert!(error(&TokenizerFiles::default()).starts_with("no tokenizer"));

    let mut files = novels_files();
    files.tokenizer_config_json = Some(br#"{"add_bos_token": "yes"}"#.to_vec());
    assert_eq!(error(&files), "tokenizer_config.json: add_bos_token: expected true or false, found \"yes\"");
    files.special_tokens_map_json = None;
    files.tokenizer_config_json = Some(br#"{"bos_token": 7}"#.to_vec());
    assert_eq!(error(&files), "bos_token: expected a token's text, found 7");
}

#[test]
fn missing_files_say_which() {
    let dir = tempfile::tempdir().unwrap();
    let none = Tokenizer::from_dir(dir.path()).unwrap_err();
    assert_eq!(none.kind(), ErrorKind::NotFound);
    assert!(none.to_string().contains("no tokenizer, expected tokenizer.json"), "{none}");
    assert_eq!(Tokenizer::from_dir(dir.path().join("x")).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(Tokenizer::from_file(dir.path().join("t.json")).unwrap_err().kind(), ErrorKind::NotFound);
    fs::write(dir.path().join("vocab.json"), "{}").unwrap();
    let half = Tokenizer::from_dir(dir.path()).unwrap_err();
    assert_eq!(half.kind(), ErrorKind::Tokenizer);
    assert!(half.to_string().ends_with("has vocab.json but not merges.txt, expected both"), "{half}");
}

#[test]
fn parts_that_can_fail_are_refused_by_name() {
    let refused = |pointer: &str, part: Value| {
        let json = edited(|j| *j.pointer_mut(pointer).unwrap() = part);
        let error = Tokenizer::from_bytes(&json).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        error.to_string()
    };
    let table = json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Precompiled"}]});
    assert_eq!(refused("/normalizer", table), "tokenizer.json: normalizer \"Precompiled\" is not supported");
    refused("/normalizer", json!({"type": "Replace", "pattern": {"Regex": "x*"}, "content": ""}));
    refused("/normalizer", json!({"type": "Prepend", "prepend": ""}));
    refused("/pre_tokenizer", json!({"type": "FixedLength", "length": 0}));
    refused("/decoder", json!({"type": "Strip", "content": " ", "start": 0, "stop": 1}));
    refused("/decoder", json!({"content": " ", "start": 0, "stop": 1}));
}
