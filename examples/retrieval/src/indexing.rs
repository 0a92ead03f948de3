//! `retrieval index`: texts into passages, passages into vectors, and all of it into a folder.

use crate::{
    ann::Ann,
    chunk::{self, Lengths},
    folder::{self, Draft},
    store::{Passage, Store},
};
use clap::Args;
use indicatif::ProgressBar;
use opt_core::{
    CancelToken, Error, ErrorKind, Prompt, Result,
    embedding::{
        Embedder, Embedding, Index as Exact, Metric,
        export::{Exporter, Format, Layout, Record, RecordId},
    },
    tokenizer::Bos,
};
use serde_json::{Map, json};
use std::{
    fs::{self, File},
    io::BufWriter,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Instant,
};

#[derive(Debug, Args)]
pub(crate) struct Index {
    /// The folder with the texts
    dir: PathBuf,
    /// The folder for the index
    #[arg(long)]
    into: PathBuf,
    /// Most tokens of a passage
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(8..))]
    tokens: u32,
    /// Most tokens that a passage has in common with the one before it
    #[arg(long, default_value_t = 32)]
    overlap: u32,
}

impl Index {
    pub(crate) fn run(&self, embedder: &Embedder, cancel: &CancelToken) -> Result<()> {
        let begun = Instant::now();
        let passages = self.passages(embedder, cancel)?;
        let count = passages.len();
        // Begun before the long work: a place that cannot be written is known at once.
        let draft = Draft::begin(&self.into)?;

        let prompts: Vec<Prompt> = passages.iter().map(|passage| passage.text.as_str().into()).collect();
        let bar = ProgressBar::new(count as u64);
        let vectors = embedder.embed_with(&prompts, cancel, &mut |progress| {
            bar.set_position(progress.done);
            ControlFlow::Continue(())
        });
        bar.finish_and_clear();
        let vectors = vectors?;

        export(&draft.path(folder::PARQUET), embedder, &passages, &vectors)?;
        let rows = passages.iter().zip(vectors.iter().map(Embedding::vector));
        Store::create(&draft.path(folder::SQLITE), embedder.width(), rows)?;
        let mut exact = Exact::new(embedder, Metric::Cosine)?;
        for (id, vector) in vectors.iter().enumerate() {
            exact.insert(id.to_string(), vector, None)?;
        }
        exact.save(draft.path(folder::EXACT))?;
        Ann::create(
            &draft.path(folder::ANN),
            embedder.width(),
            vectors.iter().map(Embedding::vector),
            cancel,
        )?;
        draft.keep(embedder.identity()?, count)?;
        let seconds = begun.elapsed().as_secs_f64();
        println!("{count} passages of {} in {} ({seconds:.1} s)", self.dir.display(), self.into.display());
        Ok(())
    }

    /// The passages of all texts.
    fn passages(&self, embedder: &Embedder, cancel: &CancelToken) -> Result<Vec<Passage>> {
        let tokenizer = embedder.opt().require_tokenizer()?;
        let lengths = Lengths { tokens: self.tokens as usize, overlap: self.overlap as usize };
        let context = embedder.opt().context();
        let most = context.saturating_sub(usize::from(tokenizer.adds_bos()));
        for (name, found, most) in
            [("--tokens", lengths.tokens, most), ("--overlap", lengths.overlap, lengths.tokens - 1)]
        {
            if found > most {
                let message = format_args!("{name}: expected at most {most}, found {found}");
                return Err(Error::new(ErrorKind::Option, message));
            }
        }
        let count = |text: &str| Ok(tokenizer.encode(text, Bos::Never)?.len());
        let mut names = Vec::new();
        find(&self.dir, &mut names)?;
        names.sort();
        let mut passages = Vec::new();
        for name in names {
            cancel.check("indexing")?;
            let failed = |e| Error::because(ErrorKind::Io, format_args!("{}", name.display()), e);
            let text = fs::read_to_string(&name).map_err(failed)?;
            let inside = name.strip_prefix(&self.dir).unwrap_or(&name);
            let parts: Vec<_> = inside.iter().map(|part| part.to_string_lossy()).collect();
            for bytes in chunk::passages(&text, lengths, &count)? {
                let (start, end) = (bytes.start as i64, bytes.end as i64);
                let text = chunk::flat(text.get(bytes).unwrap_or_default());
                let tokens = count(&text)? as i64;
                passages.push(Passage { path: parts.join("/"), start, end, tokens, text });
            }
        }
        if passages.is_empty() {
            let message =
                format_args!("{}: expected .txt or .md files with text, found none", self.dir.display());
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        Ok(passages)
    }
}

/// The texts in a folder and the folders in it.
fn find(dir: &Path, names: &mut Vec<PathBuf>) -> Result<()> {
    let failed = |e| Error::because(ErrorKind::Io, format_args!("{}", dir.display()), e);
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        // What the entry itself is: a link to a folder above would never end.
        if entry.file_type().map_err(failed)?.is_dir() {
            find(&path, names)?;
        } else if path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("txt") || e.eq_ignore_ascii_case("md"))
        {
            names.push(path);
        }
    }
    Ok(())
}

/// Writes what other programs may want: `pandas.read_parquet` reads it.
fn export(path: &Path, embedder: &Embedder, passages: &[Passage], vectors: &[Embedding]) -> Result<()> {
    let file = File::create(path)
        .map_err(|e| Error::because(ErrorKind::Io, format_args!("{}", path.display()), e))?;
    let layout = Layout::of(embedder, Format::Parquet, passages.len() as u64);
    let mut exporter = Exporter::new(BufWriter::new(file), layout)?;
    for (index, (passage, vector)) in (0..).zip(passages.iter().zip(vectors)) {
        let Passage { path, start, end, tokens, text } = passage;
        let id = RecordId::Text(format!("{path}:{start}-{end}"));
        let metadata =
            [("path", json!(path)), ("start", json!(start)), ("end", json!(end)), ("tokens", json!(tokens))];
        let metadata: Map<_, _> =
            metadata.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let record =
            Record::new(index, vector.rows.view()).id(Some(&id)).text(Some(text)).metadata(Some(&metadata));
        exporter.write(&record)?;
    }
    let mut out = exporter.finish()?;
    std::io::Write::flush(&mut out)
        .map_err(|e| Error::because(ErrorKind::Io, format_args!("{}", path.display()), e))
}
