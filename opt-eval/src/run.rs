//! Runs tasks on a model.

mod journal;

use crate::{
    filter,
    measure::{self, Reply, Value},
    report::{self, GroupResult, MetricResult, NO_FILTER, Report, RunInfo, TaskResult},
    requests::{Asker, Encoded},
    samples::{Sample, document_hash, hash, in_words, task_hash},
    task::{Answer, Document, Filter, FilterStep, GroupSpec, Selection, Task, TaskKind, TaskOptions},
};
use journal::{Entry, Journal};
use opt_core::{
    CacheDType, CancelToken, Error, ErrorKind, Opt, Progress, ProgressFn, Result, tokenizer::Bos,
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Instant,
};

/// Rows that are asked before they are written down: what a run that is ended loses at most, and what shared
/// beginnings are looked for in.
const BLOCK: usize = 64;

/// How an evaluation is run.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct EvalOptions {
    /// How prompts are made.
    pub task: TaskOptions,
    /// Whether texts begin with BOS: what the tokenizer says (the harness since 0.4.10), or never (until 0.4.9).
    pub bos: Bos,
    /// Whether what several requests begin with is run once.
    pub share: bool,
    /// At most so many tokens of a made text, in the place of what tasks say.
    pub max_gen_toks: Option<usize>,
    /// How keys and values are held.
    pub cache: CacheDType,
    /// Seed of texts that are drawn.
    pub seed: u64,
    /// Changes with the model's weights, such as the dates of its files: a journal of others is refused.
    pub weights_mark: String,
    /// Resamples of bootstrapped standard errors; 0 is none.
    pub bootstrap_iters: usize,
    /// Whether to keep what was asked and answered of each row.
    pub keep_samples: bool,
    /// Where answers are written down as they come, so that a run that was ended can go on.
    pub journal: Option<PathBuf>,
    /// Goes on where the journal ends.
    pub resume: bool,
    /// What the model is called in the report.
    pub model_name: String,
    /// Ends the work from elsewhere; what was answered stays in the journal.
    pub cancel: CancelToken,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self {
            task: TaskOptions::default(),
            bos: Bos::Model,
            share: true,
            max_gen_toks: None,
            cache: CacheDType::default(),
            seed: 0,
            weights_mark: String::new(),
            bootstrap_iters: 100_000,
            keep_samples: false,
            journal: None,
            resume: false,
            model_name: "opt".to_owned(),
            cancel: CancelToken::new(),
        }
    }
}

/// What an evaluation gave.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct Evaluation {
    /// Scores, in the harness' layout.
    pub report: Report,
    /// For each task what was asked and answered, if it was to be kept.
    pub samples: BTreeMap<String, Vec<Sample>>,
}

/// Evaluates a model on tasks whose rows lie under `data`.
///
/// ```no_run
/// use opt_core::Opt;
/// use opt_eval::{EvalOptions, Tasks, evaluate};
///
/// let opt = Opt::open("models/opt-125m")?;
/// let tasks = Tasks::builtin().select(&["lambada_openai", "hellaswag"])?;
/// let found = evaluate(&opt, &tasks, "data", &EvalOptions::default(), &mut |_| std::ops::ControlFlow::Continue(()))?;
/// println!("{}", found.report.markdown());
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// Those of [`Task::load`] and [`Task::documents`], before anything is run; [`ErrorKind::Cancelled`];
/// [`ErrorKind::Backend`]; [`ErrorKind::Option`] for a journal of another evaluation; [`ErrorKind::Io`].
pub fn evaluate(
    opt: &Opt,
    selection: &Selection,
    data: impl AsRef<Path>,
    options: &EvalOptions,
    progress: &mut ProgressFn<'_>,
) -> Result<Evaluation> {
    Prepared::load(selection, data, options)?.run(opt, options, progress)
}

/// Tasks whose rows were read and whose prompts were made: what [`evaluate`] does before it needs a model, so that bad
/// data is told before one is loaded.
pub struct Prepared {
    tasks: Vec<(Task, Vec<Document>)>,
    groups: Vec<GroupSpec>,
}

impl Prepared {
    /// Reads the rows and makes the prompts.
    ///
    /// # Errors
    /// Those of [`Task::load`] and [`Task::documents`]; [`ErrorKind::Option`] for a file in the place of a folder where
    /// there are several tasks; [`ErrorKind::Cancelled`].
    pub fn load(selection: &Selection, data: impl AsRef<Path>, options: &EvalOptions) -> Result<Self> {
        let data = data.as_ref();
        if let (true, [_, second, ..]) = (data.is_file(), &selection.tasks[..]) {
            let message = format_args!(
                "{}: a file holds the rows of one task, found a second: {:?}",
                data.display(),
                second.name
            );
            return Err(Error::new(ErrorKind::Option, message));
        }
        let mut tasks = Vec::new();
        for spec in &selection.tasks {
            options.cancel.check("evaluation")?;
            let mut spec = spec.clone();
            spec.generation.max_gen_toks = options.max_gen_toks.unwrap_or(spec.generation.max_gen_toks);
            let task = Task::load(spec, data, &options.task)?;
            let documents = task.documents()?;
            tasks.push((task, documents));
        }
        Ok(Self { tasks, groups: selection.groups.clone() })
    }

    /// Evaluates a model on them.
    ///
    /// # Errors
    /// As [`evaluate`], but for those of [`Prepared::load`].
    pub fn run(&self, opt: &Opt, options: &EvalOptions, progress: &mut ProgressFn<'_>) -> Result<Evaluation> {
        let begun = Instant::now();
        let asker = Asker::new(opt)
            .bos(options.bos)
            .share(options.share)
            .cache_dtype(options.cache)
            .seed(options.seed)
            .cancel(options.cancel.clone());
        let mut journal = match &options.journal {
            Some(path) => Journal::open(path, &run_of(opt, options), options.resume)?,
            None => Journal::none(),
        };
        let mut evaluation = Evaluation { report: Report::new(info(opt, options)), ..Evaluation::default() };
        let total: usize = self.tasks.iter().map(|(_, documents)| documents.len()).sum();
        let mut done = 0;
        for (task, documents) in &self.tasks {
            let name = &task.spec().name;
            let mut at = |of_task: usize, part: f64| -> ControlFlow<()> {
                let now = (done + of_task) as f64 + part;
                progress(Progress::new(name, now as u64, total as u64))
            };
            let entries = answer(&asker, task, documents, &mut journal, &mut at)?;
            let (result, samples) = score(task, documents, &entries, options)?;
            done += documents.len();
            let groups = self.groups.iter().filter(|group| group.tasks.contains(name));
            let result = TaskResult { groups: groups.map(|group| group.name.clone()).collect(), ..result };
            evaluation.report.add_task(result);
            if options.keep_samples {
                evaluation.samples.insert(name.clone(), samples);
            }
        }
        for group in &self.groups {
            let mut result = GroupResult::new(&group.name, group.tasks.clone());
            result.alias.clone_from(&group.alias);
            result.version = Some(group.version.to_string());
            evaluation
                .report
                .add_group(group.metrics.iter().fold(result, |result, metric| result.mean_of(metric)));
        }
        evaluation.report.set_seconds(begun.elapsed().as_secs_f64());
        Ok(evaluation)
    }
}

/// What a journal's answers depend on, beside the prompts.
fn run_of(opt: &Opt, options: &EvalOptions) -> serde_json::Value {
    json!({
        "model": options.model_name,
        "config": format!("{:?}", opt.config()),
        "weights": opt.weights(),
        "adapter": opt.adapter(),
        "backend": opt.info().name,
        "bos": format!("{:?}", options.bos),
        "kv_dtype": format!("{:?}", options.cache),
        "seed": options.seed,
        "weights_mark": options.weights_mark,
        "max_gen_toks": options.max_gen_toks,
    })
}

fn bos_of(opt: &Opt, bos: Bos) -> report::Bos {
    let adds = opt.tokenizer().is_some_and(|tokenizer| tokenizer.adds_bos());
    if bos == Bos::Always || (bos == Bos::Model && adds) { report::Bos::With } else { report::Bos::Without }
}

fn info(opt: &Opt, options: &EvalOptions) -> RunInfo {
    let (config, backend) = (opt.config(), opt.info());
    let mut info = RunInfo::new(&options.model_name);
    info.num_parameters = Some(config.parameters());
    info.dtype = Some(opt.weights().to_owned());
    info.device = Some(backend.device.to_string());
    info.gen_kwargs = options.max_gen_toks.map(|most| json!({ "max_gen_toks": most }));
    info.limit = options.task.limit.map(|limit| limit as f64);
    info.bootstrap_iters = options.bootstrap_iters;
    info.fewshot_seed = Some(options.task.fewshot_seed);
    info.max_length = Some(opt.context());
    info.bos = Some(bos_of(opt, options.bos));
    if let Some(tokenizer) = opt.tokenizer() {
        let named = |id: Option<u32>| id.and_then(|id| Some((tokenizer.decode(&[id], false).ok()?, id)));
        info.bos_token = named(tokenizer.bos_id());
        info.eos_token = named(tokenizer.eos_id());
        info.pad_token = named(tokenizer.pad_id());
    }
    info.backend = Some(backend.name.to_string());
    info.weights = Some(opt.weights().to_owned());
    info.adapter = opt.adapter().map(str::to_owned);
    info.hidden_size = Some(config.hidden_size);
    info.num_hidden_layers = Some(config.num_hidden_layers);
    info
}

/// Answers to all documents of a task, those in the journal first.
fn answer(
    asker: &Asker<'_>,
    task: &Task,
    documents: &[Document],
    journal: &mut Journal,
    at: &mut (dyn FnMut(usize, f64) -> ControlFlow<()> + Send),
) -> Result<Vec<Entry>> {
    let name = &task.spec().name;
    let mut entries: Vec<Option<Entry>> = vec![None; documents.len()];
    for entry in journal.begin(task.spec(), documents)? {
        if let Some(slot) = entries.get_mut(entry.doc) {
            *slot = Some(entry);
        }
    }
    let open: Vec<&Document> =
        documents.iter().filter(|d| entries.get(d.id).is_none_or(Option::is_none)).collect();
    let mut done = documents.len() - open.len();
    for block in open.chunks(BLOCK) {
        let mut within =
            |p: Progress<'_>| at(done, block.len() as f64 * p.done as f64 / p.total.max(1) as f64);
        let answers = ask(asker, task, block, &mut within).map_err(|e| match e.kind() {
            ErrorKind::Cancelled => e,
            _ => e.at(format_args!("task {name:?}")),
        })?;
        journal.write(name, &answers)?;
        done += block.len();
        for entry in answers {
            if let Some(slot) = entries.get_mut(entry.doc) {
                *slot = Some(entry);
            }
        }
        if at(done, 0.0).is_break() {
            return Err(Error::new(ErrorKind::Cancelled, "evaluation was cancelled"));
        }
    }
    let all: Option<Vec<Entry>> = entries.into_iter().collect();
    all.ok_or_else(|| {
        Error::new(
            ErrorKind::Backend,
            format_args!("task {name:?}: expected an answer to each row, found fewer"),
        )
    })
}

/// Asks the model about some documents.
fn ask(
    asker: &Asker<'_>,
    task: &Task,
    documents: &[&Document],
    progress: &mut ProgressFn<'_>,
) -> Result<Vec<Entry>> {
    let first =
        |document: &&Document| document.arguments.first().map(|(text, _)| text.clone()).unwrap_or_default();
    let entry = |document: &&Document, reply: Reply, cut: usize| Entry { doc: document.id, reply, cut };
    match task.spec().kind {
        TaskKind::MultipleChoice | TaskKind::Loglikelihood => {
            let mut encoded: Vec<Encoded> = Vec::new();
            for document in documents {
                for (context, continuation) in &document.arguments {
                    encoded.push(
                        asker.encode(context, continuation).map_err(|e| e.at(task.place(document.id)))?,
                    );
                }
            }
            let mut found = asker.log_likelihoods(&encoded, progress)?.into_iter().zip(&encoded);
            let of = |document: &&Document| {
                let of_document = found.by_ref().take(document.arguments.len());
                let (said, cut): (Vec<_>, Vec<usize>) =
                    of_document.map(|(found, encoded)| (found, usize::from(encoded.cut > 0))).unzip();
                entry(document, Reply::Likelihoods(said), cut.iter().sum())
            };
            Ok(documents.iter().map(of).collect())
        }
        TaskKind::LoglikelihoodRolling => {
            let texts: Vec<String> = documents.iter().map(first).collect();
            let sums = asker.rolling(&texts, progress)?;
            Ok(documents
                .iter()
                .zip(sums)
                .map(|(document, sum)| entry(document, Reply::Whole(sum), 0))
                .collect())
        }
        TaskKind::GenerateUntil => {
            let prompts: Vec<String> = documents.iter().map(first).collect();
            let mut how = task.spec().generation.clone();
            if how.until.is_empty() {
                how.until.push(task.spec().fewshot_delimiter.clone());
            }
            let written = asker.generate(&prompts, &how, progress)?;
            let of = |(document, written): (&&Document, crate::requests::Written)| {
                entry(document, Reply::Text(written.text), usize::from(written.cut > 0))
            };
            Ok(documents.iter().zip(written).map(of).collect())
        }
    }
}

/// Scores of a task, and its samples if they are to be kept.
fn score(
    task: &Task,
    documents: &[Document],
    entries: &[Entry],
    options: &EvalOptions,
) -> Result<(TaskResult, Vec<Sample>)> {
    let spec = task.spec();
    let plain = [Filter::none()];
    let filters = if spec.filters.is_empty() { &plain[..] } else { &spec.filters };
    let mut metrics = Vec::new();
    let mut samples = Vec::new();
    for filter in filters {
        let replies: Vec<Reply> =
            entries.iter().map(|entry| entry.reply.through(&filter.steps)).collect::<Result<_>>()?;
        let mut columns: Vec<Vec<Value>> = Vec::new();
        for metric in &spec.metrics {
            let kind = measure::check(spec.kind, &metric.metric)?;
            let each = documents.iter().zip(&replies);
            let values: Vec<Value> = each
                .filter_map(|(document, reply)| measure::of_row(metric, document, reply).transpose())
                .collect::<Result<_>>()?;
            let (value, stderr) = measure::aggregate(kind, &values, options.bootstrap_iters)
                .map_err(|e| e.at(format_args!("task {:?}: {}", spec.name, metric.metric)))?;
            let mut result = MetricResult::new(&metric.metric, value)
                .filter(&filter.name)
                .higher_is_better(kind.higher_is_better);
            result.stderr = stderr;
            metrics.push(result);
            columns.push(values);
        }
        if options.keep_samples {
            for (index, (document, entry)) in documents.iter().zip(entries).enumerate() {
                let row = columns.iter().map(|column| column.get(index)).zip(&spec.metrics);
                let values = row
                    .filter_map(|(value, metric)| Some((metric.metric.clone(), value?.to_json())))
                    .collect();
                let filtered = replies.get(index).map(Reply::to_json).unwrap_or_default().into();
                samples.push(sample(task, document, entry, &filter.name, filtered, values));
            }
        }
    }
    let mut result = TaskResult::new(&spec.name, documents.len());
    result.alias = spec.alias.clone();
    result.version = json!(spec.version);
    result.num_fewshot = task.num_fewshot();
    result.metrics = metrics;
    result.original = task.len();
    result.truncated = entries.iter().map(|entry| entry.cut).sum();
    result.task_hash = options.keep_samples.then(|| task_hash(&samples));
    result.config = spec.to_harness();
    Ok((result, samples))
}

fn sample(
    task: &Task,
    document: &Document,
    entry: &Entry,
    filter: &str,
    filtered: serde_json::Value,
    values: serde_json::Map<String, serde_json::Value>,
) -> Sample {
    let doc = task.row(document.id).cloned().map(serde_json::Value::Object).unwrap_or_default();
    let target = match &document.answer {
        Answer::Choice(index) => index.to_string(),
        Answer::Texts(texts) => texts.first().cloned().unwrap_or_default(),
        Answer::Counts { .. } => document.arguments.first().map(|(text, _)| text.clone()).unwrap_or_default(),
    };
    let mut sample = Sample::new(document.id as u64, doc);
    sample.doc_hash = document_hash(&sample.doc.to_string());
    sample.prompt_hash = hash(document.arguments.first().map_or("", |(context, _)| context));
    sample.target_hash = hash(&target);
    sample.target = target.into();
    for (context, continuation) in &document.arguments {
        let second: Option<serde_json::Value> = match task.spec().kind {
            TaskKind::MultipleChoice | TaskKind::Loglikelihood => Some(continuation.as_str().into()),
            TaskKind::LoglikelihoodRolling => None,
            TaskKind::GenerateUntil => Some(json!(task.spec().generation)),
        };
        sample.ask(std::iter::once(context.as_str().into()).chain(second));
    }
    // Each request was made once.
    sample.resps = entry.reply.to_json().into_iter().map(|one| vec![one]).collect::<Vec<_>>().into();
    sample.filtered_resps = filtered;
    sample.filter = filter.to_owned();
    sample.metrics = task.spec().metrics.iter().map(|metric| metric.metric.clone()).collect();
    sample.values = values;
    sample
}

impl Filter {
    /// What is there without filters.
    fn none() -> Self {
        Self { name: NO_FILTER.to_owned(), steps: Vec::new() }
    }
}

impl Reply {
    /// What filters leave of it; only made texts are filtered.
    fn through(&self, steps: &[FilterStep]) -> Result<Self> {
        match self {
            Self::Text(text) => filter::apply(steps, text).map(Self::Text),
            other => Ok(other.clone()),
        }
    }

    /// An answer for each request, in the harness' form.
    fn to_json(&self) -> Vec<serde_json::Value> {
        match self {
            Self::Likelihoods(all) => {
                all.iter().map(|one| in_words(&json!([one.log_prob, one.greedy]))).collect()
            }
            Self::Whole(sum) => vec![in_words(&json!(sum))],
            Self::Text(text) => vec![json!(text)],
        }
    }
}

impl Value {
    /// The harness' form of it.
    fn to_json(&self) -> serde_json::Value {
        match self {
            Self::Number(number) => json!(number),
            Self::Weighted(sum, weight) => json!([sum, weight]),
            Self::Labels(gold, taken) => json!([gold, taken]),
            Self::Probabilities(gold, probabilities) => json!([gold, probabilities]),
            Self::Texts(right, written) => json!([right.first(), written]),
        }
    }
}
