//! How each kind of option stands in generation_config.json.

use super::{EarlyStopping, TokenIds};
use serde_json::Value;
use std::collections::BTreeMap;

/// A value of one option in JSON.
pub(super) trait Field: Sized {
    /// What a file must have there, for the message.
    const EXPECTED: &'static str;
    /// `None` for anything else than that.
    fn read(value: &Value) -> Option<Self>;
    fn write(&self) -> Value;
}

/// The double with the fewest digits that is this float: 0.9 and not 0.8999999761581421, as a user would have
/// written it in Python.
pub(super) fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Field for $type {
            const EXPECTED: &'static str = "a whole number of at least 0";
            fn read(value: &Value) -> Option<Self> {
                value.as_u64().and_then(|v| v.try_into().ok())
            }
            fn write(&self) -> Value {
                (*self as u64).into()
            }
        }
    )*};
}
integers!(usize, u32, u64);

impl Field for bool {
    const EXPECTED: &'static str = "true or false";
    fn read(value: &Value) -> Option<Self> {
        value.as_bool()
    }
    fn write(&self) -> Value {
        (*self).into()
    }
}

impl Field for f64 {
    const EXPECTED: &'static str = "a number";
    fn read(value: &Value) -> Option<Self> {
        value.as_f64()
    }
    fn write(&self) -> Value {
        (*self).into()
    }
}

impl Field for f32 {
    const EXPECTED: &'static str = "a number";
    fn read(value: &Value) -> Option<Self> {
        value.as_f64().map(|v| v as f32).filter(|v| v.is_finite())
    }
    fn write(&self) -> Value {
        // JSON has no infinity; the largest float bans or forces a token just as well.
        decimal(self.clamp(f32::MIN, f32::MAX)).into()
    }
}

impl Field for String {
    const EXPECTED: &'static str = "a text";
    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(str::to_owned)
    }
    fn write(&self) -> Value {
        self.as_str().into()
    }
}

impl Field for Vec<String> {
    const EXPECTED: &'static str = "a list of texts";
    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::String(text) => Some(vec![text.clone()]),
            _ => value.as_array()?.iter().map(String::read).collect(),
        }
    }
    fn write(&self) -> Value {
        self.iter().map(Field::write).collect()
    }
}

impl Field for Vec<u32> {
    const EXPECTED: &'static str = "a list of token ids";
    fn read(value: &Value) -> Option<Self> {
        value.as_array()?.iter().map(u32::read).collect()
    }
    fn write(&self) -> Value {
        self.iter().map(Field::write).collect()
    }
}

impl Field for Vec<Vec<u32>> {
    const EXPECTED: &'static str = "a list of lists of token ids";
    fn read(value: &Value) -> Option<Self> {
        value.as_array()?.iter().map(Field::read).collect()
    }
    fn write(&self) -> Value {
        self.iter().map(Field::write).collect()
    }
}

impl Field for TokenIds {
    const EXPECTED: &'static str = "a token id or a list of token ids";
    fn read(value: &Value) -> Option<Self> {
        u32::read(value).map(Self::One).or_else(|| Field::read(value).map(Self::Many))
    }
    fn write(&self) -> Value {
        match self {
            Self::One(id) => id.write(),
            Self::Many(ids) => ids.write(),
        }
    }
}

impl Field for EarlyStopping {
    const EXPECTED: &'static str = "true, false or \"never\"";
    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(true) => Some(Self::Yes),
            Value::Bool(false) => Some(Self::No),
            Value::String(text) if text == "never" => Some(Self::Never),
            _ => None,
        }
    }
    fn write(&self) -> Value {
        match self {
            Self::Yes => true.into(),
            Self::No => false.into(),
            Self::Never => "never".into(),
        }
    }
}

impl Field for (usize, f32) {
    const EXPECTED: &'static str = "[start, factor]";
    fn read(value: &Value) -> Option<Self> {
        match value.as_array()?.as_slice() {
            [start, factor] => Some((Field::read(start)?, Field::read(factor)?)),
            _ => None,
        }
    }
    fn write(&self) -> Value {
        Value::Array(vec![self.0.write(), self.1.write()])
    }
}

impl Field for BTreeMap<Vec<u32>, f32> {
    // A list of pairs, since the keys of a JSON object are texts.
    const EXPECTED: &'static str = "[[[ids], bias], ...]";
    fn read(value: &Value) -> Option<Self> {
        let pair = |value: &Value| match value.as_array()?.as_slice() {
            [ids, bias] => Some((Field::read(ids)?, Field::read(bias)?)),
            _ => None,
        };
        value.as_array()?.iter().map(pair).collect()
    }
    fn write(&self) -> Value {
        self.iter().map(|(ids, bias)| Value::Array(vec![ids.write(), bias.write()])).collect()
    }
}
