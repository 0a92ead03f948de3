//! Failures as OpenAI's API tells them.

use crate::completions::request::FIELDS;
use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use opt_core::{ErrorKind, generation::GenerationConfig};
use serde::Serialize;
use utoipa::ToSchema;

/// Why a request is not answered with what it asked for.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) body: ErrorBody,
    retry_after: Option<u32>,
}

/// The body of an error.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    pub(crate) error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct ErrorDetail {
    /// One line: what, where, what was expected and what was found.
    pub(crate) message: String,
    /// The class of the error, such as `invalid_request_error`.
    #[serde(rename = "type")]
    #[schema(rename = "type")]
    pub(crate) kind: &'static str,
    /// The field of the request that is to blame.
    pub(crate) param: Option<String>,
    /// What programs can tell it by.
    pub(crate) code: Option<&'static str>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> Self {
        let kind = match status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::REQUEST_TIMEOUT => "timeout_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        // Causes from elsewhere may have several lines.
        let message: String = message.into();
        let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
        let retry_after =
            matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE).then_some(1);
        let error = ErrorDetail { message, kind, param: None, code };
        Self { status, body: ErrorBody { error }, retry_after }
    }

    /// 400 for a field.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Some("invalid_value"), message).param(param)
    }

    /// 400 for something that OpenAI's API has and this one has not.
    pub(crate) fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Some("unsupported_parameter"), message).param(param)
    }

    pub(crate) fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Some(code), message)
    }

    pub(crate) fn timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, Some("request_timeout"), message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, Some("internal_error"), message)
    }

    #[must_use]
    pub(crate) fn param(mut self, param: impl Into<String>) -> Self {
        self.body.error.param = Some(param.into());
        self
    }

    /// Says which of several prompts it is about.
    #[must_use]
    pub(crate) fn at_prompt(mut self, place: usize, prompts: usize) -> Self {
        if prompts > 1 {
            self.body.error.message = format!("prompt {place}: {}", self.body.error.message);
        }
        self
    }

    /// The body alone, as a stream that has begun tells it.
    pub(crate) fn json(&self) -> String {
        serde_json::to_string(&self.body).unwrap_or_default()
    }
}

impl From<opt_core::Error> for ApiError {
    fn from(error: opt_core::Error) -> Self {
        let message = error.to_string();
        match error.kind() {
            ErrorKind::Prompt => {
                Self::new(StatusCode::BAD_REQUEST, Some("invalid_prompt"), message).param("prompt")
            }
            ErrorKind::Option | ErrorKind::Config | ErrorKind::Tokenizer | ErrorKind::Unsupported => {
                // Options tell their name in front.
                let name = message.split_once(':').map(|(name, _)| name.to_owned());
                let known = name
                    .filter(|name| FIELDS.contains(&&**name) || GenerationConfig::NAMES.contains(&&**name));
                let error = Self::new(StatusCode::BAD_REQUEST, Some("invalid_value"), message);
                match known {
                    // What is n here is num_return_sequences there.
                    Some(name) if name == "num_return_sequences" => error.param("n"),
                    Some(name) => error.param(name),
                    None => error,
                }
            }
            ErrorKind::NotFound => Self::new(StatusCode::NOT_FOUND, Some("not_found"), message),
            ErrorKind::Cancelled => Self::unavailable("cancelled", message),
            _ => Self::internal(message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body)).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
