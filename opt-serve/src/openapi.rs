//! The description of the API at `/openapi.json`.

use axum::Json;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use utoipa::{
    Modify, OpenApi, ToSchema,
    openapi::{
        self,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

/// What `/v1/completions` takes. Besides these, every option of transformers' GenerationConfig may be given by its name
/// (`top_k`, `min_p`, `repetition_penalty`, `num_beams`, ...).
#[derive(ToSchema)]
#[allow(dead_code)] // Described, and read field by field elsewhere.
pub(crate) struct CompletionRequest {
    /// The model or one of its adapters; without it the model.
    model: Option<String>,
    prompt: Prompt,
    /// Most new tokens; 0 with `echo` scores the prompt alone. Default: 16.
    max_tokens: Option<usize>,
    /// 0 takes the most probable token. Default: 1.
    #[schema(minimum = 0)]
    temperature: Option<f32>,
    /// Default: 1.
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Continuations of each prompt. Default: 1.
    #[schema(minimum = 1)]
    n: Option<usize>,
    /// Continuations to choose the `n` best of, by mean log-probability. Default: `n`.
    #[schema(minimum = 1)]
    best_of: Option<usize>,
    /// Whether pieces are sent as they are made.
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    /// So many of the most probable tokens in the place of each, of the raw logits.
    #[schema(minimum = 0)]
    logprobs: Option<usize>,
    /// Whether the answer begins with the prompt; with `logprobs` its tokens are scored too.
    echo: Option<bool>,
    /// Texts that end the answer and are no part of it.
    stop: Option<Stop>,
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f32>,
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f32>,
    /// Token ids with what is added to their logits, -100 to 100.
    logit_bias: Option<BTreeMap<String, f32>>,
    /// Makes the draws repeatable.
    seed: Option<i64>,
    /// `{"type": "json_schema", "json_schema": {"schema": ...}}`, `{"type": "json_object"}`, `{"type": "text"}` or
    /// `{"type": "regex", "pattern": ...}`.
    #[schema(value_type = Option<Object>)]
    response_format: Option<Map<String, Value>>,
    /// A regular expression that the answer matches.
    regex: Option<String>,
    /// The adapter that the model wears.
    adapter: Option<String>,
    /// Whether a text gets the model's beginning-of-text token. Default: true.
    add_special_tokens: Option<bool>,
    /// Whether choices name their token ids.
    return_token_ids: Option<bool>,
    /// Not supported: only the empty text is taken.
    suffix: Option<String>,
    /// Means nothing here.
    user: Option<String>,
}

/// One prompt or several, as text or token ids, which are run exactly as given.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
pub(crate) enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    ManyIds(Vec<Vec<u32>>),
}

/// One or several.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
pub(crate) enum Stop {
    One(String),
    Several(Vec<String>),
}

/// Of streams.
#[derive(ToSchema)]
#[allow(dead_code)]
pub(crate) struct StreamOptions {
    /// Whether a last piece tells what it took.
    include_usage: Option<bool>,
}

/// What `/v1/embeddings` takes.
#[derive(ToSchema)]
#[allow(dead_code)]
pub(crate) struct EmbeddingRequest {
    /// The model or one of its adapters; without it the model.
    model: Option<String>,
    input: Prompt,
    /// `float` or `base64` (f32, little-endian). Default: `float`.
    encoding_format: Option<String>,
    /// Only the model's own width is possible.
    dimensions: Option<usize>,
    /// `mean`, `weighted-mean`, `max`, `first` or `last`. Default: `mean`.
    pooling: Option<String>,
    /// Whose states: 0 is the embeddings, i the output of layer i; negative ones count from the end. Default: -1.
    layer: Option<i32>,
    /// Whether vectors have length 1. Default: true.
    normalize: Option<bool>,
    /// What happens to an input longer than the context: `error`, `left` or `right`. Default: `error`.
    truncate: Option<String>,
    /// The adapter that the model wears.
    adapter: Option<String>,
    /// Whether a text gets the model's beginning-of-text token. Default: true.
    add_special_tokens: Option<bool>,
    /// Means nothing here.
    user: Option<String>,
}

#[derive(OpenApi)]
#[openapi(
    info(title = "opt-serve", description = "OPT language models behind the API of OpenAI"),
    paths(
        crate::completions::completions,
        crate::embeddings::embeddings,
        crate::models::models,
        crate::models::model,
        crate::status::health,
        crate::status::ready,
        crate::status::metrics,
    ),
    modifiers(&Keys),
    security((), ("key" = []))
)]
struct Description;

/// The server may ask for keys.
struct Keys;

impl Modify for Keys {
    fn modify(&self, api: &mut openapi::OpenApi) {
        let scheme = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        api.components.get_or_insert_default().add_security_scheme("key", scheme);
    }
}

/// This description.
pub(crate) async fn description() -> Json<openapi::OpenApi> {
    Json(Description::openapi())
}
