//! Where the model is.

use crate::{out::Failure, progress::Console};
use std::path::{Path, PathBuf};

/// The model that is used where none is named, below a folder of models.
const DEFAULT: &str = "models/opt-novels";

/// The local path of the model that the user named, or of the default one.
pub(crate) fn find(name: Option<&Path>, console: &Console) -> Result<PathBuf, Failure> {
    if let Some(name) = name {
        return named(name, console);
    }
    if let Some(name) = std::env::var_os("OPT_MODEL").filter(|name| !name.is_empty()) {
        return named(Path::new(&name), console).map_err(|failure| failure.at("OPT_MODEL"));
    }
    let here = PathBuf::from(DEFAULT);
    let mut places = std::iter::once(here).chain(beside_the_executable());
    places.find(|place| place.exists()).ok_or_else(|| {
        Failure::failed(format!(
            "no model: expected --model, OPT_MODEL, or {DEFAULT} here or beside the executable; the repository of \
             this program has that folder, and `opt convert` makes one of a downloaded checkpoint"
        ))
    })
}

/// `models/` beside the executable; for one that cargo built also beside its target directory.
fn beside_the_executable() -> impl Iterator<Item = PathBuf> {
    let executable = std::env::current_exe().and_then(|path| path.canonicalize()).unwrap_or_default();
    let own = executable.parent().map(Path::to_owned);
    let target = executable.ancestors().skip(1).find(|dir| dir.join("CACHEDIR.TAG").exists());
    let repository = target.and_then(Path::parent).map(Path::to_owned);
    own.into_iter().chain(repository).map(|dir| dir.join(DEFAULT))
}

fn named(name: &Path, console: &Console) -> Result<PathBuf, Failure> {
    if name.exists() {
        return Ok(name.to_owned());
    }
    match name.to_str().filter(|name| is_hub_id(name)) {
        Some(id) => download(id, console),
        None => Err(Failure::failed(format!(
            "{}: no such model: expected a directory or a weights file",
            name.display()
        ))),
    }
}

/// `org/name`, perhaps with `@revision`, and not what only a path can be.
fn is_hub_id(name: &str) -> bool {
    let name = name.split_once('@').map_or(name, |(name, _)| name);
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    name.split_once('/').is_some_and(|(org, model)| part(org) && part(model))
}

#[cfg(feature = "hub")]
fn download(id: &str, console: &Console) -> Result<PathBuf, Failure> {
    let bar = console.byte_bar("downloading");
    let hub = opt_core::hub::Hub::from_env()?;
    let snapshot = hub.snapshot(id, &mut |at| bar.show(at), &console.cancel)?;
    drop(bar);
    // A commit never changes, so nobody has to be asked for one.
    if snapshot.unchecked && !id.ends_with(&snapshot.commit) {
        console.warn(&format!("{id}: taken from the cache without asking the hub"));
    }
    Ok(snapshot.path)
}

#[cfg(not(feature = "hub"))]
fn download(id: &str, _console: &Console) -> Result<PathBuf, Failure> {
    Err(Failure::failed(format!(
        "{id}: no such directory or file; to download it from the Hugging Face hub, enable the feature `hub` of this \
         program"
    )))
}

#[cfg(test)]
mod tests {
    use super::is_hub_id;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for id in ["facebook/opt-125m", "facebook/opt-125m@main", "a/b.c@refs/pr/3"] {
            assert!(is_hub_id(id), "{id}");
        }
        for path in ["opt-125m", "./a/b", "../a", "/a/b", "a/b/c", "a/", "/b", "a b/c", "~/b", ""] {
            assert!(!is_hub_id(path), "{path}");
        }
    }
}
