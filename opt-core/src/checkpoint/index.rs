//! `*.index.json`: which shard holds which tensor.

use super::{
    entry::{fail, shown},
    json::{self, Unique},
};
use crate::Result;
use serde::Deserialize;
use std::path::{Component, Path};

#[derive(Deserialize)]
struct File {
    weight_map: Unique<String>,
}

/// A shard index: tensor names as the shards have them, each with the name of its file.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) weight_map: Vec<(String, String)>,
}

impl Index {
    /// Reads an index and refuses file names that would lead out of its directory.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let file: File = serde_json::from_str(text).map_err(|e| json::error("index", &e))?;
        let weight_map = file.weight_map.0;
        if weight_map.is_empty() {
            return fail("weight_map: expected at least one tensor");
        }
        match weight_map.iter().find(|(_, file)| !is_plain(file)) {
            None => Ok(Self { weight_map }),
            Some((tensor, file)) => fail(format_args!(
                "weight_map: expected the name of a file beside the index for {}, found {}",
                shown(tensor),
                shown(file)
            )),
        }
    }

    /// The files named, each once, in the order of their names.
    pub(super) fn files(&self) -> Vec<&str> {
        let mut files: Vec<&str> = self.weight_map.iter().map(|(_, file)| file.as_str()).collect();
        files.sort_unstable();
        files.dedup();
        files
    }
}

/// One path component that is a name: no directory, no drive, on any system.
fn is_plain(file: &str) -> bool {
    let mut components = Path::new(file).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(name)), None) if name == file)
        && !file.contains(['/', '\\', ':', '\0'])
}
