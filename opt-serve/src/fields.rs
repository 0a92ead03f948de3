//! The fields of a request, taken one by one, so that each refusal can name its field.

use crate::error::ApiError;
use axum::http::StatusCode;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// What is left of a request's JSON object.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    pub(crate) fn new(body: Value) -> Result<Self, ApiError> {
        match body {
            Value::Object(map) => Ok(Self(map)),
            other => {
                let message = format!("body: expected a JSON object, found {}", short(&other));
                Err(ApiError::new(StatusCode::BAD_REQUEST, Some("invalid_value"), message))
            }
        }
    }

    /// A field; null is as if it were not there.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &mut self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => read(&value).map(Some).ok_or_else(|| wrong(name, expected, &value)),
        }
    }

    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.typed(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub(crate) fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    pub(crate) fn whole(
        &mut self,
        name: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, ApiError> {
        let expected = if *range.end() == usize::MAX {
            format!("a whole number of at least {}", range.start())
        } else {
            format!("a whole number from {} to {}", range.start(), range.end())
        };
        self.typed(name, &expected, |value| {
            value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n))
        })
    }

    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let expected = if *range.end() == f64::INFINITY {
            format!("a number of at least {}", range.start())
        } else {
            format!("a number from {} to {}", range.start(), range.end())
        };
        self.typed(name, &expected, |value| {
            value.as_f64().filter(|n| range.contains(n)).map(|n| n as f32).filter(|n| n.is_finite())
        })
    }

    /// A string, or a list of at most `most` of them; none of them empty.
    pub(crate) fn texts(&mut self, name: &str, most: usize, longest: usize) -> Result<Vec<String>, ApiError> {
        let expected = format!("a string or a list of at most {most} strings, none of them empty");
        let texts = match self.take(name) {
            None => return Ok(Vec::new()),
            Some(Value::String(text)) => vec![text],
            Some(Value::Array(list)) if list.len() > most => {
                return Err(ApiError::invalid(
                    name,
                    format!("{name}: expected {expected}, found {}", list.len()),
                ));
            }
            Some(Value::Array(list)) => {
                let texts =
                    list.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
                texts.ok_or_else(|| wrong(name, &expected, &Value::Array(list)))?
            }
            Some(other) => return Err(wrong(name, &expected, &other)),
        };
        if let Some(text) = texts.iter().find(|text| text.is_empty() || text.len() > longest) {
            let message = format!("{name}: expected strings of 1 to {longest} bytes, found {}", text.len());
            return Err(ApiError::invalid(name, message));
        }
        Ok(texts)
    }

    /// The fields that `names` has, as an object of their own.
    pub(crate) fn take_all(&mut self, names: &[&str]) -> Map<String, Value> {
        names.iter().filter_map(|name| self.take(name).map(|value| ((*name).to_owned(), value))).collect()
    }

    /// Refuses what is left but for `ignored`; `known` are the names that might have been meant.
    pub(crate) fn finish(self, ignored: &[&str], known: &[&[&str]]) -> Result<(), ApiError> {
        let Some(name) = self.0.keys().find(|name| !ignored.contains(&name.as_str())) else { return Ok(()) };
        let near = known
            .iter()
            .copied()
            .flatten()
            .map(|known| (strsim::jaro_winkler(name, known), *known))
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .filter(|(likeness, _)| *likeness > 0.8);
        let shown: String = name.chars().take(60).collect();
        let message = match near {
            Some((_, near)) => format!("unknown field {shown:?}: did you mean {near:?}?"),
            None => format!("unknown field {shown:?}"),
        };
        Err(ApiError::new(StatusCode::BAD_REQUEST, Some("unknown_parameter"), message).param(shown))
    }
}

/// 400 for a value of another type or out of range.
pub(crate) fn wrong(name: &str, expected: &str, found: &Value) -> ApiError {
    ApiError::invalid(name, format!("{name}: expected {expected}, found {}", short(found)))
}

/// A value in a message. Texts are not told, only that they are texts: messages are logged, texts of users are not.
pub(crate) fn short(value: &Value) -> String {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) => format!("a string of {} bytes", text.len()),
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(map) => format!("an object of {} fields", map.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn fields_are_named_in_refusals() {
        let mut fields =
            Fields::new(json!({"n": -1, "temperature": "hot", "stop": ["a", ""], "top": 1})).unwrap();
        let message = |error: ApiError| (error.body.error.message, error.body.error.param.unwrap());
        assert_eq!(
            message(fields.whole("n", 1..=8).unwrap_err()),
            ("n: expected a whole number from 1 to 8, found -1".into(), "n".into())
        );
        let (text, _) = message(fields.number("temperature", 0.0..=2.0).unwrap_err());
        assert_eq!(text, "temperature: expected a number from 0 to 2, found a string of 3 bytes");
        assert!(fields.texts("stop", 4, 10).is_err());
        let (text, param) = message(fields.finish(&["user"], &[&["top_p", "prompt"]]).unwrap_err());
        assert_eq!(
            (text.as_str(), param.as_str()),
            ("unknown field \"top\": did you mean \"top_p\"?", "top")
        );
    }
}
