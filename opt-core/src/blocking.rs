//! The forms that wait: each blocks its thread until its awaitable twin is done.
//!
//! Not on wasm32, whose only thread must return to the browser before anything can arrive from a device.

use crate::{
    CancelToken, Error, ErrorKind, Generated, Opt, Progress, ProgressFn, Prompt, Request, Result, ScoreInput,
    Scored, Session, StreamToken, TokenStream, generation::GenerationConfig,
};
use ndarray::{Array2, Array3};
use opt_backend::block_on;
use std::{io::Write, ops::ControlFlow, path::Path};

impl Opt {
    /// Continues a prompt.
    ///
    /// # Errors
    /// [`ErrorKind::Prompt`] and [`ErrorKind::Option`] for what cannot be run, [`ErrorKind::Backend`].
    pub fn generate(&self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Generated> {
        block_on(self.generate_async(prompt, config))
    }

    /// Continues several prompts as one batch, each with its own settings. The results are those of running each
    /// alone.
    ///
    /// # Errors
    /// As [`Opt::generate`], naming the request.
    pub fn generate_batch(
        &self,
        requests: impl IntoIterator<Item = impl Into<Request>>,
    ) -> Result<Vec<Generated>> {
        block_on(self.generate_batch_async(requests))
    }

    /// Continues several prompts and hands each token to `see`, which can end it all; so can `progress`, which is
    /// told how far the prompts have been run.
    ///
    /// # Errors
    /// As [`Opt::generate_batch`]; [`ErrorKind::Cancelled`] if `progress` ended it. Ending it from `see` is no error:
    /// the sequences so far are the result.
    pub fn generate_with(
        &self,
        requests: impl IntoIterator<Item = impl Into<Request>>,
        see: impl FnMut(&StreamToken) -> ControlFlow<()>,
        progress: impl FnMut(Progress<'_>) -> ControlFlow<()> + Send,
    ) -> Result<Vec<Generated>> {
        block_on(self.generate_with_async(requests, see, progress))
    }

    /// Logits `[tokens, vocab_size]` of every position of `ids`.
    ///
    /// # Errors
    /// [`ErrorKind::Prompt`] for ids that cannot be run, [`ErrorKind::Backend`].
    pub fn logits(&self, ids: &[u32]) -> Result<Array2<f32>> {
        block_on(self.logits_async(ids))
    }

    /// Hidden states of every position of `ids`, as transformers gives them: the embeddings, the output of each layer
    /// but the last, and the last one after the final LayerNorm and `project_out`; each `[tokens, width]`.
    ///
    /// # Errors
    /// As [`Opt::logits`].
    pub fn hidden_states(&self, ids: &[u32]) -> Result<Vec<Array2<f32>>> {
        block_on(self.hidden_states_async(ids))
    }

    /// Attention weights of each layer, `[heads, tokens, tokens]`. Slow: for looking.
    ///
    /// # Errors
    /// As [`Opt::logits`].
    pub fn attentions(&self, ids: &[u32]) -> Result<Vec<Array3<f32>>> {
        block_on(self.attentions_async(ids))
    }

    /// Log-probabilities of given tokens. Inputs are run as ragged batches; the order of results is theirs.
    ///
    /// ```
    /// use opt_core::{Opt, ScoreInput, tokenizer::Bos};
    ///
    /// let opt = Opt::open("../models/opt-novels")?;
    /// let likely = ScoreInput::pair(&opt, "He opened the", " door", Bos::Model)?;
    /// let unlikely = ScoreInput::pair(&opt, "He opened the", " of", Bos::Model)?;
    /// let scores = opt.score(&[likely, unlikely])?;
    /// assert!(scores[0].log_prob > scores[1].log_prob);
    /// # Ok::<(), opt_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Prompt`] for an input that is empty, longer than the context or outside the vocabulary, naming
    /// it; [`ErrorKind::Backend`].
    pub fn score(&self, inputs: &[ScoreInput]) -> Result<Vec<Scored>> {
        block_on(self.score_async(inputs))
    }

    /// [`Opt::score`], which `cancel` and `progress` can end.
    ///
    /// # Errors
    /// Those of [`Opt::score`], and [`ErrorKind::Cancelled`].
    pub fn score_with(
        &self,
        inputs: &[ScoreInput],
        cancel: &CancelToken,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Vec<Scored>> {
        block_on(self.score_with_async(inputs, cancel, progress))
    }
}

impl TokenStream {
    /// Like the iterator's `next`, and tells `watch` how far the prompts have been run; it can cancel there.
    pub fn next_watched(&mut self, watch: &mut ProgressFn<'_>) -> Option<Result<StreamToken>> {
        block_on(self.next_token_watched(watch))
    }

    /// Runs to the end (what the iterator has given out included) and collects everything.
    ///
    /// # Errors
    /// What a step failed with.
    pub fn collect_all(self) -> Result<Vec<Generated>> {
        block_on(self.finish())
    }
}

impl Iterator for TokenStream {
    type Item = Result<StreamToken>;

    fn next(&mut self) -> Option<Self::Item> {
        block_on(self.next_token())
    }
}

impl Session {
    /// Adds to the conversation without generating, and runs it.
    ///
    /// # Errors
    /// As [`Opt::generate`]; the session is then as before.
    pub fn append(&mut self, prompt: impl Into<Prompt>) -> Result<()> {
        block_on(self.append_async(prompt))
    }

    /// Adds a prompt (which may be empty) and continues it; prompt and continuation become part of the conversation.
    ///
    /// # Errors
    /// As [`Opt::generate`]; the session is then as before.
    pub fn generate(&mut self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Generated> {
        block_on(self.generate_async(prompt, config))
    }

    /// [`Session::generate`] with all that a request can say.
    ///
    /// # Errors
    /// As [`Opt::generate`]; the session is then as before.
    pub fn run(&mut self, request: Request) -> Result<Generated> {
        block_on(self.run_async(request))
    }

    /// Runs a turn that [`Session::start`] began to its end and keeps it.
    ///
    /// # Errors
    /// As [`Opt::generate`], and [`ErrorKind::Option`] for a stream that does not continue this conversation as it
    /// stands; the session is then as before.
    pub fn absorb(&mut self, stream: TokenStream) -> Result<Generated> {
        block_on(self.absorb_async(stream))
    }

    /// Writes tokens, keys and values to a safetensors file; an existing file is replaced once the new one is whole.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if it cannot be written, [`ErrorKind::Backend`] if the device fails.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bytes = block_on(self.to_bytes_async()).map_err(|e| e.at(path.display()))?;
        let write = || -> std::io::Result<()> {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let mut file = tempfile::NamedTempFile::new_in(dir)?;
            file.write_all(&bytes)?;
            file.as_file().sync_all()?;
            file.persist(path)?;
            Ok(())
        };
        write().map_err(|e| {
            Error::because(ErrorKind::Io, format_args!("{}: cannot write the session", path.display()), e)
        })
    }

    /// Reads a session back that was saved with the same model.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::Io`] if the file cannot be read, [`ErrorKind::Checkpoint`] if it is
    /// damaged or of another model.
    pub fn restore(opt: &Opt, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|e| {
            let kind = match e.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Io,
            };
            Error::because(kind, format_args!("{}: cannot read the session", path.display()), e)
        })?;
        block_on(Self::from_bytes_async(opt, &bytes)).map_err(|e| e.at(path.display()))
    }
}
