//! A logits processor and a stopping criterion of one's own.

use opt_core::{
    Opt, Request, Result,
    generation::{GenerationConfig, LogitsProcessor, StoppingCriterion},
};

/// Allows only tokens without a certain letter: a lipogram, as in Ernest Vincent Wright's novel without an e.
struct Without {
    /// For each token whether it has the letter.
    has_letter: Vec<bool>,
}

impl LogitsProcessor for Without {
    fn name(&self) -> &str {
        "without"
    }

    fn process(&self, _ids: &[u32], scores: &mut [f32]) -> Result<()> {
        for (score, has_letter) in scores.iter_mut().zip(&self.has_letter) {
            if *has_letter {
                *score = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }
}

/// Ends a sequence at its second full stop.
struct TwoSentences {
    full_stop: u32,
}

impl StoppingCriterion for TwoSentences {
    fn should_stop(&self, ids: &[u32], prompt_len: usize) -> bool {
        ids[prompt_len..].iter().filter(|id| **id == self.full_stop).count() == 2
    }
}

fn main() -> Result<()> {
    let opt = Opt::open(opt_examples::model())?;
    let tokenizer = opt.require_tokenizer()?;
    let has_letter = (0..opt.config().vocab_size as u32)
        .map(|id| Ok(tokenizer.decode(&[id], true)?.contains(['e', 'E'])))
        .collect::<Result<_>>()?;
    let full_stop = tokenizer.token_to_id(".").unwrap_or_default();
    let settings = GenerationConfig::default().max_new_tokens(60).do_sample(true).top_p(0.9).seed(3);
    let request = Request::new("A man in a black hat")
        .config(settings)
        .processor(Without { has_letter })
        .stop_when(TwoSentences { full_stop });
    for generated in opt.generate_batch([request])? {
        println!("A man in a black hat{}", generated.text());
    }
    Ok(())
}
