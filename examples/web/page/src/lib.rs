//! OPT in a web page: what JavaScript sees of it.
//!
//! The model's files come as bytes, since a page has no file system, and everything that waits for the device is a
//! promise, since a page has one thread.

use js_sys::Function;
use opt_core::{
    Load, Opt, Request, ScoreInput,
    backends::Wgpu,
    checkpoint::Checkpoint,
    generation::{FinishReason, GenerationConfig},
    tokenizer::{Tokenizer, TokenizerFiles},
};
use serde_json::json;
use std::ops::ControlFlow;
use wasm_bindgen::prelude::*;

type Result<T> = std::result::Result<T, JsError>;

/// A model on the browser's GPU.
#[wasm_bindgen]
pub struct Model(Opt);

#[wasm_bindgen]
impl Model {
    /// Loads a model from the contents of config.json, model.safetensors and, where there are such, tokenizer.json,
    /// tokenizer_config.json and generation_config.json.
    pub async fn load(
        config: String,
        weights: Vec<u8>,
        tokenizer: Option<Vec<u8>>,
        tokenizer_config: Option<Vec<u8>>,
        generation: Option<String>,
    ) -> Result<Model> {
        let gpu = Wgpu::builder().build_async().await?;
        let checkpoint = Checkpoint::from_bytes(&config, vec![weights])?;
        let tokenizer = tokenizer.map(|json| {
            let mut files = TokenizerFiles::default();
            files.tokenizer_json = Some(json);
            files.tokenizer_config_json = tokenizer_config;
            Tokenizer::from_files(&files)
        });
        let generation = generation.map(|json| GenerationConfig::from_json(&json));
        let opt = Opt::assemble(&checkpoint, tokenizer.transpose()?, generation.transpose()?, Load::on(gpu))?;
        Ok(Model(opt))
    }

    /// The adapter that it runs on.
    #[wasm_bindgen(getter)]
    pub fn device(&self) -> String {
        self.0.info().device
    }

    /// The token ids of a text, with BOS where the model wants it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.0.require_tokenizer()?.encode(text, Default::default())?)
    }

    /// Continues a text (see [`Model::generate_ids`]).
    pub async fn generate(
        &self,
        text: String,
        settings: String,
        on_token: Option<Function>,
    ) -> Result<String> {
        self.run(Request::new(text), &settings, on_token).await
    }

    /// Continues token ids. `settings` are JSON, named as in generation_config.json. `on_token` is given each token's
    /// text, its id and the number of its sequence as soon as they are certain, and ends the work by returning false.
    /// The result is JSON: `{"prompt_ids", "sequences": [{"ids", "text", "finish", "logprobs", "score"}]}`.
    pub async fn generate_ids(
        &self,
        ids: Vec<u32>,
        settings: String,
        on_token: Option<Function>,
    ) -> Result<String> {
        self.run(Request::new(ids), &settings, on_token).await
    }

    /// log p(token | all before it) of each token but the first.
    pub async fn score(&self, ids: Vec<u32>) -> Result<Vec<f32>> {
        let mut scored = self.0.score_async(&[ScoreInput::all(ids)]).await?;
        Ok(scored.pop().map(|scored| scored.log_probs).unwrap_or_default())
    }

    /// The logits of every position, row after row.
    pub async fn logits(&self, ids: Vec<u32>) -> Result<Vec<f32>> {
        Ok(self.0.logits_async(&ids).await?.into_iter().collect())
    }

    async fn run(&self, request: Request, settings: &str, on_token: Option<Function>) -> Result<String> {
        let request = request.config(GenerationConfig::from_json(settings)?);
        let mut thrown = None;
        let see = |token: &opt_core::StreamToken| {
            let Some(on_token) = &on_token else { return ControlFlow::Continue(()) };
            let (text, id, sequence) = (token.text.as_str().into(), token.id.into(), token.sequence.into());
            match on_token.call3(&JsValue::NULL, &text, &id, &sequence) {
                Ok(answer) if answer == JsValue::FALSE => ControlFlow::Break(()),
                Ok(_) => ControlFlow::Continue(()),
                Err(error) => {
                    thrown = Some(error);
                    ControlFlow::Break(())
                }
            }
        };
        let mut all = self.0.generate_with_async([request], see, |_| ControlFlow::Continue(())).await?;
        if let Some(error) = thrown {
            return Err(JsError::new(&format!("on_token: {error:?}")));
        }
        let Some(generated) = all.pop() else { return Err(JsError::new("expected one result, found none")) };
        let sequences = generated.sequences.iter().map(|sequence| {
            let finish = match sequence.finish {
                FinishReason::Eos => "eos",
                FinishReason::Length => "length",
                _ => "stop",
            };
            json!({
                "ids": sequence.ids, "text": sequence.text, "finish": finish, "logprobs": sequence.log_probs,
                "score": sequence.score,
            })
        });
        let sequences: Vec<_> = sequences.collect();
        Ok(json!({"prompt_ids": generated.prompt_ids, "sequences": sequences}).to_string())
    }
}

#[wasm_bindgen]
extern "C" {
    #[wasm_bindgen(js_namespace = console)]
    fn error(message: &str);
}

/// Run by the browser when it has the module: what goes wrong inside shall be on its console.
#[wasm_bindgen(start)]
fn start() {
    std::panic::set_hook(Box::new(|info| error(&info.to_string())));
}
