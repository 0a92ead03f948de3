//! The tables that the harness prints: tasks, and after them groups.

use super::{Report, Scores};
use crate::Result;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const HEADERS: [&str; 9] = ["Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr"];

impl Report {
    /// The scores as Markdown, as lm-evaluation-harness prints them: a table of all tasks, ordered as they are grouped,
    /// then one of the groups that have scores. Values have four decimals; an arrow says which way is better.
    pub fn markdown(&self) -> String {
        let mut text = self.table("Tasks", &self.results);
        if !self.groups.is_empty() {
            text += "\n";
            text += &self.table("Groups", &self.groups);
        }
        text
    }

    /// Writes a Markdown file: a heading, how the scores came about, and the tables.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn write_markdown(&self, path: impl AsRef<Path>) -> Result<()> {
        super::file::write_whole(path.as_ref(), &self.document())
    }

    /// The text of [`Report::write_markdown`].
    pub fn document(&self) -> String {
        let mut text = format!("# {}\n\n", self.title());
        for line in self.circumstances() {
            text += &format!("- {line}\n");
        }
        text + "\n" + &self.markdown()
    }

    /// Settings that change scores, a line each, and the notes.
    fn circumstances(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(bos) = self.bos() {
            lines.push(format!("texts {bos}"));
        }
        if let Some(limit) = self.config.get("limit").and_then(Value::as_f64) {
            lines.push(match limit < 1.0 {
                true => format!("only {} % of each task's documents", limit * 100.0),
                false => format!("only {limit} documents of each task"),
            });
        }
        if let Some(own) = &self.opt_eval {
            let cut = own.truncated.iter().filter(|(_, n)| **n > 0);
            lines.extend(cut.map(|(task, n)| format!("{task}: {n} prompts were longer than the context")));
            lines.extend(own.notes.iter().cloned());
        }
        if let Some(version) = self.other.get("lm_eval_version").and_then(Value::as_str) {
            lines.push(format!("by lm-evaluation-harness {version}"));
        }
        lines
    }

    fn table(&self, column: &str, scores: &BTreeMap<String, Scores>) -> String {
        let mut rows = Vec::new();
        for (name, depth) in self.ordered(scores) {
            let Some(scores) = scores.get(&name) else { continue };
            let title = match depth {
                0 => scores.alias.clone(),
                _ => format!("{}- {}", " ".repeat(depth), scores.alias),
            };
            for (i, score) in scores.metrics.iter().enumerate() {
                let first = |text: String| if i == 0 { text } else { String::new() };
                rows.push([
                    first(title.clone()),
                    first(self.version(&name)),
                    score.filter.clone(),
                    self.n_shot.get(&name).map_or_else(|| " ".to_owned(), plain),
                    score.metric.clone(),
                    arrow(self.higher_is_better(&name, &score.metric)).to_owned(),
                    number(score.value),
                    "±".to_owned(),
                    score.stderr.map_or_else(|| "   N/A".to_owned(), number),
                ]);
            }
        }
        let mut headers = HEADERS;
        if let Some(first) = headers.first_mut() {
            *first = column;
        }
        markdown_table(&headers, &rows)
    }

    fn version(&self, task: &str) -> String {
        match self.versions.get(task) {
            Some(Value::Null) => "N/A".to_owned(),
            // So wide in the harness.
            None => "    N/A".to_owned(),
            Some(version) => plain(version),
        }
    }

    /// Names with their depth: groups from the outermost, each followed by what is in it, then tasks of no group.
    fn ordered(&self, scores: &BTreeMap<String, Scores>) -> Vec<(String, usize)> {
        fn visit(
            groups: &BTreeMap<String, Vec<String>>,
            name: &str,
            depth: usize,
            path: &mut Vec<String>,
            found: &mut Vec<(String, usize)>,
        ) {
            found.push((name.to_owned(), depth));
            if path.iter().any(|above| above == name) {
                return;
            }
            path.push(name.to_owned());
            let mut children: Vec<&String> = groups.get(name).into_iter().flatten().collect();
            children.sort();
            for child in children {
                visit(groups, child, depth + 1, path, found);
            }
            path.pop();
        }
        let children: BTreeSet<&String> = self.group_subtasks.values().flatten().collect();
        let mut found = Vec::new();
        for root in self.group_subtasks.keys().filter(|name| !children.contains(name)) {
            visit(&self.group_subtasks, root, 0, &mut Vec::new(), &mut found);
        }
        let seen: BTreeSet<String> = found.iter().map(|(name, _)| name.clone()).collect();
        found.extend(scores.keys().filter(|name| !seen.contains(*name)).map(|name| (name.clone(), 0)));
        found
    }
}

fn arrow(higher_is_better: Option<bool>) -> &'static str {
    match higher_is_better {
        Some(true) => "↑",
        Some(false) => "↓",
        None => "",
    }
}

/// Four decimals; what is no finite number in Python's words.
pub(crate) fn number(value: f64) -> String {
    if value.is_nan() { "nan".to_owned() } else { format!("{value:.4}") }
}

/// A version or a number of shots: whole numbers without their decimals.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(n) => n.as_f64().map_or_else(|| n.to_string(), |n| n.to_string()),
        other => other.to_string(),
    }
}

/// A Markdown table whose columns line up as text too: headers in the middle, numbers at the right, words at the left.
pub(crate) fn markdown_table<const N: usize>(headers: &[&str; N], rows: &[[String; N]]) -> String {
    let is_number = |cell: &str| cell.parse::<f64>().is_ok();
    let columns: Vec<(usize, bool)> = headers
        .iter()
        .enumerate()
        .map(|(i, header)| {
            let cells = || rows.iter().filter_map(|row| row.get(i)).map(String::as_str);
            // Empty cells, of a row that goes on with the one above, say nothing.
            let numeric = cells().any(is_number) && cells().all(|cell| cell.is_empty() || is_number(cell));
            let least = if numeric { 4 } else { 3 };
            let width = cells().map(|cell| cell.chars().count()).max().unwrap_or(0);
            (width.max(header.chars().count()).max(least), numeric)
        })
        .collect();
    let mut text = String::from("|");
    for (header, &(width, _)) in headers.iter().zip(&columns) {
        text += &format!("{header:^width$}|");
    }
    text += "\n|";
    for &(width, numeric) in &columns {
        text += &"-".repeat(width - usize::from(numeric));
        text += if numeric { ":|" } else { "|" };
    }
    text += "\n";
    for row in rows {
        text += "|";
        for (cell, &(width, _)) in row.iter().zip(&columns) {
            // A bar would end the cell.
            let cell = cell.replace('|', "\\|").replace('\n', " ");
            text += &match is_number(&cell) {
                true => format!("{cell:>width$}|"),
                false => format!("{cell:<width$}|"),
            };
        }
        text += "\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    // What make_table of lm-eval 0.4.13 prints of the same (opt-eval/tests/fixtures/report/make_table.py).
    #[test]
    fn tables_are_those_of_the_harness() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/report");
        for name in ["groups", "tasks", "filters"] {
            let read = |end| std::fs::read_to_string(folder.join(format!("table_{name}.{end}")));
            let report = Report::from_json(&read("json").expect("the fixture")).expect("it reads");
            assert_eq!(report.markdown(), read("md").expect("the fixture"), "{name}");
        }
    }

    #[test]
    fn a_circle_of_groups_ends() {
        let mut report = Report::from_json(r#"{"results": {"t": {"acc,none": 0.5}}}"#).expect("it reads");
        report.group_subtasks.insert("a".into(), vec!["b".into(), "t".into()]);
        report.group_subtasks.insert("b".into(), vec!["a".into()]);
        report.group_subtasks.insert("c".into(), vec!["b".into(), "t".into()]);
        assert!(report.markdown().contains("- t"));
        report.add_group(super::super::GroupResult::new("c", ["a"]).mean_of("acc"));
        assert!(report.score("c", "acc", "none").is_none(), "t has no documents");
    }
}
