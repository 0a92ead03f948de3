//! `/v1/models`.

use crate::{
    app::{App, unknown_model},
    error::ApiError,
};
use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use serde::Serialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// The models of the server.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    /// `list`.
    object: &'static str,
    /// The model, then its adapters.
    data: Vec<Model>,
}

/// A model, or an adapter, which is a model of its own here.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Model {
    id: String,
    /// `model`.
    object: &'static str,
    /// When the server was started, in seconds since 1970.
    created: u64,
    owned_by: &'static str,
    /// The model that an adapter is worn by.
    parent: Option<String>,
    /// Tokens that a prompt may have.
    max_model_len: usize,
}

fn list(app: &App) -> Vec<Model> {
    let (_, opt) = app.engine.state.model();
    let (name, created) = (&app.options.model, app.started);
    let model = |id: String, parent: Option<String>, max_model_len| Model {
        id,
        object: "model",
        created,
        owned_by: "opt-serve",
        parent,
        max_model_len,
    };
    let base = model(name.clone(), None, opt.context());
    let positions = opt.config().max_position_embeddings;
    let adapters = opt.adapters().iter().map(|adapter| {
        let context = positions.saturating_sub(adapter.virtual_tokens);
        model(adapter.name.to_string(), Some(name.clone()), context)
    });
    std::iter::once(base).chain(adapters).collect()
}

/// Lists the model and its adapters.
#[utoipa::path(get, path = "/v1/models", tag = "OpenAI", responses((status = 200, body = ModelList)))]
pub(crate) async fn models(State(app): State<Arc<App>>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: list(&app) })
}

/// Tells of one of them.
#[utoipa::path(
    get,
    path = "/v1/models/{model}",
    tag = "OpenAI",
    params(("model" = String, Path, description = "Its name")),
    responses((status = 200, body = Model), (status = 404, body = crate::error::ErrorBody)),
)]
pub(crate) async fn model(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path(name) = name.map_err(|error| ApiError::invalid("model", error.body_text()))?;
    let found = list(&app).into_iter().find(|model| model.id == name);
    found.map(Json).ok_or_else(|| unknown_model(&name, "model"))
}
