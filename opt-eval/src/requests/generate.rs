use super::{Asker, Encoded};
use crate::task::Generation;
use opt_core::{
    Error, ErrorKind, Progress, ProgressFn, Request, Result,
    generation::{GenerationConfig, StoppingCriterion},
    tokenizer::Tokenizer,
};

/// Prompts that are continued together.
const BATCH: usize = 16;

/// What a model wrote after a prompt.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Written {
    /// The text, up to the first stop string.
    pub text: String,
    /// Tokens of the prompt that were cut off to leave room.
    pub cut: usize,
}

/// Ends a text once it holds a stop string. Unlike generation's own stop strings, as in transformers, this does not look
/// at the prompt's end, nor does the harness.
struct StopInText {
    tokenizer: Tokenizer,
    until: Vec<String>,
}

impl StoppingCriterion for StopInText {
    fn should_stop(&self, ids: &[u32], prompt_len: usize) -> bool {
        let longest = self.until.iter().map(String::len).max().unwrap_or(0);
        // A token is a byte at least, so that the last ones hold whatever the newest has made whole.
        let tail = ids.len().saturating_sub(longest + 2).max(prompt_len);
        let text = ids.get(tail..).and_then(|ids| self.tokenizer.decode(ids, true).ok()).unwrap_or_default();
        // An empty one is found at once.
        self.until.iter().any(|stop| text.contains(&stop[..]))
    }
}

impl Asker<'_> {
    /// What the model writes after each prompt: up to the first of the stop strings, to EOS, or to `max_gen_toks`
    /// tokens. Prompts that leave too little room lose their beginning.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] where `max_gen_toks` leaves no room for a prompt, [`ErrorKind::Cancelled`],
    /// [`ErrorKind::Backend`].
    pub fn generate(
        &self,
        prompts: &[String],
        how: &Generation,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Vec<Written>> {
        let tokenizer = self.opt.require_tokenizer()?;
        let room = self.opt.context().saturating_sub(how.max_gen_toks);
        if room == 0 {
            let (context, wanted) = (self.opt.context(), how.max_gen_toks);
            let message =
                format_args!("max_gen_toks: expected less than {context} (the context), found {wanted}");
            return Err(Error::new(ErrorKind::Option, message));
        }
        let mut config =
            GenerationConfig::default().max_new_tokens(how.max_gen_toks).do_sample(how.do_sample);
        if let Some(temperature) = how.temperature.filter(|_| how.do_sample) {
            config = config.temperature(temperature);
        }
        let mut written = Vec::with_capacity(prompts.len());
        for some in prompts.chunks(BATCH) {
            self.cancel.check("generating")?;
            let mut requests = Vec::new();
            for prompt in some {
                let encoded = self.prompt(prompt, room)?;
                written.push(Written { text: String::new(), cut: encoded.cut });
                let seed = self.seed ^ u64::from(crc32fast::hash(prompt.as_bytes())) << 32;
                let config = config.clone().seed(seed);
                let stop = StopInText { tokenizer: tokenizer.clone(), until: how.until.clone() };
                let request =
                    Request::new(encoded.ids).config(config).stop_when(stop).cache_dtype(self.cache);
                requests.push(request.cancel(self.cancel.clone()));
            }
            let first = written.len() - some.len();
            let made = self.opt.generate_batch(requests)?;
            for (slot, made) in written.iter_mut().skip(first).zip(made) {
                let Some(sequence) = made.sequences.first() else { continue };
                let text = tokenizer.decode(&sequence.ids, true)?;
                // The first of each in turn, as the harness cuts.
                let cut = how.until.iter().filter(|stop| !stop.is_empty());
                slot.text =
                    cut.fold(text, |text, stop| text.split(&stop[..]).next().unwrap_or_default().to_owned());
            }
            if progress(Progress::new("texts", written.len() as u64, prompts.len() as u64)).is_break() {
                return Err(Error::new(ErrorKind::Cancelled, "generating was cancelled"));
            }
        }
        Ok(written)
    }

    fn prompt(&self, prompt: &str, room: usize) -> Result<Encoded> {
        let mut ids = self.tokens(self.opt.require_tokenizer()?, prompt)?;
        let cut = ids.len().saturating_sub(room);
        ids.drain(..cut);
        if ids.is_empty() {
            return Err(Error::new(ErrorKind::Prompt, "expected a prompt of at least one token, found none"));
        }
        Ok(Encoded { from: ids.len(), ids, cut })
    }
}
