//! What the outputs of a head mean, and how config.json says it.

use crate::{Error, ErrorKind, Result};
use serde_json::{Map, Value, json};
use std::collections::HashSet;

/// What a head is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Task {
    /// One of these classes is true: transformers' `single_label_classification`.
    OneOf(Vec<String>),
    /// Any number of these classes are: `multi_label_classification`.
    AnyOf(Vec<String>),
    /// Numbers of these names: `regression`.
    Numbers(Vec<String>),
    /// Two outputs a token: whether the answer begins, and whether it ends, there.
    Answer,
}

/// transformers' classes with a head.
const CLASSIFICATION: &str = "OPTForSequenceClassification";
const ANSWERING: &str = "OPTForQuestionAnswering";

fn fail<T>(message: impl std::fmt::Display) -> Result<T> {
    Err(Error::new(ErrorKind::Config, message))
}

impl Task {
    /// One of at least two classes.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for fewer, and for two of one name.
    pub fn one_of(classes: impl IntoIterator<Item = impl Into<String>>) -> Result<Self> {
        Self::OneOf(classes.into_iter().map(Into::into).collect()).checked()
    }

    /// Any of at least one class.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for none, and for two of one name.
    pub fn any_of(classes: impl IntoIterator<Item = impl Into<String>>) -> Result<Self> {
        Self::AnyOf(classes.into_iter().map(Into::into).collect()).checked()
    }

    /// Numbers of at least one name.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for none, and for two of one name.
    pub fn numbers(names: impl IntoIterator<Item = impl Into<String>>) -> Result<Self> {
        Self::Numbers(names.into_iter().map(Into::into).collect()).checked()
    }

    /// `outputs` of which nothing is known: a number, or one of some classes, as transformers takes them.
    pub(super) fn unnamed(outputs: usize) -> Result<Self> {
        let names = (0..outputs).map(|i| format!("LABEL_{i}")).collect();
        if outputs == 1 { Self::Numbers(names).checked() } else { Self::OneOf(names).checked() }
    }

    fn checked(self) -> Result<Self> {
        let least = if matches!(self, Self::OneOf(_)) { 2 } else { 1 };
        let names = self.labels();
        if names.len() < least && self != Self::Answer {
            return fail(format_args!("{}: expected at least {least}, found {}", self.about(), names.len()));
        }
        let mut known = HashSet::new();
        match names.iter().find(|name| !known.insert(*name)) {
            Some(twice) => fail(format_args!("{}: {twice:?} is there twice", self.about())),
            None => Ok(self),
        }
    }

    /// The names of the outputs; none for answers.
    pub fn labels(&self) -> &[String] {
        match self {
            Self::OneOf(names) | Self::AnyOf(names) | Self::Numbers(names) => names,
            Self::Answer => &[],
        }
    }

    /// How many outputs there are, for each sequence or, for answers, each token.
    pub fn outputs(&self) -> usize {
        if *self == Self::Answer { 2 } else { self.labels().len() }
    }

    pub(crate) fn has_bias(&self) -> bool {
        *self == Self::Answer
    }

    /// The names of weight and bias.
    pub(crate) fn tensors(&self) -> [&'static str; 2] {
        match self {
            Self::Answer => ["qa_outputs.weight", "qa_outputs.bias"],
            _ => ["score.weight", "score.bias"],
        }
    }

    /// Names and shapes of the tensors, for a model whose LM head sees `width` numbers.
    pub(crate) fn shapes(&self, width: usize) -> Vec<(String, Vec<usize>)> {
        let [weight, bias] = self.tensors();
        let weight = (weight.to_owned(), vec![self.outputs(), width]);
        let bias = self.has_bias().then(|| (bias.to_owned(), vec![self.outputs()]));
        std::iter::once(weight).chain(bias).collect()
    }

    /// What PEFT calls it, and the modules it saves whole then.
    pub(crate) fn peft(&self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Answer => ("QUESTION_ANS", &["qa_outputs"]),
            _ => ("SEQ_CLS", &["classifier", "score"]),
        }
    }

    pub(crate) fn about(&self) -> &'static str {
        match self {
            Self::OneOf(_) => "one of some classes",
            Self::AnyOf(_) => "any of some classes",
            Self::Numbers(_) => "numbers",
            Self::Answer => "answers in a text",
        }
    }

    /// Reads a config.json; `None` where it names neither of transformers' classes with a head. Without
    /// `problem_type`, one output is a number and several are classes of which one is true.
    ///
    /// ```
    /// use opt_core::heads::Task;
    ///
    /// let config = r#"{"architectures": ["OPTForSequenceClassification"], "id2label": {"0": "bad", "1": "good"}}"#;
    /// assert_eq!(Task::from_config(config)?, Some(Task::one_of(["bad", "good"])?));
    /// # Ok::<(), opt_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for what is no JSON, and classes that cannot be meant.
    pub fn from_config(config_json: &str) -> Result<Option<Self>> {
        let unusable = |e| Error::because(ErrorKind::Config, "config.json is not usable", e);
        let config: Value =
            serde_json::from_str(config_json.trim_start_matches('\u{feff}')).map_err(unusable)?;
        let is = |class: &str| {
            config["architectures"].as_array().is_some_and(|all| all.iter().any(|found| found == class))
        };
        if is(ANSWERING) {
            return Ok(Some(Self::Answer));
        }
        if !is(CLASSIFICATION) {
            return Ok(None);
        }
        let names = match (&config["id2label"], config["num_labels"].as_u64()) {
            (Value::Object(names), _) => in_order(names)?,
            // As transformers fills in what is not there.
            (_, count) => (0..count.unwrap_or(2).min(1 << 20)).map(|i| format!("LABEL_{i}")).collect(),
        };
        let task = match config["problem_type"].as_str() {
            Some("regression") => Self::Numbers(names),
            Some("single_label_classification") => Self::OneOf(names),
            Some("multi_label_classification") => Self::AnyOf(names),
            Some(other) => {
                return fail(format_args!(
                    "problem_type: expected regression, single_label_classification or \
                     multi_label_classification, found {other:?}"
                ));
            }
            None if names.len() == 1 => Self::Numbers(names),
            None => Self::OneOf(names),
        };
        task.checked().map_err(|e| e.at("id2label")).map(Some)
    }

    /// The keys of config.json that say this.
    pub(crate) fn config_keys(&self) -> Map<String, Value> {
        let (class, problem) = match self {
            Self::OneOf(_) => (CLASSIFICATION, "single_label_classification"),
            Self::AnyOf(_) => (CLASSIFICATION, "multi_label_classification"),
            Self::Numbers(_) => (CLASSIFICATION, "regression"),
            Self::Answer => (ANSWERING, ""),
        };
        let mut keys = Map::new();
        keys.insert("architectures".to_owned(), json!([class]));
        if *self != Self::Answer {
            let names = || self.labels().iter().enumerate();
            let by_id = names().map(|(i, name)| (i.to_string(), json!(name)));
            let by_name = names().map(|(i, name)| (name.clone(), json!(i)));
            keys.insert("id2label".to_owned(), Value::Object(by_id.collect()));
            keys.insert("label2id".to_owned(), Value::Object(by_name.collect()));
            keys.insert("problem_type".to_owned(), json!(problem));
        }
        keys
    }
}

/// The names of `id2label`, whose keys must be 0, 1, 2 and so on.
fn in_order(names: &Map<String, Value>) -> Result<Vec<String>> {
    let name = |id: usize| match names.get(&id.to_string()) {
        Some(Value::String(name)) => Ok(name.clone()),
        Some(other) => fail(format_args!("id2label: {id}: expected a name, found {other}")),
        None => {
            fail(format_args!("id2label: expected the numbers 0 to {}, {id} is missing", names.len() - 1))
        }
    };
    (0..names.len()).map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(rest: &str) -> Result<Option<Task>> {
        Task::from_config(&format!(r#"{{"architectures": ["OPTForSequenceClassification"]{rest}}}"#))
    }

    #[test]
    fn a_config_says_what_a_head_is_for() {
        let names = |all: &[&str]| all.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let two = names(&["LABEL_0", "LABEL_1"]);
        assert_eq!(config("").unwrap(), Some(Task::OneOf(two.clone())));
        let any = r#", "problem_type": "multi_label_classification""#;
        assert_eq!(config(any).unwrap(), Some(Task::AnyOf(two)));
        let one = r#", "id2label": {"0": "stars"}"#;
        assert_eq!(config(one).unwrap(), Some(Task::Numbers(names(&["stars"]))));
        let ten: Vec<String> = (0..11).map(|i| format!("c{i}")).collect();
        let task = Task::OneOf(ten);
        let text = Value::Object(task.config_keys()).to_string();
        assert_eq!(Task::from_config(&text).unwrap(), Some(task));
        let text = Value::Object(Task::Answer.config_keys()).to_string();
        assert_eq!(Task::from_config(&text).unwrap(), Some(Task::Answer));
        assert_eq!(Task::from_config(r#"{"architectures": ["OPTForCausalLM"]}"#).unwrap(), None);
    }

    #[test]
    fn classes_that_cannot_be_meant() {
        for (rest, expected) in [
            (r#", "id2label": {"0": "a", "2": "b"}"#, "1 is missing"),
            (r#", "id2label": {"0": "a", "1": 7}"#, "expected a name, found 7"),
            (r#", "id2label": {"0": "a", "1": "a"}"#, r#""a" is there twice"#),
            (r#", "id2label": {}"#, "expected at least 2, found 0"),
            (r#", "problem_type": "sorting""#, r#"found "sorting""#),
        ] {
            let error = config(rest).unwrap_err();
            assert!(error.to_string().contains(expected), "{rest}: {error}");
        }
        assert!(Task::one_of(["a"]).is_err());
        assert!(Task::any_of(["a", "a"]).is_err());
    }
}
