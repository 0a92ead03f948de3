use super::{TaskSpec, spec::bad_toml};
use opt_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};
use toml::{Table, Value};

/// Tasks that are asked for together, and what their scores are together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct GroupSpec {
    /// The name it is asked for by.
    pub name: String,
    /// A shorter name in tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// The version of what is in it.
    #[serde(default = "one")]
    pub version: f64,
    /// Tasks and groups.
    #[serde(default)]
    pub tasks: Vec<String>,
    /// Metrics of which the group has a mean, weighted by the number of rows.
    #[serde(default)]
    pub metrics: Vec<String>,
    /// Whether it has scores of its own; without, it is only a name for several tasks.
    #[serde(default = "yes")]
    pub aggregate: bool,
}

fn one() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}

/// What was asked for: tasks in order, and the groups that named them, the inner ones first.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct Selection {
    /// Each task once.
    pub tasks: Vec<TaskSpec>,
    /// Groups whose scores are to be reported.
    pub groups: Vec<GroupSpec>,
}

/// All tasks that are known by name.
///
/// ```
/// let tasks = opt_eval::Tasks::builtin();
/// let found = tasks.select(&["hellaswag", "mmlu"])?;
/// assert_eq!(found.tasks.len(), 1 + 57);
/// let error = tasks.select(&["helaswag"]).unwrap_err();
/// assert!(error.to_string().contains("hellaswag"));
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    specs: BTreeMap<String, TaskSpec>,
    tables: BTreeMap<String, Table>,
    groups: BTreeMap<String, GroupSpec>,
    order: Vec<String>,
}

const BUILTIN: [(&str, &str); 3] = [
    ("choices.toml", include_str!("../../tasks/choices.toml")),
    ("texts.toml", include_str!("../../tasks/texts.toml")),
    ("mmlu.toml", include_str!("../../tasks/mmlu.toml")),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    task: Vec<Table>,
    #[serde(default)]
    group: Vec<GroupSpec>,
}

impl Tasks {
    /// The built-in ones.
    pub fn builtin() -> Self {
        let mut tasks = Self::default();
        for (name, text) in BUILTIN {
            // A test reads them all; a file that cannot be read would be left out.
            let read = tasks.add(text);
            debug_assert!(read.is_ok(), "{name}: {read:?}");
        }
        tasks
    }

    /// Adds tasks of a file: TOML with a table `[[task]]` for each, which may say `like = "NAME"` to begin as another
    /// does, and `each = [...]` for one of each name; and `[[group]]`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] and [`ErrorKind::Io`] if it cannot be read, [`ErrorKind::Config`] for what is no task,
    /// naming file and task.
    pub fn add_file(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let text = fs::read_to_string(path).map_err(|e| {
            let kind =
                if e.kind() == std::io::ErrorKind::NotFound { ErrorKind::NotFound } else { ErrorKind::Io };
            Error::because(kind, format_args!("{}: cannot read tasks", path.display()), e)
        })?;
        self.add(&text).map_err(|e| e.at(path.display()))
    }

    /// [`Tasks::add_file`] from text.
    ///
    /// # Errors
    /// Those of [`Tasks::add_file`].
    pub fn add(&mut self, text: &str) -> Result<()> {
        let file: File = toml::from_str(text).map_err(|e| bad_toml(&e))?;
        if file.task.is_empty() && file.group.is_empty() {
            return Err(Error::new(ErrorKind::Config, "expected tables [[task]], found none"));
        }
        for group in file.group {
            self.order.push(group.name.clone());
            self.groups.insert(group.name.clone(), group);
        }
        for table in file.task {
            self.add_table(table)?;
        }
        Ok(())
    }

    fn add_table(&mut self, mut table: Table) -> Result<()> {
        let named = table.get("name").and_then(Value::as_str).unwrap_or("?").to_owned();
        let fail =
            |message: String| Err(Error::new(ErrorKind::Config, format_args!("task {named:?}: {message}")));
        let group = match table.remove("group") {
            None => None,
            Some(Value::String(group)) => Some(group),
            Some(_) => return fail("group: expected a name".to_owned()),
        };
        let each = match table.remove("each") {
            None => vec![None],
            Some(Value::Array(names)) if names.iter().all(Value::is_str) => {
                names.into_iter().map(|name| name.as_str().map(str::to_owned)).collect()
            }
            Some(_) => return fail("each: expected a list of names".to_owned()),
        };
        if let Some(like) = table.remove("like") {
            let Some(base) = like.as_str().and_then(|name| self.tables.get(name)) else {
                let like = like.as_str().unwrap_or_default();
                return fail(format!(
                    "like: expected the name of a task, found {like:?}; {}",
                    self.near(like)
                ));
            };
            let own = table;
            table = base.clone();
            // An alias is a name, and so not inherited. Rows lie where they lie for the other task.
            table.remove("alias");
            let data = table.entry("data").or_insert_with(|| Value::Table(Table::new()));
            if let (Some(data), false) = (data.as_table_mut(), own.contains_key("data")) {
                let names = data.entry("names").or_insert_with(|| Value::Array(Vec::new()));
                names.as_array_mut().into_iter().for_each(|names| names.push(like.clone()));
            }
            own.into_iter().for_each(|(key, value)| {
                table.insert(key, value);
            });
        }
        for one in each {
            let mut table = table.clone();
            if let Some(one) = &one {
                let words = one.replace('_', " ");
                table.iter_mut().for_each(|(_, value)| fill(value, one, &words));
            }
            let spec: TaskSpec = Value::Table(table.clone())
                .try_into()
                .map_err(|e: toml::de::Error| bad_toml(&e).at(format_args!("task {named:?}")))?;
            spec.validate()?;
            if let Some(group) = &group {
                let known = self.groups.entry(group.clone()).or_insert_with(|| {
                    self.order.push(group.clone());
                    let metrics = spec.metrics.iter().map(|metric| metric.metric.clone()).collect();
                    GroupSpec {
                        name: group.clone(),
                        alias: None,
                        version: 1.0,
                        tasks: Vec::new(),
                        metrics,
                        aggregate: true,
                    }
                });
                if !known.tasks.contains(&spec.name) {
                    known.tasks.push(spec.name.clone());
                }
            }
            self.order.retain(|name| name != &spec.name);
            self.order.push(spec.name.clone());
            self.tables.insert(spec.name.clone(), table);
            self.specs.insert(spec.name.clone(), spec);
        }
        Ok(())
    }

    /// The task of a name.
    pub fn get(&self, name: &str) -> Option<&TaskSpec> {
        self.specs.get(name)
    }

    /// Names of tasks and groups, as they were added.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.order.iter().map(String::as_str)
    }

    /// The group of a name.
    pub fn group(&self, name: &str) -> Option<&GroupSpec> {
        self.groups.get(name)
    }

    /// Tasks by their names and those of groups.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a name that is not known, with those that are near it, and for no name.
    pub fn select(&self, names: &[impl AsRef<str>]) -> Result<Selection> {
        let mut selection = Selection::default();
        let mut seen = BTreeSet::new();
        for name in names {
            self.take(name.as_ref().trim(), &mut selection, &mut seen)?;
        }
        if selection.tasks.is_empty() {
            return Err(Error::new(
                ErrorKind::Option,
                "tasks: expected the name of at least one, found none",
            ));
        }
        Ok(selection)
    }

    fn take(&self, name: &str, selection: &mut Selection, seen: &mut BTreeSet<String>) -> Result<()> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        if let Some(spec) = self.specs.get(name) {
            selection.tasks.push(spec.clone());
            return Ok(());
        }
        let Some(group) = self.groups.get(name) else {
            let message = format_args!("tasks: {name:?} is not known; {}", self.near(name));
            return Err(Error::new(ErrorKind::Option, message));
        };
        for inner in &group.tasks {
            self.take(inner, selection, seen)?;
        }
        if group.aggregate {
            selection.groups.push(group.clone());
        }
        Ok(())
    }

    /// What could have been meant.
    fn near(&self, name: &str) -> String {
        near(name, self.names())
    }
}

/// The names most like one that is not known, for a message.
pub(crate) fn near<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let mut like: Vec<(f64, &str)> = known.map(|known| (strsim::jaro_winkler(name, known), known)).collect();
    like.sort_by(|a, b| b.0.total_cmp(&a.0));
    let near: Vec<&str> =
        like.iter().filter(|(like, _)| *like > 0.75).take(3).map(|(_, name)| *name).collect();
    match &near[..] {
        [] => "`opt eval --list` names all".to_owned(),
        near => format!("near it: {}", near.join(", ")),
    }
}

/// Puts a name in the place of `$each`, and its words in that of `$words`.
fn fill(value: &mut Value, name: &str, words: &str) {
    match value {
        Value::String(text) => *text = text.replace("$each", name).replace("$words", words),
        Value::Array(items) => items.iter_mut().for_each(|item| fill(item, name, words)),
        Value::Table(table) => table.iter_mut().for_each(|(_, value)| fill(value, name, words)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_files_can_be_read() {
        for (name, text) in BUILTIN {
            let mut tasks = Tasks::builtin();
            tasks.add(text).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        let tasks = Tasks::builtin();
        let mmlu = tasks.select(&["mmlu"]).unwrap();
        assert_eq!(mmlu.tasks.len(), 57);
        assert_eq!(mmlu.groups.last().map(|group| &group.name[..]), Some("mmlu"));
        assert_eq!(
            tasks.get("mmlu_us_foreign_policy").unwrap().description,
            "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        );
    }

    #[test]
    fn a_task_may_begin_as_another_does() {
        let mut tasks = Tasks::builtin();
        tasks.add("[[task]]\nname = \"mine\"\nlike = \"piqa\"\ntext = \"Q: {{question}}\\nA:\"\n").unwrap();
        let (mine, piqa) = (tasks.get("mine").unwrap(), tasks.get("piqa").unwrap());
        assert_eq!(mine.rows, piqa.rows);
        assert_ne!(mine.text, piqa.text);
        for (text, expected) in [
            ("[[task]]\nname = \"mine\"\nlike = \"piqo\"", "near it: piqa"),
            ("[[task]]\nname = \"mine\"\nlike = \"piqa\"\ncolour = 1", "colour"),
            ("[[task]]\nname = \"mine\"\nlike = \"piqa\"\ntext = \"{{\"", "text"),
            ("[[task]]\nname = \"mine\"\nlike = \"piqa\"\nmetrics = [\"ac\"]", "acc"),
            ("", "found none"),
        ] {
            let error = tasks.clone().add(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
