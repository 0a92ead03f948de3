//! Prompts that are run for what they are, with nothing generated behind them.

use crate::{
    Result,
    generation::{
        Alternative, FinishReason, ModelRole, Need, Plan, Reply, Run, SequenceOutput, Strategy, TokenEvent,
        math,
    },
};

/// Runs a prompt once; what is kept of it is the driver's matter.
pub(super) struct Reading {
    prompt: Vec<u32>,
}

impl Reading {
    pub(super) fn new(prompt: &[u32]) -> Self {
        Self { prompt: prompt.to_vec() }
    }
}

impl Strategy for Reading {
    fn plan(&mut self) -> Plan {
        let tokens = std::mem::take(&mut self.prompt);
        if tokens.is_empty() {
            return Plan::default();
        }
        let run = Run { model: ModelRole::Target, slot: 0, tokens, prompt: true, need: Need::default() };
        Plan { cache: Vec::new(), runs: vec![run] }
    }

    fn advance(&mut self, _replies: Vec<Reply>) -> Result<()> {
        Ok(())
    }

    fn take_events(&mut self) -> Vec<TokenEvent> {
        Vec::new()
    }

    fn interrupt(&mut self, _reason: FinishReason) {
        self.prompt.clear();
    }

    fn finish(&mut self) -> Vec<SequenceOutput> {
        Vec::new()
    }
}

/// How probable the tokens of a prompt are.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PromptScores {
    /// The prompt as it was run.
    pub ids: Vec<u32>,
    /// For each token but the first, which follows nothing.
    pub tokens: Vec<PromptToken>,
}

/// How probable a token of a prompt is.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PromptToken {
    /// log p(token | all before it), in nats.
    pub log_prob: f32,
    /// The most probable tokens in its place, best first.
    pub alternatives: Vec<Alternative>,
}

impl PromptToken {
    /// The token `id` under logits `[vocab_size]`, and the `top` most probable ones.
    pub(crate) fn new(logits: &[f32], id: u32, top: usize) -> Self {
        let sum = math::log_sum_exp(logits);
        let log_prob = |logit: f32| (f64::from(logit) - sum) as f32;
        let best = math::top_k(logits, top).into_iter();
        let alternatives = best.map(|(id, logit)| Alternative { id: id as u32, log_prob: log_prob(logit) });
        let own = logits.get(id as usize).copied().map_or(f32::NEG_INFINITY, log_prob);
        Self { log_prob: own, alternatives: alternatives.collect() }
    }
}
