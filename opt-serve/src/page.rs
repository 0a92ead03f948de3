//! The page at `/`, for trying things out: three files in the program, nothing from elsewhere.

use crate::app::App;
use axum::{
    Router,
    extract::{NestedPath, rejection::NestedPathRejection},
    http::{HeaderName, header},
    response::{IntoResponse, Redirect, Response},
    routing::get,
};
use std::sync::Arc;

const HTML: &str = include_str!("../page/index.html");
const SCRIPT: &str = include_str!("../page/page.js");
const STYLE: &str = include_str!("../page/page.css");

pub(crate) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/", get(index))
        .route("/page", get(async || file("text/html; charset=utf-8", HTML)))
        .route("/page.js", get(async || file("text/javascript; charset=utf-8", SCRIPT)))
        .route("/page.css", get(async || file("text/css; charset=utf-8", STYLE)))
}

/// The page. Below a path of another program this is reached without a slash at the end, and names in the page would
/// then lead elsewhere: there it is asked for by another name.
async fn index(nested: Result<NestedPath, NestedPathRejection>) -> Response {
    match nested {
        Ok(path) => {
            Redirect::temporary(&format!("{}/page", path.as_str().trim_end_matches('/'))).into_response()
        }
        Err(_) => file("text/html; charset=utf-8", HTML),
    }
}

fn file(kind: &'static str, content: &'static str) -> Response {
    let policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                  base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let headers: [(HeaderName, &str); 5] = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        // A new version of the program has new files under the same names.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, content).into_response()
}
