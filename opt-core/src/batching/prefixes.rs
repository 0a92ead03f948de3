//! Keys and values of prompts that were run, for prompts that begin alike.

use super::task::BLOCK;
use crate::{Result, engine::KvCache};
use opt_backend::CacheDType;
use std::sync::Arc;

/// Shorter beginnings are not worth a fork: running them costs as little.
pub(super) const WORTH: usize = 16;

/// Most that are kept: finding the right one is to cost nothing beside a step.
const MOST: usize = 256;

/// What keys and values depend on besides the tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) adapter: Option<Arc<str>>,
    pub(super) dtype: CacheDType,
}

/// How many tokens two lists begin with alike.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

struct Entry {
    ids: Vec<u32>,
    kind: Kind,
    cache: KvCache,
    bytes: u64,
    /// When it was last of use, on the store's own clock.
    used: u64,
}

/// What finished prompts and texts have left.
#[derive(Default)]
pub(super) struct Prefixes {
    entries: Vec<Entry>,
    clock: u64,
}

impl Prefixes {
    /// Bytes of keys and values, as if nothing were shared between entries.
    pub(super) fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }

    /// The cache that holds the longest beginning of `ids`, and of how many tokens.
    pub(super) fn longest(&mut self, ids: &[u32], kind: &Kind) -> Option<(usize, &KvCache)> {
        self.clock += 1;
        let alike = self.entries.iter_mut().filter(|entry| entry.kind == *kind);
        let best = alike.map(|entry| (common(&entry.ids, ids), entry)).max_by_key(|(len, _)| *len)?;
        let (len, entry) = best;
        if len >= WORTH {
            entry.used = self.clock;
        }
        Some((len, &entry.cache))
    }

    /// Keeps the cache of `ids`, of which each position takes so many bytes.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn keep(&mut self, ids: &[u32], kind: &Kind, cache: &KvCache, position: u64) -> Result<()> {
        let len = cache.len().min(ids.len());
        let ids = ids.get(..len).unwrap_or_default();
        self.clock += 1;
        let inside = |entry: &&mut Entry| entry.kind == *kind && entry.ids.starts_with(ids);
        if let Some(longer) = self.entries.iter_mut().find(inside) {
            longer.used = self.clock;
            return Ok(());
        }
        if len < WORTH {
            return Ok(());
        }
        self.entries.retain(|entry| entry.kind != *kind || !ids.starts_with(&entry.ids));
        let (bytes, used) = (len.next_multiple_of(BLOCK) as u64 * position, self.clock);
        self.entries.push(Entry { ids: ids.to_vec(), kind: kind.clone(), cache: cache.fork()?, bytes, used });
        Ok(())
    }

    /// Drops what was of use longest ago until no more than `bytes`, and not too many, are left.
    pub(super) fn shrink(&mut self, bytes: u64) {
        while self.bytes() > bytes || self.entries.len() > MOST {
            let oldest = self.entries.iter().enumerate().min_by_key(|(_, entry)| entry.used);
            let Some((oldest, _)) = oldest else { return };
            self.entries.swap_remove(oldest);
        }
    }
}
