//! One adapter of several: PEFT's `add_weighted_adapter`.

use super::{
    config::{AdapterConfig, AdapterMethod, Bias, LoraConfig, Names},
    file::{Adapter, Parts},
    target::{Part, Slot, Target},
    term::Term,
};
use crate::{Error, ErrorKind, Result, config::OptConfig};
use ndarray::{Array2, ArrayD, s};
use std::collections::BTreeMap;

/// How [`combine`] makes low-rank matrices of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Combination {
    /// One beside the other: exact, with the sum of the ranks.
    Cat,
    /// Sums of the matrices, with weights √|w s| on either side: the rank stays, at the price of cross terms.
    Linear,
}

/// An adapter whose terms are the weighted sum of those of `sources`, for a model of this shape.
///
/// ```no_run
/// use opt_core::{adapter::{Adapter, Combination, combine}, checkpoint::Checkpoint};
///
/// let (poems, recipes) = (Adapter::open("poems")?, Adapter::open("recipes")?);
/// let model = Checkpoint::open("opt-125m")?;
/// let both = combine("both", &[(&poems, 0.7), (&recipes, 0.3)], Combination::Cat, model.config())?;
/// both.save("both")?;
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Option`] for no adapter, a weight that is not finite, and with [`Combination::Linear`] unequal ranks;
/// [`ErrorKind::Unsupported`] for what has no weighted sum: prefixes and prompts, DoRA, biases, modules saved whole;
/// as [`Adapter::check`].
pub fn combine(
    name: &str,
    sources: &[(&Adapter, f32)],
    combination: Combination,
    model: &OptConfig,
) -> Result<Adapter> {
    let option = |message: String| Err(Error::new(ErrorKind::Option, message));
    let Some((first, _)) = sources.first() else {
        return option("combining adapters: expected at least one, found none".to_owned());
    };
    if let Some((adapter, weight)) = sources.iter().find(|(_, weight)| !weight.is_finite()) {
        return option(format!("adapter {:?}: expected a finite weight, found {weight}", adapter.name()));
    }
    let loras = sources.iter().map(|(adapter, _)| plain_lora(adapter)).collect::<Result<Vec<_>>>()?;
    // The largest that any pattern gives.
    let ranks: Vec<usize> =
        loras.iter().map(|lora| lora.rank_pattern.values().copied().fold(lora.r, usize::max)).collect();
    let rank = match combination {
        Combination::Cat => ranks.iter().sum(),
        Combination::Linear => match ranks.iter().find(|rank| **rank != ranks[0]) {
            None => ranks[0],
            Some(other) => {
                return option(format!(
                    "linear combination: expected adapters of one rank, found {} and {other}",
                    ranks[0]
                ));
            }
        },
    };
    let mut lora = LoraConfig {
        r: rank,
        lora_alpha: rank as f64,
        rank_pattern: BTreeMap::new(),
        alpha_pattern: BTreeMap::new(),
        // The scales are in the matrices; PEFT leaves √r over here.
        use_rslora: false,
        ..loras.first().map_or_else(LoraConfig::default, |lora| (*lora).clone())
    };
    let parts: Vec<Parts<'_>> =
        sources.iter().map(|(adapter, _)| adapter.parts(model)).collect::<Result<_>>()?;
    // By name, whatever each source calls them.
    let mut modules: Vec<String> =
        parts.iter().flat_map(|parts| &parts.targets).map(|target| full(&target.module)).collect();
    modules.sort_unstable();
    modules.dedup();
    let joint = joint_targets(&loras);
    lora.target_modules = joint.clone().unwrap_or(Names::List(modules.clone()));
    (lora.exclude_modules, lora.layers_to_transform, lora.layers_pattern) = (None, None, None);
    if joint.is_some() && lora.targets(model, &[])?.len() != modules.len() {
        lora.target_modules = Names::List(modules);
    }
    let config = AdapterConfig { method: AdapterMethod::Lora(lora), ..first.config().clone() };

    let terms = |module: &str| -> Result<Vec<(Term<'_>, f32)>> {
        let each = parts.iter().zip(sources);
        let found = each.map(|(parts, (_, weight))| Ok(parts.term(module)?.map(|term| (term, *weight))));
        Ok(found.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    };
    let mut tensors: Vec<(String, ArrayD<f32>)> = Vec::new();
    for Slot { key, shape, part } in config.slots(model)? {
        let tensor = match (&part, &shape[..]) {
            (Part::A(module) | Part::B(module), &[rows, columns]) => {
                let is_a = matches!(part, Part::A(_));
                matrix(&terms(module)?, is_a, combination, [rows, columns])?.into_dyn()
            }
            _ => match sources.iter().find_map(|(adapter, _)| adapter.tensors().get(&key)) {
                Some(copy) => copy.clone(),
                None => continue,
            },
        };
        tensors.push((key, tensor));
    }
    Ok(Adapter::new(name, config, tensors))
}

/// The union of targets that are lists.
fn joint_targets(loras: &[&LoraConfig]) -> Option<Names> {
    let mut all = Vec::new();
    for lora in loras {
        match &lora.target_modules {
            Names::List(names) => all.extend(names.iter().cloned()),
            Names::Pattern(_) => return None,
        }
    }
    all.sort_unstable();
    all.dedup();
    Some(Names::List(all))
}

fn full(module: &str) -> String {
    if module == "lm_head" { module.to_owned() } else { format!("model.decoder.{module}") }
}

fn plain_lora(adapter: &Adapter) -> Result<&LoraConfig> {
    let fail = |what: &str| {
        let message = format_args!("adapter {:?}: {what}", adapter.name());
        Err(Error::new(ErrorKind::Unsupported, message))
    };
    match adapter.config().lora() {
        None => fail("a prefix or prompt has no weighted sum"),
        Some(lora) if lora.use_dora => fail("DoRA has no weighted sum"),
        Some(lora) if lora.lora_bias || lora.bias != Bias::None => fail("biases have no weighted sum"),
        Some(_) if !adapter.config().modules_to_save.is_empty() => {
            fail("modules saved whole have no weighted sum")
        }
        Some(lora) => Ok(lora),
    }
}

/// A or B of the combination.
fn matrix(
    terms: &[(Term<'_>, f32)],
    is_a: bool,
    combination: Combination,
    shape: [usize; 2],
) -> Result<Array2<f32>> {
    let mut result = Array2::zeros(shape);
    let mut at = 0;
    for (term, weight) in terms {
        let Target { module, rank, .. } = term.target;
        let scaled = weight * term.scale();
        match (combination, is_a) {
            (Combination::Cat, true) => {
                result.slice_mut(s![at..at + rank, ..]).assign(&term.a.mapv(|v| v * weight * term.scale()));
            }
            (Combination::Cat, false) => result.slice_mut(s![.., at..at + rank]).assign(&term.b),
            (Combination::Linear, _) => {
                let matrix = if is_a { term.a } else { term.b };
                if matrix.dim() != result.dim() {
                    let message =
                        format_args!("linear combination: {module} has another rank in each adapter");
                    return Err(Error::new(ErrorKind::Option, message));
                }
                // The sign belongs to one side.
                let factor = scaled.abs().sqrt() * if is_a && scaled < 0.0 { -1.0 } else { 1.0 };
                result.scaled_add(factor, &matrix);
            }
        }
        at += rank;
    }
    Ok(result)
}
