//! `/health`, `/ready` and `/metrics`.

use crate::{app::App, error::ApiError};
use axum::{
    Json,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// How the server is.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Health {
    /// `ok`.
    status: &'static str,
    version: &'static str,
}

/// The process lives and answers.
#[utoipa::path(get, path = "/health", tag = "operation", responses((status = 200, body = Health)))]
pub(crate) async fn health() -> Json<Health> {
    Json(Health { status: "ok", version: env!("CARGO_PKG_VERSION") })
}

/// Requests are taken; 503 while the engine restarts or hangs, and while the server shuts down.
#[utoipa::path(
    get,
    path = "/ready",
    tag = "operation",
    responses((status = 200, body = Health), (status = 503, body = crate::error::ErrorBody)),
)]
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Result<Json<Health>, ApiError> {
    app.engine.state.readiness()?;
    Ok(Json(Health { status: "ready", version: env!("CARGO_PKG_VERSION") }))
}

/// Metrics for Prometheus, in OpenMetrics' text format.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "operation",
    responses((status = 200, content_type = "application/openmetrics-text", body = String)),
)]
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let state = &app.engine.state;
    let text = state.metrics.text(state.is_ready(), state.pending());
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
