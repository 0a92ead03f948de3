//! The router inside another program's server.

mod common;

use axum::{
    Router,
    extract::Request,
    http::StatusCode,
    middleware,
    middleware::Next,
    response::{IntoResponse, Response},
};
use common::{Running, http, novels};
use opt_core::batching::BatchOptions;
use opt_serve::{ServeOptions, Server};
use serde_json::json;

/// A rule of the program's own.
async fn guarded(request: Request, next: Next) -> Response {
    match request.headers().get("x-team") {
        Some(team) if team == "blue" => next.run(request).await,
        _ => StatusCode::FORBIDDEN.into_response(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_router_under_a_path_behind_a_rule_of_the_programs_own() {
    let server = Server::new(novels()).unwrap();
    let app = Router::new().nest("/llm", server.router()).layer(middleware::from_fn(guarded));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    let handle = server.handle();
    // The routers keep the engine alive.
    drop(server);
    let send = move |method: &'static str, path: &'static str, body: String| {
        let headers = [("x-team", "blue"), ("content-type", "application/json")];
        http::send(address, method, path, &headers, body.as_bytes())
    };
    let outside = tokio::task::spawn_blocking(move || http::send(address, "GET", "/llm/v1/models", &[], b""));
    assert_eq!(outside.await.unwrap().status, 403);
    tokio::task::spawn_blocking(move || {
        assert_eq!(send("GET", "/llm/v1/models", String::new()).json()["data"][0]["id"], "opt");
        // Names in the page lead to where it is.
        let page = send("GET", "/llm", String::new());
        assert_eq!((page.status, page.header("location")), (307, Some("/llm/page")));
        assert_eq!(
            send("GET", "/llm/page", String::new()).header("content-type"),
            Some("text/html; charset=utf-8")
        );
        assert_eq!(send("GET", "/llm/page.js", String::new()).status, 200);
        assert_eq!(send("GET", "/llm/v1/none", String::new()).error().0, 404);
        let body = json!({"prompt": "The", "max_tokens": 2}).to_string();
        assert_eq!(send("POST", "/llm/v1/completions", body.clone()).status, 200);
        assert!(handle.is_ready());
        handle.shutdown();
        assert!(!handle.is_ready());
        let refused = send("POST", "/llm/v1/completions", body);
        assert_eq!(refused.error(), (503, "shutting_down".into(), None));
        assert_eq!(send("GET", "/llm/ready", String::new()).error().0, 503);
        assert_eq!(send("GET", "/llm/health", String::new()).status, 200);
    })
    .await
    .unwrap();
}

/// Resident memory of this process, in MiB.
#[cfg(target_os = "linux")]
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    (pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096) >> 20
}

#[cfg(target_os = "linux")]
#[test]
fn memory_stays_what_it_is() {
    // What is kept of beginnings is full after a few dozen of these prompts, all different.
    let batch = BatchOptions::default().prefix_bytes(16 << 20);
    let server = Running::start(novels(), ServeOptions::default().batch(batch));
    let ask = |number: usize| {
        let ids: Vec<usize> = (0..20 + number % 40).map(|i| 4 + (number * 7919 + i * 31) % 8000).collect();
        server.complete(&json!({"prompt": ids, "max_tokens": 1 + number % 5, "seed": number}));
    };
    (0..150).for_each(ask);
    let before = resident();
    (150..600).for_each(ask);
    let after = resident();
    assert!(after <= before + 24, "{before} MiB after 150 requests, {after} after 600");
}
