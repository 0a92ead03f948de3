//! Text as it is made, token by token; and a stream that moves to another thread.

use opt_core::{Opt, Result, generation::GenerationConfig};
use std::io::Write;

fn main() -> Result<()> {
    let opt = Opt::open(opt_examples::model())?;
    let settings = GenerationConfig::default().max_new_tokens(40).do_sample(true).top_p(0.9).seed(7);

    // A stream is an iterator. Dropping it, here by leaving the loop, ends the work.
    print!("The river");
    for token in opt.stream("The river", &settings)? {
        let token = token?;
        print!("{}", token.text);
        let _ = std::io::stdout().flush();
        if token.text.ends_with('.') {
            break;
        }
    }
    println!();

    // It owns what it needs, so it can be read elsewhere than where it was begun.
    let stream = opt.stream("The sea", &settings)?;
    let reader = std::thread::spawn(move || stream.map(|token| Ok(token?.text)).collect::<Result<String>>());
    let text = reader.join().expect("the thread does not panic")?;
    println!("The sea{text}");
    Ok(())
}
