use crate::{assert_is_the_model, fixture};
use opt_backend::DType;
use opt_core::{
    CancelToken, ErrorKind,
    checkpoint::{Checkpoint, ConvertOptions, Format, convert},
};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{fs, ops::ControlFlow, path::Path};

fn no_leftovers(directory: &Path, expected: &[&str]) {
    let mut found: Vec<_> =
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    assert_eq!(found, expected);
}

#[test]
fn every_format_converts_to_one_safetensors() {
    for name in
        ["pickle", "pickle-sharded", "pickle-odd", "safetensors-sharded", "prefix-blip", "flax-chunked"]
    {
        let place = tempfile::tempdir().unwrap();
        let output = place.path().join("out");
        let done = convert(fixture(name), &output, ConvertOptions::default()).unwrap();
        assert_is_the_model(&Checkpoint::open(&output).unwrap(), |v| v);
        // As the library that defines the format reads it: names of transformers, no tied head, and says "pt".
        let bytes = fs::read(output.join("model.safetensors")).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
        let names = header.tensors();
        assert!(names.contains_key("model.decoder.layers.0.self_attn.q_proj.weight"));
        assert!(!names.contains_key("lm_head.weight"), "{name}");
        assert_eq!(done.tensors, names.len());
        no_leftovers(place.path(), &["out"]);
    }
}

#[test]
fn shards_and_their_index() {
    let place = tempfile::tempdir().unwrap();
    let output = place.path().join("out");
    convert(fixture("pickle"), &output, ConvertOptions::default().shard_size(1000)).unwrap();
    assert_is_the_model(&Checkpoint::open(&output).unwrap(), |v| v);
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(output.join("model.safetensors.index.json")).unwrap()).unwrap();
    let (parameters, files) =
        (&index["metadata"]["total_parameters"], fs::read_dir(&output).unwrap().count());
    assert_eq!(parameters.as_u64().unwrap() * 2, index["metadata"]["total_size"].as_u64().unwrap());
    for shard in fs::read_dir(&output).unwrap().map(|e| e.unwrap().path()) {
        if shard.extension().is_some_and(|e| e == "safetensors") {
            let bytes = fs::read(&shard).unwrap();
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            assert!(tensors.tensors().iter().map(|(_, t)| t.data().len()).sum::<usize>() <= 1000);
        }
    }
    // Besides the shards: the index and config.json.
    let shards = files - 2;
    assert!(shards >= 3, "{shards} shards");
    assert!(output.join(format!("model-{shards:05}-of-{shards:05}.safetensors")).exists());
}

#[test]
fn back_to_a_pickle() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("pytorch_model.bin");
    convert(fixture("safetensors"), &file, ConvertOptions::default()).unwrap();
    let checkpoint = Checkpoint::open(&file).unwrap();
    assert_is_the_model(&checkpoint, |v| v);
    assert!(checkpoint.tensors().any(|info| info.name == "lm_head.weight"));
    no_leftovers(place.path(), &["config.json", "generation_config.json", "pytorch_model.bin"]);
    let shards = place.path().join("shards");
    let options = ConvertOptions::default().format(Format::Pickle).shard_size(700);
    convert(fixture("safetensors"), &shards, options).unwrap();
    assert_is_the_model(&Checkpoint::open(&shards).unwrap(), |v| v);
    assert!(shards.join("pytorch_model.bin.index.json").exists());
}

#[test]
fn another_number_format_rounds_to_nearest_even_and_says_so_in_the_config() {
    let place = tempfile::tempdir().unwrap();
    let output = place.path().join("bf16");
    convert(fixture("pickle-f32"), &output, ConvertOptions::default().dtype(DType::BF16)).unwrap();
    let checkpoint = Checkpoint::open(&output).unwrap();
    // `safetensors-bf16` is torch's own rounding of the same model.
    let theirs = Checkpoint::open(fixture("safetensors-bf16")).unwrap();
    for info in theirs.tensors() {
        let (ours, theirs) =
            [&checkpoint, &theirs].map(|c| c.tensor(&info.name, &info.shape).unwrap()).into();
        assert_eq!(ours.bytes(), theirs.bytes(), "{}", info.name);
    }
    assert_eq!(checkpoint.config().dtype.as_deref(), Some("bfloat16"));
    let wide = place.path().join("f32");
    convert(&output, &wide, ConvertOptions::default().dtype(DType::F32)).unwrap();
    assert_is_the_model(&Checkpoint::open(&wide).unwrap(), |v| half::bf16::from_f32(v).to_f32());
}

#[test]
fn what_exists_is_not_overwritten() {
    let place = tempfile::tempdir().unwrap();
    let output = place.path().join("out");
    fs::create_dir(&output).unwrap();
    convert(fixture("pickle"), &output, ConvertOptions::default()).expect("an empty directory is fine");
    for output in [output.clone(), output.join("model.safetensors")] {
        let error = convert(fixture("pickle"), &output, ConvertOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Option);
        assert!(error.to_string().ends_with("exists already and is not overwritten"), "{error}");
    }
    no_leftovers(place.path(), &["out"]);
}

#[test]
fn contradictory_options_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    for (output, options, message) in [
        (at("a.safetensors"), ConvertOptions::default().shard_size(1), "cannot have a shard size"),
        (at("a.safetensors"), ConvertOptions::default().format(Format::Pickle), "extension is not that"),
        (at("a"), ConvertOptions::default().shard_size(0), "above 0"),
        (at("a"), ConvertOptions::default().format(Format::Flax), "not supported"),
        (at("no/such/a"), ConvertOptions::default(), "no such directory to write into"),
    ] {
        let error = convert(fixture("pickle"), output, options).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
    }
    no_leftovers(place.path(), &[]);
}

#[test]
fn progress_ends_at_the_total_and_can_cancel() {
    let place = tempfile::tempdir().unwrap();
    let mut last = (0, 1);
    let listen = |p: opt_core::Progress<'_>| {
        assert!(p.done > last.0 && !p.item.is_empty());
        last = (p.done, p.total);
        ControlFlow::Continue(())
    };
    convert(fixture("pickle"), place.path().join("a"), ConvertOptions::default().progress(listen)).unwrap();
    assert_eq!(last.0, last.1);

    let mut calls = 0;
    let stop = |_: opt_core::Progress<'_>| {
        calls += 1;
        if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let options = ConvertOptions::default().progress(stop);
    let error = convert(fixture("pickle"), place.path().join("b"), options).unwrap_err();
    assert_eq!((error.kind(), calls), (ErrorKind::Cancelled, 3));
    let token = CancelToken::new();
    let elsewhere = token.clone();
    let stop = move |_: opt_core::Progress<'_>| {
        elsewhere.cancel();
        ControlFlow::Continue(())
    };
    let options = ConvertOptions::default().cancel(token).progress(stop);
    let error = convert(fixture("pickle"), place.path().join("c.bin"), options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    no_leftovers(place.path(), &["a"]);
}

const CONFIG: &str = r#"{"model_type": "opt", "vocab_size": 3, "hidden_size": 2, "num_hidden_layers": 1,
    "num_attention_heads": 1, "ffn_dim": 2, "max_position_embeddings": 2, "bos_token_id": 0, "eos_token_id": 0}"#;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the numbers (NaN included), safetensors -> pickle shards -> safetensors keeps every bit and every name.
    #[test]
    fn bits_survive_a_round_trip(seed: u64, wide: bool, shard_size in 1u64..200) {
        let place = tempfile::tempdir().unwrap();
        let input = place.path().join("input");
        fs::create_dir(&input).unwrap();
        fs::write(input.join("config.json"), CONFIG).unwrap();
        let config = opt_core::config::OptConfig::from_json(CONFIG).unwrap();
        let (dtype, size) = if wide { (Dtype::F32, 4) } else { (Dtype::F16, 2) };
        let mut state = seed;
        let tensors: Vec<_> = config.tensor_shapes().into_iter().map(|(name, shape)| {
            let bytes: Vec<u8> = (0..shape.iter().product::<usize>() * size).map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            }).collect();
            (format!("decoder.{name}"), shape, bytes)
        }).collect();
        let views = tensors.iter().map(|(n, s, b)| (n, TensorView::new(dtype, s.clone(), b).unwrap()));
        safetensors::serialize_to_file(views, None, &input.join("model.safetensors")).unwrap();

        let (pickle, output) = (place.path().join("pickle"), place.path().join("out.safetensors"));
        let options = ConvertOptions::default().format(Format::Pickle).shard_size(shard_size);
        convert(&input, &pickle, options).unwrap();
        convert(&pickle, &output, ConvertOptions::default()).unwrap();
        let file = fs::read(&output).unwrap();
        let file = SafeTensors::deserialize(&file).unwrap();
        prop_assert_eq!(file.len(), tensors.len());
        for (name, shape, bytes) in &tensors {
            let tensor = file.tensor(&format!("model.{name}")).unwrap();
            prop_assert_eq!((tensor.shape(), tensor.data(), tensor.dtype()), (&shape[..], &bytes[..], dtype));
        }
    }
}

#[test]
fn no_weights_beside_another_model_s_config() {
    let place = tempfile::tempdir().unwrap();
    let config = fs::read_to_string(fixture("pickle").join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["do_layer_norm_before"] =
        serde_json::json!(!config["do_layer_norm_before"].as_bool().unwrap_or(true));
    fs::write(place.path().join("config.json"), config.to_string()).unwrap();
    let error = convert(fixture("pickle"), place.path().join("model.safetensors"), ConvertOptions::default());
    let error = error.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Option);
    assert!(error.to_string().contains("config.json: is another model's"), "{error}");
    no_leftovers(place.path(), &["config.json"]);
}
