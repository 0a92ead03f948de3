use opt_core::generation::LogitsProcessor;
use std::collections::HashMap;

/// OpenAI's penalties: a token that was produced `count` times loses `frequency * count`, and `presence` besides.
/// Formula: https://platform.openai.com/docs/guides/text-generation ("frequency and presence penalties").
pub(super) struct Penalties {
    pub(super) presence: f32,
    pub(super) frequency: f32,
    pub(super) prompt_len: usize,
}

impl LogitsProcessor for Penalties {
    fn name(&self) -> &str {
        "presence_and_frequency_penalty"
    }

    fn process(&self, ids: &[u32], scores: &mut [f32]) -> opt_core::Result<()> {
        let mut counts: HashMap<u32, f32> = HashMap::new();
        for id in ids.get(self.prompt_len..).unwrap_or_default() {
            *counts.entry(*id).or_default() += 1.0;
        }
        for (id, count) in counts {
            if let Some(score) = scores.get_mut(id as usize) {
                *score -= self.frequency * count + self.presence;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_produced_is_penalised() {
        let penalties = Penalties { presence: 0.5, frequency: 0.25, prompt_len: 2 };
        let mut scores = [1.0; 5];
        penalties.process(&[0, 1, 3, 3, 4, 9], &mut scores).unwrap();
        assert_eq!(scores, [1.0, 1.0, 1.0, 0.0, 0.25]);
    }
}
