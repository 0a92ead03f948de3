//! The parts of a tokenizer.json that are looked at before the `tokenizers` crate is trusted with them.
//!
//! That crate panics on some settings of parts that no OPT needs. Known parts with known settings pass; the rest is
//! refused by name.

use super::files::bad;
use crate::{Error, ErrorKind, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

fn refuse(part: &str, value: &Value) -> Error {
    let name = value.get("type").unwrap_or(value);
    Error::new(ErrorKind::Unsupported, format_args!("tokenizer.json: {part} {name} is not supported"))
}

fn each(part: &Value, key: &str, check: fn(&Value) -> Result<()>) -> Result<()> {
    part.get(key).and_then(Value::as_array).into_iter().flatten().try_for_each(check)
}

/// Refuses normalizers that can fail: SentencePiece's compiled table, and patterns that may match nothing at all.
pub(super) fn check_normalizer(normalizer: &Value) -> Result<()> {
    if normalizer.is_null() {
        return Ok(());
    }
    let filled =
        |pointer: &str| normalizer.pointer(pointer).and_then(Value::as_str).is_some_and(|s| !s.is_empty());
    match normalizer.get("type").and_then(Value::as_str) {
        Some(
            "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "StripAccents" | "Nmt" | "Strip"
            | "BertNormalizer",
        ) => Ok(()),
        Some("Prepend") if filled("/prepend") => Ok(()),
        Some("Replace") if filled("/pattern/String") => Ok(()),
        Some("Sequence") => each(normalizer, "normalizers", check_normalizer),
        _ => Err(refuse("normalizer", normalizer)),
    }
}

/// Refuses pre-tokenizers that can fail (FixedLength of nothing) or are not known.
pub(super) fn check_pre_tokenizer(pre_tokenizer: &Value) -> Result<()> {
    if pre_tokenizer.is_null() {
        return Ok(());
    }
    match pre_tokenizer.get("type").and_then(Value::as_str) {
        Some("ByteLevel" | "Split" | "Digits" | "Punctuation" | "Whitespace" | "WhitespaceSplit") => Ok(()),
        Some("Metaspace" | "BertPreTokenizer" | "CharDelimiterSplit" | "UnicodeScripts") => Ok(()),
        Some("Sequence") => each(pre_tokenizer, "pretokenizers", check_pre_tokenizer),
        _ => Err(refuse("pre-tokenizer", pre_tokenizer)),
    }
}

/// Refuses decoders that can fail.
pub(super) fn check_decoder(decoder: &Value) -> Result<()> {
    if decoder.is_null() {
        return Ok(());
    }
    match decoder.get("type").and_then(Value::as_str) {
        Some("ByteLevel" | "Fuse" | "ByteFallback" | "WordPiece" | "Metaspace" | "BPEDecoder" | "CTC") => {
            Ok(())
        }
        Some("Replace") if decoder.pointer("/pattern/String").is_some() => Ok(()),
        // Cutting at the end of a shorter token underflows.
        Some("Strip") if decoder.get("stop").and_then(Value::as_u64) == Some(0) => Ok(()),
        Some("Sequence") => each(decoder, "decoders", check_decoder),
        _ => Err(refuse("decoder", decoder)),
    }
}

/// The ids that a post-processor puts around one text.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Around {
    pub(super) prefix: Vec<u32>,
    pub(super) suffix: Vec<u32>,
}

impl Around {
    pub(super) fn read(processor: &Value) -> Result<Self> {
        let Some(processor) = processor.as_object() else { return Ok(Self::default()) };
        match processor.get("type").and_then(Value::as_str) {
            Some("ByteLevel") => Ok(Self::default()), // it only moves offsets
            Some("TemplateProcessing") => Self::template(processor),
            Some("RobertaProcessing" | "BertProcessing") => {
                let id = |key| {
                    let id = processor.get(key).and_then(|pair| pair.get(1)).and_then(Value::as_u64);
                    id.and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
                        bad(format_args!("tokenizer.json: the post-processor lacks an id for {key}"))
                    })
                };
                Ok(Self { prefix: vec![id("cls")?], suffix: vec![id("sep")?] })
            }
            Some("Sequence") => {
                let mut around = Self::default();
                for inner in processor.get("processors").and_then(Value::as_array).into_iter().flatten() {
                    let Self { mut prefix, suffix } = Self::read(inner)?;
                    prefix.append(&mut around.prefix);
                    around.prefix = prefix;
                    around.suffix.extend(suffix);
                }
                Ok(around)
            }
            kind => Err(bad(format_args!("tokenizer.json: unknown post-processor {kind:?}"))),
        }
    }

    fn template(processor: &Map<String, Value>) -> Result<Self> {
        let mut around = Self::default();
        let mut seen_text = false;
        for piece in processor.get("single").and_then(Value::as_array).into_iter().flatten() {
            if piece.pointer("/Sequence/id").and_then(Value::as_str) == Some("A") && !seen_text {
                seen_text = true;
            } else if let Some(name) = piece.pointer("/SpecialToken/id").and_then(Value::as_str) {
                let ids =
                    processor.get("special_tokens").and_then(|s| s.get(name)).and_then(|s| s.get("ids"));
                let ids: Vec<u32> = ids.and_then(|ids| Vec::deserialize(ids).ok()).ok_or_else(|| {
                    bad(format_args!("tokenizer.json: the post-processor has no ids for {name:?}"))
                })?;
                if seen_text { around.suffix.extend(ids) } else { around.prefix.extend(ids) }
            } else {
                return Err(bad(format_args!(
                    "tokenizer.json: the post-processor cannot place {piece} around a text"
                )));
            }
        }
        match seen_text {
            true => Ok(around),
            false => Err(bad("tokenizer.json: the post-processor has no place for the text")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn post_processors() {
        let template = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}});
        let roberta = json!({"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]});
        let sequence = json!({"type": "Sequence", "processors": [{"type": "ByteLevel"}, roberta, template]});
        let around = |v: &Value| Around::read(v).map(|a| (a.prefix, a.suffix)).map_err(|e| e.to_string());
        assert_eq!(around(&template), Ok((vec![2], vec![])));
        assert_eq!(around(&roberta), Ok((vec![0], vec![2])));
        assert_eq!(around(&sequence), Ok((vec![2, 0], vec![2])));
        assert_eq!(around(&Value::Null), Ok((vec![], vec![])));

        let mut broken = template.clone();
        broken["special_tokens"] = json!({});
        assert_eq!(around(&broken), Err("tokenizer.json: the post-processor has no ids for \"</s>\"".into()));
        broken = template.clone();
        broken["single"][1]["Sequence"]["id"] = json!("B");
        assert!(around(&broken).is_err());
    }
}
