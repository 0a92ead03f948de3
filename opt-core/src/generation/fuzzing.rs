//! What the fuzzer calls, and the test that replays its findings.

use super::{Extras, GenerationConfig, Hooks, ProcessorChain, Random};
use crate::config::OptConfig;

/// A generation_config.json, then everything that follows from it without a model. Whether it is a config.
pub fn generation_config(bytes: &[u8]) -> bool {
    let Ok(config) = GenerationConfig::from_bytes(bytes) else { return false };
    let text = config.to_json();
    let again = GenerationConfig::from_json(&text).map(|config| config.to_json());
    assert_eq!(again.ok().as_ref(), Some(&text), "what is written can be read");

    let mut model = OptConfig::default();
    (model.vocab_size, model.max_position_embeddings) = (64, 32);
    let prompt = [2, 7, 7, 2];
    let Ok((settings, _)) = config.resolve(&model, &prompt, 0, &Extras::default()) else { return true };
    // The last token of a sequence is not run, so that it may stand one past the last position.
    assert!(settings.max_length > prompt.len() && settings.max_length <= 33, "{}", settings.max_length);
    if let Ok(chain) = ProcessorChain::new(&config, &settings, &Hooks::default()) {
        let mut scores: Vec<f32> = (0..64u16).map(|i| f32::from(i * 37 % 64) / 8.0 - 4.0).collect();
        if chain.apply(&prompt, &mut scores).is_ok() {
            assert!(Random::new(settings.seed, 0).sample(&scores) < scores.len());
        }
    }
    true
}

/// A config.json and the tensors it implies. Whether it is a config.
pub fn config(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let Ok(config) = OptConfig::from_json(text) else { return false };
    assert!(config.head_dim() > 0 && config.activation().is_ok());
    // A model of thousands of layers has a long list; there is nothing more to learn from it.
    if config.num_hidden_layers <= 64 {
        assert!(config.parameters() > 0);
    }
    true
}
