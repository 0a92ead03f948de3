use crate::{assert_is_the_model, fixture, numbers};
use opt_core::{
    ErrorKind,
    checkpoint::{Checkpoint, FileDType, Format, inspect},
};
use std::fs;

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(fixture(name)).unwrap()
}

#[test]
fn every_format_holds_the_same_model() {
    for name in [
        "safetensors",
        "safetensors-sharded",
        "pickle",
        "pickle-sharded",
        "pickle-f32",
        "pickle-odd",
        "opt-model",
        "prefix-peft",
        "prefix-module",
        "prefix-blip",
        "flax",
        "flax-chunked",
    ] {
        eprintln!("{name}");
        assert_is_the_model(&open(name), |v| v);
    }
    assert_is_the_model(&open("safetensors-bf16"), |v| half::bf16::from_f32(v).to_f32());
}

#[test]
fn a_single_file_finds_its_config_beside_it() {
    for name in [
        "safetensors/model.safetensors",
        "pickle/pytorch_model.bin",
        "flax/flax_model.msgpack",
        "safetensors-sharded/model.safetensors.index.json",
        "pickle-sharded/pytorch_model.bin.index.json",
    ] {
        assert_is_the_model(&open(name), |v| v);
    }
}

#[test]
fn bytes_in_memory_hold_the_same_model() {
    for (directory, files) in [
        ("safetensors", &["model.safetensors"][..]),
        ("pickle", &["pytorch_model.bin"]),
        ("flax", &["flax_model.msgpack"]),
        (
            "safetensors-sharded",
            &[
                "model-00001-of-00003.safetensors",
                "model-00002-of-00003.safetensors",
                "model-00003-of-00003.safetensors",
            ],
        ),
    ] {
        let directory = fixture(directory);
        let config = fs::read_to_string(directory.join("config.json")).unwrap();
        let files = files.iter().map(|file| fs::read(directory.join(file)).unwrap()).collect();
        assert_is_the_model(&Checkpoint::from_bytes(&config, files).unwrap(), |v| v);
    }
}

#[test]
fn bytes_at_any_alignment_are_read() {
    let directory = fixture("safetensors");
    let config = fs::read_to_string(directory.join("config.json")).unwrap();
    let file = fs::read(directory.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(file[..8].try_into().unwrap());
    // A longer header moves every tensor: by one byte, no number is aligned.
    let mut moved = (header + 1).to_le_bytes().to_vec();
    moved.extend(&file[8..8 + header as usize]);
    moved.push(b' ');
    moved.extend(&file[8 + header as usize..]);
    assert_is_the_model(&Checkpoint::from_bytes(&config, vec![moved]).unwrap(), |v| v);
}

#[test]
fn an_untied_head_is_a_tensor_of_its_own() {
    let checkpoint = open("untied");
    assert_eq!(checkpoint.validate().unwrap(), []);
    let (head, table) = (checkpoint.tensor("lm_head.weight", &[20, 4]).unwrap(), "embed_tokens.weight");
    assert_ne!(numbers(&head), numbers(&checkpoint.tensor(table, &[20, 4]).unwrap()));
}

#[test]
fn tensors_say_where_they_are() {
    let checkpoint = open("pickle-sharded");
    assert_eq!(checkpoint.format(), Format::Pickle);
    assert_eq!(checkpoint.files().count(), 3);
    let info = checkpoint.tensors().find(|info| info.name == "layers.1.fc1.weight").unwrap();
    assert_eq!(info.stored_name, "model.decoder.layers.1.fc1.weight");
    assert_eq!((info.dtype, &info.shape[..]), (FileDType::F16, &[12, 8][..]));
    assert_eq!(info.file, "pytorch_model-00003-of-00003.bin");
}

#[test]
fn an_optional_tensor_may_be_missing_but_not_of_another_shape() {
    let checkpoint = open("safetensors");
    assert!(checkpoint.optional("layers.9.fc1.weight", &[12, 8]).unwrap().is_none());
    assert!(checkpoint.optional("layers.1.fc1.weight", &[12, 8]).unwrap().is_some());
    let error = checkpoint.optional("layers.1.fc1.weight", &[8, 12]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Checkpoint);
    assert!(error.to_string().contains("expected shape [8, 12], found [12, 8]"), "{error}");
    assert_eq!(checkpoint.tensor("nothing", &[1]).unwrap_err().kind(), ErrorKind::NotFound);
    let vector = checkpoint.tensor("layers.1.fc1.bias", &[12]).unwrap();
    assert!(vector.matrix().unwrap_err().to_string().contains("expected 2 axes"));
}

#[test]
fn inspection_counts_as_torch_does() {
    let found = inspect(fixture("pickle")).unwrap();
    // torch: sum(p.numel() for p in model.parameters()), the tied head once.
    let expected: usize = crate::expected().iter().map(|(_, _, values)| values.len()).sum();
    assert_eq!(found.parameters, expected as u64);
    assert_eq!((found.faults.len(), found.warnings.len()), (0, 0));
    assert_eq!(found.files[0].bytes, fs::metadata(fixture("pickle/pytorch_model.bin")).unwrap().len());
    // lm_head.weight is in the file although it is tied.
    assert_eq!(found.tensors.len(), crate::expected().len() + 1);
    let json = serde_json::to_value(&found).unwrap();
    assert_eq!(json["memory"][2]["dtype"], "f16");
    // 2 layers, keys and values of 8 numbers, 2 bytes each; 6 positions.
    assert_eq!((found.memory[2].cache_per_token, found.memory[2].cache_at_full_context), (64, 384));
    let matrices: u64 =
        crate::expected().iter().filter(|(_, s, _)| s.len() == 2).map(|(_, _, v)| v.len() as u64).sum();
    assert_eq!(found.memory[2].weights, matrices * 2 + (found.parameters - matrices) * 4);
    assert_eq!(found.memory[0].weights, found.parameters * 4);
}

#[test]
fn checkpoints_may_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Checkpoint>();
}
