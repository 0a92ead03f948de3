//! The API below a path of a program's own server, with the program's own users in front of it.
//!
//! ```text
//! cargo run --release -p opt-serving --bin embed
//! curl http://127.0.0.1:8000/
//! curl -H 'x-user: ann' -H 'x-pass: sesame' http://127.0.0.1:8000/llm/v1/models
//! ```
//!
//! The server has no keys here: who may use it is decided by a layer around its router, as for any other part of the
//! program.

use axum::{
    Router,
    extract::Request,
    http::{HeaderMap, StatusCode},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use opt_core::Opt;
use opt_serve::{ServeOptions, Server};
use std::error::Error;

/// Stands for whatever the program knows its users by.
fn is_known(headers: &HeaderMap) -> bool {
    let is = |name: &str, value: &str| headers.get(name).is_some_and(|found| found == value);
    is("x-user", "ann") && is("x-pass", "sesame")
}

async fn only_users(request: Request, next: Next) -> Response {
    if is_known(request.headers()) {
        next.run(request).await
    } else {
        (StatusCode::FORBIDDEN, "for users of this program\n").into_response()
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8000".to_owned());
    let opt = Opt::open("models/opt-novels")?;
    // The page is not for everybody, and the program has one of its own.
    let server = Server::with(opt, ServeOptions::default().model("opt-novels").queue(16).page(false))?;
    let handle = server.handle();
    let app = Router::new()
        .route("/", get(async || "a program with a model in it\n"))
        .nest("/llm", server.router().layer(middleware::from_fn(only_users)));

    let listener = tokio::net::TcpListener::bind(&address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    let ending = async move {
        // Without a signal handler the program runs until it is killed.
        let _ = tokio::signal::ctrl_c().await;
        handle.shutdown();
        handle.idle().await;
    };
    axum::serve(listener, app).with_graceful_shutdown(ending).await?;
    Ok(())
}
