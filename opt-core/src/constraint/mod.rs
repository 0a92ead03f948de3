//! Texts held to a form while they are made: a JSON schema, a regular expression, or a grammar (feature `constraint`).
//!
//! A [`Constraint`] knows, after any beginning of a text, which tokens may follow so that the whole can still have its
//! form. The scores of all others become negative infinity before a token is chosen, so that whatever way of generating
//! is used (greedy, sampling, beams, drafts, several sequences, batches) chooses among the possible ones:
//!
//! ```
//! use opt_core::{Opt, Request, constraint::Constraint, generation::GenerationConfig};
//!
//! let opt = Opt::open("../models/opt-novels")?;
//! let constraint = Constraint::regex(&opt, r" [A-Z][a-z]{2,8}, aged [1-9][0-9]?")?;
//! let settings = GenerationConfig::default().max_new_tokens(24);
//! let request = Request::new("The captain of the ship was").config(settings).constrain(&constraint);
//! let made = opt.generate_batch([request])?.remove(0);
//! let (name, age) = made.text().split_once(", aged ").unwrap();
//! assert!(name.starts_with(' ') && age.parse::<u8>().unwrap() > 0);
//! # Ok::<(), opt_core::Error>(())
//! ```
//!
//! # Where a text ends
//!
//! An end token is allowed exactly where the text may end, and where nothing else can follow it is the only one left. So
//! a text that ended with [`FinishReason::Eos`](crate::generation::FinishReason::Eos) has its form. One that ended
//! otherwise, at `max_new_tokens`, the context, a stop string or a deadline, was cut: it is the beginning of a text of
//! that form, and as JSON it does not parse. Forms that can go on forever (strings, lists, spaces) may well be cut with
//! a small model, so bound them: `maxLength`, `maxItems`, `{1,40}`.
//!
//! # What it speaks of
//!
//! The tokens behind the prompt, end tokens left out, as the bytes of [`TokenStrings`]; a character may be split over
//! several tokens. Special tokens (`<s>`, `</s>`, `<pad>`, `<unk>` and what the tokenizer calls so) are no text and never
//! allowed. In a text that goes on behind a prompt most words begin with a space: let a pattern begin with one, or the
//! prompt end with one. `clean_up_tokenization_spaces` in a tokenizer's files changes the decoded text afterwards, and
//! decoders other than byte-level ones may drop its first space.
//!
//! The constraint stands in the [`ProcessorChain`](crate::generation::ProcessorChain) at the place of
//! `prefix_allowed_tokens_fn` and under that name. Processors behind it may still rule tokens out, which can leave none
//! (an error), or force one that does not fit (`forced_eos_token_id`, which cuts the text).
//!
//! [`TokenStrings`]: crate::tokenizer::TokenStrings

mod processor;
mod vocabulary;

pub(crate) use processor::Constrained;
pub(crate) use vocabulary::Vocabulary;

use crate::{Error, ErrorKind, Opt, Result, generation::Settings, tokenizer::Tokenizer};
use llguidance::{Matcher, api::TopLevelGrammar};
use serde_json::{Map, Value, json};
use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Longest pattern or grammar, in bytes: more than anyone writes by hand.
const LONGEST: usize = 1 << 18;
/// Deepest nesting of a schema, as when JSON is parsed.
const DEEPEST: usize = 128;

/// A form that texts are held to; see the [module](self).
///
/// Compiled once, for one vocabulary; cheap to clone, and usable by many requests and threads at once.
///
/// ```
/// use opt_core::{Opt, Request, constraint::Constraint, generation::GenerationConfig};
/// use serde_json::{Value, json};
///
/// let opt = Opt::open("../models/opt-novels")?;
/// let schema = json!({
///     "type": "object",
///     "properties": {
///         "name": {"type": "string", "maxLength": 12},
///         "age": {"type": "integer", "minimum": 1, "maximum": 99},
///         "mood": {"enum": ["merry", "grave"]},
///     },
///     "required": ["name", "age", "mood"],
///     "additionalProperties": false,
/// });
/// let constraint = Constraint::json_schema(&opt, &schema)?;
/// let sampled = GenerationConfig::default().max_new_tokens(60).do_sample(true).seed(1);
/// let requests = [
///     Request::new("The captain:").config(sampled.clone()).constrain(&constraint),
///     Request::new("The river").config(sampled), // one without, in the same batch
/// ];
/// let made = opt.generate_batch(requests)?;
/// let captain: Value = serde_json::from_str(made[0].text()).unwrap();
/// assert!(captain["age"].as_u64().unwrap() < 100);
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Constraint(Arc<Compiled>);

struct Compiled {
    vocabulary: Arc<Vocabulary>,
    /// Has read nothing and is never used itself: what it has in common with copies of it grows as they are used.
    fresh: Mutex<Matcher>,
    /// Has read nothing; its copies share what they learn of the form.
    shared: Mutex<Matcher>,
    warnings: Vec<String>,
    what: &'static str,
}

// One value serves all requests, wherever they run.
const _: () = {
    const fn shared<T: Clone + Send + Sync + 'static>() {}
    shared::<Constraint>();
};

impl Constraint {
    /// Texts that are JSON and valid under `schema` (draft 2020-12, or the older one that its `$schema` names).
    ///
    /// The text is laid out as Python's `json.dumps` does it, `{"a": 1, "b": [2, 3]}`: one space behind a comma and a
    /// colon and none elsewhere, so that no model loses itself in white space. Properties come in the order of the
    /// schema. An object `"x-guidance"` in `schema` changes that: `{"whitespace_flexible": true}` allows any white space,
    /// `item_separator` and `key_separator` are regular expressions (`","` and `":"` where only one of these is given).
    ///
    /// `enum`, `const`, `anyOf`, `allOf`, `oneOf` whose cases exclude each other, `$ref` inside the schema, `properties`,
    /// `required`, `patternProperties`, `additionalProperties`, `minProperties`, `maxProperties`, `items`, `prefixItems`,
    /// `minItems`, `maxItems`, `minLength`, `maxLength`, `pattern`, `minimum`, `maximum`, their exclusive forms,
    /// `multipleOf`, and the formats `date-time`, `date`, `time`, `duration`, `email`, `hostname`, `ipv4`, `ipv6`,
    /// `uuid` and `uri` are kept. Other keywords that would restrict (`not`, `if`, `uniqueItems`, ...) are an error.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a schema that is none, that nothing satisfies, that uses what is not supported, or that
    /// is too large; [`ErrorKind::Tokenizer`] for a model without tokenizer.
    pub fn json_schema(opt: &Opt, schema: &Value) -> Result<Self> {
        if depth(schema) > DEEPEST {
            let message = format!("JSON schema: expected at most {DEEPEST} levels, found more");
            return Err(Error::new(ErrorKind::Option, message));
        }
        let mut map = match schema {
            Value::Object(map) => map.clone(),
            Value::Bool(true) => Map::new(),
            Value::Bool(false) => {
                return Err(Error::new(ErrorKind::Option, "JSON schema: no value satisfies `false`"));
            }
            other => {
                let message = format!("JSON schema: expected an object or true, found {other}");
                return Err(Error::new(ErrorKind::Option, message));
            }
        };
        let layout = json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
        map.entry("x-guidance").or_insert(layout);
        Self::compile(opt, "JSON schema", TopLevelGrammar::from_json_schema(Value::Object(map)))
    }

    /// Texts that are a JSON object, whatever is in it; laid out as by [`Constraint::json_schema`].
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] for a model without tokenizer.
    pub fn json_object(opt: &Opt) -> Result<Self> {
        Self::json_schema(opt, &json!({"type": "object"}))
    }

    /// Texts that match `pattern` as a whole, in the syntax of the crate `regex`: anchors are not needed, and `^` and `$`
    /// are only taken at the very ends. Word boundaries, lookaround and back-references are an error.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a pattern that is none, that nothing matches, or that is too large;
    /// [`ErrorKind::Tokenizer`] for a model without tokenizer.
    pub fn regex(opt: &Opt, pattern: &str) -> Result<Self> {
        let bad = |what: &str| Err(Error::new(ErrorKind::Option, format!("regular expression: {what}")));
        if pattern.len() > LONGEST {
            return bad(&format!("expected at most {LONGEST} bytes, found {}", pattern.len()));
        }
        if pattern.chars().rev().take_while(|c| *c == '\\').count() % 2 == 1 {
            return bad("expected a character behind the last backslash, found none");
        }
        let grammar = match pattern {
            // Which is a comment in a grammar.
            "" => TopLevelGrammar::from_lark("start: \"\"".to_owned()),
            _ => TopLevelGrammar::from_regex(pattern),
        };
        Self::compile(opt, "regular expression", grammar)
    }

    /// Texts of a context-free grammar in llguidance's dialect of Lark, whose first rule is `start`.
    ///
    /// Its special tokens (`<...>`) cannot be used. A rule without a way out of its recursion is not found out: its text
    /// goes on until it is cut.
    ///
    /// ```
    /// # use opt_core::{Opt, Request, constraint::Constraint, generation::GenerationConfig};
    /// # let opt = Opt::open("../models/opt-novels")?;
    /// let sums = Constraint::lark(&opt, r#"
    ///     start: " " sum
    ///     sum: term (" + " term){0,3}
    ///     term: NUMBER | "(" sum ")"
    ///     NUMBER: /[1-9][0-9]{0,2}/
    /// "#)?;
    /// # let made = opt.generate_batch([Request::new("Add").constrain(&sums)])?;
    /// # assert!(made[0].text().starts_with(' '));
    /// # Ok::<(), opt_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a grammar that is none, that no text has, or that is too large;
    /// [`ErrorKind::Tokenizer`] for a model without tokenizer.
    pub fn lark(opt: &Opt, grammar: &str) -> Result<Self> {
        if grammar.len() > LONGEST {
            let message = format!("grammar: expected at most {LONGEST} bytes, found {}", grammar.len());
            return Err(Error::new(ErrorKind::Option, message));
        }
        Self::compile(opt, "grammar", TopLevelGrammar::from_lark(grammar.to_owned()))
    }

    fn compile(opt: &Opt, what: &'static str, grammar: TopLevelGrammar) -> Result<Self> {
        let vocabulary = opt.vocabulary()?;
        let wrong = |error: &dyn fmt::Display| Error::new(ErrorKind::Option, line(what, error));
        // Whatever goes wrong inside becomes an error here, a panic too.
        let parser = vocabulary.factory.create_parser(grammar).map_err(|e| wrong(&e))?;
        let mut fresh = Matcher::new(Ok(parser));
        if let Some(error) = fresh.get_error() {
            return Err(wrong(&error));
        }
        let warnings = fresh.grammar_warnings();
        let shared = fresh.deep_clone();
        let mut first = shared.clone();
        let (fresh, shared) = (Mutex::new(fresh), Mutex::new(shared));
        let constraint = Self(Arc::new(Compiled { vocabulary, fresh, shared, warnings, what }));
        // A form that no text has shows here, before anything is generated.
        constraint.follow(&mut first, &[]).map_err(|error| {
            let none = error.to_string().contains("can follow, and the text may not end here");
            if none { wrong(&"no text has this form") } else { error }
        })?;
        Ok(constraint)
    }

    /// What of the form is not held to exactly, one line each.
    pub fn warnings(&self) -> &[String] {
        &self.0.warnings
    }

    /// # Errors
    /// [`ErrorKind::Option`] if a request of these settings, for a model with this tokenizer, cannot be held to it.
    pub(crate) fn check(&self, tokenizer: &Tokenizer, settings: &Settings) -> Result<()> {
        if !self.0.vocabulary.is_of(tokenizer) {
            let message = "constraint: expected one made for this model's vocabulary, found one of another";
            return Err(Error::new(ErrorKind::Option, message));
        }
        if settings.eos.is_empty() {
            let message = "constraint: expected an eos_token_id that ends the text, found none";
            return Err(Error::new(ErrorKind::Option, message));
        }
        Ok(())
    }

    fn vocabulary(&self) -> &Vocabulary {
        &self.0.vocabulary
    }

    /// A matcher that has read nothing.
    fn matcher(&self) -> Matcher {
        lock(&self.0.shared).clone()
    }

    /// One that shares nothing with those before it, and which later ones share with.
    fn renewed(&self) -> Matcher {
        let matcher = lock(&self.0.fresh).deep_clone();
        *lock(&self.0.shared) = matcher.clone();
        matcher
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Constraint").field(&self.0.what).finish()
    }
}

fn lock(matcher: &Mutex<Matcher>) -> MutexGuard<'_, Matcher> {
    matcher.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What went wrong, as one line: errors draw pictures of the place too.
fn line(what: &str, error: &dyn fmt::Display) -> String {
    let text = error.to_string();
    // What is behind these is not for users of this crate.
    let end = ["<state>", "<backtrace>", "<non-verbose/>"].iter().filter_map(|mark| text.find(mark)).min();
    let text = text.get(..end.unwrap_or(text.len())).unwrap_or_default();
    let text = text.replace(" without 'referencing' feature", "").replace("panic: ", "cannot be read: ");
    let picture = |line: &str| line.starts_with(|c: char| "|^".contains(c)) || line.contains(" | ");
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let said = match lines.clone().find_map(|line| line.strip_prefix("error: ")) {
        Some(said) => said.to_owned(),
        None => lines.filter(|line| !picture(line)).collect::<Vec<_>>().join("; "),
    };
    let short: String = said.chars().take(400).collect();
    format!("{what}: {short}")
}

/// Levels of a value, counted no further than one more than [`DEEPEST`].
fn depth(value: &Value) -> usize {
    let mut level = vec![value];
    let mut depth = 0;
    while !level.is_empty() && depth <= DEEPEST {
        depth += 1;
        level = level
            .into_iter()
            .flat_map(|value| -> Vec<&Value> {
                match value {
                    Value::Array(items) => items.iter().collect(),
                    Value::Object(map) => map.values().collect(),
                    _ => Vec::new(),
                }
            })
            .collect();
    }
    depth
}
