//! A client that others wrote: async-openai.

mod common;

use async_openai::{
    Client,
    config::OpenAIConfig,
    error::OpenAIError,
    types::{
        chat::{ChatCompletionStreamOptions, StopConfiguration},
        completions::CreateCompletionRequestArgs,
        embeddings::{CreateEmbeddingRequestArgs, EncodingFormat},
    },
};
use common::{Running, novels};
use futures_util::StreamExt;
use opt_core::{
    embedding::{EmbedOptions, Embedder},
    generation::GenerationConfig,
};
use opt_serve::ServeOptions;

fn client(server: &Running, key: &str) -> Client<OpenAIConfig> {
    let base = format!("http://{}/v1", server.address);
    Client::with_config(OpenAIConfig::new().with_api_base(base).with_api_key(key))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_others_wrote() {
    let server = Running::start(novels(), ServeOptions::default().api_keys(["secret"]));
    let client = client(&server, "secret");
    let greedy = GenerationConfig::default().max_new_tokens(12);
    let expected = novels().generate_async("The old house stood", &greedy).await.unwrap();

    let list = client.models().list().await.unwrap();
    assert_eq!(list.data[0].id, "opt-novels");
    assert_eq!(client.models().retrieve("opt-novels").await.unwrap().object, "model");

    let mut asked = CreateCompletionRequestArgs::default();
    asked.model("opt-novels").prompt("The old house stood").max_tokens(12u32).temperature(0.0).logprobs(2);
    let answer = client.completions().create(asked.build().unwrap()).await.unwrap();
    assert_eq!(answer.choices[0].text, expected.text());
    let logprobs = answer.choices[0].logprobs.as_ref().unwrap();
    assert_eq!(logprobs.tokens.len(), 12);
    assert!(
        logprobs
            .token_logprobs
            .iter()
            .zip(&expected.sequences[0].log_probs)
            .all(|(found, expected)| { (found.unwrap() - expected).abs() < 1e-4 })
    );
    assert_eq!(answer.usage.unwrap().completion_tokens, 12);

    let options = ChatCompletionStreamOptions { include_usage: Some(true), ..Default::default() };
    let asked = asked.stream(true).stream_options(options).stop(StopConfiguration::String("\u{fffe}".into()));
    let mut stream = client.completions().create_stream(asked.build().unwrap()).await.unwrap();
    let (mut text, mut usage) = (String::new(), None);
    while let Some(piece) = stream.next().await {
        let piece = piece.unwrap();
        piece.choices.iter().for_each(|choice| text.push_str(&choice.text));
        usage = piece.usage.or(usage);
    }
    assert_eq!((text.as_str(), usage.unwrap().completion_tokens), (expected.text(), 12));

    let asked = CreateCompletionRequestArgs::default()
        .model("opt-novels")
        .prompt(vec![vec![2_u32, 100], vec![2, 101, 102]])
        .max_tokens(2u32)
        .n(2)
        .seed(5)
        .build()
        .unwrap();
    let answer = client.completions().create(asked).await.unwrap();
    assert_eq!(answer.choices.iter().map(|choice| choice.index).collect::<Vec<_>>(), [0, 1, 2, 3]);

    let vector = Embedder::new(&novels(), EmbedOptions::default().normalize(true)).unwrap();
    let vector = vector.embed_async("A letter").await.unwrap();
    let near = |found: &[f32]| found.iter().zip(vector.vector()).all(|(a, b)| (a - b).abs() < 1e-5);
    let mut asked = CreateEmbeddingRequestArgs::default();
    asked.model("opt-novels").input(["The river", "A letter"]);
    let answer = client.embeddings().create(asked.build().unwrap()).await.unwrap();
    assert!(near(&answer.data[1].embedding) && answer.data[1].embedding.len() == vector.vector().len());
    let asked = asked.encoding_format(EncodingFormat::Base64).build().unwrap();
    let answer = client.embeddings().create_base64(asked).await.unwrap();
    let found: Vec<f32> = answer.data[1].embedding.clone().into();
    assert!(near(&found) && found.len() == vector.vector().len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_as_a_client_that_others_wrote_sees_them() {
    let server = Running::start(novels(), ServeOptions::default().api_keys(["secret"]));
    let error = |client: Client<OpenAIConfig>, model: &'static str, tokens: u32| async move {
        let asked = CreateCompletionRequestArgs::default()
            .model(model)
            .prompt("The")
            .max_tokens(tokens)
            .build()
            .unwrap();
        match client.completions().create(asked).await {
            Err(OpenAIError::ApiError(error)) => {
                let found = error.api_error;
                (error.status_code.as_u16(), found.r#type.unwrap(), found.param, found.code.unwrap())
            }
            other => panic!("{other:?}"),
        }
    };
    let text = str::to_owned;
    assert_eq!(
        error(client(&server, "wrong"), "opt-novels", 1).await,
        (401, text("authentication_error"), None, text("invalid_api_key"))
    );
    assert_eq!(
        error(client(&server, "secret"), "opt-175b", 1).await,
        (404, text("invalid_request_error"), Some(text("model")), text("model_not_found"))
    );
    assert_eq!(
        error(client(&server, "secret"), "opt-novels", 100_000).await,
        (400, text("invalid_request_error"), Some(text("max_tokens")), text("context_length_exceeded"))
    );
}
