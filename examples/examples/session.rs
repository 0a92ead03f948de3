//! A conversation: its keys and values are kept, so that each turn runs only what is new. It can be forked, saved and
//! restored.

use opt_core::{Opt, Result, Session, generation::GenerationConfig};

fn main() -> Result<()> {
    let opt = Opt::open(opt_examples::model())?;
    let settings = GenerationConfig::default().max_new_tokens(16).no_repeat_ngram_size(3);
    let mut story = opt.session();
    story.append("It was a dark and stormy night.")?;

    // Two ends of the same beginning.
    let mut other = story.fork()?;
    story.generate(" Suddenly", &settings)?;
    other.generate(" The captain", &settings)?;
    println!("{}\n\n{}\n", story.text()?, other.text()?);

    // On disk and back: the rest of the story is the same as without.
    let file = std::env::temp_dir().join(format!("opt-story-{}.safetensors", std::process::id()));
    story.save(&file)?;
    let mut restored = Session::restore(&opt, &file)?;
    let _ = std::fs::remove_file(&file);
    let here = story.generate("", &settings)?;
    let there = restored.generate("", &settings)?;
    assert_eq!(here.ids(), there.ids());
    println!("{}", restored.text()?);
    Ok(())
}
