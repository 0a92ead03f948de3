//! Below generation: logits, the most probable next tokens, and how probable a given text is.

use opt_core::{Opt, Result, ScoreInput, tokenizer::Bos};

fn main() -> Result<()> {
    let opt = Opt::open(opt_examples::model())?;
    let tokenizer = opt.require_tokenizer()?;
    let ids = tokenizer.encode("He opened the", Bos::Model)?;

    // One row of logits for each token: row i is about the token behind ids[i].
    let logits = opt.logits(&ids)?;
    let last = logits.row(ids.len() - 1);
    let log_sum_exp = last.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
    let mut best: Vec<(usize, f32)> = last.iter().copied().enumerate().collect();
    best.sort_by(|a, b| b.1.total_cmp(&a.1));
    println!("He opened the ...");
    for (id, logit) in best.into_iter().take(5) {
        let probability = (f64::from(logit) - log_sum_exp).exp();
        println!("{:12} {probability:.3}", tokenizer.decode(&[id as u32], true)?);
    }

    // Log-probabilities of given texts need no logits on this side of the backend.
    let door = ScoreInput::pair(&opt, "He opened the", " door", Bos::Model)?;
    let fish = ScoreInput::pair(&opt, "He opened the", " fish", Bos::Model)?;
    let scores = opt.score(&[door, fish])?;
    println!("log p(door) {:.2}, log p(fish) {:.2}", scores[0].log_prob, scores[1].log_prob);
    Ok(())
}
