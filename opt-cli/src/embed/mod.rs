//! `opt embed`.

mod input;
mod work;

use crate::{
    args::{BosArgs, RunArgs},
    out::{Failure, Out},
    progress::{Console, duration},
};
use clap::{Args, ValueEnum};
use input::{Content, Item, Source};
use opt_core::{
    Progress, Prompt,
    embedding::{
        EmbedOptions, Embedder, Embedding, Pooling, Precision,
        export::{Exporter, Format, Layout, Record, Whole},
    },
};
use serde_json::json;
use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Instant,
};
use work::{FORMAT, Head, Work};

const HELP: &str = "\
Examples:
  opt embed --input lines.txt --output vectors.npy
  opt embed --input lines.jsonl --layer 6 --pooling weighted-mean --normalize \\
    --output vectors.parquet
  opt embed --input lines.jsonl --pooling none > tokens.jsonl
  opt embed --input lines.jsonl --export pinecone --output upsert.jsonl

A line of input is one of
  {\"ids\": [...]}
  {\"text\": \"...\"}
  {\"context\": \"...\", \"continuation\": \"...\"}, which is their text as one
with, if there are such, \"id\" (a string or a number) and \"metadata\" (an
object); in a file whose name ends in .txt each line is a text. For each there
is one row of output, in order:
  .npy      one array [lines, width], f32 or f16
  .jsonl    {\"index\": 0, \"id\": ..., \"embedding\": [...]}, and without pooling
            \"embedding\": [[...], ...], a vector for each token
  .parquet  columns id, text, metadata (JSON) and embedding, a FixedSizeList
Without --output JSON lines go to stdout. With --output stdout has nothing, or
with --json a line that says what was done.

Layer 0 is the embeddings, layer i the output of layer i, and the last what the
LM head sees, as in transformers' hidden_states.

Vectors are gathered in OUTPUT.part; OUTPUT appears when it is whole. After
Ctrl-C, or if the process was killed, the same command with --resume goes on.";

/// Make vectors of texts.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct Embed {
    /// Embed the lines of this file, JSON or (.txt) texts; - is JSON lines on stdin.
    #[arg(long, value_name = "FILE", help_heading = "Input")]
    input: PathBuf,
    /// Cut, or refuse, texts of more than N tokens, as --truncate says. [default: the context]
    #[arg(long, value_name = "N", help_heading = "Input")]
    max_tokens: Option<NonZeroUsize>,
    #[command(flatten)]
    bos: BosArgs,
    /// Take the state of this layer: 0 to the number of layers, or negative from the end.
    #[arg(
        long,
        value_name = "L",
        default_value = "-1",
        allow_negative_numbers = true,
        help_heading = "Embedding"
    )]
    layer: i32,
    /// Make one vector of the states of a text's tokens.
    #[arg(long, value_name = "HOW", default_value = "mean", help_heading = "Embedding")]
    pooling: PoolingName,
    /// Scale vectors to length 1.
    #[arg(long, help_heading = "Embedding")]
    normalize: bool,
    /// Write to this file, in the format that its name ends in.
    #[arg(long, value_name = "FILE.{npy,jsonl,parquet}", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Write numbers in this format.
    #[arg(long, value_name = "FORMAT", default_value = "f32", help_heading = "Output")]
    output_dtype: PrecisionName,
    /// Write JSON lines that this vector database takes.
    #[arg(long, value_name = "DATABASE", help_heading = "Output")]
    export: Option<Database>,
    /// With --export weaviate: the class of the objects.
    #[arg(long, value_name = "NAME", default_value = "Text", help_heading = "Output")]
    class: String,
    /// Go on with an unfinished output, if there is one.
    #[arg(long, requires = "output", help_heading = "Output")]
    resume: bool,
    /// Run at most N tokens at once (a longer text alone).
    #[arg(long, value_name = "N", default_value = "512", help_heading = "Run")]
    batch_tokens: NonZeroUsize,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PoolingName {
    /// The last token.
    Last,
    /// All tokens alike.
    Mean,
    /// Later tokens count more.
    WeightedMean,
    /// The largest value in each dimension.
    Max,
    /// The first token.
    First,
    /// A vector for each token.
    None,
}

impl From<PoolingName> for Pooling {
    fn from(name: PoolingName) -> Self {
        match name {
            PoolingName::Last => Pooling::LastToken,
            PoolingName::Mean => Pooling::Mean,
            PoolingName::WeightedMean => Pooling::WeightedMean,
            PoolingName::Max => Pooling::Max,
            PoolingName::First => Pooling::FirstToken,
            PoolingName::None => Pooling::None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrecisionName {
    /// Single precision.
    #[value(alias = "float32")]
    F32,
    /// Half precision.
    #[value(alias = "float16")]
    F16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Database {
    /// Records for upsert.
    Pinecone,
    /// Objects for batch import; ids become UUIDs.
    Weaviate,
}

/// What all lines are together.
#[derive(Default)]
struct Totals {
    tokens: u64,
    truncated: u64,
    /// Most tokens that a line may have.
    limit: usize,
}

impl Embed {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let started = Instant::now();
        let console = Console::new(self.run.show);
        let format = self.format()?;
        if let Some(output) = self.output.as_deref().filter(|_| !self.resume) {
            Work::check_free(output)?;
        }
        let source = Source::open(&self.input)?;
        let content = source.look_through()?;
        console.catch_interrupts();
        let opt = self.run.model.load(&console)?;
        let embedder = Embedder::new(&opt, self.options())?;
        let layout = Layout::of(&embedder, format, content.items).class(self.class.clone());
        layout.check()?;
        // Everything is checked before anything is run, so that nobody waits for an error.
        let totals = self.check(&source, &embedder)?;
        if totals.truncated > 0 {
            let (cut, all) = (totals.truncated, content.items);
            console.warn(&format!("{cut} of {all} texts were cut to {} tokens", totals.limit));
        }
        let Some(output) = &self.output else {
            return self.print(&source, &embedder, &layout, &console, content.items);
        };
        let head = Head {
            format: FORMAT.to_owned(),
            input: content.clone(),
            precision: embedder.options().precision,
            truncate: format!("{:?}", self.run.truncate).to_lowercase(),
            max_tokens: totals.limit,
            embedder: embedder.identity()?,
        };
        let mut work = Work::open(output, head, self.resume)?;
        let resumed = work.done;
        let made = self.gather(&source, &embedder, &mut work, &console, content.items);
        if let Err(failure) = made {
            if matches!(failure, Failure::Interrupted) {
                let (done, path) = (work.done, work.path().display());
                console.say(&format!("{done} of {} lines are in {path}: --resume goes on", content.items));
            }
            return Err(failure);
        }
        write(output, layout, &source, &work)?;
        work.remove()?;
        self.summarize(&embedder, &content, &totals, resumed, started, &console)
    }

    /// The format of the output.
    fn format(&self) -> Result<Format, Failure> {
        let extension = self.output.as_deref().map(|output| {
            output.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase())
        });
        let format = match extension.as_ref().map(|extension| extension.as_deref().unwrap_or_default()) {
            Some("npy") => Format::Npy,
            Some("parquet") => Format::Parquet,
            None | Some("jsonl") => Format::Jsonl,
            Some(_) => {
                return Err(Failure::usage(format!(
                    "--output: expected a name that ends in .npy, .jsonl or .parquet, found {}",
                    self.output.as_deref().unwrap_or(Path::new("")).display()
                )));
            }
        };
        match self.export {
            None => Ok(format),
            Some(_) if format != Format::Jsonl => {
                Err(Failure::usage("--export: expected an --output that ends in .jsonl"))
            }
            Some(Database::Pinecone) => Ok(Format::Pinecone),
            Some(Database::Weaviate) => Ok(Format::Weaviate),
        }
    }

    fn options(&self) -> EmbedOptions {
        let mut options = EmbedOptions::default()
            .layer(self.layer)
            .pooling(self.pooling.into())
            .normalize(self.normalize)
            .bos(self.bos.rule())
            .overflow(self.run.truncate.into())
            .batch_tokens(self.batch_tokens.get());
        options.max_tokens = self.max_tokens.map(NonZeroUsize::get);
        if self.output_dtype == PrecisionName::F16 {
            options.precision = Precision::F16;
        }
        options
    }

    /// Whether every line can be run.
    fn check(&self, source: &Source, embedder: &Embedder) -> Result<Totals, Failure> {
        let context = embedder.opt().context();
        let limit = self.max_tokens.map_or(context, |most| most.get().min(context));
        let mut totals = Totals { limit, ..Totals::default() };
        for item in source.items()? {
            let item = item?;
            let (tokens, cut) = embedder.check(&item.input).map_err(|e| Failure::from(e).at(&item.place))?;
            totals.tokens += tokens as u64;
            totals.truncated += u64::from(cut > 0);
        }
        Ok(totals)
    }

    /// Embeds all items from number `from` on, and hands them on as they are made.
    fn batches(
        &self,
        source: &Source,
        embedder: &Embedder,
        console: &Console,
        items: u64,
        from: u64,
        mut take: impl FnMut(u64, &[Item], Vec<Embedding>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let bar = console.bar("embedding");
        let mut done = from;
        let mut waiting = Vec::new();
        let mut tokens = 0;
        let counted = |item: Result<Item, Failure>| {
            let item = item?;
            let (tokens, _) = embedder.check(&item.input).map_err(|e| Failure::from(e).at(&item.place))?;
            Ok((item, tokens))
        };
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        let mut all = source.items()?.skip(from).map(counted).peekable();
        while let Some(next) = all.next() {
            let (item, count) = next?;
            tokens += count;
            waiting.push(item);
            // As many as fit, but at least one.
            let fits = |next: &Result<(Item, usize), Failure>| {
                next.as_ref().is_ok_and(|(_, count)| tokens + count <= self.batch_tokens.get())
            };
            if all.peek().is_some_and(fits) {
                continue;
            }
            let inputs: Vec<Prompt> = waiting.iter().map(|item| item.input.clone()).collect();
            let show = &mut |_: Progress<'_>| bar.show(Progress::new("lines", done, items));
            let made = embedder.embed_with(&inputs, &console.cancel, show)?;
            take(done, &waiting, made)?;
            done += waiting.len() as u64;
            let _ = bar.show(Progress::new("lines", done, items));
            waiting.clear();
            tokens = 0;
        }
        Ok(())
    }

    /// JSON lines on stdout.
    fn print(
        &self,
        source: &Source,
        embedder: &Embedder,
        layout: &Layout,
        console: &Console,
        items: u64,
    ) -> Result<(), Failure> {
        let mut out = Out::new();
        self.batches(source, embedder, console, items, 0, |first, items, made| {
            let mut layout = layout.clone();
            layout.records = made.len() as u64;
            let mut exporter = Exporter::new(Vec::new(), layout)?;
            for ((item, embedding), index) in items.iter().zip(&made).zip(first..) {
                exporter.write(&record(index, item, embedding.rows.view()))?;
            }
            out.text(&String::from_utf8_lossy(&exporter.finish()?))
        })
    }

    /// All vectors that are not there yet.
    fn gather(
        &self,
        source: &Source,
        embedder: &Embedder,
        work: &mut Work,
        console: &Console,
        items: u64,
    ) -> Result<(), Failure> {
        let from = work.done;
        self.batches(source, embedder, console, items, from, |_, _, made| work.append(&made))
    }

    fn summarize(
        &self,
        embedder: &Embedder,
        content: &Content,
        totals: &Totals,
        resumed: u64,
        started: Instant,
        console: &Console,
    ) -> Result<(), Failure> {
        let output = self.output.as_deref().unwrap_or(Path::new("")).display().to_string();
        let took = started.elapsed();
        let (lines, tokens) = (content.items, totals.tokens);
        if !self.run.show.json {
            let took = duration(took);
            console.say(&format!(
                "{lines} vectors of {} ({tokens} tokens) in {took}: {output}",
                embedder.width()
            ));
            return Ok(());
        }
        let pooling = self.pooling.to_possible_value().map(|value| value.get_name().to_owned());
        Out::new().json(&json!({
            "output": output,
            "lines": lines,
            "tokens": tokens,
            "truncated": totals.truncated,
            "resumed": resumed,
            "width": embedder.width(),
            "layer": embedder.layer(),
            "pooling": pooling,
            "normalized": self.normalize,
            "dtype": embedder.options().precision,
            "seconds": took.as_secs_f64(),
        }))
    }
}

fn record<'a>(index: u64, item: &'a Item, rows: opt_core::ndarray::ArrayView2<'a, f32>) -> Record<'a> {
    Record::new(index, rows).id(item.id.as_ref()).text(item.text()).metadata(item.metadata.as_ref())
}

/// The whole output, from the vectors that were gathered and the input's own words.
fn write(output: &Path, layout: Layout, source: &Source, work: &Work) -> Result<(), Failure> {
    let place = |e| Failure::from(e).at(output.display());
    let mut records = work.records()?;
    let mut exporter = Exporter::new(Whole::create(output)?, layout).map_err(place)?;
    for (item, index) in source.items()?.zip(0..) {
        let item = item?;
        let Some(rows) = records.next()? else { break };
        exporter.write(&record(index, &item, rows.view())).map_err(place)?;
    }
    Ok(exporter.finish().map_err(place)?.keep()?)
}
