use super::{RowShape, Sampler, TaskKind, TaskSpec, locate};
use crate::{
    rows::{Reading, Row, Rows},
    template,
};
use minijinja::{
    Environment, Value,
    value::{Serde, ValueKind},
};
use opt_core::{Error, ErrorKind, Result};
use opt_metrics::random::PythonRandom;
use std::{cmp::Reverse, collections::BTreeMap, path::Path};

/// How prompts are made of a task's rows.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TaskOptions {
    /// Examples before each prompt; the task's own number where none is said.
    pub num_fewshot: Option<usize>,
    /// Seed of their choice.
    pub fewshot_seed: u64,
    /// Takes the first examples in their order instead of drawing them.
    pub first_n: bool,
    /// Puts the examples of each prompt in an order drawn by this seed.
    pub fewshot_order: Option<u64>,
    /// Takes only so many rows.
    pub limit: Option<usize>,
}

impl Default for TaskOptions {
    fn default() -> Self {
        Self { num_fewshot: None, fewshot_seed: 1234, first_n: false, fewshot_order: None, limit: None }
    }
}

/// What is right.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Answer {
    /// The choice of this index.
    Choice(usize),
    /// These texts.
    Texts(Vec<String>),
    /// Nothing: a text as a whole, of which these are the words and bytes.
    Counts {
        /// Runs of what is no white space, as the harness counts them.
        words: usize,
        /// Bytes of UTF-8.
        bytes: usize,
    },
}

/// A row as it is asked.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Document {
    /// Its index in the split.
    pub id: usize,
    /// What the model is asked: contexts with continuations; a text alone has no continuation, a prompt that is to be
    /// continued neither.
    pub arguments: Vec<(String, String)>,
    /// The choices as they are counted for `acc_norm`.
    pub choices: Vec<String>,
    /// What is right.
    pub answer: Answer,
}

/// A task with its rows.
///
/// ```no_run
/// use opt_eval::{Task, TaskOptions, Tasks};
///
/// let spec = Tasks::builtin().select(&["piqa"])?.tasks.remove(0);
/// let task = Task::load(spec, "data", &TaskOptions::default())?;
/// for document in task.documents()? {
///     println!("{:?}", document.arguments);
/// }
/// # Ok::<(), opt_core::Error>(())
/// ```
pub struct Task {
    spec: TaskSpec,
    options: TaskOptions,
    rows: Rows,
    examples: Examples,
}

/// Where examples come from.
enum Examples {
    None,
    /// The rows that are measured; of a file that stands for all splits the row itself is no example.
    Same {
        whole: bool,
    },
    /// Rows of another split.
    Other(Rows),
}

impl Task {
    /// Finds and reads a task's rows in a folder, or in a file that holds all splits.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there are none, [`ErrorKind::Config`] for rows that cannot be read, naming file
    /// and line, [`ErrorKind::Io`].
    pub fn load(spec: TaskSpec, root: impl AsRef<Path>, options: &TaskOptions) -> Result<Self> {
        let root = root.as_ref();
        let named = |e: Error| e.at(format_args!("task {:?}", spec.name));
        let reading = Reading { columns: &spec.data.columns, pages: spec.data.pages.as_deref() };
        if !root.exists() {
            let message = format_args!("{}: there is no such folder or file", root.display());
            return Err(named(Error::new(ErrorKind::NotFound, message)));
        }
        let splits = &spec.splits;
        let mut wanted: Vec<&str> =
            splits.test.iter().chain(&splits.validation).map(String::as_str).collect();
        if wanted.is_empty() {
            wanted.push("test");
        }
        let found =
            wanted.iter().map(|split| locate::files(&spec, root, split)).find(|(files, _)| !files.is_empty());
        let Some((files, all)) = found else {
            let places = locate::places(&spec, root, wanted.first().copied().unwrap_or_default());
            let message = format_args!("expected its rows in one of {places}; found none");
            return Err(named(Error::new(ErrorKind::NotFound, message)));
        };
        let rows = Rows::read(&files, &reading).map_err(named)?;
        if rows.rows.is_empty() {
            let file = files.first().map(|file| file.display().to_string()).unwrap_or_default();
            return Err(named(Error::new(
                ErrorKind::Config,
                format_args!("{file}: expected rows, found none"),
            )));
        }
        let shots = options.num_fewshot.unwrap_or(spec.num_fewshot);
        let examples = if shots == 0 {
            Examples::None
        } else if !spec.fewshot.samples.is_empty() {
            Examples::Other(Rows::given(spec.fewshot.samples.clone()))
        } else {
            let named_split = spec.fewshot.split.as_deref();
            let order: Vec<&str> = match named_split {
                Some(split) => vec![split],
                None => splits
                    .training
                    .iter()
                    .chain(&splits.validation)
                    .chain(&splits.test)
                    .map(String::as_str)
                    .collect(),
            };
            let found = order
                .iter()
                .map(|split| (locate::files(&spec, root, split), *split))
                .find(|((files, _), _)| !files.is_empty());
            match found {
                Some(((other, whole), _)) if other == files => Examples::Same { whole },
                Some(((other, _), _)) => Examples::Other(Rows::read(&other, &reading).map_err(named)?),
                None if all => Examples::Same { whole: true },
                None => {
                    let places = locate::places(&spec, root, order.first().copied().unwrap_or_default());
                    let message = format_args!("expected rows for examples in one of {places}; found none");
                    return Err(named(Error::new(ErrorKind::NotFound, message)));
                }
            }
        };
        Ok(Self { spec, options: options.clone(), rows, examples })
    }

    /// What it is.
    pub fn spec(&self) -> &TaskSpec {
        &self.spec
    }

    /// Rows of the split.
    pub fn len(&self) -> usize {
        self.rows.rows.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Examples before each prompt.
    pub fn num_fewshot(&self) -> usize {
        self.options.num_fewshot.unwrap_or(self.spec.num_fewshot)
    }

    /// Where a row stands: file and line.
    pub fn place(&self, id: usize) -> String {
        self.rows.place(id)
    }

    /// A row as the file has it.
    pub fn row(&self, id: usize) -> Option<&Row> {
        self.rows.rows.get(id)
    }

    /// The rows as they are asked, in order, examples before each.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a row without a column that is needed, with a label out of range or without choices,
    /// naming file and line; [`ErrorKind::Option`] for more examples than there are.
    pub fn documents(&self) -> Result<Vec<Document>> {
        let writer = Writer { spec: &self.spec, env: template::environment() };
        let mut known: BTreeMap<usize, String> = BTreeMap::new();
        let count = self.options.limit.map_or(self.len(), |limit| limit.min(self.len()));
        let shots = self.num_fewshot();
        let pool = match &self.examples {
            Examples::Other(rows) => rows,
            _ => &self.rows,
        };
        let mut written: BTreeMap<usize, String> = BTreeMap::new();
        let mut random = PythonRandom::new(self.options.fewshot_seed);
        let mut order = self.options.fewshot_order.map(PythonRandom::new);
        let mut documents = Vec::with_capacity(count);
        for (id, row) in self.rows.rows.iter().enumerate().take(count) {
            let place = |e: Error| e.at(format_args!("task {:?}: {}", self.spec.name, self.rows.place(id)));
            let mut head = String::new();
            if shots > 0 {
                let mut chosen = self
                    .choose(&writer.key(row).map_err(place)?, shots, pool, &mut random, &mut |index| {
                        if let Some(key) = known.get(&index) {
                            return Ok(key.clone());
                        }
                        let key = pool.rows.get(index).map(|row| writer.key(row)).transpose();
                        let key = key.map_err(|e| e.at(pool.place(index)))?.unwrap_or_default();
                        known.insert(index, key.clone());
                        Ok(key)
                    })
                    .map_err(|e| e.at(format_args!("task {:?}", self.spec.name)))?;
                if let Some(order) = &mut order {
                    order.shuffle(&mut chosen);
                }
                for index in chosen {
                    let example = match written.get(&index) {
                        Some(example) => example,
                        None => {
                            let place = |e: Error| {
                                e.at(format_args!("task {:?}: {}", self.spec.name, pool.place(index)))
                            };
                            let example = pool
                                .rows
                                .get(index)
                                .map(|row| writer.example(row))
                                .transpose()
                                .map_err(place)?;
                            written.entry(index).or_insert(example.unwrap_or_default())
                        }
                    };
                    head.push_str(example);
                }
            }
            documents.push(writer.document(id, row, &head).map_err(place)?);
        }
        Ok(documents)
    }

    /// Indices of examples for a row. Rows are the same if `key` is.
    fn choose(
        &self,
        own: &str,
        shots: usize,
        pool: &Rows,
        random: &mut PythonRandom,
        key: &mut dyn FnMut(usize) -> Result<String>,
    ) -> Result<Vec<usize>> {
        let all = pool.rows.len();
        let without_itself = self.leaves_out_itself();
        let first = self.options.first_n || self.spec.fewshot.sampler == Sampler::FirstN;
        let too_few = |have: usize| {
            Error::new(
                ErrorKind::Option,
                format_args!("expected {shots} examples, found {have} rows to take them from"),
            )
        };
        let mut others = |indices: &mut dyn Iterator<Item = usize>, most: usize| -> Result<Vec<usize>> {
            let mut kept = Vec::new();
            for index in indices {
                if kept.len() == most {
                    break;
                }
                if !without_itself || key(index)? != own {
                    kept.push(index);
                }
            }
            Ok(kept)
        };
        if first {
            let chosen = others(&mut (0..all), shots)?;
            return if chosen.len() < shots { Err(too_few(chosen.len())) } else { Ok(chosen) };
        }
        let mut sample = |count: usize, from: usize| random.sample(from, count).map_err(|_| too_few(from));
        let drawn = sample(if without_itself { shots.saturating_add(1) } else { shots }, all)?;
        let chosen = others(&mut drawn.into_iter(), shots)?;
        if chosen.len() == shots {
            return Ok(chosen);
        }
        // Rows equal to this one were drawn; the harness then draws from all that are not.
        let left = others(&mut (0..all), all)?;
        Ok(sample(shots, left.len())?.into_iter().filter_map(|index| left.get(index).copied()).collect())
    }

    /// Whether a row may not be its own example: in the harness where the splits of rows and of examples have the same
    /// name or neither has one; and where one file stands for all splits.
    fn leaves_out_itself(&self) -> bool {
        match self.examples {
            Examples::Same { whole: true } => true,
            // Examples that the task itself gives are nobody's rows.
            _ if !self.spec.fewshot.samples.is_empty() => false,
            _ => self.spec.fewshot.split == self.spec.splits.test,
        }
    }
}

/// Writes prompts.
struct Writer<'a> {
    spec: &'a TaskSpec,
    env: Environment<'static>,
}

impl Writer<'_> {
    /// The fields of a row: its columns and what the shape makes of them.
    fn fields(&self, row: &Row) -> Result<Value> {
        let fail = |message: String| Err(Error::new(ErrorKind::Config, message));
        let mut fields: BTreeMap<String, Value> =
            row.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value)))).collect();
        let has = |name: &String| row.contains_key(name);
        let Some(shape) = self.spec.rows.iter().find(|shape| shape.has.iter().all(has)) else {
            // The one of which most is there.
            let there = |shape: &&RowShape| Reverse(shape.has.iter().filter(|name| has(name)).count());
            let Some(nearest) = self.spec.rows.iter().min_by_key(there) else {
                return Ok(Value::from(fields));
            };
            let missing: Vec<&str> =
                nearest.has.iter().filter(|name| !has(name)).map(String::as_str).collect();
            let mut found: Vec<&str> = row.keys().map(String::as_str).collect();
            found.sort_unstable();
            let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
            return fail(format!("expected the column {}, found {found}", missing.join(", ")));
        };
        for (name, expression) in &shape.fields.0 {
            let value = self.expression(name, expression, &Value::from(fields.clone()))?;
            fields.insert(name.clone(), value);
        }
        Ok(Value::from(fields))
    }

    /// What tells a row from others: all of its fields, so that rows which a shape makes equal are.
    fn key(&self, row: &Row) -> Result<String> {
        Ok(self.fields(row)?.to_string())
    }

    fn expression(&self, key: &str, expression: &str, fields: &Value) -> Result<Value> {
        let value = template::evaluate(&self.env, expression, fields)
            .map_err(|e| self.cannot(key, expression, &e))?;
        if value.is_undefined() {
            let message = format_args!("{key}: {expression:?}: nothing of that name");
            return Err(Error::new(ErrorKind::Config, message));
        }
        Ok(value)
    }

    fn cannot(&self, key: &str, source: &str, error: &minijinja::Error) -> Error {
        Error::new(ErrorKind::Config, format_args!("{key}: {source:?}: {}", template::explain(error)))
    }

    fn template(&self, key: &str, template: &str, fields: &Value) -> Result<String> {
        template::render(&self.env, template, fields).map_err(|e| self.cannot(key, template, &e))
    }

    fn texts(&self, key: &str, expression: &str, fields: &Value) -> Result<Vec<String>> {
        let value = self.expression(key, expression, fields)?;
        let found = |found: &Value| {
            let message = format_args!("{key}: {expression:?}: expected a list of texts, found {found}");
            Error::new(ErrorKind::Config, message)
        };
        if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
            return Err(found(&value));
        }
        let items = value.try_iter().map_err(|e| self.cannot(key, expression, &e))?;
        let text = |item: Value| match item.kind() {
            ValueKind::String | ValueKind::Number => {
                Ok(item.as_str().map_or_else(|| item.to_string(), str::to_owned))
            }
            _ => Err(found(&item)),
        };
        let texts: Vec<String> = items.map(text).collect::<Result<_>>()?;
        if texts.is_empty() {
            return Err(Error::new(
                ErrorKind::Config,
                format_args!("{key}: expected at least one, found none"),
            ));
        }
        Ok(texts)
    }

    fn gold(&self, choices: &[String], fields: &Value) -> Result<usize> {
        let value = self.expression("gold", &self.spec.gold, fields)?;
        let index = match value.as_str() {
            Some(text) => choices.iter().position(|choice| choice == text).or_else(|| text.parse().ok()),
            None if value.kind() == ValueKind::Bool => Some(usize::from(value.is_true())),
            None => usize::try_from(value.clone()).ok(),
        };
        index.filter(|index| *index < choices.len()).ok_or_else(|| {
            let message = format_args!(
                "gold: expected a label of 0 to {} or one of the choices, found {value}",
                choices.len().saturating_sub(1)
            );
            Error::new(ErrorKind::Config, message)
        })
    }

    /// A row as an example: prompt, answer and what stands after it.
    fn example(&self, row: &Row) -> Result<String> {
        let spec = self.spec;
        let fields = self.fields(row)?;
        let own_text = spec.fewshot.text.as_deref();
        let (text, answer) = if spec.kind == TaskKind::MultipleChoice {
            let (many, expression) = if spec.contexts.is_empty() {
                ("choices", &spec.choices)
            } else {
                ("contexts", &spec.contexts)
            };
            let choices = self.texts(many, expression, &fields)?;
            let right = choices.get(self.gold(&choices, &fields)?).cloned().unwrap_or_default();
            if spec.contexts.is_empty() {
                (self.template("text", own_text.unwrap_or(&spec.text), &fields)?, right)
            } else {
                (right, self.template("target", &spec.target, &fields)?)
            }
        } else {
            let target = spec.fewshot.target.as_deref().unwrap_or(&spec.target);
            if !spec.targets.is_empty() && spec.fewshot.target.is_none() {
                let first =
                    self.texts("targets", &spec.targets, &fields)?.into_iter().next().unwrap_or_default();
                let text = self.template("text", own_text.unwrap_or(&spec.text), &fields)?;
                return Ok(self.joined(&text, &first));
            }
            (
                self.template("text", own_text.unwrap_or(&spec.text), &fields)?,
                self.template("target", target, &fields)?,
            )
        };
        Ok(self.joined(&text, &answer))
    }

    fn joined(&self, text: &str, answer: &str) -> String {
        if answer.is_empty() {
            return text.to_owned();
        }
        let between = self.spec.fewshot.target_delimiter.as_ref().unwrap_or(&self.spec.target_delimiter);
        format!("{text}{between}{answer}{}", self.spec.fewshot_delimiter)
    }

    fn document(&self, id: usize, row: &Row, examples: &str) -> Result<Document> {
        let spec = self.spec;
        let fields = self.fields(row)?;
        let head = self.template("description", &spec.description, &fields)? + examples;
        let target = || self.template("target", &spec.target, &fields);
        let text = || self.template("text", &spec.text, &fields);
        let between = &spec.target_delimiter;
        let mut choices = Vec::new();
        let (mut arguments, answer) = match spec.kind {
            TaskKind::MultipleChoice if spec.contexts.is_empty() => {
                choices = self.texts("choices", &spec.choices, &fields)?;
                let context = head + &text()?;
                let each = choices.iter().map(|choice| (context.clone(), format!("{between}{choice}")));
                (each.collect::<Vec<_>>(), Answer::Choice(self.gold(&choices, &fields)?))
            }
            TaskKind::MultipleChoice => {
                choices = self.texts("contexts", &spec.contexts, &fields)?;
                let continuation = format!("{between}{}", target()?);
                let each = choices.iter().map(|context| (format!("{head}{context}"), continuation.clone()));
                (each.collect(), Answer::Choice(self.gold(&choices, &fields)?))
            }
            TaskKind::Loglikelihood => {
                let target = target()?;
                (vec![(head + &text()?, target.clone())], Answer::Texts(vec![target]))
            }
            TaskKind::LoglikelihoodRolling => {
                let target = target()?;
                let counted = match &spec.counted[..] {
                    "" => target.clone(),
                    counted => self.template("counted", counted, &fields)?,
                };
                let answer = Answer::Counts { words: words(&counted), bytes: counted.len() };
                (vec![(target, String::new())], answer)
            }
            TaskKind::GenerateUntil => {
                let right = match &spec.targets[..] {
                    "" => vec![target()?],
                    targets => self.texts("targets", targets, &fields)?,
                };
                (vec![(head + &text()?, String::new())], Answer::Texts(right))
            }
        };
        // Mutual information asks each choice once more, after nothing.
        if spec.metrics.iter().any(|metric| metric.metric == "acc_mutual_info") {
            arguments.extend(choices.iter().map(|choice| (String::new(), format!("{between}{choice}"))));
        }
        Ok(Document { id, arguments, choices, answer })
    }
}

/// Pieces between runs of white space, an empty one at either end counted, as Python's `re.split` counts.
fn words(text: &str) -> usize {
    let mut pieces = 1;
    let mut inside = false;
    for c in text.chars() {
        let space = template::python_space(c);
        if space && !inside {
            pieces += 1;
        }
        inside = space;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_as_python_splits() {
        // len(re.split(r"\s+", text)) in Python.
        for (text, expected) in [("", 1), ("a", 1), (" a  b ", 4), ("a\n\n b", 2), (" ", 2)] {
            assert_eq!(words(text), expected, "{text:?}");
        }
    }
}
