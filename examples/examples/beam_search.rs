//! Beam search: the most probable sequences instead of the most probable next tokens.

use opt_core::{
    Opt, Result,
    generation::{EarlyStopping, GenerationConfig},
};

fn main() -> Result<()> {
    let opt = Opt::open(opt_examples::model())?;
    let settings = GenerationConfig::default()
        .max_new_tokens(20)
        .num_beams(4)
        .num_return_sequences(3)
        .early_stopping(EarlyStopping::Yes)
        .length_penalty(1.0)
        .no_repeat_ngram_size(3);
    let generated = opt.generate("The captain looked at", &settings)?;
    // Best first. The score is the mean log-probability of a token, since the length penalty is 1.
    for sequence in generated.sequences {
        println!("{:.3} {}", sequence.score.unwrap_or_default(), sequence.text.unwrap_or_default());
    }
    Ok(())
}
