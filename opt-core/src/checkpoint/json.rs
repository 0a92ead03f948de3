use super::entry::damaged;
use crate::Error;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use std::{collections::HashSet, fmt, marker::PhantomData};

/// A JSON object in file order that refuses a key given twice, where serde's maps would keep the last.
#[derive(Debug, Default)]
pub(super) struct Unique<V>(pub(super) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Entries<V> {
            type Value = Unique<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let (mut seen, mut entries) = (HashSet::new(), Vec::new());
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(duplicate(&key));
                    }
                    entries.push((key, map.next_value()?));
                }
                Ok(Unique(entries))
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

pub(super) fn duplicate<E: serde::de::Error>(key: &str) -> E {
    E::custom(format_args!("{} is there twice", super::entry::shown(key)))
}

/// serde_json's message as one short line: it may quote the file.
pub(super) fn error(what: &str, error: &serde_json::Error) -> Error {
    let text: String =
        error.to_string().chars().take(200).map(|c| if c.is_control() { '?' } else { c }).collect();
    damaged(format_args!("{what}: {text}"))
}
