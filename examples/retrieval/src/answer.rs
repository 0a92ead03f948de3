//! `retrieval answer`: a question, answered by the model that found the passages, with them before its eyes.

use crate::{folder::Folder, search::nearest, store::Passage};
use clap::Args;
use opt_core::{
    Opt, Result,
    embedding::Embedder,
    generation::GenerationConfig,
    prompt::{Overflow, PromptBuilder, fit},
    tokenizer::Bos,
};
use std::{
    io::{self, Write},
    path::PathBuf,
};

#[derive(Debug, Args)]
pub(crate) struct Answer {
    /// The folder with the index
    pub(crate) folder: PathBuf,
    /// The question
    question: String,
    /// How many passages the model sees
    #[arg(short, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    k: u16,
    /// Most tokens of the answer
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
    new_tokens: u32,
}

impl Answer {
    pub(crate) fn run(&self, folder: &Folder, embedder: &Embedder) -> Result<()> {
        let opt = embedder.opt();
        let found = nearest(folder, embedder, &self.question, self.k.into(), false)?;
        let (ids, seen) = prompt(opt, &self.question, &found, self.new_tokens as usize)?;
        println!("{}", self.question);
        for (score, Passage { path, start, end, .. }) in found.iter().take(seen) {
            println!("  {score:.3} {path}:{start}-{end}");
        }
        // The end of a line is the end of the answer: a model that was never taught to stop would ask the next question.
        let settings =
            GenerationConfig::default().max_new_tokens(self.new_tokens as usize).stop_strings(["\n"]);
        for token in opt.stream(ids, &settings)? {
            print!("{}", token?.text);
            // As it is made; that nobody reads is no failure.
            let _ = io::stdout().flush();
        }
        println!();
        Ok(())
    }
}

/// The ids of a few-shot prompt: passages as answers to questions for them, then the question; and how many passages
/// are in it. It leaves room for `new_tokens`.
fn prompt(
    opt: &Opt,
    question: &str,
    found: &[(f32, Passage)],
    new_tokens: usize,
) -> Result<(Vec<u32>, usize)> {
    let tokenizer = opt.require_tokenizer()?;
    let room = opt.context().saturating_sub(new_tokens);
    let begun = || {
        PromptBuilder::new(question)
            .instruction("Questions and answers.")
            .input_prefix("Question: ")
            .output_prefix("\nAnswer: ")
    };
    let ask = |passage: &Passage| format!("What does {} say?", passage.path);
    // What is left beside everything else is shared by the passages, of which each keeps its beginning.
    let bare = found.iter().fold(begun(), |builder, (_, passage)| builder.example(ask(passage), ""));
    let taken = tokenizer.encode(&bare.text(), Bos::Model)?.len();
    let share = room.saturating_sub(taken) / found.len().max(1);
    let mut builder = begun();
    // The nearest passage stands nearest to the question. If no share is large enough to be of use, whole passages
    // make room: the builder drops the first ones.
    for (_, passage) in found.iter().rev() {
        let mut text = passage.text.clone();
        if share > 8 && passage.tokens as usize > share {
            let ids =
                fit(tokenizer.encode(&text, Bos::Never)?, share - 2, Overflow::TruncateRight, None)?.ids;
            text = tokenizer.decode(&ids, true)? + "...";
        }
        builder = builder.example(ask(passage), text);
    }
    let prompt = builder.build(tokenizer, room)?;
    Ok((prompt.ids, found.len() - prompt.dropped.len()))
}
