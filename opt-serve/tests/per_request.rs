//! Adapters by request: what PEFT computes with them (`opt-core/tests/fixtures/adapters`), all in one batch.

mod common;

use common::{Running, root};
use opt_core::{Load, Opt};
use opt_serve::ServeOptions;
use serde_json::{Value, json};
use std::thread;

/// LoRA, rank-stabilized LoRA, DoRA, and a prefix in the cache.
const NAMES: [&str; 4] = ["plain", "rslora", "dora", "prefix"];

fn fixture(name: &str) -> std::path::PathBuf {
    root("opt-core/tests/fixtures/adapters").join(name)
}

#[test]
fn each_request_has_the_adapter_that_it_names() {
    let expected = NAMES.map(|name| -> Value {
        serde_json::from_str(&std::fs::read_to_string(fixture(name).join("expected.json")).unwrap()).unwrap()
    });
    assert!(expected.iter().all(|expected| expected["model"] == "pre_ln"));
    let base = root("opt-core/tests/fixtures/models/pre_ln");
    let load = NAMES.iter().fold(Load::default(), |load, name| load.adapter(fixture(name)));
    let server = Running::start(Opt::load(base, load).unwrap(), ServeOptions::default());

    let listed = server.get("/v1/models").json();
    let listed: Vec<&str> =
        listed["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(listed[0], "opt-novels");
    assert!(NAMES.iter().all(|name| listed.contains(name)), "{listed:?}");

    // By either field, all at once and each again.
    thread::scope(|scope| {
        for (name, expected) in NAMES.iter().zip(&expected) {
            let (server, greedy) = (&server, &expected["greedy"]);
            scope.spawn(move || {
                for field in ["model", "adapter"].repeat(4) {
                    let body = json!({
                        "prompt": greedy["prompt"], "max_tokens": greedy["output"].as_array().unwrap().len(),
                        "temperature": 0, "return_token_ids": true, field: name,
                    });
                    let answer = server.complete(&body);
                    assert_eq!(answer["choices"][0]["token_ids"], greedy["output"], "{name}");
                    assert_eq!(answer["model"], *name);
                }
            });
        }
    });
    // Without a name it is the base, which says something else.
    let greedy = &expected[0]["greedy"];
    let base =
        json!({"prompt": greedy["prompt"], "max_tokens": 8, "temperature": 0, "return_token_ids": true});
    let answer = server.complete(&base);
    assert_eq!(answer["model"], "opt-novels");
    assert_ne!(answer["choices"][0]["token_ids"], greedy["output"]);
}
