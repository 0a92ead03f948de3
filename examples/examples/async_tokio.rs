//! A model in an async program. Generation computes for as long as it takes, so it runs on a thread for blocking work;
//! the async side awaits its tokens over a channel and stays free for everything else.

use opt_core::{Opt, Request, Result, generation::GenerationConfig};
use std::time::Duration;
use tokio::sync::mpsc;

/// Begins a continuation; its pieces of text arrive as they are made. Dropping the receiver ends the work.
fn continue_text(opt: &Opt, prompt: &str, settings: GenerationConfig) -> mpsc::Receiver<Result<String>> {
    // A small buffer: a slow reader slows the model down instead of filling the memory.
    let (sender, receiver) = mpsc::channel(8);
    let opt = opt.clone();
    let request = Request::new(prompt).config(settings);
    tokio::task::spawn_blocking(move || {
        let stream = match opt.stream_batch([request]) {
            Ok(stream) => stream,
            Err(error) => return drop(sender.blocking_send(Err(error))),
        };
        for token in stream {
            if sender.blocking_send(token.map(|token| token.text)).is_err() {
                return;
            }
        }
    });
    receiver
}

#[tokio::main]
async fn main() -> Result<()> {
    // Loading blocks as well.
    let loading = tokio::task::spawn_blocking(|| Opt::open(opt_examples::model()));
    let opt = loading.await.expect("loading does not panic")?;

    // Something else that this program does.
    let clock = tokio::spawn(async {
        let mut ticks = 0;
        loop {
            tokio::time::sleep(Duration::from_millis(5)).await;
            ticks += 1;
            if ticks % 100 == 0 {
                eprintln!("(still alive)");
            }
        }
    });

    // Two conversations at once on one model.
    let settings = GenerationConfig::default().max_new_tokens(24);
    let mut river = continue_text(&opt, "The river", settings.clone());
    let mut house = continue_text(&opt, "The house", settings);
    let (mut of_river, mut of_house) = (String::from("The river"), String::from("The house"));
    let (mut river_open, mut house_open) = (true, true);
    while river_open || house_open {
        tokio::select! {
            piece = river.recv(), if river_open => match piece {
                Some(piece) => of_river.push_str(&piece?),
                None => river_open = false,
            },
            piece = house.recv(), if house_open => match piece {
                Some(piece) => of_house.push_str(&piece?),
                None => house_open = false,
            },
        }
    }
    clock.abort();
    println!("{of_river}\n{of_house}");
    Ok(())
}
