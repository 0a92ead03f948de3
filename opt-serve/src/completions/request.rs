//! What a request to `/v1/completions` may say.

use crate::{
    error::ApiError,
    fields::{Fields, short, wrong},
    options::ServeOptions,
};
use opt_core::generation::GenerationConfig;
use serde_json::{Map, Value};
use std::{collections::BTreeMap, sync::Arc};

/// Fields of OpenAI's API, and those that this one adds.
pub(crate) const FIELDS: &[&str] = &[
    "model",
    "prompt",
    "suffix",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stream",
    "stream_options",
    "logprobs",
    "echo",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "best_of",
    "logit_bias",
    "user",
    "seed",
    "response_format",
    "regex",
    "adapter",
    "add_special_tokens",
    "return_token_ids",
];
/// Those that mean nothing here and do no harm.
pub(crate) const IGNORED: &[&str] =
    &["user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"];
/// Most entries of a list of tokens or strings, each of which costs something in every step.
const LONGEST_LIST: usize = 1024;
/// Longest stop string, in bytes.
const LONGEST_STOP: usize = 4096;

/// A prompt as it was sent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Input {
    Text(String),
    Ids(Vec<u32>),
}

/// What the answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Format {
    /// A JSON object of any kind.
    Json,
    /// JSON that a schema allows.
    Schema(Value),
    /// What a regular expression matches.
    Regex(String),
}

/// A request, each field by itself checked.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) model: Option<String>,
    pub(crate) adapter: Option<String>,
    pub(crate) inputs: Vec<Input>,
    pub(crate) add_special_tokens: bool,
    /// All of [`GenerationConfig`] that was said, in OpenAI's words or in transformers'.
    pub(crate) config: GenerationConfig,
    /// The tokens that `logit_bias` named.
    pub(crate) biased: Vec<u32>,
    /// `None` if it was not said.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) n: usize,
    pub(crate) best_of: usize,
    pub(crate) stop: Arc<[String]>,
    pub(crate) presence: f32,
    pub(crate) frequency: f32,
    pub(crate) echo: bool,
    pub(crate) logprobs: Option<usize>,
    pub(crate) format: Option<Format>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) return_token_ids: bool,
}

/// Tokens where nothing is said, as OpenAI has it.
const DEFAULT_MAX_TOKENS: usize = 16;

impl Wanted {
    pub(crate) fn read(body: Value, options: &ServeOptions) -> Result<Self, ApiError> {
        let mut fields = Fields::new(body)?;
        refuse(&mut fields)?;
        let model = fields.text("model")?;
        let adapter = fields.text("adapter")?;
        let prompt = fields.take("prompt");
        let prompt = prompt.ok_or_else(|| {
            ApiError::invalid(
                "prompt",
                "prompt: expected a string, token ids, or a list of either, found nothing",
            )
        })?;
        let inputs = inputs("prompt", prompt, options.prompts)?;
        let n = fields.whole("n", 1..=options.choices)?;
        let best_of = fields.whole("best_of", 1..=options.choices)?;
        let n = n.unwrap_or(1);
        let best_of = best_of.unwrap_or(n);
        if best_of < n {
            let message = format!("best_of: expected at least n = {n}, found {best_of}");
            return Err(ApiError::invalid("best_of", message));
        }
        let stream = fields.flag("stream")?.unwrap_or(false);
        if stream && best_of != n {
            let message = format!("best_of: a stream cannot choose: expected n = {n}, found {best_of}");
            return Err(ApiError::invalid("best_of", message));
        }
        let include_usage = stream_options(&mut fields)?;
        let wanted = Self {
            model,
            adapter,
            inputs,
            add_special_tokens: fields.flag("add_special_tokens")?.unwrap_or(true),
            n,
            best_of,
            stop: fields.texts("stop", options.stops, LONGEST_STOP)?.into(),
            presence: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            echo: fields.flag("echo")?.unwrap_or(false),
            logprobs: fields.whole("logprobs", 0..=options.logprobs)?,
            format: format(&mut fields)?,
            return_token_ids: fields.flag("return_token_ids")?.unwrap_or(false),
            stream,
            include_usage,
            biased: Vec::new(),
            max_tokens: None,
            config: GenerationConfig::default(),
        };
        let bias = logit_bias(&mut fields)?;
        let biased = bias.keys().flatten().copied().collect();
        let (config, max_tokens) = config(&mut fields, bias, wanted.n, wanted.best_of, options)?;
        if let Some((most, found)) = options.max_tokens.zip(max_tokens).filter(|(most, found)| found > most) {
            let message = format!("max_tokens: expected at most {most}, found {found}");
            return Err(ApiError::invalid("max_tokens", message));
        }
        fields.finish(IGNORED, &[FIELDS, GenerationConfig::NAMES])?;
        Ok(Self { config, biased, max_tokens, ..wanted })
    }

    /// Most new tokens of a sequence.
    pub(crate) fn new_tokens(&self) -> usize {
        self.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS)
    }

    /// Whether each run of a prompt would give the same.
    pub(crate) fn is_certain(&self) -> bool {
        self.config.do_sample != Some(true)
    }
}

/// What OpenAI's API has, and a model of this kind cannot do.
fn refuse(fields: &mut Fields) -> Result<(), ApiError> {
    if fields.take("suffix").is_some_and(|suffix| suffix != "") {
        let message = "suffix: OPT continues texts, it cannot fill a gap: expected none";
        return Err(ApiError::unsupported("suffix", message));
    }
    for (name, instead) in [("messages", "prompt"), ("max_completion_tokens", "max_tokens")] {
        if fields.take(name).is_some() {
            let message = format!("{name}: this is no chat: expected {instead}");
            return Err(ApiError::unsupported(name, message));
        }
    }
    Ok(())
}

/// The prompts, or texts to embed, of a field.
pub(crate) fn inputs(name: &str, value: Value, most: usize) -> Result<Vec<Input>, ApiError> {
    let expected = "a string, a list of strings, a list of token ids or a list of those";
    let list = match value {
        Value::String(text) => return Ok(vec![Input::Text(text)]),
        Value::Array(list) if !list.is_empty() => list,
        other => return Err(wrong(name, expected, &other)),
    };
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = |value: &Value| value.as_array()?.iter().map(id).collect::<Option<Vec<u32>>>();
    if list.iter().all(Value::is_number) {
        let ids: Option<Vec<u32>> = list.iter().map(id).collect();
        return ids.map(|ids| vec![Input::Ids(ids)]).ok_or_else(|| {
            let bad = list.iter().find(|value| id(value).is_none()).map(short).unwrap_or_default();
            ApiError::invalid(name, format!("{name}: expected token ids, found {bad}"))
        });
    }
    if list.len() > most {
        let message = format!("{name}: expected at most {most} of them, found {}", list.len());
        return Err(ApiError::invalid(name, message));
    }
    let each = list.iter().enumerate().map(|(place, value)| match value {
        Value::String(text) => Ok(Input::Text(text.clone())),
        other => ids(other)
            .filter(|ids| !ids.is_empty())
            .map(Input::Ids)
            .ok_or_else(|| wrong(name, &format!("{expected}; at {place}"), other)),
    });
    each.collect()
}

fn stream_options(fields: &mut Fields) -> Result<bool, ApiError> {
    let Some(value) = fields.take("stream_options") else { return Ok(false) };
    let Value::Object(map) = value else { return Err(wrong("stream_options", "an object", &value)) };
    let mut options = Fields::new(Value::Object(map))?;
    let place = |error: ApiError| error.param("stream_options");
    let include = options.flag("include_usage").map_err(place)?.unwrap_or(false);
    // Padding against onlookers: there is none here.
    options.flag("include_obfuscation").map_err(place)?;
    options.finish(&[], &[&["include_usage"]]).map_err(place)?;
    Ok(include)
}

/// What the answer must look like, if anything.
fn format(fields: &mut Fields) -> Result<Option<Format>, ApiError> {
    let regex = fields.text("regex")?.map(Format::Regex);
    let format = match fields.take("response_format") {
        None => None,
        Some(value) => match value.get("type").and_then(Value::as_str) {
            Some("text") => None,
            Some("json_object") => Some(Format::Json),
            Some("json_schema") => {
                let schema = value.pointer("/json_schema/schema").or_else(|| value.get("schema"));
                let schema =
                    schema.filter(|schema| schema.is_object() || schema.is_boolean()).ok_or_else(|| {
                        let message = "response_format: expected json_schema.schema, an object";
                        ApiError::invalid("response_format", message)
                    })?;
                Some(Format::Schema(schema.clone()))
            }
            Some("regex") => match value.get("pattern").and_then(Value::as_str) {
                Some(pattern) => Some(Format::Regex(pattern.to_owned())),
                None => {
                    let message = "response_format: expected pattern, a string";
                    return Err(ApiError::invalid("response_format", message));
                }
            },
            _ => {
                let expected = "an object with type text, json_object, json_schema or regex";
                return Err(wrong("response_format", expected, &value));
            }
        },
    };
    match (regex, format) {
        (Some(_), Some(_)) => {
            let message = "regex and response_format contradict each other: expected one of them";
            Err(ApiError::invalid("regex", message))
        }
        (one, other) => Ok(one.or(other)),
    }
}

/// The settings, OpenAI's defaults under what was said: sampling at temperature 1 from all tokens.
fn config(
    fields: &mut Fields,
    bias: BTreeMap<Vec<u32>, f32>,
    n: usize,
    best_of: usize,
    options: &ServeOptions,
) -> Result<(GenerationConfig, Option<usize>), ApiError> {
    let max_tokens = fields.whole("max_tokens", 0..=usize::MAX)?;
    let temperature = fields.number("temperature", 0.0..=f64::INFINITY)?;
    let top_p = fields.number("top_p", 0.0..=1.0)?;
    let seed = match fields.take("seed") {
        None => None,
        // OpenAI's seeds may be negative.
        Some(value) => match value.as_u64().or_else(|| value.as_i64().map(|seed| seed as u64)) {
            Some(seed) => Some(seed),
            None => return Err(wrong("seed", "a whole number", &value)),
        },
    };
    let said: Map<String, Value> = fields.take_all(GenerationConfig::NAMES);
    let lists = said.iter().filter_map(|(name, value)| Some((name, value.as_array()?.len())));
    if let Some((name, found)) = lists.max_by_key(|(_, len)| *len).filter(|(_, len)| *len > LONGEST_LIST) {
        let message = format!("{name}: expected at most {LONGEST_LIST} entries, found {found}");
        return Err(ApiError::invalid(name, message));
    }
    let mut config: GenerationConfig =
        serde_json::from_value(Value::Object(said)).map_err(|error| named(&error.to_string()))?;
    if let Some(strings) = config.stop_strings.as_ref().filter(|strings| strings.len() > options.stops) {
        let (most, found) = (options.stops, strings.len());
        let message = format!("stop_strings: expected at most {most} of them, found {found}");
        return Err(ApiError::invalid("stop_strings", message));
    }
    if config.num_return_sequences.is_some() {
        return Err(ApiError::unsupported(
            "num_return_sequences",
            "num_return_sequences: expected n in its place",
        ));
    }
    let max_tokens = match (max_tokens, config.max_new_tokens.take()) {
        (Some(one), Some(other)) if one != other => {
            let message = format!("max_tokens {one} and max_new_tokens {other} contradict each other");
            return Err(ApiError::invalid("max_new_tokens", message));
        }
        (one, other) => one.or(other),
    };
    if !bias.is_empty() {
        let mut all = config.sequence_bias.take().unwrap_or_default();
        all.extend(bias);
        config.sequence_bias = Some(all);
    }
    // Ways of generating that choose rather than draw.
    let chooses = config.num_beams.is_some_and(|beams| beams > 1)
        || config.num_beam_groups.is_some_and(|groups| groups > 1)
        || config.penalty_alpha.is_some_and(|alpha| alpha > 0.0);
    // Divided by less than this, logits are no numbers any more.
    let cold = temperature.is_some_and(|temperature| temperature < 1e-6);
    let sample = config.do_sample.unwrap_or(!chooses) && !cold;
    config.do_sample = Some(sample);
    // What is left open would be taken from the model's generation_config.json, which knows nothing of this API.
    if sample {
        config.temperature = Some(temperature.unwrap_or(1.0));
        // OpenAI's clients say 0 for the most probable token.
        config.top_p = Some(top_p.unwrap_or(1.0).max(f32::MIN_POSITIVE));
        config.top_k = config.top_k.or(Some(0));
    } else {
        (config.temperature, config.top_p) = (Some(1.0), Some(1.0));
        if config.penalty_alpha.is_none() {
            config.top_k = Some(GenerationConfig::DEFAULT_TOP_K);
        }
    }
    config.seed = seed.or(config.seed);
    let runs = if sample {
        best_of
    } else if config.num_beams.is_some_and(|beams| beams > 1) {
        n
    } else {
        1
    };
    config.num_return_sequences = Some(runs);
    Ok((config, max_tokens))
}

fn logit_bias(fields: &mut Fields) -> Result<BTreeMap<Vec<u32>, f32>, ApiError> {
    let expected = "an object of token ids and numbers from -100 to 100";
    let map = match fields.take("logit_bias") {
        None => return Ok(BTreeMap::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong("logit_bias", expected, &other)),
    };
    let each = map.into_iter().map(|(name, bias)| {
        let bias_of = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        // One way to write an id, so that two spellings do not name one.
        let id = name.parse().ok().filter(|id: &u32| id.to_string() == name);
        match (id, bias_of) {
            (Some(id), Some(bias)) => Ok((vec![id], bias as f32)),
            (None, _) => Err(wrong("logit_bias", expected, &Value::String(name))),
            _ => Err(wrong("logit_bias", expected, &bias)),
        }
    });
    each.collect()
}

/// 400 for `name: what is wrong`.
fn named(message: &str) -> ApiError {
    match message.split_once(':') {
        Some((name, _)) if GenerationConfig::NAMES.contains(&name) => ApiError::invalid(name, message),
        _ => ApiError::invalid("body", message),
    }
}
