//! Runs under way.

use super::{Active, MAX_ROWS, Scoring, Slot};
use crate::{
    CancelToken, Error, ErrorKind, Progress, ProgressFn, Result,
    batching::PromptToken,
    embedding::EmbedPart,
    engine::{Engine, Forward, Hidden, Input, KvCache, Output, Sequence, Want},
    generation::{LogitsRow, ModelRole, Need, Reply, RowScores, Run, ScoreNeed},
};
use ndarray::{Array2, Axis, concatenate};
use std::{ops::ControlFlow, sync::Arc};

/// A run under way: what is left of it and what came of it.
pub(crate) struct Job {
    /// Its place among the runs of its plan.
    pub(super) at: usize,
    pub(super) model: ModelRole,
    pub(super) slot: usize,
    prompt: bool,
    cache: KvCache,
    adapter: Option<Arc<str>>,
    keep_cache: bool,
    /// Everything to run, embeddings first.
    embeds: Option<Array2<f32>>,
    tokens: Vec<u32>,
    /// The tokens that are new to the slot.
    appended: Vec<u32>,
    /// Rows that are new to the slot.
    fresh: usize,
    done: usize,
    need: Need,
    /// The layer of which states are kept.
    keeps: Option<usize>,
    /// Layers of the model.
    layers: usize,
    kept: Vec<Array2<f32>>,
    reply: Reply,
    /// Set where the run's tokens are to be scored.
    score: Option<Scoring>,
    pub(super) scores: Vec<PromptToken>,
}

impl Job {
    pub(super) fn new(engine: &dyn Engine, request: &mut Active, run: &Run, at: usize) -> Result<Self> {
        let first = run.prompt && run.model == ModelRole::Target && !run.need.hidden;
        let start = first.then(|| request.start.take()).flatten();
        let mut slot = std::mem::take(request.slots.slot(run.model, run.slot)?);
        let job = Self::in_slot(engine, request, &mut slot, start, run, at);
        *request.slots.slot(run.model, run.slot)? = slot;
        job
    }

    /// A run in a slot, whose cache it takes, or in a restored cache.
    pub(super) fn in_slot(
        engine: &dyn Engine,
        request: &Active,
        slot: &mut Slot,
        start: Option<KvCache>,
        run: &Run,
        at: usize,
    ) -> Result<Self> {
        let embeds = request.embeds.as_ref();
        let mut tokens = run.tokens.clone();
        let mut with_embeds = run.prompt.then_some(embeds).flatten().cloned();
        let cache = match (slot.cache.take(), start) {
            (Some(cache), _) => cache,
            (None, Some(start)) => {
                tokens.drain(..start.len().min(tokens.len()));
                start
            }
            (None, None) => {
                // Nothing is cached: what the slot has run before is run again.
                if !run.prompt {
                    tokens.splice(0..0, slot.ids.iter().copied());
                    with_embeds = embeds.cloned();
                }
                engine.new_cache(request.cache_dtype)?
            }
        };
        let keeps = request.embed.as_ref().filter(|embed| {
            run.model == ModelRole::Target && (!run.prompt || embed.part == EmbedPart::Whole)
        });
        let fresh =
            run.tokens.len() + if run.prompt { request.embeds.as_ref().map_or(0, Array2::nrows) } else { 0 };
        Ok(Self {
            at,
            fresh,
            model: run.model,
            slot: run.slot,
            prompt: run.prompt,
            cache,
            adapter: match run.model {
                ModelRole::Target => request.adapter.clone(),
                ModelRole::Assistant => {
                    request.assistant.as_ref().and_then(|assistant| assistant.adapter.clone())
                }
            },
            keep_cache: request.use_cache,
            embeds: with_embeds,
            tokens,
            appended: run.tokens.clone(),
            done: 0,
            need: run.need,
            keeps: keeps.map(|embed| embed.layer),
            layers: engine.config().num_hidden_layers,
            kept: Vec::new(),
            reply: Reply::default(),
            score: request.score.clone().filter(|_| run.prompt),
            scores: Vec::new(),
        })
    }

    /// Rows to run in all.
    fn len(&self) -> usize {
        self.tokens.len() + self.embeds.as_ref().map_or(0, Array2::nrows)
    }

    /// Rows that are still to be run.
    pub(crate) fn left(&self) -> usize {
        self.len() - self.done
    }

    /// Tokens that need not be run, since a cache that was there held them.
    pub(crate) fn spared(&self) -> usize {
        self.fresh.saturating_sub(self.len())
    }

    /// The tokens of a run of the target's prompt that begins with it, and the cache that holds the first of them.
    pub(crate) fn prefix(&self) -> Option<(&[u32], &KvCache)> {
        let plain = self.prompt && self.model == ModelRole::Target && self.embeds.is_none();
        plain.then_some((&self.appended, &self.cache))
    }

    /// The next piece of at most `rows` tokens; embeddings are a piece of their own.
    pub(crate) fn piece(&mut self, rows: usize) -> (usize, Sequence<'_>) {
        let total = self.len();
        let embeds = self.embeds.as_ref().map_or(0, Array2::nrows);
        let (input, len) = match &self.embeds {
            Some(rows) if self.done == 0 => (Input::Embeds(rows.view()), embeds),
            _ => {
                let from = self.done - embeds;
                let len = rows.min(self.tokens.len() - from);
                (Input::Ids(&self.tokens[from..from + len]), len)
            }
        };
        // Of the run's last `rows` rows, those that lie in this piece.
        let wanted = (self.done + len).saturating_sub(total.saturating_sub(self.need.rows)).min(len);
        let want = match self.need.scores {
            _ if self.score.is_some() => Want::Logits { rows: len },
            ScoreNeed::None => Want::Nothing,
            _ if wanted == 0 => Want::Nothing,
            ScoreNeed::TopK(k) => Want::TopK { rows: wanted, k },
            ScoreNeed::Full => Want::Logits { rows: wanted },
        };
        let hidden = match (self.need.hidden, self.keeps) {
            (false, None) => Hidden::None,
            (false, Some(layer)) => Hidden::Layer(layer),
            (true, Some(layer)) if layer < self.layers => Hidden::All,
            (true, _) => Hidden::Last,
        };
        let (cache, adapter) = (Some(&mut self.cache), self.adapter.as_deref());
        (len, Sequence { cache, hidden, adapter, ..Sequence::new(input).want(want) })
    }

    /// Whether whole rows of logits are asked for.
    pub(super) fn has_rows(&self) -> bool {
        matches!(self.need.scores, ScoreNeed::Full)
    }

    /// What came of a piece of `len` rows.
    pub(crate) fn take(&mut self, len: usize, output: Output) -> Result<()> {
        let from = self.done;
        self.done += len;
        if let Some(Scoring { next, top }) = &self.score {
            // Each row says how probable the token behind it is; whole rows are not kept.
            let rows = output.logits.iter().flat_map(|logits| logits.outer_iter());
            let scores = rows.zip(next.iter().skip(from));
            self.scores.extend(
                scores.map(|(row, &id)| PromptToken::new(row.as_slice().unwrap_or_default(), id, *top)),
            );
            return Ok(());
        }
        self.reply.scores.extend(output.top_k.into_iter().map(RowScores::TopK));
        if let Some(logits) = output.logits {
            self.reply.scores.extend(LogitsRow::each(logits).map(RowScores::Full));
        }
        let mut hidden = output.hidden;
        if let Some(layer) = self.keeps {
            // Of all layers, or the one.
            let at = if hidden.len() > 1 { layer } else { 0 };
            self.kept.extend(hidden.get(at).cloned());
        }
        let rows = hidden.pop().filter(|_| self.need.hidden);
        if let Some(rows) = rows {
            self.reply.hidden = Some(match self.reply.hidden.take() {
                None => rows,
                Some(before) => concatenate(Axis(0), &[before.view(), rows.view()])
                    .map_err(|e| Error::because(ErrorKind::Backend, "hidden states of unequal width", e))?,
            });
        }
        Ok(())
    }

    /// Puts the cache back into its slot, with the tokens that are new to it and what is kept of their states. The reply.
    pub(super) fn put_back(self, slot: &mut Slot) -> Reply {
        let (rows, fresh) = (self.len(), self.fresh);
        slot.ids.extend(self.appended);
        slot.cache = self.keep_cache.then_some(self.cache);
        // What was run again for want of a cache is not new.
        let mut again = rows.saturating_sub(fresh);
        if self.keeps.is_none() {
            slot.states.skip(fresh);
        }
        for states in self.kept {
            let known = again.min(states.nrows());
            again -= known;
            slot.states.extend(states.slice(ndarray::s![known.., ..]));
        }
        let mut reply = self.reply;
        reply.hidden = reply.hidden.map(|hidden| {
            let again = hidden.nrows().saturating_sub(fresh);
            hidden.slice_move(ndarray::s![again.., ..])
        });
        reply
    }
}

/// Runs jobs to their end, as many rows at a time as [`MAX_ROWS`] lets.
pub(super) async fn run_jobs(
    engine: &dyn Engine,
    mut jobs: Vec<&mut Job>,
    cancels: &[CancelToken],
    watch: Option<&mut ProgressFn<'_>>,
) -> Result<()> {
    let total: usize = jobs.iter().map(|job| job.len()).sum();
    // Only prompts are worth a report: all else is a few tokens.
    let mut watch = watch.filter(|_| jobs.iter().any(|job| job.prompt));
    let mut done = 0;
    while done < total {
        let mut budget = MAX_ROWS;
        let mut pieces = Vec::new();
        for job in &mut jobs {
            let rows = job.left().min(budget);
            if rows > 0 {
                pieces.push((&mut **job, rows));
                // Embeddings are one piece, however many.
                budget -= rows;
            }
        }
        let rows: usize = pieces.iter().map(|(_, rows)| rows).sum();
        let mut in_tokens = |layers: Progress<'_>| match &mut watch {
            _ if cancels.iter().any(CancelToken::is_cancelled) => ControlFlow::Break(()),
            Some(watch) => {
                let now = done as u64 + rows as u64 * layers.done / layers.total.max(1);
                watch(Progress::new("prompt", now.min(total as u64), total as u64))
            }
            None => ControlFlow::Continue(()),
        };
        done += run_pieces(engine, pieces, Some(&mut in_tokens)).await?;
    }
    Ok(())
}

/// One pass over the next rows of jobs, of each at most as many as stand beside it. The number of rows that were run.
pub(crate) async fn run_pieces(
    engine: &dyn Engine,
    mut jobs: Vec<(&mut Job, usize)>,
    mut watch: Option<&mut ProgressFn<'_>>,
) -> Result<usize> {
    let (lengths, outputs) = {
        let mut in_layers = |progress: Progress<'_>| match &mut watch {
            Some(watch) => watch(progress),
            None => ControlFlow::Continue(()),
        };
        let pieces = jobs.iter_mut().map(|(job, rows)| job.piece(*rows));
        let (lengths, sequences): (Vec<usize>, Vec<Sequence<'_>>) = pieces.unzip();
        let watch = Some(&mut in_layers as &mut ProgressFn<'_>);
        (lengths, engine.forward(Forward { sequences, cancel: None, watch }).await?)
    };
    for (((job, _), &len), output) in jobs.iter_mut().zip(&lengths).zip(outputs) {
        job.take(len, output)?;
    }
    Ok(lengths.iter().sum())
}
