//! An answer that is sent when all of it is there.

use super::{
    answer::{Choice, Usage, finish},
    logprobs::{Logprobs, Writer},
    prepare::Ready,
    request::Wanted,
    stop,
};
use crate::error::ApiError;
use opt_core::{Generated, GeneratedSequence, Opt, batching::PromptScores};

/// The choices of one prompt. `generated` is nothing where no token was asked for.
pub(super) fn choices(
    opt: &Opt,
    wanted: &Wanted,
    place: usize,
    prompt: &Ready,
    scores: Option<&PromptScores>,
    generated: Option<Generated>,
) -> Result<Vec<Choice>, ApiError> {
    let sequences = generated.map(|generated| generated.sequences);
    let sequences: Vec<Option<GeneratedSequence>> = match sequences {
        None => vec![None; wanted.n],
        Some(mut sequences) => {
            if wanted.best_of > wanted.n && sequences.len() > wanted.n {
                // Stable: among equals the first drawn.
                sequences.sort_by(|a, b| mean(&b.log_probs).total_cmp(&mean(&a.log_probs)));
            }
            // One run stands for all where each would give the same.
            let one = sequences.first().cloned();
            sequences.into_iter().map(Some).chain(std::iter::repeat(one)).take(wanted.n).collect()
        }
    };
    let each = sequences.into_iter().enumerate();
    each.map(|(i, sequence)| choice(opt, wanted, place * wanted.n + i, prompt, scores, sequence)).collect()
}

/// Of no token it is the lowest.
fn mean(log_probs: &[f32]) -> f64 {
    if log_probs.is_empty() {
        return f64::NEG_INFINITY;
    }
    log_probs.iter().map(|p| f64::from(*p)).sum::<f64>() / log_probs.len() as f64
}

fn choice(
    opt: &Opt,
    wanted: &Wanted,
    index: usize,
    prompt: &Ready,
    scores: Option<&PromptScores>,
    sequence: Option<GeneratedSequence>,
) -> Result<Choice, ApiError> {
    let (mut logprobs, start) = echo(opt, wanted, prompt, scores)?;
    let mut text = if wanted.echo { prompt.text.clone() } else { String::new() };
    let mut finish_reason = "length";
    let mut token_ids = Vec::new();
    if let Some(sequence) = sequence {
        finish_reason = finish(sequence.finish);
        let mut produced = sequence.text.unwrap_or_default();
        let mut new = Logprobs::default();
        if let Some(top) = wanted.logprobs {
            let mut writer = Writer::starting(opt.tokenizer(), top, start);
            let none = Vec::new();
            for (i, (id, log_prob)) in sequence.ids.iter().zip(&sequence.log_probs).enumerate() {
                writer.push(&mut new, *id, Some(*log_prob), sequence.alternatives.get(i).unwrap_or(&none))?;
            }
        }
        if let Some(at) = stop::find(&produced, &wanted.stop) {
            produced.truncate(at);
            finish_reason = "stop";
            new.split_off(start + produced.chars().count());
        }
        text.push_str(&produced);
        logprobs.extend(new);
        token_ids = sequence.ids;
    }
    Ok(Choice {
        text,
        index,
        logprobs: wanted.logprobs.map(|_| logprobs),
        finish_reason: Some(finish_reason),
        token_ids: wanted.return_token_ids.then_some(token_ids),
        prompt_token_ids: wanted.return_token_ids.then(|| prompt.ids.clone()),
    })
}

/// The log-probabilities of a prompt that is repeated, and where what follows begins.
pub(super) fn echo(
    opt: &Opt,
    wanted: &Wanted,
    prompt: &Ready,
    scores: Option<&PromptScores>,
) -> Result<(Logprobs, usize), ApiError> {
    let mut logprobs = Logprobs::default();
    if !wanted.echo {
        return Ok((logprobs, 0));
    }
    let start = prompt.text.chars().count();
    let Some((top, scores)) = wanted.logprobs.zip(scores) else { return Ok((logprobs, start)) };
    let mut writer = Writer::new(opt.tokenizer(), top);
    for (i, id) in prompt.ids.iter().enumerate() {
        let score = i.checked_sub(1).and_then(|before| scores.tokens.get(before));
        let alternatives = score.map(|score| &score.alternatives[..]).unwrap_or_default();
        writer.push(&mut logprobs, *id, score.map(|score| score.log_prob), alternatives)?;
        if prompt.literal && i >= prompt.front {
            writer.count_special(*id);
        }
    }
    Ok((logprobs, start))
}

/// What all of it took.
pub(super) fn usage(wanted: &Wanted, prompts: &[Ready], generated: &[(Generated, usize)]) -> Usage {
    let prompt_tokens = prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let copies = if wanted.is_certain() { wanted.n } else { 1 };
    let new = |generated: &Generated| {
        let runs = if generated.sequences.len() > 1 { 1 } else { copies };
        runs * generated.sequences.iter().map(|sequence| sequence.ids.len()).sum::<usize>()
    };
    let completion_tokens = generated.iter().map(|(generated, _)| new(generated)).sum();
    let cached = generated.iter().map(|(_, cached)| cached).sum();
    Usage::of(prompt_tokens, completion_tokens, cached)
}
