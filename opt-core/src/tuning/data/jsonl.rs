//! One line of a JSONL file.

use crate::{Error, ErrorKind, Result};
use serde_json::{Map, Value};

/// What a line says.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::tuning) enum Line {
    /// `{"text": "..."}`
    Text(String),
    /// `{"prompt": "...", "completion": "..."}`
    Pair { prompt: String, completion: String },
    /// `{"ids": [...]}`
    Ids(Vec<u32>),
}

const EXPECTED: &str =
    r#"expected {"text": "..."}, {"prompt": "...", "completion": "..."} or {"ids": [...]}"#;

fn refuse<T>(message: impl std::fmt::Display) -> Result<T> {
    Err(Error::new(ErrorKind::Prompt, message))
}

/// Reads a line; other keys than the known ones are nobody's business.
pub(in crate::tuning) fn parse(line: &str) -> Result<Line> {
    let value: Value = serde_json::from_str(line)
        .map_err(|e| Error::because(ErrorKind::Prompt, format_args!("{EXPECTED}, found no JSON"), e))?;
    let Value::Object(map) = value else {
        return refuse(format_args!("{EXPECTED}, found {}", kind(&value)));
    };
    let has = |key: &str| map.contains_key(key);
    match [has("text"), has("prompt") || has("completion"), has("ids")] {
        [true, false, false] => Ok(Line::Text(string(&map, "text")?)),
        [false, true, false] => {
            Ok(Line::Pair { prompt: string(&map, "prompt")?, completion: string(&map, "completion")? })
        }
        [false, false, true] => ids(&map).map(Line::Ids),
        [false, false, false] => refuse(format_args!("{EXPECTED}, found {}", keys(&map))),
        _ => refuse(format_args!("{EXPECTED}, and one of these alone, found {}", keys(&map))),
    }
}

pub(super) fn keys(map: &Map<String, Value>) -> String {
    if map.is_empty() {
        return "no keys".to_owned();
    }
    // In one order, whether or not some crate makes maps keep the file's. A line may have any number of them.
    let mut all: Vec<&String> = map.keys().collect();
    all.sort_unstable();
    let shown: Vec<String> = all.iter().take(8).map(|key| format!("{key:?}")).collect();
    format!("the keys {}{}", shown.join(", "), if map.len() > 8 { ", ..." } else { "" })
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn string(map: &Map<String, Value>, key: &str) -> Result<String> {
    match map.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => refuse(format_args!("{key:?}: expected a string, found {}", kind(other))),
        None => refuse(format_args!("{EXPECTED}, found no {key:?} beside the other")),
    }
}

pub(super) fn ids(map: &Map<String, Value>) -> Result<Vec<u32>> {
    let Some(Value::Array(values)) = map.get("ids") else {
        let found = map.get("ids").map_or("nothing", kind);
        return refuse(format_args!("\"ids\": expected an array of token ids, found {found}"));
    };
    let id = |value: &Value| match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok(id),
        None if value.is_number() => refuse(format_args!("\"ids\": expected token ids, found {value}")),
        None => refuse(format_args!("\"ids\": expected token ids, found {}", kind(value))),
    };
    values.iter().map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let text = |s: &str| s.to_owned();
        assert_eq!(parse(r#"{"text": "a\nb", "id": 7}"#).unwrap(), Line::Text(text("a\nb")));
        let pair = Line::Pair { prompt: text("a"), completion: text(" b") };
        assert_eq!(parse(r#"{"completion": " b", "prompt": "a"}"#).unwrap(), pair);
        assert_eq!(parse(r#" {"ids": [2, 7]} "#).unwrap(), Line::Ids(vec![2, 7]));
    }

    #[test]
    fn lines_that_say_nothing() {
        for (line, expected) in [
            ("", "found no JSON: EOF"),
            ("the text", "found no JSON: expected"),
            (r#"{"text": "a"} {"text": "b"}"#, "found no JSON: trailing characters"),
            ("[1, 2]", "found an array"),
            ("\"text\"", "found a string"),
            ("{}", "found no keys"),
            (r#"{"txt": "a", "n": 1}"#, r#"found the keys "n", "txt""#),
            (r#"{"text": "a", "ids": [1]}"#, r#"one of these alone, found the keys "ids", "text""#),
            (r#"{"text": "a", "prompt": "b"}"#, "one of these alone"),
            (r#"{"prompt": "b"}"#, r#"found no "completion" beside the other"#),
            (r#"{"completion": "b"}"#, r#"found no "prompt" beside the other"#),
            (r#"{"text": 7}"#, r#""text": expected a string, found a number"#),
            (r#"{"text": null}"#, r#""text": expected a string, found null"#),
            (r#"{"prompt": ["a"], "completion": "b"}"#, r#""prompt": expected a string, found an array"#),
            (r#"{"ids": "2 7"}"#, r#""ids": expected an array of token ids, found a string"#),
            (r#"{"ids": [2, "7"]}"#, r#""ids": expected token ids, found a string"#),
            (r#"{"ids": [2, -7]}"#, r#""ids": expected token ids, found -7"#),
            (r#"{"ids": [2, 1.5]}"#, r#""ids": expected token ids, found 1.5"#),
            (r#"{"ids": [4294967296]}"#, r#""ids": expected token ids, found 4294967296"#),
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Prompt);
            assert!(error.to_string().contains(expected), "{line}: {error}");
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    }
}
