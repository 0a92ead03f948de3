use crate::{app::App, error::ApiError};
use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::Response,
};
use std::sync::Arc;
use subtle::{Choice, ConstantTimeEq};

/// Lets requests through that carry one of the keys.
pub(crate) async fn check(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let keys = &app.options.api_keys;
    if !keys.is_empty() {
        allowed(keys, request.headers())?;
    }
    Ok(next.run(request).await)
}

fn allowed(keys: &[String], headers: &HeaderMap) -> Result<(), ApiError> {
    let refuse = |code, message| Err(ApiError::new(StatusCode::UNAUTHORIZED, Some(code), message));
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return refuse("missing_api_key", "expected an API key: the header Authorization: Bearer KEY");
    };
    let value = value.as_bytes();
    let key = match value.split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => key.trim_ascii(),
        _ => return refuse("missing_api_key", "authorization: expected Bearer KEY"),
    };
    // All keys are looked at in any case, so that the time tells nothing but lengths.
    let found = keys.iter().fold(Choice::from(0), |found, known| found | known.as_bytes().ct_eq(key));
    if bool::from(found) { Ok(()) } else { refuse("invalid_api_key", "the API key is not known here") }
}
