//! Python's words for values, over which the harness hashes.

use serde_json::Value;
use sha2::{Digest, Sha256};

/// SHA-256 of a text, in hexadecimal.
///
/// ```
/// assert!(opt_eval::samples::hash("").starts_with("e3b0c44298fc1c14"));
/// ```
pub fn hash(text: &str) -> String {
    hex(Sha256::new_with_prefix(text))
}

pub(super) fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The harness' hash of a document, which is that of Python's `json.dumps(doc, indent=2, ensure_ascii=False)`. It is
/// over the keys in the document's order, so `json` is the document's text and no value that sorts them.
///
/// ```
/// use opt_eval::samples::{document_hash, hash};
/// assert_eq!(document_hash(r#"{"b":1,"a":["x", {}]}"#), hash("{\n  \"b\": 1,\n  \"a\": [\n    \"x\",\n    {}\n  ]\n}"));
/// ```
pub fn document_hash(json: &str) -> String {
    hash(&indented(json))
}

/// JSON with the white space of `json.dumps(indent=2)`. Strings and numbers stay as they are written.
fn indented(json: &str) -> String {
    let mut out = String::with_capacity(json.len() * 2);
    let mut depth = 0_usize;
    let (mut inside, mut escaped) = (false, false);
    let mut rest = json.chars().peekable();
    let line = |out: &mut String, depth: usize| {
        out.push('\n');
        out.extend(std::iter::repeat_n("  ", depth));
    };
    while let Some(c) = rest.next() {
        if inside {
            out.push(c);
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => inside = false,
                _ => {}
            }
            continue;
        }
        match c {
            '"' => {
                inside = true;
                out.push(c);
            }
            '{' | '[' => {
                out.push(c);
                while rest.next_if(|c| c.is_ascii_whitespace()).is_some() {}
                if let Some(end) = rest.next_if(|c| matches!(c, '}' | ']')) {
                    out.push(end);
                } else {
                    depth += 1;
                    line(&mut out, depth);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                line(&mut out, depth);
                out.push(c);
            }
            ',' => {
                out.push(c);
                line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            c if c.is_ascii_whitespace() => {}
            c => out.push(c),
        }
    }
    out
}

/// A value whose numbers, truths and nulls are the words that Python has for them, as the harness writes answers:
/// `[-3.5, true]` is `["-3.5", "True"]`.
pub fn in_words(value: &Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.iter().map(in_words).collect()),
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Number(n) => match n.as_f64().filter(|_| n.is_f64()) {
            Some(f) => float(f).into(),
            None => n.to_string().into(),
        },
        other => other.clone(),
    }
}

/// Python's `repr` of a float: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
fn float(f: f64) -> String {
    let size = f.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{f:e}");
        return match text.split_once('e').map(|(digits, power)| (digits, power.parse::<i32>())) {
            Some((digits, Ok(power))) => {
                format!("{digits}e{}{:02}", if power < 0 { '-' } else { '+' }, power.abs())
            }
            _ => text,
        };
    }
    format!("{f:?}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    // By Python 3.11: [repr(x) for x in …].
    #[test]
    fn floats_are_pythons() {
        let found: Vec<String> =
            [-3.25, 1.0, 1e-5, 1.25e-7, 1e16, 123456789012345.0, 0.0001, 1e22].map(float).to_vec();
        let expected = ["-3.25", "1.0", "1e-05", "1.25e-07", "1e+16", "123456789012345.0", "0.0001", "1e+22"];
        assert_eq!(found, expected);
        assert_eq!(
            in_words(&json!([[-3.5, true], ["a", null, 3]])),
            json!([["-3.5", "True"], ["a", "None", "3"]])
        );
    }

    // hashlib.sha256(json.dumps({"q": 'a "b": {', "choices": {"text": ["x", "é"], "label": []}, "n": 1.5},
    //     indent=2, ensure_ascii=False).encode()).hexdigest() by Python 3.11.
    #[test]
    fn documents_are_hashed_as_python_writes_them() {
        let found = document_hash(r#"{"q": "a \"b\": {", "choices":{"text":["x","é"],"label":[ ]},"n":1.5}"#);
        assert_eq!(found, "ad785b0a3b50fe02bf65657a757da8496032ac38bf644e35057efbe70d44db07");
    }
}
