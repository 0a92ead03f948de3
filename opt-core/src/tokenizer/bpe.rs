//! Byte-level BPE from `vocab.json` and `merges.txt`, and the checks that the `tokenizers` crate leaves out.

use crate::{Error, ErrorKind, Result};
use serde::Deserialize;
use std::collections::HashMap;
use tokenizers::{
    decoders::byte_level::ByteLevel,
    models::bpe::{BPE, Vocab},
};

/// Ids above this are not believed: tables indexed by id would fill the memory. (The largest vocabularies in use have
/// about 2^18 tokens.)
const MAX_ID: u32 = 1 << 20;

/// The model part of a tokenizer.json whose type is BPE.
#[derive(Deserialize)]
struct BpeFile {
    model: BpeModel,
}

#[derive(Deserialize)]
struct BpeModel {
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    continuing_subword_prefix: Option<String>,
}

/// A merge, as newer and as older files write it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

/// Checks the BPE of a tokenizer.json before the `tokenizers` crate sees it, which trusts that every merge makes a
/// token of the vocabulary and panics where one does not.
pub(super) fn check(tokenizer_json: &[u8]) -> Result<()> {
    let file: BpeFile = serde_json::from_slice(tokenizer_json)
        .map_err(|e| Error::because(ErrorKind::Tokenizer, "tokenizer.json is damaged", e))?;
    let BpeModel { vocab, merges, continuing_subword_prefix } = file.model;
    let prefix = continuing_subword_prefix.unwrap_or_default();
    check_ids(&vocab, "tokenizer.json")?;
    for (i, merge) in merges.iter().enumerate() {
        let pair = match merge {
            Merge::Pair(left, right) => Some((left.as_str(), right.as_str())),
            // The header of merges.txt, which old files carry along.
            Merge::Line(line) if line.starts_with("#version") => continue,
            Merge::Line(line) => line.split_once(' '),
        };
        check_merge(&vocab, pair, &prefix).map_err(|what| {
            Error::new(ErrorKind::Tokenizer, format_args!("tokenizer.json: merge {i} {what}"))
        })?;
    }
    Ok(())
}

/// The model part of a tokenizer.json that is a plain vocabulary (WordPiece, WordLevel).
#[derive(Deserialize)]
struct WordsFile {
    model: WordsModel,
}

#[derive(Deserialize)]
struct WordsModel {
    vocab: HashMap<String, u32>,
}

/// Checks the ids of a tokenizer.json whose model is WordPiece or WordLevel.
pub(super) fn check_words(tokenizer_json: &[u8]) -> Result<()> {
    let file: WordsFile = serde_json::from_slice(tokenizer_json)
        .map_err(|e| Error::because(ErrorKind::Tokenizer, "tokenizer.json is damaged", e))?;
    check_ids(&file.model.vocab, "tokenizer.json")
}

fn check_ids(vocab: &HashMap<String, u32>, file: &str) -> Result<()> {
    match vocab.iter().find(|(_, id)| **id > MAX_ID) {
        Some((token, id)) => Err(Error::new(
            ErrorKind::Tokenizer,
            format_args!("{file}: token {token:?} has id {id}, expected at most {MAX_ID}"),
        )),
        None => Ok(()),
    }
}

fn check_merge(
    vocab: &HashMap<String, u32>,
    pair: Option<(&str, &str)>,
    prefix: &str,
) -> std::result::Result<(), String> {
    let (left, right) = pair.ok_or("is not two tokens")?;
    for part in [left, right] {
        if !vocab.contains_key(part) {
            return Err(format!("names {part:?}, which the vocabulary lacks"));
        }
    }
    // Only what continues a word carries the prefix, and a merge drops it.
    let tail =
        right.strip_prefix(prefix).ok_or_else(|| format!("lacks the prefix {prefix:?} in {right:?}"))?;
    let made = format!("{left}{tail}");
    if !vocab.contains_key(&made) {
        return Err(format!("makes {made:?}, which the vocabulary lacks"));
    }
    Ok(())
}

/// GPT-2's tokenizer from its two files. `add_prefix_space` puts a space before a text that has none.
pub(super) fn from_vocab_and_merges(
    vocab_json: &[u8],
    merges_txt: &[u8],
    add_prefix_space: bool,
) -> Result<tokenizers::Tokenizer> {
    let vocab: HashMap<String, u32> = serde_json::from_slice(vocab_json).map_err(|e| {
        Error::because(ErrorKind::Tokenizer, "vocab.json is damaged, expected an object of token: id", e)
    })?;
    check_ids(&vocab, "vocab.json")?;
    let text = std::str::from_utf8(merges_txt)
        .map_err(|e| Error::because(ErrorKind::Tokenizer, "merges.txt is not UTF-8", e))?;
    let mut merges = Vec::with_capacity(vocab.len());
    for (i, line) in text.lines().enumerate() {
        if line.is_empty() || (i == 0 && line.starts_with("#version")) {
            continue;
        }
        let pair = line.split_once(' ').filter(|(_, right)| !right.contains(' '));
        check_merge(&vocab, pair, "").map_err(|what| {
            Error::new(ErrorKind::Tokenizer, format_args!("merges.txt: line {} {what}", i + 1))
        })?;
        merges.extend(pair.map(|(left, right)| (left.to_owned(), right.to_owned())));
    }
    let vocab: Vocab = vocab.into_iter().collect();
    let model = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(|e| {
        Error::because(ErrorKind::Tokenizer, "vocab.json and merges.txt do not make a tokenizer", e)
    })?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(add_prefix_space, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::new(add_prefix_space, true, true)));
    Ok(tokenizer)
}
