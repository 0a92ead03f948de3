//! Which files of a repository a model needs.

use crate::{Error, ErrorKind, Result};
use serde::Deserialize;
use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::Path,
};

/// Small files, taken where they are there.
const SMALL: [&str; 9] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "quantize_config.json",
    "quant_config.json",
];

/// Weights in the order of preference: a single file of a kind, then its shards.
const WEIGHTS: [(&str, &str); 3] = [
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("flax_model.msgpack", "flax_model.msgpack.index.json"),
];

#[derive(Debug, PartialEq)]
pub(super) struct Wanted {
    /// config.json and other small files.
    pub(super) first: Vec<String>,
    pub(super) weights: Weights,
}

#[derive(Debug, PartialEq)]
pub(super) enum Weights {
    Single(String),
    /// The index, which names the shards.
    Sharded(String),
}

pub(super) fn choose(files: &[String]) -> Result<Wanted> {
    let has = |name: &str| files.iter().any(|file| file == name);
    let missing = |what: &str| Error::new(ErrorKind::NotFound, format_args!("the repository has no {what}"));
    if !has("config.json") {
        return Err(missing("config.json"));
    }
    let small = SMALL.iter().copied().filter(|name| has(name));
    let first = ["config.json"].into_iter().chain(small).map(str::to_owned).collect();
    let weights = WEIGHTS.iter().find_map(|(single, index)| match (has(single), has(index)) {
        (true, _) => Some(Weights::Single((*single).to_owned())),
        (_, true) => Some(Weights::Sharded((*index).to_owned())),
        _ => None,
    });
    let expected =
        "weights, expected model.safetensors, pytorch_model.bin or flax_model.msgpack, single or in shards";
    Ok(Wanted { first, weights: weights.ok_or_else(|| missing(expected))? })
}

/// The shards that the index at `path` names; all must be among `files`.
pub(super) fn shards(path: &Path, files: &[String]) -> Result<Vec<String>> {
    let shards = read_index(path)?;
    match shards.iter().find(|shard| !files.contains(shard)) {
        Some(missing) => Err(Error::new(
            ErrorKind::NotFound,
            format_args!("the index names {missing:?}, which the repository does not have"),
        )),
        None => Ok(shards),
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

fn read_index(path: &Path) -> Result<Vec<String>> {
    let bytes = fs::read(path).map_err(|e| Error::because(ErrorKind::Io, path.display(), e))?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|e| {
        Error::because(ErrorKind::Checkpoint, format_args!("{} is damaged", path.display()), e)
    })?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    match shards.iter().find(|shard| !is_plain_path(shard)) {
        Some(bad) => Err(Error::new(
            ErrorKind::Checkpoint,
            format_args!("{}: names {bad:?}, expected a file below its own directory", path.display()),
        )),
        None => Ok(shards.into_iter().collect()),
    }
}

/// Whether a snapshot directory has a config and all of its weights.
pub(super) fn is_complete(dir: &Path) -> bool {
    let has = |name: &str| dir.join(name).is_file();
    let weights = WEIGHTS.iter().any(|(single, index)| {
        let all_shards =
            || read_index(&dir.join(index)).is_ok_and(|shards| shards.iter().all(|shard| has(shard)));
        has(single) || (has(index) && all_shards())
    });
    has("config.json") && weights
}

/// A relative path with forward slashes that leads nowhere but down, on every platform.
pub(super) fn is_plain_path(path: &str) -> bool {
    path.len() <= 512
        && !path.contains(['\\', ':'])
        && !path.chars().any(char::is_control)
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn weights_by_preference() {
        let weights = |names: &[&str]| choose(&files(names)).map(|w| w.weights).map_err(|e| e.to_string());
        let both = ["config.json", "pytorch_model.bin", "model.safetensors", "tf_model.h5"];
        assert_eq!(weights(&both), Ok(Weights::Single("model.safetensors".into())));
        let shards = ["config.json", "pytorch_model.bin", "model.safetensors.index.json"];
        assert_eq!(weights(&shards), Ok(Weights::Sharded("model.safetensors.index.json".into())));
        assert_eq!(
            weights(&["config.json", "flax_model.msgpack"]),
            Ok(Weights::Single("flax_model.msgpack".into()))
        );
        assert!(weights(&["config.json", "tf_model.h5"]).unwrap_err().contains("no weights, expected"));
        assert_eq!(weights(&["model.safetensors"]), Err("the repository has no config.json".into()));
        let small = choose(&files(&["vocab.json", "model.safetensors", "config.json", "README.md"])).unwrap();
        assert_eq!(small.first, ["config.json", "vocab.json"]);
    }

    #[test]
    fn paths_that_lead_elsewhere() {
        for good in ["a", "a/b.bin", "main", "refs/pr/3", "..a"] {
            assert!(is_plain_path(good), "{good}");
        }
        for bad in [
            "", "/", "/a", "a/", "a//b", "..", "../x", "a/../b", "./a", "a\\b", "..\\b", "C:x", "a\0", "a\nb",
        ] {
            assert!(!is_plain_path(bad), "{bad:?}");
        }
    }
}
