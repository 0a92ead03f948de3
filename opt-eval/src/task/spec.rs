use crate::{rows::Row, template};
use opt_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Deserializer, Serialize, de};
use std::fmt;

/// What a model is asked of each row of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TaskKind {
    /// How probable each of several choices is after the prompt.
    #[default]
    MultipleChoice,
    /// How probable the target is after the prompt.
    Loglikelihood,
    /// How probable the text is as a whole.
    LoglikelihoodRolling,
    /// What the model writes after the prompt.
    GenerateUntil,
}

impl TaskKind {
    /// The harness' name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::MultipleChoice => "multiple_choice",
            Self::Loglikelihood => "loglikelihood",
            Self::LoglikelihoodRolling => "loglikelihood_rolling",
            Self::GenerateUntil => "generate_until",
        }
    }
}

/// A task as data: how rows become prompts and choices, and what is measured.
///
/// In files it is a table of TOML; see the repository's docs/evaluation.md for each key. `text`, `target` and
/// `description` are templates, all others with code in them are expressions; both see the fields of the row.
///
/// ```
/// let spec = opt_eval::TaskSpec::from_toml(r#"
///     name = "capitals"
///     text = "The capital of {{country}} is"
///     choices = "options"
///     gold = "gold"
///     metrics = ["acc", "acc_norm"]
/// "#)?;
/// assert_eq!(spec.name, "capitals");
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct TaskSpec {
    /// The name it is asked for by, and has in reports.
    pub name: String,
    /// A shorter name in tables.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// What is asked.
    pub kind: TaskKind,
    /// The version of its wording; a change of prompts is a new one.
    pub version: f64,
    /// What stands before everything else; a template.
    pub description: String,
    /// The shapes that rows may have; the first whose columns are there is taken. None: rows are taken as they are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rows: Vec<RowShape>,
    /// The prompt; a template.
    pub text: String,
    /// What follows the prompt; a template. Of tasks with choices only where each has a prompt of its own.
    pub target: String,
    /// Instead of `target`, several texts of which any may be written; an expression. Examples show the first.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub targets: String,
    /// The choices, a list of texts; an expression.
    pub choices: String,
    /// Instead of `text`, a prompt for each choice; an expression. The target follows each.
    pub contexts: String,
    /// Which choice is right: its index, or the choice itself; an expression.
    pub gold: String,
    /// Of a text as a whole, what words and bytes are counted in; a template. Empty: the text.
    pub counted: String,
    /// Between prompt and choice, and between prompt and answer of an example.
    pub target_delimiter: String,
    /// After each example.
    pub fewshot_delimiter: String,
    /// The splits that rows are looked for in.
    pub splits: Splits,
    /// Where examples come from.
    pub fewshot: Fewshot,
    /// Examples where nobody says how many.
    pub num_fewshot: usize,
    /// What is measured.
    pub metrics: Vec<MetricSpec>,
    /// How texts are made.
    pub generation: Generation,
    /// What is done to made texts before they are measured; each pipeline gives results of its own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<Filter>,
    /// Which files hold the rows.
    pub data: Data,
}

impl Default for TaskSpec {
    fn default() -> Self {
        Self {
            name: String::new(),
            alias: None,
            kind: TaskKind::default(),
            version: 1.0,
            description: String::new(),
            rows: Vec::new(),
            text: String::new(),
            target: String::new(),
            targets: String::new(),
            choices: String::new(),
            contexts: String::new(),
            gold: String::new(),
            counted: String::new(),
            target_delimiter: " ".to_owned(),
            fewshot_delimiter: "\n\n".to_owned(),
            splits: Splits::default(),
            fewshot: Fewshot::default(),
            num_fewshot: 0,
            metrics: Vec::new(),
            generation: Generation::default(),
            filters: Vec::new(),
            data: Data::default(),
        }
    }
}

/// A shape that rows may have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct RowShape {
    /// Columns that tell it.
    pub has: Vec<String>,
    /// Fields that are made of them, in order; a field may use those before it.
    #[serde(default)]
    pub fields: Fields,
}

/// Names and the expressions that give them their values, in the order of the file.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Fields(pub Vec<(String, String)>);

impl Serialize for Fields {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, expression)| (name, expression)))
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct InOrder;
        impl<'de> de::Visitor<'de> for InOrder {
            type Value = Fields;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table of expressions")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> std::result::Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    fields.push(entry);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// The splits of a data set that a task uses; what is missing does not exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct Splits {
    /// Where examples come from unless [`Fewshot::split`] says otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<String>,
    /// What is measured where there is no test split.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<String>,
    /// What is measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test: Option<String>,
}

/// Where examples come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct Fewshot {
    /// Their split.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// How they are chosen.
    pub sampler: Sampler,
    /// Rows of their own, in the place of a split's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub samples: Vec<Row>,
    /// Their prompt, where it is not the task's; a template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Their answer, where it is not the task's; a template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Between their prompt and answer, where it is not the task's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_delimiter: Option<String>,
}

/// How examples are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Sampler {
    /// At random, by the harness' seed.
    #[default]
    Default,
    /// The first ones of their split.
    FirstN,
}

/// A metric, and what may be said of it.
#[derive(Debug, Clone, PartialEq, Serialize, Default)]
#[non_exhaustive]
pub struct MetricSpec {
    /// Its name in the harness.
    pub metric: String,
    /// Letters' case does not count.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ignore_case: bool,
    /// ASCII punctuation does not count.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ignore_punctuation: bool,
    /// ASCII digits do not count.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ignore_numbers: bool,
    /// What matches one of these does not count.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub regexes_to_ignore: Vec<String>,
}

impl<'de> Deserialize<'de> for MetricSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Long {
            metric: String,
            #[serde(default)]
            ignore_case: bool,
            #[serde(default)]
            ignore_punctuation: bool,
            #[serde(default)]
            ignore_numbers: bool,
            #[serde(default)]
            regexes_to_ignore: Vec<String>,
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Name(String),
            Long(Long),
        }
        Ok(match Either::deserialize(deserializer)? {
            Either::Name(metric) => Self { metric, ..Self::default() },
            Either::Long(Long {
                metric,
                ignore_case,
                ignore_punctuation,
                ignore_numbers,
                regexes_to_ignore,
            }) => Self { metric, ignore_case, ignore_punctuation, ignore_numbers, regexes_to_ignore },
        })
    }
}

/// How texts are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct Generation {
    /// A text ends before the first of these. None: the delimiter of examples.
    pub until: Vec<String>,
    /// At most so many tokens.
    pub max_gen_toks: usize,
    /// Draws tokens instead of taking the most probable.
    pub do_sample: bool,
    /// The temperature of draws.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
}

impl Default for Generation {
    fn default() -> Self {
        Self { until: Vec::new(), max_gen_toks: 256, do_sample: false, temperature: None }
    }
}

/// What is done to made texts, under a name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Filter {
    /// The name that its results have in reports: `exact_match,NAME`.
    pub name: String,
    /// In order.
    pub steps: Vec<FilterStep>,
}

/// One thing that is done to a made text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "function", rename_all = "snake_case")]
#[non_exhaustive]
pub enum FilterStep {
    /// White space around it is removed.
    RemoveWhitespace,
    /// Lower case.
    Lowercase,
    /// Upper case.
    Uppercase,
    /// What a pattern finds, its first group that found something if it has groups.
    Regex {
        /// The pattern.
        pattern: String,
        /// Which match: 0 is the first, -1 the last.
        #[serde(default)]
        group_select: i64,
        /// What is said where nothing matches.
        #[serde(default = "invalid")]
        fallback: String,
    },
    /// Only the first text of several; always so here, since each prompt is continued once.
    TakeFirst,
}

fn invalid() -> String {
    "[invalid]".to_owned()
}

/// Which files hold the rows of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct Data {
    /// Names that files or their folders may have, as `arc_easy`; the task's own is tried as well.
    pub names: Vec<String>,
    /// Columns of files without a line of names.
    pub columns: Vec<String>,
    /// In a text file, lines that begin a new row match this; without it a text file is one row. The row's column is
    /// `page`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pages: Option<String>,
}

impl TaskSpec {
    /// Reads one task.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for what is no task: a line of TOML that cannot be read, a key that does not exist, a
    /// template that is none, keys that contradict each other.
    pub fn from_toml(text: &str) -> Result<Self> {
        let spec: Self = toml::from_str(text).map_err(|e| bad_toml(&e))?;
        spec.validate()?;
        Ok(spec)
    }

    /// The name in tables.
    pub fn alias(&self) -> &str {
        self.alias.as_deref().unwrap_or(&self.name)
    }

    /// # Errors
    /// [`ErrorKind::Config`], naming task and key.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|e| e.at(format_args!("task {:?}", self.name)))
    }

    fn check(&self) -> Result<()> {
        let fail = |message: &str| Err(Error::new(ErrorKind::Config, message));
        if self.name.is_empty() || self.name.contains([',', '/', '\\']) {
            return fail("name: expected a name without comma and slash");
        }
        let env = template::environment();
        let fewshot = &self.fewshot;
        let templates = [
            ("text", &self.text),
            ("target", &self.target),
            ("description", &self.description),
            ("counted", &self.counted),
        ];
        for (key, source) in templates {
            template::check_template(&env, key, source)?;
        }
        for (key, source) in [("fewshot.text", &fewshot.text), ("fewshot.target", &fewshot.target)] {
            source.as_ref().map_or(Ok(()), |source| template::check_template(&env, key, source))?;
        }
        for (key, source) in [
            ("choices", &self.choices),
            ("contexts", &self.contexts),
            ("gold", &self.gold),
            ("targets", &self.targets),
        ] {
            if !source.is_empty() {
                template::check_expression(&env, key, source)?;
            }
        }
        for (name, source) in self.rows.iter().flat_map(|shape| &shape.fields.0) {
            template::check_expression(&env, &format!("rows: {name}"), source)?;
        }
        let choice = self.kind == TaskKind::MultipleChoice;
        if choice && (self.choices.is_empty() == self.contexts.is_empty() || self.gold.is_empty()) {
            return fail(
                "expected `gold` and one of `choices` and `contexts` of a task of kind multiple_choice",
            );
        }
        let written = self.kind == TaskKind::GenerateUntil;
        let follows = !choice || !self.contexts.is_empty();
        let several = written && !self.targets.is_empty();
        if follows && !several && self.target.is_empty() {
            return fail("expected a `target`");
        }
        if !self.targets.is_empty() && (!written || !self.target.is_empty()) {
            return fail("`targets` belongs to kind generate_until, in the place of `target`");
        }
        let of_choices = [&self.choices, &self.contexts, &self.gold];
        if !choice && of_choices.iter().any(|source| !source.is_empty()) {
            return fail("`choices`, `contexts` and `gold` belong to kind multiple_choice");
        }
        if self.metrics.is_empty() {
            return fail("metrics: expected at least one");
        }
        if self.generation.max_gen_toks == 0 {
            return fail("generation.max_gen_toks: expected at least 1, found 0");
        }
        let patterns = self.filters.iter().flat_map(|filter| &filter.steps).filter_map(|step| match step {
            FilterStep::Regex { pattern, .. } => Some(pattern),
            _ => None,
        });
        let ignored = self.metrics.iter().flat_map(|metric| &metric.regexes_to_ignore);
        for pattern in patterns.chain(ignored).chain(&self.data.pages) {
            regex::Regex::new(pattern).map_err(|e| {
                let last = e.to_string().lines().last().unwrap_or_default().to_owned();
                Error::new(ErrorKind::Config, format_args!("pattern {pattern:?}: {last}"))
            })?;
        }
        for (index, metric) in self.metrics.iter().enumerate() {
            crate::measure::check(self.kind, &metric.metric)?;
            if self.metrics.iter().take(index).any(|other| other.metric == metric.metric) {
                return fail(&format!("metrics: {:?} stands there twice", metric.metric));
            }
        }
        Ok(())
    }
}

/// One line of what the reader of TOML says.
pub(super) fn bad_toml(error: &toml::de::Error) -> Error {
    let place = error.span().map(|span| format!(" (byte {})", span.start)).unwrap_or_default();
    Error::new(ErrorKind::Config, format_args!("{}{place}", error.message().replace('\n', " ")))
}

impl TaskSpec {
    /// The task as the harness' reports describe theirs.
    pub(crate) fn to_harness(&self) -> serde_json::Value {
        let metrics: Vec<serde_json::Value> = self
            .metrics
            .iter()
            .map(|metric| {
                let better = crate::measure::check(self.kind, &metric.metric)
                    .map(|kind| kind.higher_is_better)
                    .unwrap_or(true);
                serde_json::json!({ "metric": metric.metric, "higher_is_better": better })
            })
            .collect();
        serde_json::json!({
            "task": self.name,
            "task_alias": self.alias,
            "training_split": self.splits.training,
            "validation_split": self.splits.validation,
            "test_split": self.splits.test,
            "fewshot_split": self.fewshot.split,
            "doc_to_text": if self.contexts.is_empty() { &self.text } else { &self.contexts },
            "doc_to_target": if self.gold.is_empty() { &self.target } else { &self.gold },
            "doc_to_choice": self.choices,
            "description": self.description,
            "target_delimiter": self.target_delimiter,
            "fewshot_delimiter": self.fewshot_delimiter,
            "num_fewshot": self.num_fewshot,
            "metric_list": metrics,
            "output_type": self.kind.name(),
            "generation_kwargs": (self.kind == TaskKind::GenerateUntil).then_some(&self.generation),
            "metadata": { "version": self.version },
        })
    }
}
