//! `/v1/completions`.

pub(crate) mod answer;
pub(crate) mod logprobs;
mod penalty;
pub(crate) mod prepare;
pub(crate) mod request;
mod stop;
mod stream;
mod whole;

use crate::{
    app::App,
    body,
    engine::{Place, Update},
    error::ApiError,
    gather::{Sent, blocking},
    timing::{Deadline, Timer},
};
use answer::Completion;
use axum::{
    Json,
    extract::{Request, State},
    response::{
        IntoResponse, Response,
        sse::{KeepAlive, Sse},
    },
};
use opt_core::{Generated, batching::PromptScores};
use prepare::{Prepared, Ready};
use request::Wanted;
use std::{sync::Arc, time::Instant};
use stream::Streaming;

/// Continues prompts.
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "OpenAI",
    request_body = crate::openapi::CompletionRequest,
    responses(
        (
            status = 200,
            description = "The continuations; with `stream` as events of pieces of the same form, the last one `[DONE]`",
            content((Completion = "application/json"), (Completion = "text/event-stream")),
        ),
        (status = "4XX", description = "The request cannot be answered", body = crate::error::ErrorBody),
        (status = "5XX", description = "The server cannot answer", body = crate::error::ErrorBody),
    ),
)]
pub(crate) async fn completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let since = Instant::now();
    let body = body::read_json(request, &app.bodies, &app.options).await?;
    let for_app = Arc::clone(&app);
    let wanted = Arc::new(body.read(move |value| Wanted::read(value, &for_app.options)).await?);
    let state = &app.engine.state;
    let timer = Timer::new(state, "completions", since);
    let deadline = Deadline::new(since, app.options.timeout);
    let (epoch, opt) = state.model();
    let (opt, model) = app.choose(opt, wanted.model.as_deref(), wanted.adapter.as_deref())?;
    let (scores, runs) = prepare::needs(&wanted);
    let count = wanted.inputs.len();
    let places = state.admit(count * (usize::from(scores) + usize::from(runs)))?;
    let permit = match wanted.format {
        Some(_) => deadline.within(Arc::clone(&app.forms).acquire_owned()).await?.ok(),
        None => None,
    };
    let (for_app, for_opt, for_wanted) = (Arc::clone(&app), opt.clone(), Arc::clone(&wanted));
    // Whoever goes away meanwhile gives place and permit back when the work is done, not before.
    let prepared = blocking(move || {
        let prepared = prepare::prepare(&for_opt, &for_wanted, &for_app.options);
        drop(permit);
        Ok((prepared?, places))
    });
    let (Prepared { prompts, scores, runs }, mut places) = deadline.within(prepared).await??;

    let sent = Sent::new(&app.engine, epoch, since);
    let places_of_scores: Vec<Place> = places.drain(..scores.len().min(places.len())).collect();
    let scores = sent.gather(scores, places_of_scores, &deadline).await?;
    let scores: Vec<PromptScores> = scores.into_iter().filter_map(scored).collect();
    let head = Completion {
        id: app.new_id("cmpl"),
        object: "text_completion",
        created: crate::app::now(),
        model,
        system_fingerprint: app.fingerprint(&opt),
        choices: Vec::new(),
        usage: None,
    };
    if app.options.log_prompts {
        log_prompts(&head.id, &prompts);
    }
    if wanted.stream {
        let running = runs.len();
        let receiver = sent.stream(runs, places)?;
        let ends = (deadline, timer, app.engine.clone());
        let stream = Streaming::new(&opt, head, wanted, prompts, &scores, receiver, running, ends)?;
        let keep_alive = KeepAlive::new().interval(app.options.keep_alive);
        let stream = futures_util::stream::unfold(stream, Streaming::next);
        return Ok(Sse::new(stream).keep_alive(keep_alive).into_response());
    }
    let generated = sent.gather(runs, places, &deadline).await?;
    let generated: Vec<(Generated, usize)> = generated.into_iter().filter_map(done).collect();
    let usage = whole::usage(&wanted, &prompts, &generated);
    let mut generated = generated.into_iter();
    let mut choices = Vec::new();
    for (place, prompt) in prompts.iter().enumerate() {
        let generated = generated.next().map(|(generated, _)| generated);
        choices.extend(whole::choices(&opt, &wanted, place, prompt, scores.get(place), generated)?);
    }
    if app.options.log_prompts {
        choices.iter().for_each(|choice| tracing::info!(id = head.id, text = choice.text, "answer"));
    }
    Ok(Json(Completion { choices, usage: Some(Some(usage)), ..head }).into_response())
}

fn scored(update: Update) -> Option<PromptScores> {
    match update {
        Update::Scored(scores) => Some(scores),
        _ => None,
    }
}

fn done(update: Update) -> Option<(Generated, usize)> {
    match update {
        Update::Generated { generated, cached } => Some((generated, cached)),
        _ => None,
    }
}

fn log_prompts(id: &str, prompts: &[Ready]) {
    prompts.iter().for_each(|prompt| tracing::info!(id, text = prompt.text, "prompt"));
}
