//! Where the rows of a split are: the hub's folders, and plainer places.

use super::TaskSpec;
use crate::rows::ENDINGS;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// The files of a split; empty where there are none. The flag says that one file stands for all splits.
pub(super) fn files(spec: &TaskSpec, root: &Path, split: &str) -> (Vec<PathBuf>, bool) {
    if root.is_file() {
        return (vec![root.to_owned()], true);
    }
    let names = || std::iter::once(&spec.name).chain(&spec.data.names);
    for name in names() {
        let found = of_split(root, name, split);
        if !found.is_empty() {
            return (found, false);
        }
    }
    for name in names() {
        if let Some(file) =
            ENDINGS.iter().map(|ending| root.join(format!("{name}.{ending}"))).find(|f| f.is_file())
        {
            return (vec![file], true);
        }
    }
    // A folder of the task's own with one file in it, that is not by its name another split.
    let splits = ["train", "validation", "test", "dev", split];
    let of_a_split =
        |file: &Path| splits.iter().flat_map(|split| aliases(split)).any(|alias| begins(file, alias));
    for name in names() {
        let inside = readable(&root.join(name));
        if let [only] = &inside[..]
            && !of_a_split(only)
        {
            return (vec![only.clone()], true);
        }
    }
    (Vec::new(), false)
}

/// Places that are looked in, for a message.
pub(super) fn places(spec: &TaskSpec, root: &Path, split: &str) -> String {
    let root = root.display();
    let name = &spec.name;
    format!("{root}/{name}/{split}*.{{{}}}, {root}/{name}_{split}.*, {root}/{name}.*", ENDINGS.join(","))
}

fn aliases(split: &str) -> Vec<&str> {
    match split {
        "train" => vec!["train", "training"],
        "validation" => vec!["validation", "valid", "val", "validation_matched"],
        "test" => vec!["test"],
        other => vec![other],
    }
}

fn of_split(root: &Path, name: &str, split: &str) -> Vec<PathBuf> {
    let (parent, leaf) = name.rsplit_once('/').unwrap_or(("", name));
    for alias in aliases(split) {
        // The hub's: NAME/validation-00000-of-00001.parquet, NAME/data/validation.jsonl, NAME/validation/0000.parquet.
        let own = root.join(name);
        for dir in [own.clone(), own.join("data")] {
            let shards: Vec<PathBuf> =
                readable(&dir).into_iter().filter(|file| begins(file, alias)).collect();
            if let Some(best) = same_ending(shards) {
                return best;
            }
        }
        if let Some(best) = same_ending(readable(&own.join(alias))) {
            return best;
        }
        // PARENT/SPLIT/LEAF_SPLIT.csv, as MMLU was first published; NAME_SPLIT.jsonl; NAME.SPLIT.raw.
        let folder = root.join(parent);
        for ending in ENDINGS {
            let candidates = [
                folder.join(alias).join(format!("{leaf}_{alias}.{ending}")),
                folder.join(alias).join(format!("{leaf}.{ending}")),
                folder.join(format!("{leaf}_{alias}.{ending}")),
                folder.join(format!("{leaf}-{alias}.{ending}")),
                folder.join(format!("{leaf}.{alias}.{ending}")),
            ];
            if let Some(file) = candidates.into_iter().find(|file| file.is_file()) {
                return vec![file];
            }
        }
    }
    Vec::new()
}

/// Files of a folder that rows can be read from, by name.
fn readable(dir: &Path) -> Vec<PathBuf> {
    let known = |path: &PathBuf| {
        path.is_file() && path.extension().and_then(|e| e.to_str()).is_some_and(|e| ENDINGS.contains(&e))
    };
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(known).collect::<BTreeSet<_>>().into_iter().collect()
}

/// Whether the name of a file is that of a split, or of a part of it.
fn begins(file: &Path, split: &str) -> bool {
    let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.strip_prefix(split).is_some_and(|rest| rest.starts_with(['.', '-', '_']))
}

/// Of files in several formats those in the first.
fn same_ending(files: Vec<PathBuf>) -> Option<Vec<PathBuf>> {
    let of = |ending: &&str| {
        let same = files.iter().filter(|file| file.extension().is_some_and(|e| e == *ending));
        Some(same.cloned().collect::<Vec<_>>()).filter(|same| !same.is_empty())
    };
    ENDINGS.iter().find_map(of)
}
