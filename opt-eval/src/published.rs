//! Published scores of the OPT models: EleutherAI's evaluations beside Pythia (0-shot, with standard errors) and the Open
//! LLM Leaderboard v1 (few-shot, without).
//!
//! ```
//! use opt_eval::published;
//!
//! let [piqa] = &published::find("facebook/opt-125m", "piqa", "acc")[..] else { panic!("one source has it") };
//! assert_eq!((piqa.value, piqa.stderr, piqa.shots), (0.630033, Some(0.0112644), 0));
//! ```

use crate::report::{Bos, Report};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::LazyLock};

/// Sizes by shape: name, width of the hidden states, layers.
const SHAPES: [(&str, usize, usize); 9] = [
    ("opt-125m", 768, 12),
    ("opt-350m", 1024, 24),
    ("opt-1.3b", 2048, 24),
    ("opt-2.7b", 2560, 32),
    ("opt-6.7b", 4096, 32),
    ("opt-13b", 5120, 40),
    ("opt-30b", 7168, 48),
    ("opt-66b", 9216, 64),
    ("opt-175b", 12288, 96),
];

/// Models of the same shapes that only their names tell from OPT.
const NAMED: [&str; 1] = ["opt-iml-max-1.3b"];

/// A model that scores were published of, such as `opt-125m` or `opt-iml-max-1.3b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Size(&'static str);

impl Size {
    /// The size's name, such as `opt-1.3b`.
    pub fn name(self) -> &'static str {
        self.0
    }

    /// By a name: `facebook/opt-125m`, `models/opt-125m`, `opt-125m` or `125m`, in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        let last = name.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next()?.to_ascii_lowercase();
        let known = SHAPES.iter().map(|(name, ..)| *name).chain(NAMED);
        let is = |name: &&str| *name == last || name.strip_prefix("opt-") == Some(last.as_str());
        known.into_iter().find(is).map(Self)
    }

    /// By the shape: width of the hidden states and number of layers.
    pub fn from_shape(hidden_size: usize, num_hidden_layers: usize) -> Option<Self> {
        let found =
            SHAPES.iter().find(|(_, hidden, layers)| (*hidden, *layers) == (hidden_size, num_hidden_layers));
        found.map(|(name, ..)| Self(name))
    }

    /// Of a model, by its name, else by its shape.
    pub fn of_model(name: &str, hidden_size: usize, num_hidden_layers: usize) -> Option<Self> {
        Self::from_name(name).or_else(|| Self::from_shape(hidden_size, num_hidden_layers))
    }

    /// Of the model that a report is of: by its name, else by its shape where the report has it.
    pub fn of(report: &Report) -> Option<Self> {
        let by_name = report.model_name.as_deref().and_then(Self::from_name);
        by_name.or_else(|| {
            let own = report.opt_eval.as_ref()?;
            Self::from_shape(own.hidden_size?, own.num_hidden_layers?)
        })
    }
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

/// A published score.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Published {
    /// The model, such as `opt-125m`.
    pub model: &'static str,
    /// The task as lm-evaluation-harness 0.4 names it.
    pub task: &'static str,
    /// The metric as lm-evaluation-harness 0.4 names it.
    pub metric: &'static str,
    /// The value; accuracies from 0 to 1. Six significant digits.
    pub value: f64,
    /// Its standard error, where published.
    pub stderr: Option<f64>,
    /// Examples before each question.
    pub shots: u64,
    /// Whether texts began with the model's first token.
    pub bos: Bos,
    /// Who published it.
    pub source: &'static str,
    /// Where.
    pub url: &'static str,
    /// Version of lm-evaluation-harness that measured it.
    pub harness: &'static str,
    /// Why it measures something else than the task of that name in release 0.4.
    pub differs: Option<&'static str>,
    /// Whether it is the mean over a group's tasks that each count as one, whatever their size.
    pub macro_mean: bool,
}

#[derive(Default, Deserialize)]
struct Table {
    sources: Vec<Source>,
}

/// Scores by task and metric: shots, value, standard error.
type Tasks = BTreeMap<String, BTreeMap<String, (u64, f64, Option<f64>)>>;

#[derive(Deserialize)]
struct Source {
    name: String,
    url: String,
    harness: String,
    bos: Bos,
    differs: BTreeMap<String, String>,
    #[serde(rename = "macro")]
    macro_means: Vec<String>,
    /// By model.
    scores: BTreeMap<String, Tasks>,
}

/// The file of this crate; a test reads it.
static TABLE: LazyLock<Table> =
    LazyLock::new(|| serde_json::from_str(include_str!("../data/published.json")).unwrap_or_default());

/// All scores published of a model, by source, task and metric.
pub fn of(size: Size) -> Vec<Published> {
    let mut found = Vec::new();
    for source in &TABLE.sources {
        let Some((model, tasks)) = source.scores.get_key_value(size.name()) else { continue };
        for (task, metrics) in tasks {
            // What holds for a group holds for the tasks in it.
            let of_task = |name: &str| {
                task.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
            };
            let differs = source.differs.iter().find(|(name, _)| of_task(name));
            for (metric, &(shots, value, stderr)) in metrics {
                found.push(Published {
                    model,
                    task,
                    metric,
                    value,
                    stderr,
                    shots,
                    bos: source.bos,
                    source: &source.name,
                    url: &source.url,
                    harness: &source.harness,
                    differs: differs.map(|(_, why)| why.as_str()),
                    macro_mean: source.macro_means.contains(task),
                });
            }
        }
    }
    found
}

/// The scores published of a model ([`Size::from_name`]) on a task by a metric; none if there are none.
pub fn find(model: &str, task: &str, metric: &str) -> Vec<Published> {
    let Some(size) = Size::from_name(model) else { return Vec::new() };
    of(size).into_iter().filter(|score| score.task == task && score.metric == metric).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_has_all_models() {
        let count = |name| Size::from_name(name).map_or(0, |size| of(size).len());
        // 8 tasks with 14 metrics, 57 subjects with two each, and their mean; six of the leaderboard.
        assert_eq!(count("opt-125m"), 14 + 57 * 2 + 1 + 6);
        assert_eq!(count("facebook/opt-13b"), 14 + 57 * 2 + 1);
        assert_eq!(count("OPT-IML-max-1.3B"), 6);
        assert_eq!(count("opt-175b"), 0);
    }

    #[test]
    fn a_score_knows_where_it_is_from() {
        let found = find("66b", "mmlu", "acc");
        let [old, leaderboard] = &found[..] else { panic!("{found:?}") };
        assert!((old.value - 0.2828).abs() < 5e-5 && old.macro_mean && old.differs.is_some());
        assert_eq!((leaderboard.value, leaderboard.shots, leaderboard.stderr), (0.2699, 5, None));
        assert!(leaderboard.differs.is_none() && leaderboard.bos == Bos::Without);
        assert!(find("66b", "mmlu_anatomy", "acc").iter().all(|score| score.differs.is_some()));
        assert!(find("some/opt-125m-novels", "piqa", "acc").is_empty());
    }

    #[test]
    fn sizes_are_known_by_name_and_shape() {
        assert_eq!(Size::from_shape(1024, 24).map(Size::name), Some("opt-350m"));
        assert_eq!(Size::from_shape(1024, 12), None);
        assert_eq!(Size::from_name("models/opt-6.7B/").map(Size::name), Some("opt-6.7b"));
        let mut info = crate::report::RunInfo::new("mine");
        (info.hidden_size, info.num_hidden_layers) = (Some(768), Some(12));
        assert_eq!(Size::of(&Report::new(info)).map(Size::name), Some("opt-125m"));
    }
}
