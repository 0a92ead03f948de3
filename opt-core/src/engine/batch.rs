//! One batch on its way through a local engine: which rows are whose, and what is waited for.

use super::{Input, Output, Piece, Sequence, Want, states::States};
use crate::Result;
use ndarray::{Array2, Array3, s};
use opt_backend::{Readback, Span, TargetScore, TopK};
use std::{ops::Range, sync::Arc};

/// Which rows are whose.
#[derive(Default)]
pub(super) struct BatchPlan {
    pub(super) spans: Vec<Span>,
    pub(super) positions: Vec<u32>,
    /// How many layers are run.
    pub(super) depth: usize,
    /// Rows of which the state behind them is needed.
    pub(super) wanted: Vec<usize>,
    /// For each sequence, where its rows lie among `wanted`.
    pub(super) kept: Vec<Range<usize>>,
    /// For each sequence, those of them that go through the LM head.
    pub(super) scored: Vec<Range<usize>>,
    /// For each sequence, its adapter.
    pub(super) worn: Vec<Wear>,
}

/// The adapter of a sequence.
#[derive(Debug, Clone, Default)]
pub(super) struct Wear {
    pub(super) adapter: Option<usize>,
    pub(super) name: Option<Arc<str>>,
    /// Positions of virtual tokens, there already or from this pass on.
    pub(super) front: usize,
    /// Whether their keys and values must be put into the cache first.
    pub(super) seed: bool,
    /// How many of them are rows of this pass, before the sequence's own.
    pub(super) run: usize,
}

impl BatchPlan {
    /// For each sequence, where its own rows lie, those of an adapter's prompt left out.
    pub(super) fn own(&self) -> impl Iterator<Item = Range<usize>> {
        self.spans.iter().zip(&self.worn).map(|(span, wear)| span.start + wear.run..span.start + span.len)
    }

    /// Where the rows come from.
    pub(super) fn pieces<'a>(&self, sequences: &[Sequence<'a>]) -> Vec<(Piece<'a>, Option<usize>)> {
        let each = sequences.iter().zip(&self.worn);
        each.flat_map(|(sequence, wear)| {
            let own = match sequence.input {
                Input::Ids(ids) => Piece::Ids(ids),
                Input::Embeds(rows) => Piece::Embeds(rows),
            };
            let prompt = (wear.run > 0).then_some((Piece::Prompt(wear.run), wear.adapter));
            prompt.into_iter().chain([(own, wear.adapter)])
        })
        .collect()
    }
}

/// Results on their way from the device.
#[derive(Default)]
pub(super) struct Pending<'a> {
    pub(super) plan: BatchPlan,
    /// In the order of layers.
    pub(super) hidden: Vec<States<'a>>,
    pub(super) logits: Option<Readback<'a, Array2<f32>>>,
    pub(super) top_k: Option<Readback<'a, Vec<TopK>>>,
    pub(super) log_probs: Option<Readback<'a, Vec<TargetScore>>>,
    /// For each layer, for each span.
    pub(super) attentions: Vec<Readback<'a, Vec<Array3<f32>>>>,
}

impl Pending<'_> {
    /// Waits for everything and deals it out to the sequences.
    pub(super) async fn wait(self, sequences: &[Sequence<'_>]) -> Result<Vec<Output>> {
        let mut states = vec![Vec::new(); sequences.len()];
        for layer in self.hidden {
            layer.deal(&mut states).await?;
        }
        let mut attentions = Vec::with_capacity(self.attentions.len());
        for readback in self.attentions {
            attentions.push(readback.await?);
        }
        let logits = wait(self.logits).await?.map(Array2::into_shared);
        let mut top_k = wait(self.top_k).await?.unwrap_or_default().into_iter();
        let mut log_probs = wait(self.log_probs).await?.unwrap_or_default().into_iter();

        let mut first = 0;
        let mut outputs = Vec::with_capacity(sequences.len());
        for ((index, sequence), hidden) in sequences.iter().enumerate().zip(states) {
            let mut output = Output { hidden, ..Output::default() };
            match sequence.want {
                Want::Nothing => {}
                Want::Logits { rows } => {
                    // Rows of many sequences, or of a long prompt, are large: they change hands without a copy.
                    let own = s![first..first + rows, ..];
                    output.logits = logits.clone().map(|logits| logits.slice_move(own));
                    first += rows;
                }
                Want::TopK { rows, k } => {
                    output.top_k = top_k.by_ref().take(rows).collect();
                    for row in &mut output.top_k {
                        row.ids.truncate(k);
                        row.logits.truncate(k);
                    }
                }
                Want::LogProbs { targets } => {
                    output.log_probs = log_probs.by_ref().take(targets.len()).collect()
                }
            }
            if sequence.attentions {
                let from = self.plan.worn[index].run;
                let own = |spans: &Vec<Array3<f32>>| spans[index].slice(s![.., from.., ..]).to_owned();
                output.attentions = attentions.iter().map(own).collect();
            }
            outputs.push(output);
        }
        Ok(outputs)
    }
}

async fn wait<T>(readback: Option<Readback<'_, T>>) -> Result<Option<T>> {
    match readback {
        None => Ok(None),
        Some(readback) => Ok(Some(readback.await?)),
    }
}
