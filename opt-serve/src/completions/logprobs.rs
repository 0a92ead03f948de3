use opt_core::{
    generation::Alternative,
    tokenizer::{Detokenizer, Tokenizer},
};
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// How probable the tokens of a choice are.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub(crate) struct Logprobs {
    /// Each token as text; one that is part of a character is written `bytes:\xe2\x82`.
    pub(crate) tokens: Vec<String>,
    /// ln p of each, from the raw logits; null for the first of a prompt, which follows nothing.
    pub(crate) token_logprobs: Vec<Option<f32>>,
    /// The most probable tokens in the place of each, with itself.
    pub(crate) top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where each begins in `text`, in characters.
    pub(crate) text_offset: Vec<usize>,
}

impl Logprobs {
    /// Takes off the tokens that begin at `offset` or behind it.
    pub(crate) fn split_off(&mut self, offset: usize) -> Logprobs {
        let keep = self.text_offset.iter().take_while(|at| **at < offset).count();
        Logprobs {
            tokens: self.tokens.split_off(keep),
            token_logprobs: self.token_logprobs.split_off(keep),
            top_logprobs: self.top_logprobs.split_off(keep),
            text_offset: self.text_offset.split_off(keep),
        }
    }

    pub(crate) fn extend(&mut self, other: Logprobs) {
        self.tokens.extend(other.tokens);
        self.token_logprobs.extend(other.token_logprobs);
        self.top_logprobs.extend(other.top_logprobs);
        self.text_offset.extend(other.text_offset);
    }
}

/// Writes the log-probabilities of a text that grows.
pub(crate) struct Writer {
    tokenizer: Option<Tokenizer>,
    detokenizer: Option<Detokenizer>,
    offset: usize,
    top: usize,
}

impl Writer {
    /// `top` is how many of the most probable tokens are named.
    pub(crate) fn new(tokenizer: Option<&Tokenizer>, top: usize) -> Self {
        let detokenizer = tokenizer.map(|tokenizer| tokenizer.detokenizer(true));
        Self { tokenizer: tokenizer.cloned(), detokenizer, offset: 0, top }
    }

    /// [`Writer::new`] behind so many characters of text.
    pub(crate) fn starting(tokenizer: Option<&Tokenizer>, top: usize, offset: usize) -> Self {
        Self { offset, ..Self::new(tokenizer, top) }
    }

    /// The text has this token, which has just been pushed, in it as its name, if it is a special one.
    pub(crate) fn count_special(&mut self, id: u32) {
        let strings = self.tokenizer.as_ref().map(Tokenizer::token_strings);
        let bytes = strings.filter(|strings| strings.is_special(id)).and_then(|strings| strings.get(id));
        self.offset += bytes.map_or(0, |bytes| String::from_utf8_lossy(bytes).chars().count());
    }

    pub(crate) fn push(
        &mut self,
        out: &mut Logprobs,
        id: u32,
        log_prob: Option<f32>,
        alternatives: &[Alternative],
    ) -> opt_core::Result<()> {
        let token = self.name(id);
        out.top_logprobs.push(log_prob.map(|log_prob| {
            let others =
                alternatives.iter().take(self.top).map(|other| (self.name(other.id), number(other.log_prob)));
            let mut map: Map<String, Value> = others.collect();
            map.entry(token.clone()).or_insert_with(|| number(log_prob));
            map
        }));
        out.tokens.push(token);
        out.token_logprobs.push(log_prob.map(finite));
        out.text_offset.push(self.offset);
        if let Some(detokenizer) = &mut self.detokenizer {
            self.offset += detokenizer.push(id)?.chars().count();
        }
        Ok(())
    }

    /// A token as text.
    fn name(&self, id: u32) -> String {
        let bytes = self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.token_strings().get(id));
        match bytes {
            None => format!("token_id:{id}"),
            Some(bytes) => std::str::from_utf8(bytes).map_or_else(
                |_| bytes.iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}")),
                str::to_owned,
            ),
        }
    }
}

fn number(log_prob: f32) -> Value {
    // The double with the same digits as the float, as token_logprobs has it.
    finite(log_prob).to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

/// JSON has no infinity.
fn finite(log_prob: f32) -> f32 {
    if log_prob.is_finite() { log_prob } else { -9999.0 }
}
