//! The files of a tokenizer and what they say together.

use super::{
    Inner, bpe,
    parts::{self, Around},
};
use crate::{Error, ErrorKind, Result};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::OnceLock,
};
use tokenizers::{AddedToken, DecoderWrapper, PostProcessorWrapper, PreTokenizerWrapper};

/// The contents of a tokenizer's files. Either `tokenizer_json`, or `vocab_json` and `merges_txt`, must be there.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct TokenizerFiles {
    /// tokenizer.json
    pub tokenizer_json: Option<Vec<u8>>,
    /// vocab.json
    pub vocab_json: Option<Vec<u8>>,
    /// merges.txt
    pub merges_txt: Option<Vec<u8>>,
    /// tokenizer_config.json
    pub tokenizer_config_json: Option<Vec<u8>>,
    /// special_tokens_map.json
    pub special_tokens_map_json: Option<Vec<u8>>,
    /// added_tokens.json
    pub added_tokens_json: Option<Vec<u8>>,
}

impl TokenizerFiles {
    /// Reads what is there of these files in `dir`. `tokenizer.json` goes before `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when `dir` holds no tokenizer, [`ErrorKind::Tokenizer`] when it holds half of one,
    /// [`ErrorKind::Io`] when reading fails.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut files = Self::configs(dir)?;
        files.tokenizer_json = read(dir.join("tokenizer.json"))?;
        if files.tokenizer_json.is_some() {
            return Ok(files);
        }
        files.vocab_json = read(dir.join("vocab.json"))?;
        files.merges_txt = read(dir.join("merges.txt"))?;
        let half = |has, lacks| {
            let message = format!("{}: has {has} but not {lacks}, expected both", dir.display());
            Err(Error::new(ErrorKind::Tokenizer, message))
        };
        match (&files.vocab_json, &files.merges_txt) {
            (Some(_), Some(_)) => Ok(files),
            (Some(_), None) => half("vocab.json", "merges.txt"),
            (None, Some(_)) => half("merges.txt", "vocab.json"),
            (None, None) => Err(Error::new(
                ErrorKind::NotFound,
                format_args!(
                    "{}: no tokenizer, expected tokenizer.json, or vocab.json and merges.txt",
                    dir.display()
                ),
            )),
        }
    }

    /// Reads a tokenizer.json at `path` and the configs beside it.
    pub(super) fn read_file(path: &Path) -> Result<Self> {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut files = Self::configs(dir)?;
        files.tokenizer_json = read(path.to_owned())?;
        if files.tokenizer_json.is_none() {
            return Err(Error::new(ErrorKind::NotFound, format_args!("{}: no such file", path.display())));
        }
        Ok(files)
    }

    fn configs(dir: &Path) -> Result<Self> {
        Ok(Self {
            tokenizer_config_json: read(dir.join("tokenizer_config.json"))?,
            special_tokens_map_json: read(dir.join("special_tokens_map.json"))?,
            added_tokens_json: read(dir.join("added_tokens.json"))?,
            ..Self::default()
        })
    }
}

fn read(path: PathBuf) -> Result<Option<Vec<u8>>> {
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(Error::because(ErrorKind::Io, path.display(), e)),
    }
}

pub(super) fn bad(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Tokenizer, message)
}

/// What of tokenizer.json is read before the `tokenizers` crate reads it. That crate panics where one of these parts
/// is not valid JSON to the last escape, so all of them are parsed here.
#[derive(Deserialize)]
struct Head {
    model: ModelHead,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
}

#[derive(Deserialize)]
struct ModelHead {
    #[serde(rename = "type")]
    kind: Option<String>,
}

pub(super) fn build(files: &TokenizerFiles) -> Result<Inner> {
    let config = object(files.tokenizer_config_json.as_deref(), "tokenizer_config.json")?;
    let map = object(files.special_tokens_map_json.as_deref(), "special_tokens_map.json")?;
    let added = object(files.added_tokens_json.as_deref(), "added_tokens.json")?;
    let add_prefix_space = flag(&config, "add_prefix_space")?;

    let mut around = Around::default();
    let mut hf = match (&files.tokenizer_json, &files.vocab_json, &files.merges_txt) {
        (Some(json), ..) => {
            let head: Head = serde_json::from_slice(json)
                .map_err(|e| Error::because(ErrorKind::Tokenizer, "tokenizer.json is damaged", e))?;
            match head.model.kind.as_deref() {
                None | Some("BPE") => bpe::check(json)?,
                Some("WordPiece" | "WordLevel") => bpe::check_words(json)?,
                // Unigram counts its own ids; the rest is refused below.
                Some(_) => {}
            }
            parts::check_normalizer(&head.normalizer)?;
            parts::check_pre_tokenizer(&head.pre_tokenizer)?;
            parts::check_decoder(&head.decoder)?;
            around = Around::read(&head.post_processor)?;
            from_json(json, add_prefix_space)?
        }
        (None, Some(vocab), Some(merges)) => {
            bpe::from_vocab_and_merges(vocab, merges, add_prefix_space.unwrap_or(false))?
        }
        _ => return Err(bad("no tokenizer, expected tokenizer.json, or vocab.json and merges.txt")),
    };

    // Bare vocab.json and merges.txt are taken for OPT's.
    let bare = files.tokenizer_json.is_none() && files.tokenizer_config_json.is_none();
    let special = Special::read(&config, &map, &hf, bare)?;
    add_tokens(&mut hf, &config, &added, &special)?;

    let id = |token: &Option<String>| token.as_deref().and_then(|token| hf.token_to_id(token));
    let byte_level = match hf.get_decoder() {
        Some(DecoderWrapper::ByteLevel(_)) => true,
        Some(DecoderWrapper::Sequence(s)) => matches!(s.get_decoders(), [DecoderWrapper::ByteLevel(_)]),
        _ => false,
    };
    Ok(Inner {
        bos: id(&special.bos).or(around.prefix.first().copied()),
        eos: id(&special.eos),
        pad: id(&special.pad),
        unk: id(&special.unk),
        add_bos: flag(&config, "add_bos_token")?.unwrap_or(bare),
        clean_up: flag(&config, "clean_up_tokenization_spaces")?.unwrap_or(false),
        prefix: around.prefix,
        suffix: around.suffix,
        byte_level,
        strings: OnceLock::new(),
        hf,
    })
}

fn from_json(json: &[u8], add_prefix_space: Option<bool>) -> Result<tokenizers::Tokenizer> {
    let mut hf = tokenizers::Tokenizer::from_bytes(json)
        .map_err(|e| Error::because(ErrorKind::Tokenizer, "tokenizer.json is damaged", e))?;
    // Truncation and padding in the file are what its maker used last; transformers overrides both on every call.
    hf.with_truncation(None).map_err(|e| Error::because(ErrorKind::Tokenizer, "tokenizer.json", e))?;
    hf.with_padding(None);
    hf.with_post_processor(None::<PostProcessorWrapper>);
    if let (Some(add), Some(PreTokenizerWrapper::ByteLevel(level))) =
        (add_prefix_space, hf.get_pre_tokenizer())
    {
        let level = level.add_prefix_space(add);
        hf.with_pre_tokenizer(Some(level));
    }
    Ok(hf)
}

/// The special tokens by name.
#[derive(Default)]
struct Special {
    bos: Option<String>,
    eos: Option<String>,
    pad: Option<String>,
    unk: Option<String>,
    others: Vec<String>,
}

impl Special {
    fn read(
        config: &Map<String, Value>,
        map: &Map<String, Value>,
        hf: &tokenizers::Tokenizer,
        bare: bool,
    ) -> Result<Self> {
        // transformers lets the map win unless the config is of the newer kind that lists its added tokens.
        let order = if config.contains_key("added_tokens_decoder") { [config, map] } else { [map, config] };
        let name = |key: &str| -> Result<Option<String>> {
            for file in order {
                if let Some(value) = file.get(key).filter(|v| !v.is_null()) {
                    return content(value).map(Some).map_err(|e| e.at(key));
                }
            }
            Ok(None)
        };
        let opt = |token: &str| Some(token.to_owned()).filter(|t| bare && hf.token_to_id(t).is_some());
        let mut others = Vec::new();
        for value in
            order.iter().filter_map(|file| file.get("additional_special_tokens")?.as_array()).flatten()
        {
            others.push(content(value).map_err(|e| e.at("additional_special_tokens"))?);
        }
        Ok(Self {
            bos: name("bos_token")?.or_else(|| opt("</s>")),
            eos: name("eos_token")?.or_else(|| opt("</s>")),
            pad: name("pad_token")?.or_else(|| opt("<pad>")),
            unk: name("unk_token")?.or_else(|| opt("</s>")),
            others,
        })
    }

    fn all(&self) -> impl Iterator<Item = &String> {
        [&self.bos, &self.eos, &self.unk, &self.pad].into_iter().flatten().chain(&self.others)
    }
}

/// A token's text, from a string or from an object with its properties.
fn content(value: &Value) -> Result<String> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    text.map(str::to_owned).ok_or_else(|| bad(format_args!("expected a token's text, found {value}")))
}

/// Makes the tokens that only the configs name known as units, by rising id, as transformers does after loading.
fn add_tokens(
    hf: &mut tokenizers::Tokenizer,
    config: &Map<String, Value>,
    added: &Map<String, Value>,
    special: &Special,
) -> Result<()> {
    let mut wanted: Vec<(u64, AddedToken)> = Vec::new();
    let is_special = |token: &str| special.all().any(|s| s == token);
    for (id, value) in config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
        let id = id.parse().map_err(|_| {
            bad(format_args!("tokenizer_config.json: added_tokens_decoder: expected an id, found {id:?}"))
        })?;
        let text = content(value).map_err(|e| e.at("tokenizer_config.json: added_tokens_decoder"))?;
        let on = |key| value.get(key).and_then(Value::as_bool).unwrap_or(false);
        let token = AddedToken::from(text.clone(), on("special") || is_special(&text))
            .single_word(on("single_word"))
            .lstrip(on("lstrip"))
            .rstrip(on("rstrip"))
            .normalized(on("normalized"));
        wanted.push((id, token));
    }
    for (text, id) in added {
        let id = id
            .as_u64()
            .ok_or_else(|| bad(format_args!("added_tokens.json: {text:?}: expected an id, found {id}")))?;
        wanted.push((id, AddedToken::from(text.clone(), is_special(text))));
    }
    wanted.sort_by_key(|(id, _)| *id);
    wanted.extend(special.all().map(|text| (u64::MAX, AddedToken::from(text.clone(), true))));
    for (id, token) in wanted {
        let text = token.content.clone();
        let known = hf.get_added_vocabulary().get_vocab().contains_key(&text);
        if text.is_empty() || known {
            continue;
        }
        hf.add_tokens([token])
            .map_err(|e| Error::because(ErrorKind::Tokenizer, "tokens cannot be added", e))?;
        let got = hf.token_to_id(&text).map(u64::from);
        if id != u64::MAX && got != Some(id) {
            tracing::warn!("added token {text:?} should have id {id} but has {got:?}");
        }
    }
    Ok(())
}

/// A JSON object; empty where the file is missing.
fn object(bytes: Option<&[u8]>, name: &str) -> Result<Map<String, Value>> {
    match bytes {
        None => Ok(Map::new()),
        Some(bytes) => serde_json::from_slice(bytes)
            .map_err(|e| Error::because(ErrorKind::Tokenizer, format_args!("{name} is damaged"), e)),
    }
}

fn flag(config: &Map<String, Value>, key: &str) -> Result<Option<bool>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(on)) => Ok(Some(*on)),
        Some(other) => {
            Err(bad(format_args!("tokenizer_config.json: {key}: expected true or false, found {other}")))
        }
    }
}
