//! Which modules of a model an adapter belongs to, by PEFT's rules, and what its file must hold for them.

use super::config::{AdapterConfig, AdapterMethod, Bias, LoraConfig, Names};
use crate::{Error, ErrorKind, Result, config::OptConfig};
use fancy_regex::Regex;
use std::collections::BTreeSet;

/// What every key of an adapter's file begins with, but for prefixes and prompts.
pub(crate) const PREFIX: &str = "base_model.model.";

/// The one key of a prefix or a prompt.
pub(crate) const PROMPT_EMBEDDINGS: &str = "prompt_embeddings";

/// Heads of other tasks than language modelling ([`crate::heads`]): PEFT adds these names to `modules_to_save` by itself.
pub(crate) const HEADS: [&str; 3] = ["classifier", "score", "qa_outputs"];

/// The linears an OPT model may have beside its head.
const LINEARS: [&str; 8] =
    ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"];

/// A module with a low-rank term.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Target {
    /// Its canonical name: `layers.0.self_attn.q_proj`, `embed_tokens`, `lm_head`.
    pub module: String,
    /// What it is.
    pub kind: TargetKind,
    /// The rank.
    pub rank: usize,
    /// What the term is multiplied by.
    pub scale: f64,
    /// `[out, in]` of a linear and the LM head; of a table `[width, entries]`.
    pub shape: [usize; 2],
    /// Whether it has a bias.
    pub has_bias: bool,
}

/// What a low-rank term stands beside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TargetKind {
    /// A linear.
    Linear,
    /// The token table as embedding.
    Embedding,
    /// The LM head.
    Head,
}

/// A tensor of an adapter's file.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Slot {
    /// Its key in the file.
    pub key: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What it is.
    pub part: Part,
}

/// What a tensor of an adapter is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Part {
    /// `[rank, in]` of this module's low-rank term.
    A(String),
    /// `[out, rank]`.
    B(String),
    /// `[out]`: the low-rank term's own bias.
    OwnBias(String),
    /// `[out]`: DoRA's magnitudes.
    Magnitude(String),
    /// A tensor in the place of the model's of this canonical name.
    Instead(String),
    /// A copy of a table of the model's, which PEFT saves beside a term for it. Reading does without it.
    Copy(String),
    /// `[virtual tokens, 2 · layers · hidden]` for a prefix, `[virtual tokens, embedding width]` for a prompt.
    Virtual,
}

/// The canonical name as transformers' module has it.
fn full(module: &str) -> String {
    if module == "lm_head" { module.to_owned() } else { format!("model.decoder.{module}") }
}

/// The names that PEFT may meet on its walk over a model: those with tensors and those around them.
fn modules(model: &OptConfig) -> Vec<String> {
    let mut found = BTreeSet::new();
    for (name, _) in model.tensor_shapes() {
        let module = name.rsplit_once('.').map_or(&name[..], |(module, _)| module);
        let name = full(module);
        found.extend(name.match_indices('.').map(|(end, _)| name[..end].to_owned()));
        found.insert(name);
    }
    found.insert("lm_head".to_owned());
    // LayerNorms without weight and bias are modules all the same, and so are activations; neither can be adapted.
    found.into_iter().collect()
}

/// `[out, in]`, kind and whether it has a bias, of a module that can have a low-rank term.
fn adaptable(model: &OptConfig, name: &str) -> Option<(TargetKind, [usize; 2], bool)> {
    let table = [model.vocab_size, model.word_embed_proj_dim];
    if name == "lm_head" {
        return Some((TargetKind::Head, table, false));
    }
    let module = name.strip_prefix("model.decoder.")?;
    if module == "embed_tokens" {
        return Some((TargetKind::Embedding, [table[1], table[0]], false));
    }
    let last = module.rsplit('.').next()?;
    if !LINEARS.contains(&last) {
        return None;
    }
    let shapes = model.tensor_shapes();
    let weight = shapes.iter().find(|(name, _)| name.strip_suffix(".weight") == Some(module))?;
    let &[out, input] = &weight.1[..] else { return None };
    let bias = shapes.iter().any(|(name, _)| name.strip_suffix(".bias") == Some(module));
    Some((TargetKind::Linear, [out, input], bias))
}

/// A regular expression of Python's, for the whole of a name.
struct Pattern(Regex);

impl Pattern {
    fn new(key: &str, text: &str) -> Result<Self> {
        let fail = |e| {
            let message =
                format_args!("adapter_config.json: {key}: {text:?} is not a usable regular expression");
            Error::because(ErrorKind::Config, message, e)
        };
        // Python writes (?P<name>...) and \Z, which this understands too.
        Regex::new(&format!("^(?:{text})$")).map(Self).map_err(|e| fail(Box::new(e)))
    }

    fn matches(&self, name: &str) -> Result<bool> {
        let fail = |e| {
            Error::because(ErrorKind::Config, format_args!("{}: gives up on {name:?}", self.0.as_str()), e)
        };
        self.0.is_match(name).map_err(|e| fail(Box::new(e)))
    }

    fn capture(&self, name: &str) -> Result<Option<usize>> {
        let fail = |e| {
            Error::because(ErrorKind::Config, format_args!("{}: gives up on {name:?}", self.0.as_str()), e)
        };
        let captures = self.0.captures(name).map_err(|e| fail(Box::new(e)))?;
        Ok(captures.and_then(|found| found.name("idx")).and_then(|number| number.as_str().parse().ok()))
    }
}

/// Names by PEFT's rule for targets.
enum Matcher<'a> {
    Pattern(Pattern),
    Ends(&'a [String]),
}

impl<'a> Matcher<'a> {
    fn new(key: &str, names: &'a Names) -> Result<Self> {
        Ok(match names {
            Names::Pattern(pattern) => Matcher::Pattern(Pattern::new(key, pattern)?),
            Names::List(names) => Matcher::Ends(names),
        })
    }

    fn matches(&self, name: &str) -> Result<bool> {
        match self {
            Matcher::Pattern(pattern) => pattern.matches(name),
            Matcher::Ends(ends) => Ok(ends.iter().any(|end| ends_with(name, end))),
        }
    }
}

fn ends_with(name: &str, end: &str) -> bool {
    name == end || name.strip_suffix(end).is_some_and(|before| before.ends_with('.'))
}

impl LoraConfig {
    /// The modules of a model that have a low-rank term, in the order of their names. `saved` are the modules that are
    /// trained whole ([`AdapterConfig::modules_to_save`]), which have none.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] where no module is matched or one that cannot be adapted, or a pattern cannot be used.
    pub fn targets(&self, model: &OptConfig, saved: &[String]) -> Result<Vec<Target>> {
        self.check()?;
        let names = modules(model);
        let all_linear = self.target_modules.is_all_linear();
        let matcher = match all_linear {
            true => Matcher::Ends(&[]),
            false => Matcher::new("target_modules", &self.target_modules)?,
        };
        let excluded = self.exclude_modules.as_ref().map(|names| Matcher::new("exclude_modules", names));
        let excluded = excluded.transpose()?;
        let whole =
            saved.iter().map(|name| Pattern::new("modules_to_save", &format!(r"(.*\.)?{name}(\..*)?")));
        let whole = whole.collect::<Result<Vec<_>>>()?;
        let layers = LayerRule::new(self)?;
        let ranks = patterns("rank_pattern", &self.rank_pattern)?;
        let alphas = patterns("alpha_pattern", &self.alpha_pattern)?;

        if let Matcher::Ends(ends) = &matcher
            && let Some(lost) = ends
                .iter()
                .find(|end| !LINEARS.contains(&&end[..]) && !names.iter().any(|name| ends_with(name, end)))
        {
            return Err(no_such("target_modules", lost, &names));
        }
        let mut targets = Vec::new();
        for name in &names {
            let found = adaptable(model, name);
            let named = match all_linear {
                true => matches!(found, Some((TargetKind::Linear, ..))),
                false => matcher.matches(name)?,
            };
            let excluded = excluded.as_ref().map(|matcher| matcher.matches(name)).transpose()?;
            if !named || excluded == Some(true) || any(&whole, name)? || !layers.allows(name)? {
                continue;
            }
            let Some((kind, shape, has_bias)) = found else {
                let message = format_args!(
                    "target_modules: {name} cannot have a low-rank term; expected one of {}, embed_tokens, lm_head",
                    LINEARS.join(", ")
                );
                return Err(Error::new(ErrorKind::Config, message));
            };
            let rank = first(&ranks, name)?.unwrap_or(self.r);
            let alpha = first(&alphas, name)?.unwrap_or(self.lora_alpha);
            let scale = self.scale(rank, alpha);
            let module = name.strip_prefix("model.decoder.").unwrap_or(name).to_owned();
            targets.push(Target { module, kind, rank, scale, shape, has_bias });
        }
        if targets.is_empty() {
            return Err(match &self.target_modules {
                Names::List(list) if list.is_empty() => {
                    Error::new(ErrorKind::Config, "target_modules: expected at least one module, found none")
                }
                named => no_such("target_modules", &named.entries().join(", "), &names),
            });
        }
        if self.lora_bias && targets.iter().any(|target| target.kind == TargetKind::Embedding) {
            let message = "lora_bias: expected false where embed_tokens is among the targets";
            return Err(Error::new(ErrorKind::Config, message));
        }
        Ok(targets)
    }
}

/// `layers_to_transform` and `layers_pattern`.
struct LayerRule<'a> {
    layers: &'a [usize],
    patterns: Vec<Pattern>,
    /// Names given in full are not asked for their layer.
    exact: &'a [String],
}

impl<'a> LayerRule<'a> {
    fn new(config: &'a LoraConfig) -> Result<Self> {
        let layers = config.layers_to_transform.as_ref().map_or(&[][..], |layers| layers.numbers());
        let named = config.layers_pattern.as_ref().map_or(&[][..], |names| names.entries());
        let pattern = |text: &str| Pattern::new("layers_pattern", text);
        let patterns = if named.iter().all(String::is_empty) {
            vec![pattern(r".*?\.[^.]*\.(?P<idx>\d+)\..*")?]
        } else {
            named
                .iter()
                .map(|name| pattern(&format!(r"(?:.*?\.)?{name}\.(?P<idx>\d+)\..*")))
                .collect::<Result<_>>()?
        };
        Ok(Self { layers, patterns, exact: config.target_modules.entries() })
    }

    fn allows(&self, name: &str) -> Result<bool> {
        if self.layers.is_empty() || self.exact.iter().any(|exact| exact == name) {
            return Ok(true);
        }
        for pattern in &self.patterns {
            if let Some(layer) = pattern.capture(name)? {
                return Ok(self.layers.contains(&layer));
            }
        }
        Ok(false)
    }
}

fn patterns<'a, T: Copy + 'a>(
    key: &str,
    map: impl IntoIterator<Item = (&'a String, &'a T)>,
) -> Result<Vec<(Pattern, T)>> {
    // As `re.match(rf"(.*\.)?({key})$", name)` in PEFT.
    map.into_iter()
        .map(|(text, value)| Ok((Pattern::new(key, &format!(r"(.*\.)?({text})"))?, *value)))
        .collect()
}

fn first<T: Copy>(patterns: &[(Pattern, T)], name: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if pattern.matches(name)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

fn any(patterns: &[Pattern], name: &str) -> Result<bool> {
    for pattern in patterns {
        if pattern.matches(name)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn no_such(key: &str, lost: &str, names: &[String]) -> Error {
    let mut ends: Vec<&str> = names.iter().filter_map(|name| name.rsplit('.').next()).collect();
    ends.retain(|end| end.parse::<usize>().is_err() && !["model", "decoder", "layers"].contains(end));
    ends.sort_unstable();
    ends.dedup();
    let wanted = lost.rsplit('.').next().unwrap_or(lost);
    ends.sort_by_key(|end| distance(wanted, end));
    let near = ends.get(..3).unwrap_or(&ends).join(", ");
    Error::new(
        ErrorKind::Config,
        format_args!("{key}: {lost:?} is no module of this model; near it are {near}"),
    )
}

/// Levenshtein's.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        if let Some(start) = row.first_mut() {
            *start = left;
        }
        for (y, cell) in b.iter().zip(row.iter_mut().skip(1)) {
            let here = (diagonal + usize::from(x != *y)).min(*cell + 1).min(left + 1);
            (diagonal, left) = (*cell, here);
            *cell = here;
        }
    }
    row.last().copied().unwrap_or(0)
}

impl AdapterConfig {
    /// The tensors that an adapter of this configuration has for a model of this shape, in the order of their keys.
    ///
    /// ```
    /// use opt_core::{adapter::{AdapterConfig, AdapterMethod, LoraConfig}, config::OptConfig};
    ///
    /// let config = AdapterConfig::new(AdapterMethod::Lora(LoraConfig::default()));
    /// let slots = config.slots(&OptConfig::default())?;
    /// assert_eq!(slots.len(), 2 * 2 * 12);
    /// assert_eq!(slots[0].key, "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight");
    /// assert_eq!(slots[0].shape, [8, 768]);
    /// # Ok::<(), opt_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Config`] where the configuration does not fit the model.
    pub fn slots(&self, model: &OptConfig) -> Result<Vec<Slot>> {
        let mut slots = match &self.method {
            AdapterMethod::Lora(lora) => self.lora_slots(lora, model)?,
            AdapterMethod::Prefix(prefix) => {
                let width = 2 * model.num_hidden_layers * model.hidden_size;
                vec![virtual_slot(prefix.sizes.num_virtual_tokens, width)]
            }
            AdapterMethod::Prompt(prompt) => {
                vec![virtual_slot(prompt.sizes.num_virtual_tokens, model.word_embed_proj_dim)]
            }
        };
        slots.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(slots)
    }

    fn lora_slots(&self, lora: &LoraConfig, model: &OptConfig) -> Result<Vec<Slot>> {
        let targets = lora.targets(model, &self.modules_to_save)?;
        let mut slots = Vec::new();
        for target in &targets {
            let Target { module, kind, rank, shape: [out, input], .. } = target;
            let mut add = |end: &str, shape: &[usize], part: Part| {
                slots.push(Slot {
                    key: format!("{PREFIX}{}.{end}", full(module)),
                    shape: shape.to_vec(),
                    part,
                });
            };
            let [a, b] = match kind {
                TargetKind::Embedding => ["lora_embedding_A", "lora_embedding_B"],
                _ => ["lora_A.weight", "lora_B.weight"],
            };
            add(a, &[*rank, *input], Part::A(module.clone()));
            add(b, &[*out, *rank], Part::B(module.clone()));
            if lora.use_dora {
                add("lora_magnitude_vector", &[*out], Part::Magnitude(module.clone()));
            }
            if lora.lora_bias {
                add("lora_B.bias", &[*out], Part::OwnBias(module.clone()));
            }
            if *kind != TargetKind::Linear {
                let table = [model.vocab_size, model.word_embed_proj_dim];
                add("base_layer.weight", &table, Part::Copy(module.clone()));
            }
        }
        let saved = self.saved_tensors(model)?;
        let is_saved = |name: &String| saved.iter().any(|(saved, _)| saved == name);
        for (name, shape) in model.tensor_shapes() {
            let Some(module) = name.strip_suffix(".bias") else { continue };
            let target = targets.iter().any(|target| target.module == module);
            let trained = match lora.bias {
                Bias::None => false,
                Bias::All => true,
                Bias::LoraOnly => target,
            };
            if trained && !is_saved(&name) {
                let inner = if target { "base_layer.bias" } else { "bias" };
                let key = format!("{PREFIX}{}.{inner}", full(module));
                slots.push(Slot { key, shape, part: Part::Instead(name) });
            }
        }
        slots.extend(saved.into_iter().map(|(name, shape)| {
            let key = format!("{PREFIX}{}", tensor_name(&name));
            Slot { key, shape, part: Part::Instead(name) }
        }));
        Ok(slots)
    }

    /// The tensors of the modules that are saved whole.
    fn saved_tensors(&self, model: &OptConfig) -> Result<Vec<(String, Vec<usize>)>> {
        let names = modules(model);
        let wanted = || self.modules_to_save.iter().filter(|name| !HEADS.contains(&&name[..]));
        if let Some(lost) = wanted().find(|end| !names.iter().any(|name| name.ends_with(&end[..]))) {
            return Err(no_such("modules_to_save", lost, &names));
        }
        // As PEFT has it, any end of a name will do, whole words or not.
        let modules: Vec<&String> =
            names.iter().filter(|name| wanted().any(|end| name.ends_with(&end[..]))).collect();
        let mut shapes = model.tensor_shapes();
        if model.tie_word_embeddings {
            shapes.push(("lm_head.weight".to_owned(), vec![model.vocab_size, model.word_embed_proj_dim]));
        }
        shapes.retain(|(name, _)| {
            let name = tensor_name(name);
            modules
                .iter()
                .any(|module| name.strip_prefix(&module[..]).is_some_and(|rest| rest.starts_with('.')))
        });
        Ok(shapes)
    }
}

/// A canonical tensor name as transformers has it.
fn tensor_name(name: &str) -> String {
    if name.starts_with("lm_head.") { name.to_owned() } else { format!("model.decoder.{name}") }
}

fn virtual_slot(tokens: usize, width: usize) -> Slot {
    Slot { key: PROMPT_EMBEDDINGS.to_owned(), shape: vec![tokens, width], part: Part::Virtual }
}
