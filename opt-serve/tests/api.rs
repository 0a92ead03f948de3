//! What the API answers, held to what the library gives for the same.

mod common;

use common::{Running, http, novels};
use opt_core::{
    Request, ScoreInput,
    embedding::{EmbedOptions, Embedder},
    generation::GenerationConfig,
    tokenizer::Bos,
};
use opt_serve::ServeOptions;
use serde_json::{Value, json};
use std::sync::OnceLock;

/// One server for all tests here.
fn server() -> &'static Running {
    static SERVER: OnceLock<Running> = OnceLock::new();
    SERVER.get_or_init(|| Running::start(novels(), ServeOptions::default()))
}

fn greedy(prompt: &str, tokens: usize) -> String {
    novels().generate(prompt, &GenerationConfig::default().max_new_tokens(tokens)).unwrap().text().to_owned()
}

fn text(answer: &Value, choice: usize) -> &str {
    answer["choices"][choice]["text"].as_str().unwrap()
}

/// The pieces of a stream, whose last event is `[DONE]`.
fn stream(body: &Value) -> Vec<Value> {
    let answer = server().post("/v1/completions", body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let mut events = answer.events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

/// The text of a choice, put together from pieces, and why it ended.
fn joined(pieces: &[Value], index: usize) -> (String, String) {
    let of = |piece: &&Value| piece["choices"][0]["index"] == index;
    let text = pieces.iter().filter(of).map(|piece| text(piece, 0)).collect();
    let ends = pieces.iter().filter(of).filter_map(|piece| piece["choices"][0]["finish_reason"].as_str());
    let ends: Vec<&str> = ends.collect();
    assert_eq!(ends.len(), 1, "{pieces:?}");
    (text, ends[0].to_owned())
}

#[test]
fn greedy_texts_are_those_of_the_library() {
    let prompts = ["The old house stood", "A letter came", "It was"];
    let answer = server().complete(&json!({"prompt": prompts, "temperature": 0, "max_tokens": 12}));
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["model"], "opt-novels");
    let tokenizer = novels().tokenizer().cloned().unwrap();
    let mut prompt_tokens = 0;
    for (i, prompt) in prompts.iter().enumerate() {
        assert_eq!(text(&answer, i), greedy(prompt, 12));
        assert_eq!(answer["choices"][i]["index"], i);
        assert_eq!(answer["choices"][i]["finish_reason"], "length");
        assert_eq!(answer["choices"][i]["logprobs"], Value::Null);
        prompt_tokens += tokenizer.encode(prompt, Bos::Model).unwrap().len();
    }
    assert_eq!(answer["usage"]["prompt_tokens"], prompt_tokens);
    assert_eq!(answer["usage"]["completion_tokens"], 36);
    assert_eq!(answer["usage"]["total_tokens"], prompt_tokens + 36);

    // Ids are run exactly as given, one list or several.
    let ids = tokenizer.encode(prompts[0], Bos::Model).unwrap();
    let one = server().complete(&json!({"prompt": ids, "temperature": 0, "max_tokens": 12}));
    assert_eq!(text(&one, 0), greedy(prompts[0], 12));
    let two =
        json!({"prompt": [ids, ids[1..]], "temperature": 0, "max_tokens": 12, "return_token_ids": true});
    let two = server().complete(&two);
    let bare = GenerationConfig::default().max_new_tokens(12);
    let bare = novels().generate(&ids[1..], &bare).unwrap();
    assert_eq!((text(&two, 0), text(&two, 1)), (text(&one, 0), bare.text()));
    assert_eq!(two["choices"][1]["prompt_token_ids"], json!(ids[1..]));
    assert_eq!(two["choices"][1]["token_ids"], json!(bare.ids()));
}

#[test]
fn draws_are_openais_defaults_and_repeat_with_a_seed() {
    let settings = GenerationConfig::default().max_new_tokens(10).do_sample(true).top_k(0).seed(7);
    let expected = novels().generate("The river", &settings).unwrap();
    let body = json!({"prompt": "The river", "seed": 7, "max_tokens": 10});
    assert_eq!(text(&server().complete(&body), 0), expected.text());
    // In company, streamed, and with extras in transformers' words.
    let pair = server().complete(&json!({"prompt": ["A letter", "The river"], "seed": 7, "max_tokens": 10}));
    assert_eq!(text(&pair, 1), expected.text());
    let pieces = stream(&json!({"prompt": "The river", "seed": 7, "max_tokens": 10, "stream": true}));
    assert_eq!(joined(&pieces, 0).0, expected.text());
    let settings = settings.top_k(5).repetition_penalty(1.3).temperature(0.7);
    let expected = novels().generate("The river", &settings).unwrap();
    let body = json!({
        "prompt": "The river", "seed": 7, "max_new_tokens": 10, "top_k": 5, "repetition_penalty": 1.3, "temperature": 0.7,
    });
    assert_eq!(text(&server().complete(&body), 0), expected.text());
    let beams = GenerationConfig::default().max_new_tokens(10).num_beams(3);
    let beams = novels().generate("The river", &beams).unwrap();
    let body = json!({"prompt": "The river", "num_beams": 3, "max_tokens": 10});
    assert_eq!(text(&server().complete(&body), 0), beams.text());
}

#[test]
fn n_and_best_of() {
    let settings = GenerationConfig::default().max_new_tokens(8).do_sample(true).top_k(0).seed(3);
    let drawn = novels().generate("The ship", &settings.clone().num_return_sequences(4)).unwrap();
    let all: Vec<&str> = drawn.sequences.iter().map(|sequence| sequence.text.as_deref().unwrap()).collect();
    let body = json!({"prompt": "The ship", "n": 4, "seed": 3, "max_tokens": 8});
    let answer = server().complete(&body);
    assert_eq!((0..4).map(|i| text(&answer, i)).collect::<Vec<_>>(), all);
    let mut body = body;
    body["stream"] = true.into();
    let pieces = stream(&body);
    assert_eq!((0..4).map(|i| joined(&pieces, i).0).collect::<Vec<_>>(), all);

    let mean = |i: usize| {
        let log_probs = &drawn.sequences[i].log_probs;
        log_probs.iter().map(|p| f64::from(*p)).sum::<f64>() / log_probs.len() as f64
    };
    let mut order: Vec<usize> = (0..4).collect();
    order.sort_by(|a, b| mean(*b).total_cmp(&mean(*a)));
    let best = json!({"prompt": "The ship", "n": 2, "best_of": 4, "seed": 3, "max_tokens": 8});
    let best = server().complete(&best);
    assert_eq!([text(&best, 0), text(&best, 1)], [all[order[0]], all[order[1]]]);
    assert_eq!(best["usage"]["completion_tokens"], 32, "what was drawn and left out was made too");

    let same = server().complete(&json!({"prompt": "The ship", "n": 3, "temperature": 0, "max_tokens": 8}));
    assert!((0..3).all(|i| text(&same, i) == greedy("The ship", 8)));
    let same =
        stream(&json!({"prompt": "The ship", "n": 3, "temperature": 0, "max_tokens": 8, "stream": true}));
    assert!((0..3).all(|i| joined(&same, i).0 == greedy("The ship", 8)));
}

#[test]
fn stop_strings_end_the_answer_and_are_no_part_of_it() {
    let whole = greedy("The old house stood", 30);
    // One that lies across tokens, from the middle of one word to the middle of the next.
    let (at, _) = whole.char_indices().filter(|(_, c)| *c == ' ').nth(4).unwrap();
    let stop = &whole[at - 2..at + 3];
    let at = whole.find(stop).unwrap();
    let body = json!({"prompt": "The old house stood", "temperature": 0, "max_tokens": 30, "stop": [stop, "\u{fffe}"]});
    let answer = server().complete(&body);
    assert_eq!(text(&answer, 0), &whole[..at]);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() < 30, "it ended at once");
    let mut body = body;
    body["stream"] = true.into();
    assert_eq!(joined(&stream(&body), 0), (whole[..at].to_owned(), "stop".to_owned()));
    // In the prompt it does not count.
    let body = json!({"prompt": "The old house stood", "temperature": 0, "max_tokens": 5, "stop": "house"});
    assert_eq!(text(&server().complete(&body), 0), greedy("The old house stood", 5));
}

#[test]
fn streams_say_what_whole_answers_say() {
    let body = json!({
        "prompt": ["The old house stood", "Caf\u{e9} \u{1f600}"], "temperature": 0, "max_tokens": 9, "logprobs": 2, "echo": true,
    });
    let whole = server().complete(&body);
    let mut body = body;
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let mut pieces = stream(&body);
    let last = pieces.pop().unwrap();
    assert_eq!(last["choices"], json!([]));
    let counts =
        |usage: &Value| ["prompt_tokens", "completion_tokens"].map(|name| usage[name].as_u64().unwrap());
    assert_eq!(counts(&last["usage"]), counts(&whole["usage"]));
    assert!(pieces.iter().all(|piece| piece.get("usage") == Some(&Value::Null) && piece["id"] == last["id"]));
    for i in 0..2 {
        assert_eq!(joined(&pieces, i).0, text(&whole, i));
        for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let of = |piece: &&Value| piece["choices"][0]["index"] == i;
            let all: Vec<Value> = pieces
                .iter()
                .filter(of)
                .flat_map(|piece| {
                    piece["choices"][0]["logprobs"][name].as_array().cloned().unwrap_or_default()
                })
                .collect();
            close(&Value::from(all), &whole["choices"][i]["logprobs"][name], name);
        }
    }
}

#[test]
fn tokens_whose_text_is_held_back_wait_with_it() {
    // Each end of what has been produced may become a stop string that overlaps itself.
    for stop in [json!(["aab"]), json!(["aaab", "ab"]), json!(["aaz"])] {
        let body = json!({
            "prompt": "The", "temperature": 0, "max_tokens": 40, "logprobs": 1, "stop": stop,
            "regex": " (x|aaaaaab|aaaaaac)aaaaaaaabzz",
        });
        let whole = server().complete(&body);
        let mut body = body;
        body["stream"] = true.into();
        let pieces = stream(&body);
        assert_eq!(joined(&pieces, 0).0, text(&whole, 0));
        let (mut length, mut told) = (0, Vec::new());
        for piece in &pieces {
            let choice = &piece["choices"][0];
            length += choice["text"].as_str().unwrap().chars().count() as u64;
            let offsets = choice["logprobs"]["text_offset"].as_array().unwrap();
            // The end of a text has no text of its own.
            let end = u64::from(!choice["finish_reason"].is_null());
            assert!(offsets.iter().all(|at| at.as_u64().unwrap() < length + end), "{piece}");
            told.extend(choice["logprobs"]["tokens"].as_array().unwrap().clone());
        }
        assert_eq!(Value::from(told), whole["choices"][0]["logprobs"]["tokens"], "{stop}");
    }
}

#[test]
fn answers_keep_the_form_they_are_held_to() {
    let schema = json!({
        "type": "object", "required": ["name", "age"], "additionalProperties": false,
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "captain", "schema": schema}});
    let answers = server().complete(&json!({
        "prompt": "The captain: ", "max_tokens": 60, "n": 4, "seed": 3, "response_format": format,
    }));
    for i in 0..4 {
        let made: Value = serde_json::from_str(text(&answers, i)).unwrap();
        assert!(made["name"].as_str().unwrap().chars().count() <= 12, "{made}");
        assert!((1..=99).contains(&made["age"].as_i64().unwrap()), "{made}");
        assert_eq!(answers["choices"][i]["finish_reason"], "stop");
    }
    let asked = json!({"prompt": "He was", "max_tokens": 20, "temperature": 0, "regex": " [0-9]{3} years"});
    let answer = server().complete(&asked);
    let made = text(&answer, 0);
    let digits = made.strip_prefix(' ').and_then(|made| made.strip_suffix(" years")).unwrap();
    assert!(digits.len() == 3 && digits.bytes().all(|digit| digit.is_ascii_digit()), "{made}");
}

/// Equal but for the last bits of numbers.
fn close(a: &Value, b: &Value, what: &str) {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{what}");
            a.iter().zip(b).for_each(|(a, b)| close(a, b, what));
        }
        (Value::Object(a), Value::Object(b)) => {
            assert!(a.keys().eq(b.keys()), "{what}: {a:?} and {b:?}");
            a.values().zip(b.values()).for_each(|(a, b)| close(a, b, what));
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            assert!((a - b).abs() < 1e-4 * a.abs().max(1.0), "{what}: {a} and {b}");
        }
        _ => assert_eq!(a, b, "{what}"),
    }
}

/// What lm-evaluation-harness asks for, and what it makes of the answer.
#[test]
fn echo_and_logprobs_are_scores_of_the_prompt() {
    let opt = novels();
    let tokenizer = opt.tokenizer().unwrap();
    let context = tokenizer.encode("She opened the", Bos::Model).unwrap();
    let all = tokenizer.encode("She opened the door and looked out", Bos::Model).unwrap();
    let scored = opt.score(&[ScoreInput { ids: all.clone(), from: context.len() }]).unwrap().remove(0);
    for max_tokens in [0, 1] {
        let body = json!({
            "model": "opt-novels", "prompt": [all], "temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "echo": true,
            "seed": 1234,
        });
        let answer = server().complete(&body);
        let logprobs = &answer["choices"][0]["logprobs"];
        let list = |name: &str| logprobs[name].as_array().unwrap().clone();
        let (tokens, values, top) = (list("tokens"), list("token_logprobs"), list("top_logprobs"));
        assert_eq!([tokens.len(), values.len(), top.len()], [all.len() + max_tokens; 3]);
        assert_eq!((&values[0], &top[0]), (&Value::Null, &Value::Null));
        let until = all.len();
        let sum: f64 = values[context.len()..until].iter().map(|value| value.as_f64().unwrap()).sum();
        assert!((sum - scored.log_prob).abs() < 1e-3, "{sum} and {}", scored.log_prob);
        let greedy = (context.len()..until).all(|i| {
            let most =
                top[i].as_object().unwrap().values().map(|p| p.as_f64().unwrap()).fold(f64::MIN, f64::max);
            values[i].as_f64().unwrap() == most
        });
        assert_eq!(greedy, scored.greedy);
        // The text is that of the tokens, and each offset its token's place in it.
        let text = text(&answer, 0);
        let offsets: Vec<usize> =
            list("text_offset").iter().map(|at| at.as_u64().unwrap() as usize).collect();
        for (i, token) in tokens.iter().enumerate().filter(|(i, _)| *i > 0) {
            assert!(
                text[offsets[i]..].starts_with(token.as_str().unwrap()),
                "{token} at {} in {text:?}",
                offsets[i]
            );
        }
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
    }
    // A text as prompt is repeated as it is, special tokens in it too.
    let body = json!({"prompt": "One</s> two", "max_tokens": 0, "echo": true, "logprobs": 0});
    let answer = server().complete(&body);
    assert_eq!(text(&answer, 0), "One</s> two");
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"], json!(["</s>", "One", "</s>", " two"]));
    assert_eq!(answer["choices"][0]["logprobs"]["text_offset"], json!([0, 0, 3, 7]));
}

#[test]
fn penalties_and_biases() {
    let body = json!({"prompt": "It was", "temperature": 0, "max_tokens": 24, "frequency_penalty": 2, "presence_penalty": 2, "return_token_ids": true});
    let ids = |answer: &Value| -> Vec<u64> {
        answer["choices"][0]["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
    };
    let different = |ids: &[u64]| ids.iter().collect::<std::collections::HashSet<_>>().len();
    let (with, mut without) = (ids(&server().complete(&body)), body.clone());
    without["frequency_penalty"] = Value::Null;
    without["presence_penalty"] = Value::Null;
    let without = ids(&server().complete(&without));
    assert!(different(&with) > different(&without), "{with:?} and {without:?}");
    // OpenAI's formula, done again by a processor's means: the bias of the token that comes first.
    let first = without[0];
    let banned = json!({"prompt": "It was", "temperature": 0, "max_tokens": 24, "logit_bias": {first.to_string(): -100}, "return_token_ids": true});
    assert!(!ids(&server().complete(&banned)).contains(&first));
    let forced = json!({"prompt": "It was", "temperature": 0, "max_tokens": 3, "logit_bias": {"100": 100}, "return_token_ids": true});
    assert_eq!(ids(&server().complete(&forced)), [100; 3]);
}

#[test]
fn embeddings_are_those_of_the_library() {
    let opt = novels();
    let texts = ["The river ran.", "A letter came"];
    let embedder = Embedder::new(&opt, EmbedOptions::default().normalize(true)).unwrap();
    let expected: Vec<Vec<f32>> =
        texts.iter().map(|text| embedder.embed(*text).unwrap().vector().to_vec()).collect();
    let near = |found: &[f32], expected: &[f32]| {
        assert_eq!(found.len(), expected.len());
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5));
    };
    let answer = server().post("/v1/embeddings", &json!({"input": texts, "model": "opt-novels"})).json();
    assert_eq!(answer["object"], "list");
    for (i, expected) in expected.iter().enumerate() {
        assert_eq!(answer["data"][i]["index"], i);
        let found: Vec<f32> = serde_json::from_value(answer["data"][i]["embedding"].clone()).unwrap();
        near(&found, expected);
    }
    let body = json!({"input": texts, "encoding_format": "base64"});
    let answer = server().post("/v1/embeddings", &body).json();
    use base64::Engine;
    let bytes = answer["data"][1]["embedding"].as_str().unwrap();
    let bytes = base64::engine::general_purpose::STANDARD.decode(bytes).unwrap();
    let found: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect();
    near(&found, &expected[1]);
    assert!(answer["usage"]["prompt_tokens"].as_u64().unwrap() > 4);
    // Extras.
    let options = EmbedOptions::default().layer(2).pooling(opt_core::embedding::Pooling::LastToken);
    let expected = Embedder::new(&opt, options).unwrap().embed(texts[0]).unwrap();
    let body = json!({"input": texts[0], "layer": 2, "pooling": "last", "normalize": false});
    let answer = server().post("/v1/embeddings", &body).json();
    let found: Vec<f32> = serde_json::from_value(answer["data"][0]["embedding"].clone()).unwrap();
    near(&found, expected.vector());
    let body = json!({"input": texts[0], "dimensions": 7});
    assert_eq!(
        server().post("/v1/embeddings", &body).error(),
        (400, "unsupported_parameter".into(), Some("dimensions".into()))
    );
}

#[test]
fn many_clients_at_once_get_what_one_gets() {
    let prompts =
        ["The old house stood", "A letter came", "It was", "The river", "She said that", "In the morning"];
    std::thread::scope(|scope| {
        for (i, prompt) in prompts.iter().enumerate() {
            scope.spawn(move || {
                let tokens = 6 + 5 * i;
                let body = json!({"prompt": prompt, "temperature": 0, "max_tokens": tokens});
                assert_eq!(text(&server().complete(&body), 0), greedy(prompt, tokens));
                let settings = GenerationConfig::default()
                    .max_new_tokens(tokens)
                    .do_sample(true)
                    .top_k(0)
                    .seed(i as u64);
                let expected =
                    novels().generate_batch([Request::new(*prompt).config(settings)]).unwrap().remove(0);
                let body = json!({"prompt": prompt, "seed": i, "max_tokens": tokens, "stream": true});
                assert_eq!(joined(&stream(&body), 0).0, expected.text());
            });
        }
    });
}

#[test]
fn models_health_metrics_page_and_description() {
    let list = server().get("/v1/models").json();
    assert_eq!(list["data"][0]["id"], "opt-novels");
    assert_eq!(list["data"][0]["object"], "model");
    assert_eq!(server().get("/v1/models/opt-novels").json()["id"], "opt-novels");
    assert_eq!(server().get("/v1/models/a/b").error().1, "model_not_found");
    assert_eq!(server().get("/v1/models/%ff").error(), (400, "invalid_value".into(), Some("model".into())));
    assert_eq!(server().get("/health").json()["status"], "ok");
    assert_eq!(server().get("/ready").status, 200);
    let page = server().get("/");
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
    assert_eq!(server().get("/page.js").header("content-type"), Some("text/javascript; charset=utf-8"));

    server().complete(&json!({"prompt": "The", "max_tokens": 3}));
    assert!(server().metric("opt_generated_tokens_total") >= 3.0);
    assert!(server().metric("opt_first_token_seconds_count") >= 1.0);
    assert!(
        server()
            .get("/metrics")
            .text()
            .contains("opt_requests_total{endpoint=\"completions\",status=\"200\"}")
    );

    // The description names exactly the fields that are taken.
    let description = server().get("/openapi.json").json();
    assert_eq!(description["components"]["securitySchemes"]["key"]["scheme"], "bearer");
    let answer = &description["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"];
    assert!(answer["application/json"].is_object() && answer["text/event-stream"].is_object());
    let names = |schema: &str| -> Vec<String> {
        description["components"]["schemas"][schema]["properties"]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect()
    };
    for (schema, path, needed) in
        [("CompletionRequest", "/v1/completions", "prompt"), ("EmbeddingRequest", "/v1/embeddings", "input")]
    {
        assert!(description["paths"][path]["post"].is_object());
        assert_eq!(description["components"]["schemas"][schema]["required"], json!([needed]));
        for name in names(schema) {
            // A value that no field takes: whoever knows the field complains of that, and else of the name.
            let answer = server().post(path, &json!({needed: "x", &name: [[[]]]}));
            let unknown = answer.status != 200 && answer.error().1 == "unknown_parameter";
            assert!(!unknown, "{name}");
        }
    }
}

#[test]
fn bad_requests_are_refused_by_name() {
    let context = novels().context();
    let cases = [
        (json!({}), "invalid_value", "prompt"),
        (json!({"prompt": []}), "invalid_value", "prompt"),
        (json!({"prompt": 7}), "invalid_value", "prompt"),
        (json!({"prompt": ["a", 7]}), "invalid_value", "prompt"),
        (json!({"prompt": [-1]}), "invalid_value", "prompt"),
        (json!({"prompt": [1.5]}), "invalid_value", "prompt"),
        (json!({"prompt": [99_999_999]}), "invalid_value", "prompt"),
        (json!({"prompt": [[]]}), "invalid_value", "prompt"),
        (json!({"prompt": vec![5; context + 1]}), "context_length_exceeded", "prompt"),
        (json!({"prompt": "a", "max_tokens": context + 1}), "context_length_exceeded", "max_tokens"),
        (json!({"prompt": "a", "max_tokens": -1}), "invalid_value", "max_tokens"),
        (json!({"prompt": "a", "max_tokens": "many"}), "invalid_value", "max_tokens"),
        (json!({"prompt": "a", "temperature": -0.1}), "invalid_value", "temperature"),
        (json!({"prompt": "a", "top_p": 1.5}), "invalid_value", "top_p"),
        (json!({"prompt": "a", "top_k": -5}), "invalid_value", "top_k"),
        (json!({"prompt": "a", "min_p": 2}), "invalid_value", "min_p"),
        (json!({"prompt": "a", "n": 0}), "invalid_value", "n"),
        (json!({"prompt": "a", "n": 1_000_000}), "invalid_value", "n"),
        (json!({"prompt": "a", "n": 3, "best_of": 2}), "invalid_value", "best_of"),
        (json!({"prompt": "a", "n": 1, "best_of": 2, "stream": true}), "invalid_value", "best_of"),
        (json!({"prompt": "a", "logprobs": 6}), "invalid_value", "logprobs"),
        (json!({"prompt": "a", "frequency_penalty": 3}), "invalid_value", "frequency_penalty"),
        (json!({"prompt": "a", "logit_bias": {"x": 1}}), "invalid_value", "logit_bias"),
        (json!({"prompt": "a", "logit_bias": {"1": 101}}), "invalid_value", "logit_bias"),
        (json!({"prompt": "a", "logit_bias": {"+5": 1}}), "invalid_value", "logit_bias"),
        (json!({"prompt": "a", "logit_bias": {"05": 1}}), "invalid_value", "logit_bias"),
        (json!({"prompt": "a", "logit_bias": {"99999": 1}}), "invalid_value", "logit_bias"),
        (json!({"prompt": "a", "stop": vec!["x"; 10_000]}), "invalid_value", "stop"),
        (json!({"prompt": "a", "stop": ""}), "invalid_value", "stop"),
        (json!({"prompt": "a", "stop": 3}), "invalid_value", "stop"),
        (json!({"prompt": "a", "seed": 1.5}), "invalid_value", "seed"),
        (json!({"prompt": "a", "stream": "yes"}), "invalid_value", "stream"),
        (json!({"prompt": "a", "stream_options": {"usage": true}}), "unknown_parameter", "stream_options"),
        (json!({"prompt": "a", "suffix": "b"}), "unsupported_parameter", "suffix"),
        (json!({"messages": []}), "unsupported_parameter", "messages"),
        (json!({"prompt": "a", "temperatur": 1}), "unknown_parameter", "temperatur"),
        (json!({"prompt": "a", "num_return_sequences": 2}), "unsupported_parameter", "num_return_sequences"),
        (json!({"prompt": "a", "response_format": {"type": "xml"}}), "invalid_value", "response_format"),
        (json!({"prompt": "a", "num_beams": 65, "stream": true}), "invalid_value", "num_beams"),
        (json!({"prompt": "a", "num_beams": 2, "n": 4}), "invalid_value", "n"),
        (json!({"prompt": "a", "stop_strings": vec!["x"; 10_000]}), "invalid_value", "stop_strings"),
        (json!({"prompt": "a", "bad_words_ids": vec![[5]; 10_000]}), "invalid_value", "bad_words_ids"),
        (
            json!({"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "enum": []}}}}),
            "invalid_value",
            "response_format",
        ),
        (json!({"prompt": "a", "regex": "(a"}), "invalid_value", "regex"),
        (json!({"prompt": "a", "adapter": "none"}), "model_not_found", "adapter"),
    ];
    for (body, code, param) in cases {
        let status = if code == "model_not_found" { 404 } else { 400 };
        let answer = server().post("/v1/completions", &body);
        let shown: String = body.to_string().chars().take(100).collect();
        assert_eq!(answer.status, status, "{shown}: {}", answer.text());
        assert_eq!(
            answer.error(),
            (status, code.to_owned(), Some(param.to_owned())),
            "{shown}: {}",
            answer.text()
        );
    }
    let near = server().post("/v1/completions", &json!({"prompt": "a", "temperatur": 1})).json();
    assert!(near["error"]["message"].as_str().unwrap().contains("did you mean \"temperature\"?"));
    let unknown = server().post("/v1/completions", &json!({"prompt": "a", "model": "gpt-9"}));
    assert_eq!(unknown.error(), (404, "model_not_found".into(), Some("model".into())));
    // What means nothing here is no reason to refuse.
    let harmless =
        json!({"prompt": "a", "max_tokens": 1, "user": "me", "store": false, "metadata": {}, "suffix": null});
    server().complete(&harmless);

    let raw = |kind: &str, body: &[u8]| {
        http::send(server().address, "POST", "/v1/completions", &[("content-type", kind)], body).error()
    };
    let json = "application/json; charset=utf-8";
    assert_eq!(raw(json, b"{\"prompt\": "), (400, "invalid_json".into(), None));
    assert_eq!(raw(json, b"{\"prompt\": \"\xff\xfe\"}"), (400, "invalid_json".into(), None));
    assert_eq!(raw(json, b"[1]"), (400, "invalid_value".into(), None));
    assert_eq!(raw(json, "[".repeat(100_000).as_bytes()), (400, "invalid_json".into(), None));
    assert_eq!(raw("text/plain", b"{}"), (415, "unsupported_media_type".into(), None));
    assert_eq!(server().get("/v1/completions").error().0, 405);
    assert_eq!(server().get("/v1/nothing").error(), (404, "unknown_url".into(), None));
    assert_eq!(server().post("/v1/chat/completions", &Value::Null).error().0, 404);
}

#[test]
fn keys_and_origins() {
    let options = ServeOptions::default().api_keys(["one", "other"]).cors_origins(["https://example.org"]);
    let server = Running::start(novels(), options);
    let ask = |key: Option<&str>| {
        let headers: Vec<(&str, &str)> = key.map(|key| ("authorization", key)).into_iter().collect();
        http::send(server.address, "GET", "/v1/models", &headers, b"")
    };
    assert_eq!(ask(None).error(), (401, "missing_api_key".into(), None));
    assert_eq!(ask(None).header("www-authenticate"), Some("Bearer"));
    for wrong in ["Bearer", "Bearer ", "Bearer on", "Bearer oneother", "Basic one", "one"] {
        assert_eq!(ask(Some(wrong)).error().0, 401, "{wrong}");
    }
    assert_eq!(ask(Some("Bearer other")).status, 200);
    assert_eq!(ask(Some("bearer one")).status, 200);
    // What tells nothing needs no key.
    assert!(["/health", "/ready", "/"].iter().all(|path| server.get(path).status == 200));
    assert_eq!(server.get("/metrics").status, 401);

    let origin = |origin| {
        let headers = [("origin", origin), ("access-control-request-method", "POST")];
        let answer = http::send(server.address, "OPTIONS", "/v1/completions", &headers, b"");
        answer.header("access-control-allow-origin").map(str::to_owned)
    };
    assert_eq!(origin("https://example.org").as_deref(), Some("https://example.org"));
    assert_eq!(origin("https://elsewhere.org"), None);
    let without =
        http::send(self::server().address, "GET", "/v1/models", &[("origin", "https://example.org")], b"");
    assert_eq!(without.header("access-control-allow-origin"), None);
}
