//! From a request to tasks, off the threads that serve others.

use super::{
    penalty::Penalties,
    request::{Format, Input, Wanted},
    stop::StopAt,
};
use crate::{error::ApiError, options::ServeOptions};
use axum::http::StatusCode;
use opt_core::{Opt, Request, batching::Task, constraint::Constraint, tokenizer::Bos};

/// A prompt as it is run.
pub(super) struct Ready {
    pub(super) ids: Vec<u32>,
    /// What `echo` repeats.
    pub(super) text: String,
    /// Tokens in front that are no part of that text.
    pub(super) front: usize,
    /// Whether special tokens behind those are part of that text.
    pub(super) literal: bool,
}

/// All of a request that runs.
pub(super) struct Prepared {
    pub(super) prompts: Vec<Ready>,
    /// One for each prompt, or none.
    pub(super) scores: Vec<Task>,
    /// One for each prompt, or none.
    pub(super) runs: Vec<Task>,
}

/// Tasks that a request needs for each of its prompts: to score it, to continue it.
pub(super) fn needs(wanted: &Wanted) -> (bool, bool) {
    (wanted.echo && wanted.logprobs.is_some(), wanted.new_tokens() > 0)
}

pub(super) fn prepare(opt: &Opt, wanted: &Wanted, options: &ServeOptions) -> Result<Prepared, ApiError> {
    let (scores, runs) = needs(wanted);
    let form = wanted.format.as_ref().map(|format| constraint(opt, format)).transpose()?;
    if !wanted.stop.is_empty() {
        opt.require_tokenizer().map_err(|error| ApiError::from(error).param("stop"))?;
    }
    let vocab_size = opt.config().vocab_size;
    if let Some(id) = wanted.biased.iter().find(|id| **id as usize >= vocab_size) {
        let message =
            format!("logit_bias: expected token ids below the vocabulary of {vocab_size}, found {id}");
        return Err(ApiError::invalid("logit_bias", message));
    }
    let mut prepared = Prepared { prompts: Vec::new(), scores: Vec::new(), runs: Vec::new() };
    for (place, input) in wanted.inputs.iter().enumerate() {
        let at = |error: ApiError| error.at_prompt(place, wanted.inputs.len());
        let prompt = ready(opt, input, wanted.add_special_tokens).map_err(at)?;
        fits(opt, &prompt.ids, wanted).map_err(at)?;
        if scores {
            prepared.scores.push(
                Task::score(opt, prompt.ids.clone(), wanted.logprobs.unwrap_or(0)).map_err(ApiError::from)?,
            );
        }
        if runs {
            let request = request(opt, &prompt.ids, wanted, form.as_ref()).cache_dtype(options.cache_dtype);
            let task = Task::generate(opt, request).map_err(ApiError::from).map_err(at)?;
            options.batch.check(&task).map_err(|error| {
                let beams = wanted.config.num_beams.is_some_and(|beams| beams > 1);
                ApiError::from(error).param(if beams { "num_beams" } else { "n" })
            })?;
            prepared.runs.push(task);
        }
        prepared.prompts.push(prompt);
    }
    Ok(prepared)
}

/// The tokens of an input.
fn ready(opt: &Opt, input: &Input, special: bool) -> Result<Ready, ApiError> {
    match input {
        Input::Text(text) => {
            let tokenizer = opt.require_tokenizer().map_err(|error| ApiError::from(error).param("prompt"))?;
            let bos = if special { Bos::Model } else { Bos::Never };
            let ids = tokenizer.encode(text, bos)?;
            let front = usize::from(special && tokenizer.adds_bos()).min(ids.len());
            Ok(Ready { ids, text: text.clone(), front, literal: true })
        }
        Input::Ids(ids) => {
            let text = opt.tokenizer().map(|tokenizer| tokenizer.decode(ids, true)).transpose()?;
            Ok(Ready { ids: ids.clone(), text: text.unwrap_or_default(), front: 0, literal: false })
        }
    }
}

fn fits(opt: &Opt, ids: &[u32], wanted: &Wanted) -> Result<(), ApiError> {
    check_ids(opt, ids, "prompt")?;
    let (context, found) = (opt.context(), ids.len());
    // The last token of an answer is not run, so that it may stand behind the context.
    let asked = wanted.max_tokens.unwrap_or(0);
    if found.saturating_add(asked) > context + 1 {
        let message = format!(
            "max_tokens: expected at most {} behind a prompt of {found} tokens (the context is {context}), found {asked}",
            context + 1 - found
        );
        let code = Some("context_length_exceeded");
        return Err(ApiError::new(StatusCode::BAD_REQUEST, code, message).param("max_tokens"));
    }
    Ok(())
}

/// 400 for ids that cannot be run.
pub(crate) fn check_ids(opt: &Opt, ids: &[u32], name: &str) -> Result<(), ApiError> {
    let (context, vocab_size) = (opt.context(), opt.config().vocab_size);
    if ids.is_empty() {
        return Err(ApiError::invalid(name, format!("{name}: expected at least one token, found none")));
    }
    if ids.len() > context {
        let message = format!("{name}: expected at most {context} tokens (the context), found {}", ids.len());
        let code = Some("context_length_exceeded");
        return Err(ApiError::new(StatusCode::BAD_REQUEST, code, message).param(name));
    }
    match ids.iter().find(|id| **id as usize >= vocab_size) {
        Some(id) => {
            let message =
                format!("{name}: expected token ids below the vocabulary of {vocab_size}, found {id}");
            Err(ApiError::invalid(name, message))
        }
        None => Ok(()),
    }
}

fn request(opt: &Opt, ids: &[u32], wanted: &Wanted, form: Option<&Constraint>) -> Request {
    let room = (opt.context() + 1).saturating_sub(ids.len());
    let config = wanted.config.clone().max_new_tokens(wanted.new_tokens().min(room));
    let mut request = Request::new(ids).config(config);
    if let Some(top) = wanted.logprobs {
        request = request.top_alternatives(top);
    }
    if let Some(tokenizer) = opt.tokenizer().filter(|_| !wanted.stop.is_empty()) {
        request = request.stop_when(StopAt::new(&wanted.stop, tokenizer.clone()));
    }
    if wanted.presence != 0.0 || wanted.frequency != 0.0 {
        let (presence, frequency) = (wanted.presence, wanted.frequency);
        request = request.processor(Penalties { presence, frequency, prompt_len: ids.len() });
    }
    match form {
        Some(form) => request.constrain(form),
        None => request,
    }
}

/// What all answers to a request are held to.
fn constraint(opt: &Opt, format: &Format) -> Result<Constraint, ApiError> {
    let (name, made) = match format {
        Format::Json => ("response_format", Constraint::json_object(opt)),
        Format::Schema(schema) => ("response_format", Constraint::json_schema(opt, schema)),
        Format::Regex(pattern) => ("regex", Constraint::regex(opt, pattern)),
    };
    made.map_err(|error| ApiError::from(error).param(name))
}
