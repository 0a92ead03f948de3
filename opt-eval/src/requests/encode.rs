use super::Asker;
use crate::template::python_space;
use opt_core::{
    Error, ErrorKind, Result,
    tokenizer::{Bos, Tokenizer},
};

/// Tokens of a request: those from `from` on are scored, each given all before it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Encoded {
    /// All tokens, context first.
    pub ids: Vec<u32>,
    /// Index of the first scored token, at least 1.
    pub from: usize,
    /// Tokens of the context that were cut off because all would not fit the model.
    pub cut: usize,
}

impl Asker<'_> {
    /// A continuation after a context: white space at the context's end belongs to the continuation, whose tokens are
    /// those that the whole text has beyond the context's. An empty context is BOS (or EOS where there is none). What
    /// does not fit the model is cut off at the beginning.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] for a model without tokenizer, or one without BOS and EOS where the context is empty;
    /// [`ErrorKind::Prompt`] for a continuation without a token of its own or one longer than the context.
    pub fn encode(&self, context: &str, continuation: &str) -> Result<Encoded> {
        let tokenizer = self.opt.require_tokenizer()?;
        let trimmed = context.trim_end_matches(python_space);
        let before = if context.is_empty() { Vec::new() } else { self.tokens(tokenizer, trimmed)? };
        let from = before.len().max(1);
        let ids = if before.is_empty() {
            let mut ids = vec![prefix(tokenizer)?];
            // White space that was all of the context stays in front.
            let whole = format!("{context}{continuation}");
            let own = tokenizer.encode(&whole, Bos::Never)?;
            ids.extend(own.strip_prefix(&ids[..]).unwrap_or(&own));
            ids
        } else {
            // Where tokens of the two merge, the context keeps its own.
            let whole = self.tokens(tokenizer, &format!("{context}{continuation}"))?;
            before.into_iter().chain(whole.into_iter().skip(from)).collect()
        };
        if from >= ids.len() {
            let message = format_args!(
                "continuation {continuation:?}: expected at least one token beyond the context's {from}, found none"
            );
            return Err(Error::new(ErrorKind::Prompt, message));
        }
        self.fit(Encoded { ids, from, cut: 0 })
    }

    /// Cuts off the beginning of what is longer than the model's context and one target.
    fn fit(&self, mut encoded: Encoded) -> Result<Encoded> {
        let most = self.opt.context();
        let scored = encoded.ids.len() - encoded.from;
        if scored > most {
            let message = format_args!(
                "expected a continuation of at most {most} tokens (the context), found {scored}"
            );
            return Err(Error::new(ErrorKind::Prompt, message));
        }
        let cut = encoded.ids.len().saturating_sub(most + 1);
        encoded.ids.drain(..cut);
        // Where the continuation is as long as the context, one token of what was before it stays.
        encoded.from -= cut;
        encoded.cut = cut;
        Ok(encoded)
    }

    /// Windows over a text: the first predicts its first tokens from BOS, each later one goes on where the one before
    /// ended, with that one's last token as context.
    ///
    /// # Errors
    /// [`ErrorKind::Tokenizer`] for a model without tokenizer, or one without BOS and EOS.
    pub fn windows(&self, text: &str) -> Result<Vec<Encoded>> {
        let tokenizer = self.opt.require_tokenizer()?;
        let ids = self.tokens(tokenizer, text)?;
        Ok(rolling(&ids, prefix(tokenizer)?, self.opt.context()))
    }

    /// Tokens of a text; one that begins with BOS written out gets no second.
    pub(super) fn tokens(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
        let written = prefix(tokenizer).ok().map(|id| tokenizer.decode(&[id], false)).transpose()?;
        let begins = written.is_some_and(|bos| !bos.is_empty() && text.starts_with(&bos));
        tokenizer.encode(text, if begins { Bos::Never } else { self.bos })
    }
}

/// What stands in for an empty context.
fn prefix(tokenizer: &Tokenizer) -> Result<u32> {
    tokenizer.bos_id().or(tokenizer.eos_id()).ok_or_else(|| {
        let message = "an empty context needs a tokenizer with a BOS or EOS token; it has none";
        Error::new(ErrorKind::Tokenizer, message)
    })
}

/// The harness' `get_rolling_token_windows` with a context of one token, made disjoint. The last window is as long as
/// the others, so that what it predicts has more context.
fn rolling(ids: &[u32], prefix: u32, most: usize) -> Vec<Encoded> {
    let most = most.max(1);
    let mut windows = Vec::new();
    let mut predicted = 0;
    for part in ids.chunks(most) {
        let end = predicted + part.len();
        let window = match end.checked_sub(most + 1) {
            Some(begin) => ids.get(begin..end).unwrap_or_default().to_vec(),
            None => {
                std::iter::once(prefix).chain(ids.get(..end).unwrap_or_default().iter().copied()).collect()
            }
        };
        windows.push(Encoded { from: window.len() - part.len(), ids: window, cut: 0 });
        predicted = end;
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_predict_each_token_once() {
        let ids: Vec<u32> = (10..31).collect();
        for most in 1..30 {
            let windows = rolling(&ids, 2, most);
            let predicted: Vec<u32> = windows.iter().flat_map(|w| w.ids[w.from..].to_vec()).collect();
            assert_eq!(predicted, ids);
            assert!(windows.iter().all(|w| w.ids.len() <= most + 1));
            assert_eq!(windows[0].ids[0], 2);
        }
        assert!(rolling(&[], 2, 8).is_empty());
    }
}
