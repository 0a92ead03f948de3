//! `/v1/embeddings`.

use crate::{
    app::App,
    body,
    completions::{
        prepare::check_ids,
        request::{IGNORED, Input, inputs},
    },
    engine::Update,
    error::ApiError,
    fields::{Fields, wrong},
    gather::{Sent, blocking},
    options::ServeOptions,
    timing::{Deadline, Timer},
};
use axum::{
    Json,
    extract::{Request, State},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use opt_core::{
    Opt,
    batching::Task,
    embedding::{EmbedOptions, Embedder, Embedding, Pooling},
    prompt::Overflow,
    tokenizer::Bos,
};
use serde::Serialize;
use serde_json::Value;
use std::{sync::Arc, time::Instant};
use utoipa::ToSchema;

pub(crate) const FIELDS: &[&str] = &[
    "model",
    "input",
    "encoding_format",
    "dimensions",
    "user",
    "pooling",
    "layer",
    "normalize",
    "truncate",
    "adapter",
    "add_special_tokens",
];

/// Vectors, in the order of the inputs.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EmbeddingList {
    /// `list`.
    object: &'static str,
    data: Vec<Item>,
    model: String,
    usage: EmbeddingUsage,
}

/// A vector.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Item {
    /// `embedding`.
    object: &'static str,
    index: usize,
    embedding: Vector,
}

/// As `encoding_format` asked.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Vector {
    Float(Vec<f32>),
    /// f32, little-endian.
    Base64(String),
}

/// How many tokens it took.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EmbeddingUsage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// A request, each field by itself checked.
struct Wanted {
    model: Option<String>,
    adapter: Option<String>,
    inputs: Vec<Input>,
    base64: bool,
    dimensions: Option<usize>,
    options: EmbedOptions,
}

impl Wanted {
    fn read(body: Value, options: &ServeOptions) -> Result<Self, ApiError> {
        let mut fields = Fields::new(body)?;
        let input = fields.take("input");
        let input = input.ok_or_else(|| {
            ApiError::invalid(
                "input",
                "input: expected a string, token ids, or a list of either, found nothing",
            )
        })?;
        let pooling = match fields.text("pooling")?.as_deref() {
            None | Some("mean") => Pooling::Mean,
            Some("weighted-mean") => Pooling::WeightedMean,
            Some("max") => Pooling::Max,
            Some("first") => Pooling::FirstToken,
            Some("last") => Pooling::LastToken,
            Some(other) => {
                let expected = "mean, weighted-mean, max, first or last";
                return Err(wrong("pooling", expected, &Value::from(other)));
            }
        };
        let layer = match fields.take("layer") {
            None => -1,
            Some(value) => {
                let layer = value.as_i64().and_then(|layer| i32::try_from(layer).ok());
                layer.ok_or_else(|| wrong("layer", "a whole number", &value))?
            }
        };
        let overflow = match fields.text("truncate")?.as_deref() {
            None | Some("error") => Overflow::Error,
            Some("left") => Overflow::TruncateLeft,
            Some("right") => Overflow::TruncateRight,
            Some(other) => return Err(wrong("truncate", "error, left or right", &Value::from(other))),
        };
        let base64 = match fields.text("encoding_format")?.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(other) => return Err(wrong("encoding_format", "float or base64", &Value::from(other))),
        };
        let special = fields.flag("add_special_tokens")?.unwrap_or(true);
        // OpenAI's vectors have length 1.
        let normalize = fields.flag("normalize")?.unwrap_or(true);
        let wanted = Self {
            model: fields.text("model")?,
            adapter: fields.text("adapter")?,
            inputs: inputs("input", input, options.prompts)?,
            base64,
            dimensions: fields.whole("dimensions", 1..=usize::MAX)?,
            options: EmbedOptions::default()
                .layer(layer)
                .pooling(pooling)
                .normalize(normalize)
                .overflow(overflow)
                .bos(if special { Bos::Model } else { Bos::Never }),
        };
        fields.finish(IGNORED, &[FIELDS])?;
        Ok(wanted)
    }
}

/// Makes vectors of texts.
#[utoipa::path(
    post,
    path = "/v1/embeddings",
    tag = "OpenAI",
    request_body = crate::openapi::EmbeddingRequest,
    responses(
        (status = 200, body = EmbeddingList),
        (status = "4XX", description = "The request cannot be answered", body = crate::error::ErrorBody),
        (status = "5XX", description = "The server cannot answer", body = crate::error::ErrorBody),
    ),
)]
pub(crate) async fn embeddings(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<EmbeddingList>, ApiError> {
    let since = Instant::now();
    let body = body::read_json(request, &app.bodies, &app.options).await?;
    let for_app = Arc::clone(&app);
    let wanted = body.read(move |value| Wanted::read(value, &for_app.options)).await?;
    let state = &app.engine.state;
    let _timer = Timer::new(state, "embeddings", since);
    let deadline = Deadline::new(since, app.options.timeout);
    let (epoch, opt) = state.model();
    let (opt, model) = app.choose(opt, wanted.model.as_deref(), wanted.adapter.as_deref())?;
    let places = state.admit(wanted.inputs.len())?;
    let base64 = wanted.base64;
    let prepared = blocking(move || prepare(&opt, &wanted));
    let tasks = deadline.within(prepared).await??;
    let made = Sent::new(&app.engine, epoch, since).gather(tasks, places, &deadline).await?;
    let made: Vec<Embedding> = made.into_iter().filter_map(embedded).collect();
    let tokens = made.iter().map(|embedding| embedding.tokens).sum();
    let data = made.iter().enumerate().map(|(index, embedding)| {
        let vector = embedding.vector();
        let embedding = if base64 {
            let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
            Vector::Base64(STANDARD.encode(bytes))
        } else {
            Vector::Float(vector.to_vec())
        };
        Item { object: "embedding", index, embedding }
    });
    let usage = EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens };
    Ok(Json(EmbeddingList { object: "list", data: data.collect(), model, usage }))
}

fn embedded(update: Update) -> Option<Embedding> {
    match update {
        Update::Embedded(embedding) => Some(embedding),
        _ => None,
    }
}

fn prepare(opt: &Opt, wanted: &Wanted) -> Result<Vec<Task>, ApiError> {
    let width = Embedder::new(opt, wanted.options.clone())?.width();
    if let Some(found) = wanted.dimensions.filter(|found| *found != width) {
        let message =
            format!("dimensions: this model's vectors cannot be shortened: expected {width}, found {found}");
        return Err(ApiError::unsupported("dimensions", message));
    }
    let each = wanted.inputs.iter().enumerate().map(|(place, input)| {
        let at = |error: ApiError| error.at_prompt(place, wanted.inputs.len()).param("input");
        let task = match input {
            Input::Text(text) => Task::embed(opt, text, wanted.options.clone()),
            Input::Ids(ids) => {
                if wanted.options.overflow == Overflow::Error {
                    check_ids(opt, ids, "input").map_err(at)?;
                }
                Task::embed(opt, ids.clone(), wanted.options.clone())
            }
        };
        task.map_err(ApiError::from).map_err(at)
    });
    each.collect()
}
