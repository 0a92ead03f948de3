//! Reading a request's body.

use crate::{error::ApiError, gather::blocking, options::ServeOptions};
use axum::{
    body::to_bytes,
    extract::Request,
    http::{StatusCode, header},
};
use serde_json::Value;

/// Bodies of more bytes are read on a thread of their own: those that serve others are not to wait for it.
const LONG: usize = 64 << 10;

/// Does work on something of so many bytes of JSON where it holds up nobody.
pub(crate) async fn where_it_fits<T: Send + 'static>(
    size: usize,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if size > LONG { blocking(work).await } else { work() }
}

/// The JSON of a body, and how many bytes it had.
///
/// # Errors
/// 415 for another content type, 413 for a body over the limit, 408 for one that does not come, 400 for no JSON.
pub(crate) async fn read_json(request: Request, options: &ServeOptions) -> Result<(Value, usize), ApiError> {
    let limit = options.body_bytes;
    let too_large = || {
        let message = format!("body: expected at most {limit} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, Some("body_too_large"), message)
    };
    let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    // Pages of other origins cannot send this type without being asked for permission first, others they can.
    if !content_type.is_some_and(is_json) {
        let found = content_type.unwrap_or("none");
        let message = format!("content-type: expected application/json, found {found}");
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Some("unsupported_media_type"),
            message,
        ));
    }
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    if announced.and_then(|length| length.parse::<u64>().ok()).is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let body = tokio::time::timeout(options.read_timeout, to_bytes(request.into_body(), limit)).await;
    let bytes = match body {
        Err(_) => {
            let seconds = options.read_timeout.as_secs_f32();
            return Err(ApiError::timeout(format!("body: expected all of it within {seconds} s")));
        }
        Ok(Err(error)) => {
            let mut cause: Option<&dyn std::error::Error> = Some(&error);
            while let Some(at) = cause {
                if at.is::<axum::extract::rejection::LengthLimitError>()
                    || at.to_string().contains("length limit")
                {
                    return Err(too_large());
                }
                cause = at.source();
            }
            let message = format!("body: cannot be read: {error}");
            return Err(ApiError::new(StatusCode::BAD_REQUEST, Some("invalid_body"), message));
        }
        Ok(Ok(bytes)) => bytes,
    };
    let size = bytes.len();
    let parse = move || {
        serde_json::from_slice(&bytes).map_err(|error| {
            let message = format!("body: expected JSON: {error}");
            ApiError::new(StatusCode::BAD_REQUEST, Some("invalid_json"), message)
        })
    };
    Ok((where_it_fits(size, parse).await?, size))
}

/// `application/json`, `application/vnd.api+json`, with or without parameters.
fn is_json(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind.strip_prefix("application/").is_some_and(|kind| kind == "json" || kind.ends_with("+json"))
}
