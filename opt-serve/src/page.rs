//! The page at `/`, for trying things out: three files in the program, nothing from elsewhere.

use crate::app::App;
use axum::{
    Router,
    extract::OriginalUri,
    http::{HeaderName, header},
    response::{IntoResponse, Response},
    routing::get,
};
use std::{borrow::Cow, sync::Arc};

const HTML: &str = include_str!("../page/index.html");
const SCRIPT: &str = include_str!("../page/page.js");
const STYLE: &str = include_str!("../page/page.css");

pub(crate) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/", get(async |uri: OriginalUri| file("text/html; charset=utf-8", html(uri.path()))))
        .route("/page.js", get(async || file("text/javascript; charset=utf-8", SCRIPT.into())))
        .route("/page.css", get(async || file("text/css; charset=utf-8", STYLE.into())))
}

/// The page as it is asked for: nested in another router it is `/llm`, without a slash, from where what it names lies in
/// `llm/`. Still relative, since a proxy can have put more in front.
fn html(path: &str) -> Cow<'static, str> {
    let folder = path.rsplit('/').next().unwrap_or_default();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~%".contains(&byte);
    if folder.is_empty() || !folder.bytes().all(plain) {
        return HTML.into();
    }
    ["page.css", "page.js"]
        .iter()
        .fold(HTML.to_owned(), |html, name| {
            html.replace(&format!("=\"{name}\""), &format!("=\"{folder}/{name}\""))
        })
        .into()
}

fn file(kind: &'static str, content: Cow<'static, str>) -> Response {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_page_names_is_found_from_where_it_is() {
        for path in ["/", "/llm/", "", "/a\"b", "/<i>"] {
            assert_eq!(html(path), HTML, "{path}");
        }
        for (path, folder) in [("/llm", "llm"), ("/ai/llm", "llm"), ("/l%20m", "l%20m")] {
            let html = html(path);
            assert!(html.contains(&format!("href=\"{folder}/page.css\"")), "{path}");
            assert!(html.contains(&format!("src=\"{folder}/page.js\"")), "{path}");
        }
    }
}
