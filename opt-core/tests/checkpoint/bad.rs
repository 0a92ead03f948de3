use crate::fixture;
use opt_core::{
    Error, ErrorKind,
    checkpoint::{Checkpoint, ConvertOptions, Warning, convert, inspect},
};
use std::{fs, path::Path};

/// The error of opening, which must be one line of a sensible length.
fn error(path: impl AsRef<Path>) -> Error {
    let error = Checkpoint::open(path).expect_err("must be refused");
    one_line(&error);
    error
}

fn one_line(error: &Error) {
    let text = error.to_string();
    assert!(text.len() < 700 && !text.chars().any(char::is_control), "{text:?}");
}

fn config() -> String {
    fs::read_to_string(fixture("safetensors/config.json")).unwrap()
}

fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

fn bytes_error(file: Vec<u8>) -> String {
    let error = Checkpoint::from_bytes(&config(), vec![file]).expect_err("must be refused");
    one_line(&error);
    assert_eq!(error.kind(), ErrorKind::Checkpoint);
    error.to_string()
}

#[test]
fn safetensors_headers_that_lie() {
    let entry = |shape: &str, start: usize, end: usize| {
        format!(r#"{{"dtype":"F16","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let (two, next) = (entry("[2]", 0, 4), entry("[2]", 4, 8));
    let fill = [0; 8];
    for (header, data, message) in [
        (format!(r#"{{"a":{two},"a":{next}}}"#), &fill[..], r#""a" is there twice"#),
        (format!(r#"{{"a":{two},"\u0061":{next}}}"#), &fill, r#""a" is there twice"#),
        (format!(r#"{{"a":{two},"b":{}}}"#, entry("[2]", 2, 6)), &fill[..6], "inside the one before it"),
        (format!(r#"{{"a":{two},"b":{two}}}"#), &fill[..4], "inside the one before it"),
        (format!(r#"{{"a":{two},"b":{}}}"#, entry("[1]", 6, 8)), &fill, "leaving a hole after 4"),
        (format!(r#"{{"a":{next}}}"#), &fill, "leaving a hole after 0"),
        (format!(r#"{{"a":{two}}}"#), &fill, "expected 4 bytes of data, found 8"),
        (format!(r#"{{"a":{two},"b":{next}}}"#), &fill[..7], "within 7 bytes of data, found 4..8"),
        (format!(r#"{{"a":{}}}"#, entry("[3]", 0, 4)), &fill[..4], "expected 6 bytes for F16 [3]"),
        (format!(r#"{{"a":{}}}"#, entry("[2]", 4, 0)), &fill[..4], "found 4..0"),
        (format!(r#"{{"a":{}}}"#, entry("[4294967296,4294967296,2]", 0, 4)), &fill[..4], "overflows"),
        (format!(r#"{{"a":{}}}"#, entry("[-1]", 0, 4)), &fill[..4], "header: invalid value"),
        (two.replace("F16", "F4"), &fill[..4], "header:"),
        (format!(r#"{{"a":{}}}"#, two.replace("F16", "X1")), &fill[..4], r#"unknown dtype "X1""#),
        (r#"{"a":{"dtype":"F16","shape":[2]}}"#.into(), &fill[..4], "missing field `data_offsets`"),
        (r#"{"__metadata__":{"k":1}}"#.into(), &[], "header: invalid type"),
        ("[]".into(), &[], "expected a JSON object"),
        (format!("{}1{}", "[".repeat(999), "]".repeat(999)), &[], "expected a JSON object"),
        (format!(r#"{{"a":{}"#, "[".repeat(9999)), &[], "header: invalid type"),
        ("{".into(), &[], "header: EOF"),
    ] {
        let found = bytes_error(safetensors(&header, data));
        assert!(found.contains(message), "{header}: {found}");
    }
    let newline = "\\n\\u001b[31m".repeat(99);
    bytes_error(safetensors(&format!(r#"{{"a{newline}":{}}}"#, entry("[9]", 0, 4)), &fill[..4]));
}

#[test]
fn safetensors_files_that_end_early() {
    let whole = fs::read(fixture("safetensors/model.safetensors")).unwrap();
    for (length, message) in [
        (0, "expected 8 bytes of header length, found 0"),
        (7, "expected 8 bytes of header length, found 7"),
        (8, "bytes of header, found 0"),
        (whole.len() - 1, "bytes of data"),
    ] {
        let found = bytes_error(whole[..length].to_vec());
        assert!(found.contains(message), "{length}: {found}");
    }
    for length in [u64::MAX, 100_000_001, i64::MAX as u64] {
        let mut file = whole.clone();
        file[..8].copy_from_slice(&length.to_le_bytes());
        assert!(bytes_error(file).contains("header length: expected at most 100000000"));
    }
    let mut longer = whole;
    longer.push(0);
    assert!(bytes_error(longer).contains("bytes of data"));
}

/// A directory with the fixtures' config.json and these files.
fn directory(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("config.json"), config()).unwrap();
    for (name, bytes) in files {
        fs::write(directory.path().join(name), bytes).unwrap();
    }
    directory
}

#[test]
fn indices_that_lie() {
    let shard = safetensors(r#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#, &[0; 4]);
    for (index, message) in [
        (r#"{"weight_map":{"a":"../s.safetensors"}}"#, "a file beside the index"),
        (r#"{"weight_map":{"a":"/etc/passwd"}}"#, "a file beside the index"),
        (r#"{"weight_map":{"a":"x/s.safetensors"}}"#, "a file beside the index"),
        (r#"{"weight_map":{"a":"x\\s.safetensors"}}"#, "a file beside the index"),
        (r#"{"weight_map":{"a":"C:s.safetensors"}}"#, "a file beside the index"),
        (r#"{"weight_map":{"a":"./s.safetensors"}}"#, "a file beside the index"),
        (r#"{"weight_map":{"a":".."}}"#, "a file beside the index"),
        (r#"{"weight_map":{"a":""}}"#, "a file beside the index"),
        (r#"{"weight_map":{"a":"s.safetensors","a":"t.safetensors"}}"#, r#""a" is there twice"#),
        (r#"{"weight_map":{"b":"s.safetensors"}}"#, r#"tensor "b" is not in the shard "s.safetensors""#),
        (r#"{"weight_map":{"a":"t.safetensors"}}"#, "names a shard that cannot be used"),
        (r#"{"weight_map":{}}"#, "expected at least one tensor"),
        (r#"{"weight_map":7}"#, "index: invalid type"),
        ("{}", "missing field `weight_map`"),
        ("", "index: EOF"),
    ] {
        let files = [("s.safetensors", &shard[..]), ("model.safetensors.index.json", index.as_bytes())];
        let found = error(directory(&files).path()).to_string();
        assert!(found.contains(message), "{index}: {found}");
    }
    // Latin-1.
    let files = [("model.safetensors.index.json", &b"{\"\xe9\":1}"[..])];
    assert!(error(directory(&files).path()).to_string().contains("not UTF-8"));
}

#[test]
fn a_shard_s_tensor_that_the_index_does_not_name_is_a_warning() {
    let source = fixture("safetensors");
    let place = tempfile::tempdir().unwrap();
    fs::copy(source.join("config.json"), place.path().join("config.json")).unwrap();
    fs::copy(source.join("model.safetensors"), place.path().join("one.safetensors")).unwrap();
    let spare = safetensors(r#"{"spare":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#, &[0; 4]);
    fs::write(place.path().join("two.safetensors"), &spare).unwrap();
    let checkpoint = Checkpoint::open(&source).unwrap();
    let map: serde_json::Map<_, _> =
        checkpoint.tensors().map(|info| (info.stored_name.clone(), "one.safetensors".into())).collect();
    let mut index = serde_json::json!({ "weight_map": map });
    let path = place.path().join("model.safetensors.index.json");
    fs::write(&path, index.to_string()).unwrap();
    assert_eq!(Checkpoint::open(place.path()).unwrap().validate().unwrap(), []);
    index["weight_map"]["spare"] = "two.safetensors".into();
    fs::write(&path, index.to_string()).unwrap();
    let warnings = Checkpoint::open(place.path()).unwrap().validate().unwrap();
    let expected = Warning::ExtraTensor { name: "spare".into(), file: "two.safetensors".into() };
    assert_eq!(warnings, [expected]);
    index["weight_map"].as_object_mut().unwrap().remove("model.decoder.embed_tokens.weight");
    fs::write(&path, index.to_string()).unwrap();
    let error = Checkpoint::open(place.path()).unwrap().validate().unwrap_err();
    assert!(error.to_string().contains("model.decoder.embed_tokens.weight [20, 4] is missing"), "{error}");
}

#[test]
fn pickles_that_ask_for_more_than_tensors() {
    for (file, kind, message) in [
        // Python's os.system is defined in posix.
        ("foreign.bin", ErrorKind::Checkpoint, r#"asks for "posix.system", which is refused"#),
        ("double.bin", ErrorKind::Checkpoint, r#"asks for "torch.DoubleStorage""#),
        ("legacy.bin", ErrorKind::Unsupported, "torch.save(torch.load(path, weights_only=True), path)"),
        ("expanded.bin", ErrorKind::Checkpoint, "does not lie within 1 numbers"),
        ("tf_model.h5", ErrorKind::Unsupported, "from_tf=True"),
        ("config.json", ErrorKind::Unsupported, "expected a directory or a file ending in"),
    ] {
        let error = error(fixture("bad").join(file));
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(message) && error.to_string().contains(file), "{error}");
    }
    assert_eq!(error(fixture("bad")).kind(), ErrorKind::Unsupported, "tf_model.h5 in a directory");
}

#[test]
fn pickles_that_are_damaged() {
    let whole = fs::read(fixture("pickle/pytorch_model.bin")).unwrap();
    // The end of a zip archive is where its directory is.
    for length in [4, 100, whole.len() / 2, whole.len() - 1] {
        assert!(bytes_error(whole[..length].to_vec()).contains("the file is truncated"));
    }
    let position = |needle: &[u8]| whole.windows(needle.len()).position(|w| w == needle).unwrap();
    let changed = |at: usize, byte: u8| {
        let mut file = whole.clone();
        file[at] = byte;
        bytes_error(file)
    };
    // The compression method of the first record of the directory.
    assert!(changed(position(b"PK\x01\x02") + 10, 8).contains("is compressed or encrypted"));
    // Of a tensor's record, in the directory: its size.
    let last = whole.windows(4).rposition(|w| w == b"PK\x01\x02").unwrap();
    assert!(changed(last + 27, 0x7f).contains("stored size"));
    // The first opcode after the protocol, made INST.
    assert!(changed(position(b"\x80\x02ccollections") + 2, b'i').contains("opcode 0x69"));
}

#[test]
fn tensors_that_do_not_fit_the_config_are_named() {
    let config = config();
    let file = fs::read(fixture("safetensors/model.safetensors")).unwrap();
    let with = |from: &str, to: &str| {
        let changed = config.replace(from, to);
        assert_ne!(changed, config);
        Checkpoint::from_bytes(&changed, vec![file.clone()]).unwrap().validate()
    };
    let error = with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3").unwrap_err();
    one_line(&error);
    let text = error.to_string();
    assert!(text.contains("model.decoder.layers.2.self_attn.q_proj.weight [8, 8] is missing"), "{text}");
    assert!(text.ends_with("and 11 more"), "16 tensors a layer, 5 named: {text}");
    let text = with("\"vocab_size\": 20", "\"vocab_size\": 21").unwrap_err().to_string();
    assert!(text.contains("embed_tokens.weight\": expected shape [21, 4], found [20, 4]"), "{text}");
    let warnings = with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1").unwrap();
    assert_eq!(warnings.len(), 16);
    assert!(warnings[0].to_string().contains("has no place in the model"), "{}", warnings[0]);
}

#[test]
fn the_same_tensor_twice_is_refused() {
    let header = r#"{"decoder.a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},
        "model.decoder.a":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}"#;
    let found = bytes_error(safetensors(header, &[0; 4]));
    assert!(found.contains("are the same tensor"), "{found}");
}

#[test]
fn numbers_no_backend_takes_are_refused() {
    let place = directory(&[]);
    let header = r#"{"decoder.embed_tokens.weight":{"dtype":"F64","shape":[20,4],"data_offsets":[0,640]}}"#;
    fs::write(place.path().join("model.safetensors"), safetensors(header, &[0; 640])).unwrap();
    let error = Checkpoint::open(place.path()).unwrap().validate().unwrap_err();
    assert!(error.to_string().contains("expected F32, F16 or BF16, found F64"), "{error}");
    let found = inspect(place.path()).unwrap();
    assert_eq!(found.faults.len(), found.config.tensor_shapes().len());
    let output = place.path().join("out");
    assert!(convert(place.path(), &output, ConvertOptions::default()).is_err());
    assert!(!output.exists());
}

#[test]
fn files_that_are_not_there() {
    assert_eq!(error("no/such/model").kind(), ErrorKind::NotFound);
    let empty = directory(&[]);
    assert!(error(empty.path()).to_string().contains("no model.safetensors, pytorch_model.bin"));
    let lone = directory(&[("model.safetensors", b"")]);
    fs::remove_file(lone.path().join("config.json")).unwrap();
    fs::copy(fixture("safetensors/model.safetensors"), lone.path().join("model.safetensors")).unwrap();
    let error = error(lone.path());
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("config.json"), "{error}");
}

#[test]
fn flax_files_that_are_damaged() {
    let whole = fs::read(fixture("flax/flax_model.msgpack")).unwrap();
    for length in [1, 20, whole.len() / 2, whole.len() - 1] {
        assert!(bytes_error(whole[..length].to_vec()).contains("truncated"), "{length}");
    }
    let mut longer = whole;
    longer.push(0);
    assert!(bytes_error(longer).contains("1 bytes after the end"));
    let deep = [&b"\x81\xa1a"[..]; 99].concat();
    assert!(bytes_error(deep).contains("nested deeper than"));
    // A map of 2^32 - 1 entries in 6 bytes.
    assert!(bytes_error(b"\xdf\xff\xff\xff\xff\xa0".to_vec()).contains("truncated"));
}
