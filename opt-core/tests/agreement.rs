//! The backend under test beside the CPU backend, in one process: the same checkpoint, the same text.
//!
//! Ids may differ only where two candidates tie within rounding, and that is proved on the CPU's logits.

mod common;

use common::{
    backend,
    tiny::{Tiny, random_ids},
};
use opt_backend::conformance::Tolerance;
use opt_core::{
    CacheDType, DType, GeneratedSequence, Load, Opt, Request, ScoreInput,
    backends::Cpu,
    engine::{Forward, Sequence, Want},
    generation::{GenerationConfig, Random},
};

/// Beginnings of sentences, of one to some twenty tokens.
const PROMPTS: [&str; 20] = [
    "The old house stood",
    "It was a dark night, and",
    "“I do not know,” said",
    "When the train had left the station, she",
    "The river",
    "My dear sir, you must",
    "There was once a",
    "He opened the letter and read:",
    "In the garden behind the church, where the roses grew in summer and nobody ever came,",
    "Mr.",
    "London",
    "A tall man in a grey coat walked slowly",
    "“Never!” cried the captain.",
    "The doctor looked at his watch, and then at the",
    "Nothing could be seen but",
    "On the third of March",
    "She had been",
    "Why",
    "After dinner they all went out upon the terrace and",
    "The letter was signed",
];

fn on_cpu(dtype: DType) -> Opt {
    Opt::load(common::novels(), Load::on(Cpu::new().unwrap()).dtype(dtype)).unwrap()
}

fn under_test(dtype: DType) -> Opt {
    Opt::load(common::novels(), backend::load().dtype(dtype)).unwrap()
}

fn requests(config: &GenerationConfig) -> impl Iterator<Item = Request> {
    PROMPTS.iter().map(|prompt| Request::new(*prompt).config(config.clone()))
}

/// Fails unless the first ids in which two continuations of `prompt` differ have logits that tie within rounding.
fn assert_tie(cpu: &Opt, prompt: &[u32], found: &[u32], expected: &[u32]) {
    let at = found.iter().zip(expected).take_while(|(f, e)| f == e).count();
    let (Some(f), Some(e)) = (found.get(at), expected.get(at)) else {
        panic!(
            "prompt {prompt:?}: one continuation ends at token {at}: found {found:?}, expected {expected:?}"
        );
    };
    let logits = cpu.logits(&[prompt, &expected[..at]].concat()).unwrap();
    let last = logits.row(logits.nrows() - 1);
    let largest = last.iter().fold(1f32, |largest, value| largest.max(value.abs()));
    let gap = (last[*f as usize] - last[*e as usize]).abs();
    assert!(
        f64::from(gap) <= 2.0 * backend::tolerance().max * f64::from(largest),
        "prompt {prompt:?}, token {at}: found {f}, expected {e}, whose logits are {gap} apart: no tie"
    );
    eprintln!("a tie at token {at}: {f} and {e} are {gap:e} apart");
}

/// log p(ids | prompt) over their number: what beam search orders by.
fn beam_score(cpu: &Opt, prompt: &[u32], ids: &[u32]) -> f64 {
    let input = ScoreInput { ids: [prompt, ids].concat(), from: prompt.len() };
    cpu.score(&[input]).unwrap()[0].log_prob / ids.len() as f64
}

fn compare(config: &GenerationConfig, check: impl Fn(&Opt, &[u32], &GeneratedSequence, &GeneratedSequence)) {
    let (cpu, other) = (on_cpu(DType::F32), under_test(DType::F32));
    let expected = cpu.generate_batch(requests(config)).unwrap();
    let found = other.generate_batch(requests(config)).unwrap();
    let mut equal = 0;
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(
            (&found.prompt_ids, found.sequences.len()),
            (&expected.prompt_ids, expected.sequences.len())
        );
        for (f, e) in found.sequences.iter().zip(&expected.sequences) {
            if f.ids == e.ids {
                assert_eq!((&f.text, f.finish), (&e.text, e.finish));
                let off = f.log_probs.iter().zip(&e.log_probs).map(|(f, e)| (f - e).abs());
                assert!(off.fold(0.0, f32::max) < 1e-3, "log-probabilities of equal ids differ");
                equal += 1;
            } else {
                check(&cpu, &found.prompt_ids, f, e);
            }
        }
    }
    let all: usize = expected.iter().map(|e| e.sequences.len()).sum();
    assert!(equal * 10 >= all * 9, "ties are rare, but only {equal} of {all} texts are equal");
}

#[test]
fn greedy_text() {
    let config = GenerationConfig::default().max_new_tokens(200).min_new_tokens(200);
    compare(&config, |cpu, prompt, found, expected| assert_tie(cpu, prompt, &found.ids, &expected.ids));
}

#[test]
fn beam_text() {
    let config = GenerationConfig::default().max_new_tokens(200).min_new_tokens(200).num_beams(4);
    compare(&config, |cpu, prompt, found, expected| {
        let [f, e] = [&found.ids, &expected.ids].map(|ids| beam_score(cpu, prompt, ids));
        let rounding = 2.0 * backend::tolerance().max;
        assert!((f - e).abs() < rounding, "prompt {prompt:?}: beams of scores {f} and {e}, which is no tie");
    });
}

/// Where the probabilities of `scores`, summed in the order of ids, begin and end for `id`.
fn share(scores: &[f32], id: u32) -> (f64, f64) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = scores.iter().map(|score| f64::from(score - max).exp()).collect();
    let (all, before): (f64, f64) = (weights.iter().sum(), weights[..id as usize].iter().sum());
    (before / all, (before + weights[id as usize]) / all)
}

/// The same seed draws the same number, which picks the token on whose share of [0, 1) it falls. Another token may be
/// picked only if the number lies on the edge of that one's share within rounding.
#[test]
fn sampled_text() {
    let config = GenerationConfig::default().max_new_tokens(100).do_sample(true).temperature(0.8);
    let (cpu, other) = (on_cpu(DType::F32), under_test(DType::F32));
    let seeded = || {
        requests(&config).enumerate().map(|(seed, mut request)| {
            request.config = request.config.clone().seed(seed as u64);
            request.keep_scores()
        })
    };
    let (expected, found) = (cpu.generate_batch(seeded()).unwrap(), other.generate_batch(seeded()).unwrap());
    for (seed, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let drawn = Random::new(seed as u64, 0);
        let [found, expected] = [&found.sequences[0], &expected.sequences[0]];
        for (step, (f, e)) in found.ids.iter().zip(&expected.ids).enumerate() {
            let number = drawn.at(step as u64);
            let (begin, end) = share(&expected.scores[step], *e);
            assert!(begin - 1e-9 <= number && number <= end + 1e-9, "{number} drew {e}: {begin} to {end}");
            if f != e {
                let (begin, end) = share(&expected.scores[step], *f);
                let off = (begin - number).max(number - end);
                assert!(
                    off < 1e-5,
                    "seed {seed}, step {step}: {number} drew {f}, whose share is {begin} to {end}"
                );
                break;
            }
        }
        assert!(found.ids != expected.ids || found.text == expected.text);
    }
}

/// Weights in half precision: logits within their own rows of the tolerance table.
#[test]
fn half_precision_logits() {
    let text = common::logits().0;
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let [expected, found] = [on_cpu(dtype), under_test(dtype)].map(|opt| opt.logits(&text.ids).unwrap());
        let tolerance = if dtype == DType::F32 { backend::tolerance() } else { Tolerance::of(dtype) };
        backend::assert_within(tolerance, found.view(), expected.view(), &dtype.to_string());
    }
}

/// Per decoded token: no default body, and one readback.
#[test]
fn a_decoded_token_costs_one_readback() {
    if backend::name() == "reference" {
        backend::skipped("the reference backend is its default bodies");
        return;
    }
    // The CPU backend's results lie where they are wanted.
    let reads = if backend::name() == "cpu" { 0 } else { 1 };
    let opt = under_test(DType::F32);
    let mut cache = opt.engine().new_cache(CacheDType::F32).unwrap();
    let mut step = |ids: &[u32]| {
        let before = opt.engine().counts();
        let mut sequence = Sequence::new(ids).want(Want::TopK { rows: 1, k: 1 });
        sequence.cache = Some(&mut cache);
        let batch = Forward { sequences: vec![sequence], ..Forward::default() };
        let next = opt.engine().forward_blocking(batch).unwrap()[0].top_k[0].ids[0];
        (next, opt.engine().counts().since(&before))
    };
    let (mut next, _) = step(&[2, 17, 99, 1000]);
    for token in 0..20 {
        let (best, counts) = step(&[next]);
        assert_eq!(counts.defaults, [0; opt_backend::Op::ALL.len()], "token {token}: {counts}");
        assert_eq!(counts.reads, reads, "token {token}: {counts}");
        next = best;
    }
    // The same through the front door, with the text a user sees.
    let before = opt.engine().counts();
    let config = GenerationConfig::default().max_new_tokens(30);
    let tokens = opt.generate("The river", &config).unwrap().ids().len() as u64;
    let counts = opt.engine().counts().since(&before);
    assert_eq!(
        (counts.defaults, counts.reads),
        ([0; opt_backend::Op::ALL.len()], tokens * reads),
        "{counts}"
    );
}

#[test]
fn two_engines_on_one_device() {
    let [first, second] = [1, 2].map(|seed| Tiny { seed, ..Tiny::default() });
    let config = GenerationConfig::default().max_new_tokens(40);
    let ids = random_ids(9, 12, 61);
    let alone = [&first, &second].map(|tiny| tiny.opt().generate(&ids[..], &config).unwrap().ids().to_vec());
    let (one, two) = (first.opt(), second.opt());
    // In turns, and from two threads at once.
    let mut streams = [one.stream(&ids[..], &config).unwrap(), two.stream(&ids[..], &config).unwrap()];
    let mut found = [Vec::new(), Vec::new()];
    for _ in 0..40 {
        for (stream, found) in streams.iter_mut().zip(&mut found) {
            found.push(stream.next().unwrap().unwrap().id);
        }
    }
    assert_eq!(found, alone);
    std::thread::scope(|scope| {
        let runs =
            [&one, &two].map(|opt| scope.spawn(|| opt.generate(&ids[..], &config).unwrap().ids().to_vec()));
        assert_eq!(runs.map(|run| run.join().unwrap()), alone);
    });
}

#[test]
fn an_engine_dropped_while_a_stream_is_open() {
    let tiny = Tiny::default();
    let config = GenerationConfig::default().max_new_tokens(20);
    let whole = tiny.opt().generate(&[3u32, 4, 5][..], &config).unwrap().ids().to_vec();
    let opt = tiny.opt();
    let mut stream = opt.stream(&[3u32, 4, 5][..], &config).unwrap();
    let first = stream.next().unwrap().unwrap().id;
    drop(opt);
    let rest: Vec<u32> = stream.map(|token| token.unwrap().id).collect();
    assert_eq!([&[first], &rest[..]].concat(), whole);
    // And a stream dropped half-way, with the engine behind it.
    let mut stream = tiny.opt().stream(&[3u32, 4, 5][..], &config).unwrap();
    stream.next().unwrap().unwrap();
}

/// The shape of OPT-66b over a file with a hole in it: refused at once, by size, with nothing allocated.
#[cfg(target_os = "linux")]
#[test]
fn a_model_larger_than_memory() {
    use opt_core::{ErrorKind, config::OptConfig};
    use std::io::Write;
    if Tiny::default().opt().info().memory.is_none() {
        backend::skipped(format_args!("{} does not tell here how much memory is free", backend::name()));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let config = r#"{"model_type": "opt", "hidden_size": 9216, "word_embed_proj_dim": 9216, "ffn_dim": 36864,
        "num_attention_heads": 72, "num_hidden_layers": 64}"#;
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    let mut header = serde_json::Map::new();
    let mut end = 0u64;
    for (name, shape) in OptConfig::from_json(config).unwrap().tensor_shapes() {
        let start = end;
        end += 2 * shape.iter().map(|n| *n as u64).product::<u64>();
        let entry = serde_json::json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]});
        header.insert(format!("model.decoder.{name}"), entry);
    }
    let mut header = serde_json::Value::Object(header).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let mut file = std::fs::File::create(dir.path().join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
    drop(file);

    let error = Opt::load(dir.path(), backend::load().dtype(DType::F32)).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Backend, "{error}");
    let text = error.to_string();
    assert!(text.contains("MiB of free memory") && text.contains(backend::name()), "{text}");
}
