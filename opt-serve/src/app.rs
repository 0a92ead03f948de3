//! What all handlers share, and the routes to them.

use crate::{
    auth, body::Room, completions, embeddings, engine::Engine, error::ApiError, models, openapi,
    options::ServeOptions, page, status,
};
use axum::{
    Router,
    extract::Request,
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use opt_core::Opt;
use std::{
    any::Any,
    hash::{BuildHasher, Hasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};
use tokio::sync::Semaphore;
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowHeaders, AllowOrigin, CorsLayer},
};

/// Forms for answers that are compiled at once.
const FORMS: usize = 2;

/// What all handlers share.
pub(crate) struct App {
    pub(crate) engine: Engine,
    pub(crate) options: ServeOptions,
    pub(crate) started: u64,
    /// Who may compile a form for answers, which can take seconds of a core.
    pub(crate) forms: Arc<Semaphore>,
    pub(crate) bodies: Room,
    salt: u64,
    count: AtomicU64,
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

impl App {
    pub(crate) fn new(engine: Engine, options: ServeOptions) -> Self {
        // Two servers behind one address are not to give the same ids.
        let salt = RandomState::new().build_hasher().finish();
        Self {
            engine,
            bodies: Room::new(&options),
            options,
            started: now(),
            forms: Arc::new(Semaphore::new(FORMS)),
            salt,
            count: AtomicU64::new(0),
        }
    }

    /// A name for an answer.
    pub(crate) fn new_id(&self, kind: &str) -> String {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        format!("{kind}-{:016x}{number:08x}", self.salt)
    }

    /// The model as a request asks for it, with the name that the answer tells.
    ///
    /// # Errors
    /// 404 for one that is not there.
    pub(crate) fn choose(
        &self,
        opt: Opt,
        model: Option<&str>,
        adapter: Option<&str>,
    ) -> Result<(Opt, String), ApiError> {
        let model = model.filter(|name| *name != self.options.model);
        let (name, param) = match (model, adapter) {
            (None, None) => return Ok((opt, self.options.model.clone())),
            (_, Some(name)) => (name, "adapter"),
            (Some(name), None) => (name, "model"),
        };
        // A name of a model that is not there is wrong even where an adapter is named too.
        for (name, param) in model.map(|name| (name, "model")).into_iter().chain([(name, param)]) {
            if !opt.adapters().iter().any(|adapter| *adapter.name == *name) {
                return Err(unknown_model(name, param));
            }
        }
        Ok((opt.adapted(name)?, name.to_owned()))
    }

    /// What runs: another version or other weights may give other texts for a seed.
    pub(crate) fn fingerprint(&self, opt: &Opt) -> String {
        let info = opt.info();
        format!(
            "opt-serve-{}-{}-{}",
            env!("CARGO_PKG_VERSION"),
            info.name,
            opt.weights().replace([' ', ','], "-")
        )
    }

    pub(crate) fn router(self: Arc<Self>) -> Router {
        let api = Router::new()
            .route("/v1/completions", post(completions::completions))
            .route("/v1/embeddings", post(embeddings::embeddings))
            .route("/v1/models", get(models::models))
            .route("/v1/models/{*model}", get(models::model))
            .route("/metrics", get(status::metrics))
            .layer(middleware::from_fn_with_state(Arc::clone(&self), auth::check));
        let mut open = Router::new()
            .route("/health", get(status::health))
            .route("/ready", get(status::ready))
            .route("/openapi.json", get(openapi::description));
        if self.options.page {
            open = open.merge(page::routes());
        }
        let router = api.merge(open).fallback(not_found).method_not_allowed_fallback(wrong_method);
        let counted = Arc::clone(&self);
        let router = router.layer(CatchPanicLayer::custom(panicked)).layer(middleware::from_fn(
            move |request: Request, next: Next| count(Arc::clone(&counted), request, next),
        ));
        match self.cors() {
            Some(cors) => router.layer(cors),
            None => router,
        }
        .with_state(self)
    }

    fn cors(&self) -> Option<CorsLayer> {
        let origins = &self.options.cors_origins;
        let allowed = if origins.iter().any(|origin| origin == "*") {
            AllowOrigin::any()
        } else {
            // What cannot be a header cannot be an origin.
            AllowOrigin::list(origins.iter().filter_map(|origin| origin.parse::<HeaderValue>().ok()))
        };
        // OpenAI's own client for browsers sends headers of many names.
        let cors = CorsLayer::new().allow_origin(allowed).allow_headers(AllowHeaders::mirror_request());
        let cors = cors.expose_headers([HeaderName::from_static("x-request-id"), header::RETRY_AFTER]);
        (!origins.is_empty()).then(|| cors.allow_methods([Method::GET, Method::POST]))
    }
}

pub(crate) fn unknown_model(name: &str, param: &str) -> ApiError {
    let shown: String = name.chars().take(100).collect();
    let message = format!("the model {shown:?} does not exist here: /v1/models lists those that do");
    ApiError::new(StatusCode::NOT_FOUND, Some("model_not_found"), message).param(param)
}

async fn not_found(request: Request) -> ApiError {
    let path = request.uri().path();
    let message = if path.ends_with("/chat/completions") || path.ends_with("/responses") {
        format!("{path}: OPT is no chat model: expected /v1/completions, with a prompt")
    } else {
        format!("{path}: not found: expected /v1/completions, /v1/embeddings or /v1/models")
    };
    ApiError::new(StatusCode::NOT_FOUND, Some("unknown_url"), message)
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{}: not possible with {}", request.uri().path(), request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, Some("method_not_allowed"), message)
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    // What a panic says may quote the request.
    drop(panic);
    tracing::error!("a handler has panicked");
    ApiError::internal("the request has met a fault of the server").into_response()
}

/// Counts answers, and puts headers on all of them.
async fn count(app: Arc<App>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let known =
        ["/v1/completions", "/v1/embeddings", "/v1/models", "/metrics", "/health", "/ready", "/openapi.json"];
    let endpoint = known
        .into_iter()
        .find(|known| path == *known || path.starts_with(&format!("{known}/")))
        .unwrap_or("other");
    let endpoint = endpoint.trim_start_matches("/v1").trim_start_matches('/');
    let id = app.new_id("req");
    let since = std::time::Instant::now();
    let mut response = next.run(request).await;
    let status = response.status().as_u16();
    app.engine.state.metrics.answered(endpoint, status);
    let milliseconds = since.elapsed().as_millis() as u64;
    tracing::debug!(id, endpoint, status, milliseconds, "answered");
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert(HeaderName::from_static("x-request-id"), id);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
