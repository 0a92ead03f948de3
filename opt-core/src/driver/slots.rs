//! What a request has run so far: branches with their caches.

use crate::{
    Error, ErrorKind, Result,
    embedding::States,
    engine::KvCache,
    generation::{CacheOp, ModelRole},
};

/// The cache slots of a request's two models.
pub(crate) struct Slots {
    /// Rows of embeddings, which lie before the ids and are never cut.
    pub(super) embeds: usize,
    pub(crate) target: Vec<Slot>,
    assistant: Vec<Slot>,
}

/// One branch of a request: the tokens run so far and their cache.
#[derive(Default)]
pub(crate) struct Slot {
    pub(crate) ids: Vec<u32>,
    /// `None` until something was run, and always for a request without cache.
    pub(crate) cache: Option<KvCache>,
    /// What is kept of their hidden states.
    pub(crate) states: States,
}

impl Slots {
    /// One empty slot for each model, of a request with so many rows of embeddings.
    pub(crate) fn new(embeds: usize) -> Self {
        Self { embeds, target: vec![Slot::default()], assistant: vec![Slot::default()] }
    }

    fn of(&mut self, model: ModelRole) -> &mut Vec<Slot> {
        match model {
            ModelRole::Target => &mut self.target,
            ModelRole::Assistant => &mut self.assistant,
        }
    }

    pub(super) fn slot(&mut self, model: ModelRole, slot: usize) -> Result<&mut Slot> {
        let slots = self.of(model);
        let count = slots.len();
        slots.get_mut(slot).ok_or_else(|| {
            let message =
                format!("the strategy named cache slot {slot} of {count}; this is a mistake in the strategy");
            Error::new(ErrorKind::Unsupported, message)
        })
    }

    pub(super) fn apply(&mut self, op: &CacheOp) -> Result<()> {
        match op {
            CacheOp::Truncate { model, slot, len } => {
                let embeds = self.embeds;
                self.slot(*model, *slot)?.apply_truncate(embeds, *len)
            }
            CacheOp::Reorder { model, parents } => {
                let mut old: Vec<Option<Slot>> =
                    std::mem::take(self.of(*model)).into_iter().map(Some).collect();
                let mut new = Vec::with_capacity(parents.len());
                for (index, &parent) in parents.iter().enumerate() {
                    let last_use = !parents[index + 1..].contains(&parent);
                    let place = old.get_mut(parent).filter(|slot| slot.is_some()).ok_or_else(|| {
                        let message = format!("the strategy named cache slot {parent}, which is not there");
                        Error::new(ErrorKind::Unsupported, message)
                    })?;
                    new.extend(if last_use {
                        place.take()
                    } else {
                        place.as_ref().map(Slot::fork).transpose()?
                    });
                }
                *self.of(*model) = new;
                Ok(())
            }
        }
    }

    /// The target's slot that has run most of `ids`, or a fork of it: taken out if nobody else needs it.
    pub(super) fn longest(&mut self, ids: &[u32], take: bool) -> Result<Option<Slot>> {
        let common = |slot: &Slot| slot.ids.iter().zip(ids).take_while(|(a, b)| a == b).count();
        if take {
            let slot = std::mem::take(&mut self.target).into_iter().max_by_key(common);
            return Ok(slot.filter(|slot| slot.states.have_begun()));
        }
        let begun = self.target.iter().filter(|slot| slot.states.have_begun());
        begun.max_by_key(|slot| common(slot)).map(Slot::fork).transpose()
    }

    /// The slot of the target that has run most of `ids`, cut to what they have in common.
    pub(crate) fn take_prefix(&mut self, ids: &[u32]) -> Result<Option<Slot>> {
        let common = |slot: &Slot| slot.ids.iter().zip(ids).take_while(|(a, b)| a == b).count();
        let Some(mut best) = std::mem::take(&mut self.target).into_iter().max_by_key(common) else {
            return Ok(None);
        };
        let len = common(&best);
        best.ids.truncate(len);
        if let Some(cache) = &mut best.cache {
            cache.truncate(len)?;
        }
        Ok(Some(best))
    }
}

impl Slot {
    /// Forgets all but the first `len` positions, of which `embeds` are rows of embeddings.
    pub(super) fn apply_truncate(&mut self, embeds: usize, len: usize) -> Result<()> {
        self.ids.truncate(len.saturating_sub(embeds));
        self.states.truncate(len);
        self.cache.as_mut().map_or(Ok(()), |cache| cache.truncate(len))
    }

    pub(crate) fn fork(&self) -> Result<Self> {
        let cache = self.cache.as_ref().map(KvCache::fork).transpose()?;
        Ok(Self { ids: self.ids.clone(), cache, states: self.states.clone() })
    }
}
