//! Texts as vectors: which are alike, an index that is kept in a file, and the vector of a text while it is generated.

use opt_core::{
    Opt, Request, Result,
    embedding::{EmbedOptions, EmbedPart, Embedder, Index, Metric, Pooling},
    generation::GenerationConfig,
};

const TEXTS: [&str; 5] = [
    "The ship sailed at dawn with a fair wind.",
    "He was a lawyer of some fame in the city.",
    "A boat left the harbour before sunrise.",
    "The judge read the letter to the court.",
    "She planted roses along the garden wall.",
];

fn main() -> Result<()> {
    let opt = Opt::open(opt_examples::model())?;
    let options = EmbedOptions::default().pooling(Pooling::WeightedMean).normalize(true);
    let embedder = Embedder::new(&opt, options.clone())?;

    let mut index = Index::new(&embedder, Metric::Cosine)?;
    for (text, embedding) in TEXTS.iter().zip(embedder.embed_batch(TEXTS)?) {
        index.insert(*text, &embedding, None)?;
    }
    let file = std::env::temp_dir().join(format!("opt-embed-{}.index", std::process::id()));
    index.save(&file)?;
    // An embedder of another model, layer or pooling would be refused.
    let index = Index::open(&embedder, &file)?;
    let _ = std::fs::remove_file(&file);

    let query = "The vessel put to sea.";
    println!("{query}");
    for hit in index.search(embedder.embed(query)?.vector(), 3)? {
        println!("  {:.3} {}", hit.score, hit.id);
    }

    let settings = GenerationConfig::default().max_new_tokens(24);
    let request = Request::new("The captain").config(settings).embed(options, EmbedPart::Whole);
    let made = opt.generate_batch([request])?.remove(0);
    println!("The captain{}", made.text());
    if let Some(embedding) = made.sequences.first().and_then(|sequence| sequence.embedding.as_ref()) {
        for hit in index.search(embedding.vector(), 1)? {
            println!("  {:.3} {}", hit.score, hit.id);
        }
    }
    Ok(())
}
