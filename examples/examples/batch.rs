//! Several prompts as one batch: faster than one after the other, with the same results. Each has its own settings.

use opt_core::{Opt, Request, Result, generation::GenerationConfig};

fn main() -> Result<()> {
    let opt = Opt::open(opt_examples::model())?;
    let greedy = GenerationConfig::default().max_new_tokens(16);
    let drawn = greedy.clone().do_sample(true).temperature(0.8).top_k(40).seed(1);
    let prompts = ["The old house stood", "She opened the letter", "It was"];
    let requests = vec![
        Request::new(prompts[0]).config(greedy.clone()),
        // Two different continuations of the same prompt.
        Request::new(prompts[1]).config(drawn.num_return_sequences(2)),
        // Ends behind the first full stop.
        Request::new(prompts[2]).config(greedy.stop_strings(["."])),
    ];
    for (prompt, generated) in prompts.iter().zip(opt.generate_batch(requests)?) {
        for sequence in generated.sequences {
            println!("{prompt}{} [{:?}]", sequence.text.unwrap_or_default(), sequence.finish);
        }
    }
    Ok(())
}
