//! Reading a request's body.

use crate::{error::ApiError, gather::blocking, options::ServeOptions};
use axum::{
    body::{Body, Bytes},
    extract::Request,
    http::{StatusCode, header},
};
use futures_util::StreamExt;
use serde_json::Value;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bodies of more bytes are read on a thread of their own: those that serve others are not to wait for it.
const LONG: usize = 64 << 10;

/// Does work on something of so many bytes of JSON where it holds up nobody.
async fn where_it_fits<T: Send + 'static>(
    size: usize,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if size > LONG { blocking(work).await } else { work() }
}

/// Room for the bodies of all requests that are being read.
pub(crate) struct Room(Arc<Semaphore>);

/// A body as JSON.
pub(crate) struct Json {
    value: Value,
    /// How many bytes it had.
    size: usize,
    /// Its part of the room.
    held: Option<OwnedSemaphorePermit>,
}

impl Json {
    /// Reads a request out of it, where that holds up nobody. The room is given back when the JSON is gone, not when
    /// whoever sent it is.
    pub(crate) async fn read<T: Send + 'static>(
        self,
        work: impl FnOnce(Value) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let Self { value, size, held } = self;
        let work = move || {
            let read = work(value);
            drop(held);
            read
        };
        where_it_fits(size, work).await
    }
}

impl Room {
    pub(crate) fn new(options: &ServeOptions) -> Self {
        // A single body is possible whatever the sum is.
        let bytes = options.bodies_bytes.max(options.body_bytes);
        Self(Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS))))
    }

    /// All of a body, each piece of which takes its room when it comes: announced alone is nothing held.
    async fn read(
        &self,
        body: Body,
        limit: usize,
    ) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), ApiError> {
        let mut pieces = body.into_data_stream();
        let (mut bytes, mut held) = (Vec::new(), None::<OwnedSemaphorePermit>);
        while let Some(piece) = pieces.next().await {
            let piece: Bytes = piece.map_err(|error| {
                let message = format!("body: cannot be read: {error}");
                ApiError::new(StatusCode::BAD_REQUEST, Some("invalid_body"), message)
            })?;
            if bytes.len() + piece.len() > limit {
                return Err(too_large(limit));
            }
            let room = u32::try_from(piece.len()).ok();
            let room = room.and_then(|count| Arc::clone(&self.0).try_acquire_many_owned(count).ok());
            let Some(room) = room else {
                let message = "the server is busy: the bodies of its requests leave no room for this one";
                return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, Some("bodies_full"), message));
            };
            match &mut held {
                Some(held) => held.merge(room),
                None => held = Some(room),
            }
            bytes.extend_from_slice(&piece);
        }
        Ok((bytes, held))
    }
}

fn too_large(limit: usize) -> ApiError {
    let message = format!("body: expected at most {limit} bytes");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, Some("body_too_large"), message)
}

/// The JSON of a body.
///
/// # Errors
/// 415 for another content type, 413 for a body over the limit, 429 where all bodies together are too much, 408 for one
/// that does not come, 400 for no JSON.
pub(crate) async fn read_json(
    request: Request,
    room: &Room,
    options: &ServeOptions,
) -> Result<Json, ApiError> {
    let limit = options.body_bytes;
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
        return Err(too_large(limit));
    }
    let body = tokio::time::timeout(options.read_timeout, room.read(request.into_body(), limit)).await;
    let (bytes, held) = body.map_err(|_| {
        let seconds = options.read_timeout.as_secs_f32();
        ApiError::timeout(format!("body: expected all of it within {seconds} s"))
    })??;
    let size = bytes.len();
    let parse = move || {
        let value = serde_json::from_slice(&bytes).map_err(|error| {
            let message = format!("body: expected JSON: {error}");
            ApiError::new(StatusCode::BAD_REQUEST, Some("invalid_json"), message)
        })?;
        Ok(Json { value, size, held })
    };
    where_it_fits(size, parse).await
}

/// `application/json`, `application/vnd.api+json`, with or without parameters.
fn is_json(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind.strip_prefix("application/").is_some_and(|kind| kind == "json" || kind.ends_with("+json"))
}
