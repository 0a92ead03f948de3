//! One task under way.

use super::{Event, PromptScores, Task, TaskId, prefixes::Kind, task::Goal};
use crate::{
    Error, ErrorKind, Result,
    driver::{Active, Job, Rest, Turn, finish_one, run_rests},
    embedding::Embedding,
    engine::{Engine, KvCache},
    parallel,
    stream::Texts,
};
use std::{slice, sync::Arc};
use web_time::Instant;

/// A run of more rows than these is run in pieces, in the room that is left, as prompts are.
const LONG: usize = 32;
/// Lanes for which it is worth to start a thread.
const LANES_OF_A_THREAD: usize = 4;

pub(super) struct Lane {
    pub(super) id: TaskId,
    /// Whose it is.
    pub(super) group: u64,
    active: Active,
    goal: Goal,
    texts: Texts,
    prompt: Arc<[u32]>,
    /// What it is running; none before its first turn.
    turn: Option<Turn>,
    /// What is still to be run for a turn whose tokens have been chosen.
    rests: Option<Result<Vec<Rest>>>,
    started: Instant,
    /// Whether the prompt has been run.
    prefilled: bool,
    /// Whether some of it has been run, and whether that has been said.
    seen: bool,
    announced: bool,
    /// Tokens of the prompt that did not have to be run.
    cached: usize,
    pub(super) branches: usize,
    /// Whether something is to be known of every token of the prompt, so that all must be run.
    sees_prompt: bool,
    pub(super) cache_bytes: u64,
}

/// Chooses tokens for the turns that have been run. Draws and filters look at all the vocabulary: where many lanes do,
/// up to `most` threads share them.
pub(super) fn choose(lanes: &mut [Lane], most: Option<usize>) {
    let heavy = lanes.iter().filter(|lane| lane.turn.as_ref().is_some_and(|t| t.is_run() && t.has_rows()));
    let threads = (heavy.count() / LANES_OF_A_THREAD).min(most.unwrap_or_else(parallel::cores));
    parallel::for_each(threads, lanes.iter_mut(), Lane::choose);
}

impl Lane {
    pub(super) fn new(id: TaskId, group: u64, task: Task) -> Self {
        let Task { active, goal, prompt, branches, cache_bytes, sees_prompt, .. } = task;
        let tokenizer = match &goal {
            Goal::Generate { tokenizer, .. } => tokenizer.clone(),
            Goal::Embed { .. } | Goal::Score => None,
        };
        Self {
            id,
            group,
            active,
            goal,
            texts: Texts::new(tokenizer),
            prompt,
            turn: None,
            rests: None,
            started: Instant::now(),
            prefilled: false,
            seen: false,
            announced: false,
            cached: 0,
            sees_prompt,
            branches,
            cache_bytes,
        }
    }

    /// Whether its owner wants it no more.
    pub(super) fn is_cancelled(&self) -> bool {
        self.active.cancel.is_cancelled()
    }

    /// Whether nothing of it has been run or laid out yet.
    pub(super) fn is_fresh(&self) -> bool {
        self.turn.is_none()
    }

    /// Tokens of its prompt.
    pub(super) fn prompt_len(&self) -> usize {
        self.prompt.len()
    }

    /// How many of them did not have to be run.
    pub(super) fn cached(&self) -> usize {
        self.cached
    }

    pub(super) fn kind(&self) -> Kind {
        Kind { adapter: self.active.adapter.clone(), dtype: self.active.cache_dtype }
    }

    /// The tokens whose keys and values would be of use to it from elsewhere, if it can use any: all but the last, which
    /// must be run for what follows it.
    pub(super) fn wants_prefix(&self) -> Option<&[u32]> {
        let usable = self.active.use_cache && self.active.embeds.is_none() && !self.sees_prompt;
        self.prompt.split_last().map(|(_, before)| before).filter(|_| usable)
    }

    /// Lets it begin from a cache that holds the first tokens of its prompt.
    pub(super) fn start_from(&mut self, cache: KvCache) {
        self.active.start = Some(cache);
    }

    /// What others may begin from: tokens that are being run or will be next, with the cache that holds the first of
    /// them. Once they have all been run, a fork is kept elsewhere.
    pub(super) fn prefix(&self) -> Option<(&[u32], Option<&KvCache>)> {
        match &self.turn {
            _ if !self.active.use_cache || self.active.embeds.is_some() => None,
            None => Some((&self.prompt, None)),
            Some(turn) => {
                turn.jobs.iter().find_map(|job| job.prefix()).map(|(ids, cache)| (ids, Some(cache)))
            }
        }
    }

    /// What it has run so far, to be kept for others.
    pub(super) fn leaves(&self) -> Option<(&[u32], &KvCache)> {
        let slots = self.active.slots.target.iter().filter(|_| self.active.embeds.is_none());
        let held = slots.filter_map(|slot| Some((&slot.ids[..], slot.cache.as_ref()?)));
        held.max_by_key(|(_, cache)| cache.len())
    }

    /// Lays out its next turn. `false` at its end.
    pub(super) async fn begin(&mut self, engine: &dyn Engine) -> Result<bool> {
        let first = self.turn.is_none();
        let turn = self.active.begin(engine, None).await?;
        let goes_on = turn.is_some();
        if let Some(turn) = turn.as_ref().filter(|_| first) {
            self.cached = turn.jobs.iter().map(Job::spared).sum();
        }
        self.turn = Some(turn.unwrap_or_default());
        Ok(goes_on)
    }

    /// Rows that come before all prompts: the next tokens of sequences that grow.
    pub(super) fn urgent_rows(&self) -> usize {
        let jobs = self.turn.iter().flat_map(|turn| &turn.jobs);
        jobs.map(Job::left).filter(|left| self.prefilled && *left <= LONG).sum()
    }

    /// The next pieces of its turn, each with its rows: what is urgent whole, and of all else as many rows as there is
    /// room for.
    pub(super) fn pieces<'a>(&'a mut self, room: &mut usize, pieces: &mut Vec<(&'a mut Job, usize)>) {
        for job in self.turn.iter_mut().flat_map(|turn| &mut turn.jobs) {
            let left = job.left();
            let rows = if self.prefilled && left <= LONG { left } else { left.min(*room) };
            if rows > 0 {
                if !self.prefilled || left > LONG {
                    *room -= rows;
                }
                self.seen = true;
                pieces.push((job, rows));
            }
        }
    }

    /// Says once that it has begun.
    pub(super) fn announce(&mut self) -> Option<Event> {
        let now = self.seen && !self.announced;
        self.announced |= now;
        now.then_some(Event::Started { task: self.id, cached: self.cached })
    }

    /// Chooses tokens if all of its turn has been run.
    fn choose(&mut self) {
        if let Some(turn) = self.turn.take_if(|turn| turn.is_run()) {
            // Its place is not that of a fresh one.
            self.turn = Some(Turn::default());
            self.rests = Some(self.active.end(turn, 0));
        }
    }

    /// Hands out what has been chosen and is certain now. Whether a turn has ended, and whether it was the first.
    pub(super) async fn end(&mut self, engine: &dyn Engine, events: &mut Vec<Event>) -> Result<Option<bool>> {
        let Some(rests) = self.rests.take() else { return Ok(None) };
        let first = !std::mem::replace(&mut self.prefilled, true);
        let rests = rests?;
        self.active.keep_time(self.started.elapsed());
        run_rests(engine, slice::from_mut(&mut self.active), rests).await?;
        for event in self.active.strategy.take_events() {
            let token = self.texts.token(0, event)?;
            events.push(Event::Token { task: self.id, token });
        }
        Ok(Some(first))
    }

    /// What came of it.
    pub(super) async fn finish(mut self, engine: &dyn Engine) -> Event {
        let task = self.id;
        self.result(engine).await.unwrap_or_else(|error| Event::Failed { task, error })
    }

    async fn result(&mut self, engine: &dyn Engine) -> Result<Event> {
        let (task, cached) = (self.id, self.cached);
        Ok(match std::mem::replace(&mut self.goal, Goal::Score) {
            Goal::Generate { head, tokenizer } => {
                let endings = finish_one(engine, &mut self.active).await?;
                let generated = head.generated(endings, tokenizer.as_ref())?;
                Event::Generated { task, generated, cached }
            }
            Goal::Embed { cut } => {
                let slot = self.active.slots.target.first();
                let capture = self.active.embed.as_ref().zip(slot);
                let made = capture.map(|(capture, slot)| capture.embedding(&slot.states)).transpose()?;
                let embedding = made.flatten().ok_or_else(|| {
                    Error::new(ErrorKind::Backend, "embedding: expected hidden states, found none")
                })?;
                Event::Embedded { task, embedding: Embedding { cut, ..embedding } }
            }
            Goal::Score => {
                let tokens = std::mem::take(&mut self.active.scores);
                Event::Scored { task, scores: PromptScores { ids: self.prompt.to_vec(), tokens } }
            }
        })
    }
}
