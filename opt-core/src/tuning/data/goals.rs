//! Lines of JSONL with another goal than their own tokens.

use super::{
    DataOptions, Reads, jsonl,
    read::{refuse, tokenizer},
    text::Text,
};
use crate::{
    Error, ErrorKind, Result,
    heads::{Asked, Task},
    tuning::{Example, Goal},
};
use serde_json::{Map, Value};
use std::{collections::BTreeSet, fs::File, path::Path};

/// Reads a line for a head or for search.
pub(super) fn read(line: &str, options: &DataOptions) -> Result<Example> {
    match &options.reads {
        Reads::Head(Task::Answer) => answer(&object(line)?, options),
        Reads::Head(task) => labelled(&object(line)?, task, options),
        Reads::Pairs | Reads::Language => pair(&object(line)?, options),
    }
}

/// The names of classes in JSONL files, in the order of the alphabet: what their lines' `label` says, or, where it is an
/// array, the names in it.
///
/// # Errors
/// [`ErrorKind::NotFound`], [`ErrorKind::Io`]; [`ErrorKind::Prompt`] for a line that is no object or has a label that is
/// no name, and for files without any, naming the line.
pub fn classes(paths: &[&Path]) -> Result<Vec<String>> {
    let mut names = BTreeSet::new();
    for path in paths {
        let at = |e: Error| e.at(path.display());
        let mut text = open(path)?;
        while let Some((number, line)) = text.line().map_err(at)? {
            if !line.trim().is_empty() {
                let of_line = labels(&line).map_err(|e| e.at(format_args!("line {number}")));
                names.extend(of_line.map_err(at)?);
            }
        }
    }
    if names.is_empty() {
        return refuse("expected lines with a \"label\", found none");
    }
    Ok(names.into_iter().collect())
}

fn open(path: &Path) -> Result<Text<File>> {
    let missing = |e: &std::io::Error| e.kind() == std::io::ErrorKind::NotFound;
    match File::open(path) {
        Ok(file) => Ok(Text::new(file)),
        Err(e) => {
            let kind = if missing(&e) { ErrorKind::NotFound } else { ErrorKind::Io };
            Err(Error::because(kind, format_args!("cannot open {}", path.display()), e))
        }
    }
}

/// The names that a line has as its label.
fn labels(line: &str) -> Result<Vec<String>> {
    let map = object(line)?;
    match map.get("label") {
        Some(Value::Array(all)) => all.iter().map(name_of).collect(),
        Some(label) => Ok(vec![name_of(label)?]),
        None => refuse(format_args!("expected a \"label\", found {}", jsonl::keys(&map))),
    }
}

fn name_of(value: &Value) -> Result<String> {
    match value {
        Value::String(name) => Ok(name.clone()),
        other => {
            refuse(format_args!("\"label\": expected the name of a class, found {}", jsonl::kind(other)))
        }
    }
}

fn object(line: &str) -> Result<Map<String, Value>> {
    const EXPECTED: &str = "expected a JSON object";
    let value: Value = serde_json::from_str(line)
        .map_err(|e| Error::because(ErrorKind::Prompt, format_args!("{EXPECTED}, found no JSON"), e))?;
    match value {
        Value::Object(map) => Ok(map),
        other => refuse(format_args!("{EXPECTED}, found {}", jsonl::kind(&other))),
    }
}

fn string<'a>(map: &'a Map<String, Value>, key: &str, expected: &str) -> Result<&'a str> {
    match map.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => refuse(format_args!("{key:?}: expected a string, found {}", jsonl::kind(other))),
        None => refuse(format_args!("expected {expected}, found {}", jsonl::keys(map))),
    }
}

fn labelled(map: &Map<String, Value>, task: &Task, options: &DataOptions) -> Result<Example> {
    const EXPECTED: &str = r#"{"text": "...", "label": ...} or {"ids": [...], "label": ...}"#;
    let ids = match map.contains_key("ids") && !map.contains_key("text") {
        true => jsonl::ids(map)?,
        false => tokenizer(options)?.encode(string(map, "text", EXPECTED)?, options.bos)?,
    };
    let Some(label) = map.get("label") else {
        return refuse(format_args!("expected {EXPECTED}, found {}", jsonl::keys(map)));
    };
    let goal = match (task, label) {
        (Task::AnyOf(names), Value::Array(all)) => {
            let mut numbers = vec![0.0; names.len()];
            for value in all {
                if let Some(number) = numbers.get_mut(class(value, names)? as usize) {
                    *number = 1.0;
                }
            }
            Goal::Numbers(numbers)
        }
        (Task::AnyOf(_), other) => {
            return refuse(format_args!(
                "\"label\": expected an array of classes, found {}",
                jsonl::kind(other)
            ));
        }
        (Task::Numbers(_), Value::Array(all)) => {
            Goal::Numbers(all.iter().map(number).collect::<Result<_>>()?)
        }
        (Task::Numbers(_), other) => Goal::Numbers(vec![number(other)?]),
        (task, label) => Goal::Class(class(label, task.labels())?),
    };
    Ok(Example { ids, goal })
}

fn number(value: &Value) -> Result<f32> {
    match value.as_f64() {
        Some(number) => Ok(number as f32),
        None => refuse(format_args!("\"label\": expected a number, found {}", jsonl::kind(value))),
    }
}

/// The number of a class, given by name or number.
fn class(value: &Value, names: &[String]) -> Result<u32> {
    let known = || {
        let shown: Vec<String> = names.iter().take(8).map(|name| format!("{name:?}")).collect();
        format!("{}{}", shown.join(", "), if names.len() > 8 { ", ..." } else { "" })
    };
    let found = match value {
        Value::String(name) => names.iter().position(|known| known == name),
        Value::Number(number) => number.as_u64().map(|n| n as usize).filter(|n| *n < names.len()),
        _ => None,
    };
    match found {
        Some(number) => Ok(number as u32),
        None => refuse(format_args!(
            "\"label\": expected one of {} or a number below {}, found {value}",
            known(),
            names.len()
        )),
    }
}

fn pair(map: &Map<String, Value>, options: &DataOptions) -> Result<Example> {
    const EXPECTED: &str = r#"{"query": "...", "passage": "..."}"#;
    let encode = |key| tokenizer(options)?.encode(string(map, key, EXPECTED)?, options.bos);
    Ok(Example { ids: encode("query")?, goal: Goal::Passage(encode("passage")?) })
}

fn answer(map: &Map<String, Value>, options: &DataOptions) -> Result<Example> {
    const EXPECTED: &str = r#"{"question": "...", "context": "...", "answer": "..."}"#;
    let text = |key| string(map, key, EXPECTED);
    let (question, context, answer) = (text("question")?, text("context")?, text("answer")?);
    let start = match map.get("answer_start") {
        None | Some(Value::Null) => context.find(answer).filter(|_| !answer.is_empty()),
        Some(value) => {
            let chars = value.as_u64().map(|n| n as usize);
            let start = chars.and_then(|n| context.char_indices().map(|(at, _)| at).nth(n));
            start.filter(|start| {
                !answer.is_empty() && context.get(*start..).is_some_and(|rest| rest.starts_with(answer))
            })
        }
    };
    let asked = Asked::new(tokenizer(options)?, question, context)?;
    match start.and_then(|start| asked.covering(start..start + answer.len())) {
        Some(places) => Ok(Example { ids: asked.ids, goal: Goal::Answer(places) }),
        None => {
            let shown: String = answer.chars().take(40).collect();
            let place = map.get("answer_start").map(|at| format!(" at character {at}")).unwrap_or_default();
            refuse(format_args!("expected an answer that stands in the context{place}, found {shown:?}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::OptConfig;

    fn options(reads: Reads) -> DataOptions {
        let tokenizer = crate::tokenizer::Tokenizer::from_dir("../models/opt-novels").unwrap();
        DataOptions::new(&OptConfig::default(), Some(tokenizer)).reads(reads)
    }

    fn goal(reads: Reads, line: &str) -> Result<Goal> {
        read(line, &options(reads)).map(|example| example.goal)
    }

    #[test]
    fn lines_with_goals() {
        let one = || Reads::Head(Task::one_of(["bad", "good"]).unwrap());
        let any = || Reads::Head(Task::any_of(["bad", "good"]).unwrap());
        let numbers = || Reads::Head(Task::numbers(["stars"]).unwrap());
        assert_eq!(goal(one(), r#"{"text": "a", "label": "good"}"#).unwrap(), Goal::Class(1));
        assert_eq!(goal(one(), r#"{"ids": [2, 7], "label": 0}"#).unwrap(), Goal::Class(0));
        let of = |line| goal(any(), line).unwrap();
        assert_eq!(of(r#"{"text": "a", "label": ["good"]}"#), Goal::Numbers(vec![0.0, 1.0]));
        assert_eq!(of(r#"{"text": "a", "label": []}"#), Goal::Numbers(vec![0.0, 0.0]));
        assert_eq!(goal(numbers(), r#"{"text": "a", "label": 2.5}"#).unwrap(), Goal::Numbers(vec![2.5]));
        let pair = read(r#"{"query": "a", "passage": "b"}"#, &options(Reads::Pairs)).unwrap();
        assert_eq!((pair.ids[0], pair.units()), (2, 1));
    }

    #[test]
    fn an_answer_is_found_among_the_tokens() {
        let options = options(Reads::Head(Task::Answer));
        let line =
            |rest: &str| format!(r#"{{"question": "Who?", "context": "Élise saw Tom. Tom ran.", {rest}}}"#);
        let answer = |rest: &str| {
            let Example { ids, goal } = read(&line(rest), &options).unwrap();
            let Goal::Answer([first, last]) = goal else { panic!("{goal:?}") };
            (first, options.tokenizer.as_ref().unwrap().decode(&ids[first..=last], true).unwrap())
        };
        let (first, text) = answer(r#""answer": "Tom""#);
        assert_eq!(text.trim(), "Tom");
        let (second, text) = answer(r#""answer": "Tom", "answer_start": 15"#);
        assert_eq!(text.trim(), "Tom");
        assert!(second > first);
        let error = read(&line(r#""answer": "Tom", "answer_start": 3"#), &options).unwrap_err().to_string();
        assert!(error.contains(r#"at character 3, found "Tom""#), "{error}");
    }

    #[test]
    fn lines_that_say_something_else() {
        let one = || Reads::Head(Task::one_of(["bad", "good"]).unwrap());
        for (reads, line, expected) in [
            (one(), "7", "found a number"),
            (one(), r#"{"text": "a"}"#, r#"found the keys "text""#),
            (one(), r#"{"text": "a", "label": "fine"}"#, r#"expected one of "bad", "good""#),
            (one(), r#"{"text": "a", "label": 2}"#, "a number below 2, found 2"),
            (one(), r#"{"label": 1}"#, r#"found the keys "label""#),
            (
                Reads::Head(Task::any_of(["a"]).unwrap()),
                r#"{"text": "a", "label": "a"}"#,
                "an array of classes",
            ),
            (
                Reads::Head(Task::numbers(["a"]).unwrap()),
                r#"{"text": "a", "label": "a"}"#,
                "expected a number",
            ),
            (Reads::Pairs, r#"{"query": "a"}"#, r#"found the keys "query""#),
            (
                Reads::Head(Task::Answer),
                r#"{"question": "a", "context": "b", "answer": "c"}"#,
                r#"found "c""#,
            ),
        ] {
            let error = goal(reads, line).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Prompt, "{error}");
            assert!(error.to_string().contains(expected), "{line}: {error}");
        }
    }
}
