use crate::generation::*;
use ndarray::{Array2, ArrayView1};
use std::collections::HashMap;

/// Stands in a slot for a row of embeddings.
pub(super) const EMBEDDING: u32 = u32::MAX;

type OfIds = Box<dyn Fn(&[u32]) -> Vec<f32>>;

/// A model: what follows from the ids before it.
pub(super) struct Toy {
    pub(super) logits: OfIds,
    pub(super) hidden: OfIds,
}

/// Anything from -1 to 1, as if at random, but the same for the same numbers.
pub(super) fn noise(seed: u64, ids: &[u32]) -> f32 {
    let mut state = seed ^ 0x9E37_79B9_7F4A_7C15;
    for &id in ids {
        state = (state ^ u64::from(id)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        state ^= state >> 29;
    }
    state = state.wrapping_mul(0x94D0_49BB_1331_11EB);
    ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
}

impl Toy {
    /// Logits that depend on the last `memory` ids, and on nothing else.
    pub(super) fn new(seed: u64, vocab: usize, memory: usize, spread: f32) -> Self {
        let values = move |ids: &[u32], n: usize, salt: u64| -> Vec<f32> {
            let context = &ids[ids.len().saturating_sub(memory)..];
            (0..n as u32).map(|i| spread * noise(seed ^ salt, &[context, &[i]].concat())).collect()
        };
        Self {
            logits: Box::new(move |ids| values(ids, vocab, 0)),
            hidden: Box::new(move |ids| values(ids, 5, 0xABCD)),
        }
    }
}

/// What a request did.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Transcript {
    pub(super) outputs: Vec<SequenceOutput>,
    pub(super) events: Vec<TokenEvent>,
    /// Plans carried out.
    pub(super) steps: usize,
    /// Runs of the target.
    pub(super) target_runs: usize,
}

/// The reference driver. Checks that a plan makes sense of the caches as they are.
pub(super) struct Driver<'a> {
    pub(super) models: HashMap<ModelRole, &'a Toy>,
    pub(super) embeds_len: usize,
    slots: HashMap<ModelRole, Vec<Vec<u32>>>,
}

impl<'a> Driver<'a> {
    pub(super) fn new(target: &'a Toy, assistant: Option<&'a Toy>) -> Self {
        let models: HashMap<_, _> = [(ModelRole::Target, Some(target)), (ModelRole::Assistant, assistant)]
            .into_iter()
            .filter_map(|(role, model)| Some((role, model?)))
            .collect();
        let slots = models.keys().map(|role| (*role, vec![Vec::new()])).collect();
        Self { models, embeds_len: 0, slots }
    }

    pub(super) fn carry_out(&mut self, plan: Plan) -> Vec<Reply> {
        for op in plan.cache {
            match op {
                CacheOp::Reorder { model, parents } => {
                    let slots = self.slots.get_mut(&model).expect("a model");
                    *slots = parents.iter().map(|&p| slots[p].clone()).collect();
                }
                CacheOp::Truncate { model, slot, len } => {
                    let slot = &mut self.slots.get_mut(&model).expect("a model")[slot];
                    assert!(len <= slot.len(), "{len} positions to keep of {}", slot.len());
                    slot.truncate(len);
                }
            }
        }
        let mut seen = Vec::new();
        plan.runs
            .into_iter()
            .map(|run| {
                assert!(!seen.contains(&(run.model, run.slot)), "two runs in one slot");
                seen.push((run.model, run.slot));
                self.run(run)
            })
            .collect()
    }

    fn run(&mut self, run: Run) -> Reply {
        let slot = &mut self.slots.get_mut(&run.model).expect("a model")[run.slot];
        assert_eq!(run.prompt, slot.is_empty(), "the prompt is what runs first");
        if run.prompt && run.model == ModelRole::Target {
            slot.extend(vec![EMBEDDING; self.embeds_len]);
        } else {
            assert!(!run.tokens.is_empty());
        }
        let begin = if run.prompt { 0 } else { slot.len() };
        slot.extend(&run.tokens);
        let model = self.models[&run.model];
        let ends = begin + 1..=slot.len();
        let rows = slot.len() + 1 - run.need.rows..=slot.len();
        assert!(rows.start() >= ends.start(), "more rows than tokens");
        let scores = rows.map(|end| (model.logits)(&slot[..end])).filter_map(|row| match run.need.scores {
            ScoreNeed::None => None,
            ScoreNeed::TopK(k) => {
                assert!((1..=row.len()).contains(&k));
                Some(RowScores::TopK(opt_backend::oracle::top_k(ArrayView1::from(&row), k)))
            }
            ScoreNeed::Full => Some(RowScores::Full(row.into())),
        });
        let scores = scores.collect();
        let hidden = run.need.hidden.then(|| {
            let rows: Vec<Vec<f32>> = ends.map(|end| (model.hidden)(&slot[..end])).collect();
            let width = rows[0].len();
            Array2::from_shape_vec((rows.len(), width), rows.concat()).expect("rows of one width")
        });
        Reply { scores, hidden }
    }
}

/// Drives a request to its end.
pub(super) fn drive(request: Request, target: &Toy, assistant: Option<&Toy>) -> Transcript {
    try_drive(request, target, assistant).expect("a request that can be served")
}

pub(super) fn try_drive(
    request: Request,
    target: &Toy,
    assistant: Option<&Toy>,
) -> crate::Result<Transcript> {
    let mut driver = Driver { embeds_len: request.embeds_len, ..Driver::new(target, assistant) };
    let mut strategy = strategy(request)?;
    let (mut events, mut steps, mut target_runs) = (Vec::new(), 0, 0);
    loop {
        let plan = strategy.plan();
        if plan.runs.is_empty() {
            break;
        }
        target_runs += plan.runs.iter().filter(|r| r.model == ModelRole::Target).count();
        steps += 1;
        strategy.advance(driver.carry_out(plan))?;
        events.extend(strategy.take_events());
    }
    Ok(Transcript { outputs: strategy.finish(), events, steps, target_runs })
}

/// A request with the processors and conditions that `config` names; `change` has the last word on the settings.
pub(super) fn request(
    prompt: &[u32],
    vocab: usize,
    config: &GenerationConfig,
    change: impl FnOnce(&mut Settings),
) -> Request {
    let mut settings = Settings {
        prompt_len: prompt.len(),
        embeds_len: 0,
        vocab_size: vocab,
        max_length: prompt.len() + config.max_new_tokens.unwrap_or(20),
        eos: config.eos_token_id.as_ref().map(TokenIds::to_vec).unwrap_or_default(),
        pad: config.pad_token_id,
        method: Method::Single,
        do_sample: config.do_sample.unwrap_or(false),
        num_return_sequences: config.num_return_sequences.unwrap_or(1),
        length_penalty: config.length_penalty.unwrap_or(1.0),
        early_stopping: config.early_stopping.unwrap_or(EarlyStopping::No),
        max_time: None,
        stop_strings: Vec::new(),
        seed: config.seed.unwrap_or(0),
        top_alternatives: 0,
        keep_scores: false,
        keep_logits: false,
    };
    change(&mut settings);
    let hooks = Hooks::default();
    let chain = ProcessorChain::new(config, &settings, &hooks).expect("processors");
    let stopping = Stopping::new(&settings, None, &hooks);
    Request { prompt: prompt.to_vec(), embeds_len: settings.embeds_len, settings, chain, stopping }
}

/// One request for each way of generating, greedy ways first.
pub(super) fn methods() -> Vec<(Method, bool)> {
    let assisted = Method::Assisted { tokens: 3, schedule: AssistantSchedule::Heuristic, confidence: 0.2 };
    let lookup = Method::PromptLookup { tokens: 4, max_ngram: 2 };
    vec![
        (Method::Single, false),
        (assisted.clone(), false),
        (lookup.clone(), false),
        (Method::Contrastive { alpha: 0.5, k: 3 }, false),
        (Method::Beam { beams: 3 }, false),
        (Method::GroupBeam { beams: 4, groups: 2, diversity: 0.7 }, false),
        (Method::Single, true),
        (assisted, true),
        (lookup, true),
        (Method::Beam { beams: 3 }, true),
    ]
}

/// log softmax in f64.
pub(super) fn log_softmax(row: &[f32]) -> Vec<f64> {
    let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
    row.iter().map(|&x| f64::from(x) - sum.ln()).collect()
}
