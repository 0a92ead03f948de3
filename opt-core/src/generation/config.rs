use super::field::Field;
use crate::{Error, ErrorKind, Result, config::OptConfig};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, fs, io::Write, path::Path};

/// `early_stopping` of beam search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum EarlyStopping {
    /// `true`: stop as soon as there are enough finished hypotheses.
    Yes,
    /// `false`: stop when the best running beam, scored at its current length, cannot beat the worst finished one.
    No,
    /// `"never"`: like `No`, with the length that is best for the running beam.
    Never,
}

/// One token id or several.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum TokenIds {
    /// One id.
    One(u32),
    /// Several ids.
    Many(Vec<u32>),
}

impl TokenIds {
    /// The ids as a list.
    pub fn to_vec(&self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![*id],
            Self::Many(ids) => ids.clone(),
        }
    }
}

/// What transformers understands and this crate does not, with the number at which it does nothing; null and false
/// never do anything.
const IGNORED: [(&str, f64); 8] = [
    ("constraints", 0.0),
    ("force_words_ids", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("watermarking_config", 0.0),
    ("dola_layers", 0.0),
    ("token_healing", 0.0),
    ("assistant_early_exit", 0.0),
];

macro_rules! setter {
    ($(#[$doc:meta])* $name:ident, $type:ty) => {
        setter!($(#[$doc])* $name, $type, $type, value, value);
    };
    ($(#[$doc:meta])* $name:ident, $type:ty, $argument:ty, $value:ident, $convert:expr) => {
        $(#[$doc])*
        #[must_use]
        pub fn $name(mut self, $value: $argument) -> Self {
            self.$name = Some($convert);
            self
        }
    };
}

/// One list of all options makes the fields, the setters, reading, writing and layering.
macro_rules! options {
    ($($(#[$doc:meta])* $name:ident: $type:ty $([$argument:ty => $value:ident, $convert:expr])?,)*) => {
        /// What transformers calls `GenerationConfig`: the same names, and `None` where nothing was said.
        ///
        /// Three of them are laid over each other: the model's generation_config.json, a file of the user's, the
        /// call's own settings; a field that is `None` leaves the one below standing ([`GenerationConfig::over`]).
        ///
        /// ```
        /// use opt_core::generation::GenerationConfig;
        ///
        /// let model = GenerationConfig::from_json(r#"{"eos_token_id": 2, "do_sample": true, "top_k": 50}"#)?;
        /// let call = GenerationConfig::default().top_p(0.9).top_k(0).seed(7);
        /// let both = call.over(&model);
        /// assert_eq!((both.do_sample, both.top_k, both.top_p), (Some(true), Some(0), Some(0.9)));
        /// # Ok::<(), opt_core::Error>(())
        /// ```
        #[derive(Debug, Clone, Default, PartialEq)]
        #[non_exhaustive]
        pub struct GenerationConfig {
            $($(#[$doc])* pub $name: Option<$type>,)*
            /// Names of options in the file that would change the text and are not supported.
            pub(super) ignored: Vec<String>,
        }

        impl GenerationConfig {
            /// The names of all options.
            pub const NAMES: &[&str] = &[$(stringify!($name)),*];

            $(setter!($(#[$doc])* $name, $type $(, $argument, $value, $convert)?);)*

            /// These options where they are set, and those of `base` where they are not.
            #[must_use]
            pub fn over(self, base: &GenerationConfig) -> GenerationConfig {
                let mut ignored = base.ignored.clone();
                ignored.extend(self.ignored.into_iter().filter(|name| !base.ignored.contains(name)));
                GenerationConfig { $($name: self.$name.or_else(|| base.$name.clone()),)* ignored }
            }

            fn read(map: &Map<String, Value>) -> Result<Self> {
                let mut config = Self { $($name: option(map, stringify!($name))?,)* ignored: ignored(map) };
                // The one option whose null is not its default: transformers takes it for no limit.
                if map.get("top_k") == Some(&Value::Null) {
                    config.top_k = Some(0);
                }
                Ok(config)
            }

            fn write(&self) -> Map<String, Value> {
                // By name, also where another crate lets serde_json's maps keep the order of insertion.
                let mut map = BTreeMap::new();
                $(if let Some(value) = &self.$name {
                    map.insert(stringify!($name).to_owned(), value.write());
                })*
                map.into_iter().collect()
            }
        }
    };
}

options! {
        /// Longest sequence, prompt included.
        max_length: usize,
        /// Most new tokens; wins over `max_length`. With neither, 20.
        max_new_tokens: usize,
        /// Shortest sequence, prompt included: eos is impossible before.
        min_length: usize,
        /// Fewest new tokens.
        min_new_tokens: usize,
        /// When beam search stops (`No`).
        early_stopping: EarlyStopping,
        /// Seconds after which to stop.
        max_time: f64,
        /// Texts that end a sequence; they stay in the output.
        stop_strings: Vec<String> [impl IntoIterator<Item = impl Into<String>> => texts, texts.into_iter().map(Into::into).collect()],
        /// Draw instead of taking the most probable.
        do_sample: bool,
        /// Beams of beam search; 1 is none.
        num_beams: usize,
        /// Groups of diverse beam search.
        num_beam_groups: usize,
        /// What a group's beam loses for each token an earlier group picked in the same step.
        diversity_penalty: f32,
        /// Exponent of the length that beam scores are divided by (1).
        length_penalty: f32,
        /// Sequences handed out for each prompt.
        num_return_sequences: usize,
        /// Contrastive search: weight of the degeneration penalty.
        penalty_alpha: f32,
        /// Divides the logits; above 0. With 0 there is nothing to draw, and the most probable token is taken.
        temperature: f32,
        /// Keep the k most probable tokens and those equal to the last of them (50 unless said otherwise; 0 is off).
        top_k: usize,
        /// Keep the most probable tokens that together reach this mass; over 0, up to 1 (off).
        top_p: f32,
        /// Keep tokens with at least this share of the largest probability; 0 to 1.
        min_p: f32,
        /// Locally typical sampling (Meister et al. 2022): the mass to keep; over 0, up to 1 (off).
        typical_p: f32,
        /// Drop tokens less probable than this; 0 (off) to below 1.
        epsilon_cutoff: f32,
        /// Drop tokens less probable than min(ε, √ε e^-entropy) (Hewitt et al. 2022); 0 (off) to below 1.
        eta_cutoff: f32,
        /// Divides the positive and multiplies the negative logits of tokens seen before, prompt included; above 0.
        repetition_penalty: f32,
        /// No n-gram of this size occurs twice; 0 is off.
        no_repeat_ngram_size: usize,
        /// Token sequences that must not appear.
        bad_words_ids: Vec<Vec<u32>>,
        /// Added to the logit that would complete a token sequence.
        sequence_bias: BTreeMap<Vec<u32>, f32>,
        /// Tokens that must not appear.
        suppress_tokens: Vec<u32> [impl IntoIterator<Item = u32> => ids, ids.into_iter().collect()],
        /// Tokens that must not come first.
        begin_suppress_tokens: Vec<u32> [impl IntoIterator<Item = u32> => ids, ids.into_iter().collect()],
        /// The first token after a prompt of one.
        forced_bos_token_id: u32,
        /// The last token when `max_length` is reached.
        forced_eos_token_id: TokenIds [impl IntoIterator<Item = u32> => ids, TokenIds::Many(ids.into_iter().collect())],
        /// Replace NaN and infinite logits.
        remove_invalid_values: bool,
        /// (start, factor): raises eos exponentially from `start` new tokens on.
        exponential_decay_length_penalty: (usize, f32),
        /// Log-softmax after all processors.
        renormalize_logits: bool,
        /// Classifier-free guidance; only 1 is possible.
        guidance_scale: f32,
        /// Prompt lookup: tokens to propose from the prompt at each step.
        prompt_lookup_num_tokens: usize,
        /// Prompt lookup: longest n-gram to look for (2).
        max_matching_ngram_size: usize,
        /// Assisted decoding: tokens the draft model proposes (20).
        num_assistant_tokens: usize,
        /// Assisted decoding: `constant` (default), `heuristic` or `heuristic_transient`.
        num_assistant_tokens_schedule: String [impl Into<String> => text, text.into()],
        /// Assisted decoding: the draft stops behind a token less probable than this (0.4; 0 is never).
        assistant_confidence_threshold: f32,
        /// Padding token.
        pad_token_id: u32,
        /// Token put before a text.
        bos_token_id: u32,
        /// Tokens that end a sequence; with none named the model's own, with an empty list none.
        eos_token_id: TokenIds [impl IntoIterator<Item = u32> => ids, TokenIds::Many(ids.into_iter().collect())],
        /// Keep keys and values between steps.
        use_cache: bool,
        /// Seed of the draws; without one each request gets its own. Not known to transformers, which passes over it.
        seed: u64,
}

fn option<T: Field>(map: &Map<String, Value>, name: &str) -> Result<Option<T>> {
    match map.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => T::read(value).map(Some).ok_or_else(|| {
            let mut found: String = value.to_string().chars().take(60).collect();
            if found.len() < value.to_string().len() {
                found.push_str("...");
            }
            Error::new(ErrorKind::Config, format!("{name}: expected {}, found {found}", T::EXPECTED))
        }),
    }
}

fn ignored(map: &Map<String, Value>) -> Vec<String> {
    let acts = |name: &str, neutral: f64| match map.get(name) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Number(n)) => n.as_f64() != Some(neutral),
        Some(_) => true,
    };
    IGNORED
        .iter()
        .filter(|(name, neutral)| acts(name, *neutral))
        .map(|(name, _)| (*name).to_owned())
        .collect()
}

impl GenerationConfig {
    /// The name of the file beside a model.
    pub const FILE_NAME: &str = "generation_config.json";

    /// What a model's config.json says where there is no generation_config.json: its special tokens.
    pub fn from_model(model: &OptConfig) -> Self {
        Self {
            pad_token_id: model.pad_token_id,
            bos_token_id: model.bos_token_id,
            eos_token_id: model.eos_token_id.clone(),
            ..Self::default()
        }
    }

    /// Reads the text of a generation_config.json. Unknown keys are ignored; null is as if the key were
    /// not there, but for `top_k`, where it is 0.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for what is not a JSON object, and for a value of the wrong type, with its key.
    pub fn from_json(text: &str) -> Result<Self> {
        let fail = |e| Error::because(ErrorKind::Config, "not usable JSON", e).at(Self::FILE_NAME);
        let value: Value = serde_json::from_str(text).map_err(fail)?;
        let Value::Object(map) = value else {
            return Err(Error::new(ErrorKind::Config, "expected a JSON object").at(Self::FILE_NAME));
        };
        Self::read(&map).map_err(|e| e.at(Self::FILE_NAME))
    }

    /// [`GenerationConfig::from_json`] of bytes that may be anything.
    ///
    /// # Errors
    /// As there, and for bytes that are not UTF-8.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(bytes)
            .map_err(|e| Error::because(ErrorKind::Config, "not UTF-8", e).at(Self::FILE_NAME))?;
        Self::from_json(text)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::Io`] if it cannot be read, else as [`GenerationConfig::from_json`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(|e| {
            let kind = match e.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Io,
            };
            Error::because(kind, format!("{}: cannot be read", path.display()), e)
        })?;
        Self::from_bytes(&bytes).map_err(|e| match path.parent() {
            Some(folder) if path.ends_with(Self::FILE_NAME) => e.at(folder.display()),
            _ => e.at(path.display()),
        })
    }

    /// The text of a generation_config.json, with the options that are set, in the format of transformers.
    pub fn to_json(&self) -> String {
        format!("{:#}\n", Value::Object(self.write()))
    }

    /// Writes a file; what was there stands until the new one is complete.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let fail = |e| Error::because(ErrorKind::Io, format!("{}: cannot be written", path.display()), e);
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file =
            tempfile::Builder::new().prefix(".generation_config").tempfile_in(folder).map_err(fail)?;
        file.write_all(self.to_json().as_bytes()).map_err(fail)?;
        file.persist(path).map_err(|e| fail(e.error))?;
        Ok(())
    }
}

impl Serialize for GenerationConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.write().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for GenerationConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        Self::read(&Map::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}
