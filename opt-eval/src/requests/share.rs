use super::{Asker, Encoded, LogLikelihood};
use opt_core::{
    CacheDType, CancelToken, Error, ErrorKind, Opt, Progress, ProgressFn, Result,
    engine::{Forward, KvCache, Output, Sequence, Want},
};

/// Rows of a batch: on a CPU a sixth faster than 512.
const ROWS: usize = 2048;

/// A shared beginning is worth a pass of its own from so many tokens on …
const SHARED: usize = 4;

/// … if it saves so many rows.
const SAVED: usize = 16;

/// Requests as a tree: what several begin with is run once, its keys and values are forked for each.
///
/// Only what stands before the row that predicts a request's first scored token is shared, so that every row whose
/// prediction counts belongs to one request.
#[derive(Debug, Default)]
pub struct Shared {
    nodes: Vec<Node>,
    requests: usize,
}

#[derive(Debug)]
struct Node {
    parent: Option<usize>,
    /// One of the requests that have its tokens.
    request: usize,
    /// Its tokens, as a range of that request's.
    start: usize,
    end: usize,
    children: usize,
    /// Whether it ends a request.
    leaf: bool,
}

impl Shared {
    /// Finds what requests have in common; without `share` each stands for itself.
    pub fn plan(encoded: &[Encoded], share: bool) -> Self {
        let mut tree = Self { nodes: Vec::new(), requests: encoded.len() };
        let mut order: Vec<usize> = (0..encoded.len()).collect();
        if share {
            order.sort_by(|a, b| ids(encoded, *a).cmp(ids(encoded, *b)));
            tree.grow(encoded, &order, None, 0, 0);
        } else {
            order.iter().for_each(|request| tree.leaf(encoded, *request, None, 0));
        }
        tree
    }

    /// Rows that are run; without sharing there are as many as tokens less one of each request.
    pub fn rows(&self) -> usize {
        self.nodes.iter().map(|node| node.end - node.start).sum()
    }

    /// Adds requests that agree on their first `at` tokens, of which `parent` holds the first `start`.
    fn grow(
        &mut self,
        encoded: &[Encoded],
        sorted: &[usize],
        parent: Option<usize>,
        start: usize,
        at: usize,
    ) {
        let (first, last) = match sorted {
            [] => return,
            [only] => return self.leaf(encoded, *only, parent, start),
            [first, .., last] => (*first, *last),
        };
        let free = sorted.iter().map(|request| shareable(encoded, *request)).min().unwrap_or(0);
        // Up to `at` they are known to be the same.
        let both = ids(encoded, first).iter().zip(ids(encoded, last)).skip(at);
        let shared = (at + both.take_while(|(a, b)| a == b).count()).min(free).max(at);
        let gain = shared - start;
        let (parent, start) = if gain >= SHARED && gain * (sorted.len() - 1) >= SAVED {
            (Some(self.add(parent, first, start, shared, false)), shared)
        } else {
            (parent, start)
        };
        // By the next token; those that end here stand for themselves.
        let next = |request: &usize| {
            let open = shareable(encoded, *request) > shared;
            ids(encoded, *request).get(shared).copied().filter(|_| open)
        };
        for group in sorted.chunk_by(|a, b| next(a).is_some() && next(a) == next(b)) {
            match group {
                [only] => self.leaf(encoded, *only, parent, start),
                group => self.grow(encoded, group, parent, start, shared + 1),
            }
        }
    }

    fn leaf(&mut self, encoded: &[Encoded], request: usize, parent: Option<usize>, start: usize) {
        let end = ids(encoded, request).len().saturating_sub(1);
        self.add(parent, request, start, end, true);
    }

    fn add(&mut self, parent: Option<usize>, request: usize, start: usize, end: usize, leaf: bool) -> usize {
        if let Some(parent) = parent.and_then(|parent| self.nodes.get_mut(parent)) {
            parent.children += 1;
        }
        self.nodes.push(Node { parent, request, start, end, children: 0, leaf });
        self.nodes.len() - 1
    }

    /// Runs all of it on a model. Requests are run depth first, so that few caches live at a time.
    pub(super) fn run(
        self,
        asker: &Asker<'_>,
        encoded: &[Encoded],
        progress: &mut ProgressFn<'_>,
    ) -> Result<Vec<LogLikelihood>> {
        let cancel = &asker.cancel;
        let mut run = Run::new(&self, asker.opt, asker.cache);
        let total = self.requests as u64;
        let mut done = 0;
        while let Some(batch) = run.next_batch() {
            cancel.check("scoring")?;
            let outputs = run.forward(&batch, encoded, cancel)?;
            done += run.take(&batch, outputs)? as u64;
            if progress(Progress::new("requests", done, total)).is_break() {
                return Err(Error::new(ErrorKind::Cancelled, "scoring was cancelled"));
            }
        }
        run.found
            .into_iter()
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Error::new(ErrorKind::Backend, "expected a result for each request, found fewer"))
    }
}

fn ids(encoded: &[Encoded], request: usize) -> &[u32] {
    encoded.get(request).map_or(&[], |encoded| &encoded.ids)
}

/// Tokens of a request that others may share.
fn shareable(encoded: &[Encoded], request: usize) -> usize {
    encoded.get(request).map_or(0, |encoded| encoded.from.saturating_sub(1))
}

/// A tree on its way through a model.
struct Run<'a> {
    tree: &'a Shared,
    opt: &'a Opt,
    cache: CacheDType,
    /// Nodes whose parent has been run, the next one last.
    ready: Vec<usize>,
    /// Children of each node, last one first.
    children: Vec<Vec<usize>>,
    /// What each node left, while children need it; and how many still do.
    caches: Vec<Option<KvCache>>,
    open: Vec<usize>,
    found: Vec<Option<LogLikelihood>>,
}

/// Nodes that are run together; all with caches, or all without.
struct Batch {
    nodes: Vec<usize>,
    caches: Vec<KvCache>,
}

impl<'a> Run<'a> {
    fn new(tree: &'a Shared, opt: &'a Opt, cache: CacheDType) -> Self {
        let count = tree.nodes.len();
        let mut children = vec![Vec::new(); count];
        let mut ready = Vec::new();
        for (index, node) in tree.nodes.iter().enumerate().rev() {
            match node.parent.and_then(|parent| children.get_mut(parent)) {
                Some(siblings) => siblings.push(index),
                None => ready.push(index),
            }
        }
        let open = tree.nodes.iter().map(|node| node.children).collect();
        let caches = (0..count).map(|_| None).collect();
        Self { tree, opt, cache, ready, children, caches, open, found: vec![None; tree.requests] }
    }

    /// A node alone, without children or parent, needs no cache.
    fn alone(&self, index: usize) -> bool {
        self.tree.nodes.get(index).is_some_and(|node| node.parent.is_none() && node.leaf)
    }

    /// The nodes that are run next: the deepest that are ready, as many as fit.
    fn next_batch(&mut self) -> Option<Vec<usize>> {
        let alone = self.alone(*self.ready.last()?);
        let mut rows = 0;
        let mut batch = Vec::new();
        while let Some(&index) = self.ready.last() {
            let len = self.tree.nodes.get(index).map_or(0, |node| node.end - node.start);
            if self.alone(index) != alone || (!batch.is_empty() && rows + len > ROWS) {
                break;
            }
            rows += len;
            batch.push(index);
            self.ready.pop();
        }
        Some(batch)
    }

    fn forward(&mut self, nodes: &[usize], encoded: &[Encoded], cancel: &CancelToken) -> Result<Vec<Output>> {
        let alone = nodes.first().is_some_and(|first| self.alone(*first));
        let mut batch = Batch { nodes: nodes.to_vec(), caches: Vec::new() };
        if !alone {
            for &index in nodes {
                batch.caches.push(self.cache_for(index)?);
            }
        }
        let mut caches: Vec<Option<&mut KvCache>> = batch.caches.iter_mut().map(Some).collect();
        caches.resize_with(nodes.len(), || None);
        let mut sequences = Vec::with_capacity(nodes.len());
        for (&index, cache) in nodes.iter().zip(caches) {
            let of = |node: &Node| -> Option<(&[u32], Want<'_>)> {
                let request = encoded.get(node.request)?;
                let targets = if node.leaf { request.ids.get(request.from..)? } else { &[] };
                let want = if node.leaf { Want::LogProbs { targets } } else { Want::Nothing };
                Some((request.ids.get(node.start..node.end)?, want))
            };
            let (ids, want) = self.tree.nodes.get(index).and_then(of).ok_or_else(|| {
                Error::new(ErrorKind::Option, "expected the requests that were planned, found others")
            })?;
            let mut sequence = Sequence::new(ids).want(want).adapter(self.opt.adapter());
            sequence.cache = cache;
            sequences.push(sequence);
        }
        let outputs =
            self.opt.engine().forward_blocking(Forward { sequences, cancel: Some(cancel), watch: None })?;
        for (index, cache) in batch.nodes.into_iter().zip(batch.caches) {
            let kept = self.tree.nodes.get(index).is_some_and(|node| !node.leaf);
            if let Some(slot) = self.caches.get_mut(index).filter(|_| kept) {
                *slot = Some(cache);
            }
        }
        Ok(outputs)
    }

    /// A cache that holds what a node's tokens follow.
    fn cache_for(&mut self, index: usize) -> Result<KvCache> {
        let Some(parent) = self.tree.nodes.get(index).and_then(|node| node.parent) else {
            return self.opt.engine().new_cache(self.cache);
        };
        let missing = || {
            Error::new(ErrorKind::Backend, "expected the keys and values of a shared beginning, found none")
        };
        let slot = self.caches.get_mut(parent).ok_or_else(missing)?;
        let left = self.open.get_mut(parent).ok_or_else(missing)?;
        *left = left.saturating_sub(1);
        // The last one takes it.
        if *left == 0 { slot.take().ok_or_else(missing) } else { slot.as_ref().ok_or_else(missing)?.fork() }
    }

    /// Keeps what came of a batch; says how many requests ended in it.
    fn take(&mut self, nodes: &[usize], outputs: Vec<Output>) -> Result<usize> {
        let mut ended = 0;
        for (&index, output) in nodes.iter().zip(outputs) {
            let Some(node) = self.tree.nodes.get(index) else { continue };
            if node.leaf {
                ended += 1;
                let found = LogLikelihood {
                    log_prob: output.log_probs.iter().map(|score| f64::from(score.log_prob)).sum(),
                    greedy: output.log_probs.iter().all(|score| score.greedy),
                };
                if let Some(slot) = self.found.get_mut(node.request) {
                    *slot = Some(found);
                }
            }
        }
        // Children are pushed in reverse, so that the first node's come next.
        for &index in nodes.iter().rev() {
            if let Some(children) = self.children.get_mut(index) {
                self.ready.append(children);
            }
        }
        Ok(ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(ids: &[u32], from: usize) -> Encoded {
        Encoded { ids: ids.to_vec(), from, cut: 0 }
    }

    #[test]
    fn what_requests_begin_with_is_run_once() {
        let head: Vec<u32> = (0..40).collect();
        let questions = [[50_u32; 20], [60; 20]];
        let mut all = Vec::new();
        for question in questions {
            for choice in [[7_u32, 8, 9], [7, 8, 1], [3, 2, 1]] {
                let ids = [&head[..], &question, &choice].concat();
                all.push(request(&ids, 60));
            }
        }
        let tree = Shared::plan(&all, true);
        // The head, twice a question but its last token, and for each choice that token and all of its but the last.
        assert_eq!(tree.rows(), 40 + 2 * 19 + 6 * 3);
        assert_eq!(Shared::plan(&all, false).rows(), 6 * 62);
        let leaves: Vec<usize> = tree.nodes.iter().filter(|n| n.leaf).map(|n| n.request).collect();
        assert_eq!(leaves.len(), 6);
    }

    #[test]
    fn rows_whose_prediction_counts_are_nobody_elses() {
        // Equal requests, and requests of which one is the beginning of another.
        let ids: Vec<u32> = (0..64).collect();
        let all = [
            request(&ids, 32),
            request(&ids, 32),
            request(&ids[..48], 32),
            request(&ids, 1),
            request(&ids, 63),
        ];
        let tree = Shared::plan(&all, true);
        for node in tree.nodes.iter().filter(|node| node.leaf) {
            let from = all[node.request].from;
            assert!(node.start < from && node.end >= from.max(node.start + 1), "{node:?}");
        }
        assert_eq!(tree.nodes.iter().filter(|node| node.leaf).count(), all.len());
    }
}
