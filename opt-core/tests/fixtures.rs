//! The fixtures themselves: complete, of the shapes that their configurations say, and in agreement with each other.

mod common;

use ndarray::{Array2, Axis, s};
use serde_json::Value;

use common::{Arrays, Generated, Model};

fn config(model: &Model) -> Value {
    serde_json::from_str(&std::fs::read_to_string(&model.config).unwrap()).unwrap()
}

fn number(config: &Value, key: &str) -> usize {
    config[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize
}

fn check_run(arrays: &Arrays, prefix: &str, rows: usize, config: &Value) {
    let logits = arrays.matrix(&format!("{prefix}.logits"));
    assert_eq!(logits.dim(), (rows, number(config, "vocab_size")));
    let hidden = arrays.hidden(prefix);
    let layers = number(config, "num_hidden_layers");
    assert_eq!(hidden.len(), layers + 1);
    for state in &hidden[..layers] {
        assert_eq!(state.dim(), (rows, number(config, "hidden_size")));
    }
    assert_eq!(hidden[layers].dim(), (rows, number(config, "word_embed_proj_dim")));
}

#[test]
fn models_have_the_shapes_of_their_configs() {
    let models = common::models();
    assert!(models.len() >= 41, "found {}", models.len());
    for model in &models {
        let config = config(model);
        assert!(model.weights.exists(), "{}", model.name);
        for (i, sequence) in model.meta.sequences.iter().enumerate() {
            check_run(&model.expected, &format!("seq{i}"), sequence.len(), &config);
        }
        if let Some(positions) = &model.meta.positions {
            check_run(&model.expected, "positions", positions.position_ids.len(), &config);
        }
        if let Some(input) = model.expected.find("embeds.input") {
            assert_eq!(input.shape()[1], number(&config, "word_embed_proj_dim"));
            check_run(&model.expected, "embeds", input.shape()[0], &config);
        }
    }
}

fn log_softmax(row: ndarray::ArrayView1<'_, f32>, id: u32) -> f64 {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|x| f64::from(x - largest).exp()).sum();
    f64::from(row[id as usize] - largest) - sum.ln()
}

#[test]
fn log_probabilities_are_those_of_the_logits() {
    for model in common::models() {
        for (i, sequence) in model.meta.sequences.iter().enumerate().filter(|(_, s)| s.len() > 1) {
            let logits = model.expected.matrix(&format!("seq{i}.logits"));
            let expected = model.expected.vector(&format!("seq{i}.logprobs"));
            for (t, (row, id)) in logits.rows().into_iter().zip(&sequence[1..]).enumerate() {
                let found = log_softmax(row, *id);
                assert!((found - f64::from(expected[t])).abs() < 1e-5, "{} {i} {t}", model.name);
            }
        }
    }
}

/// The last hidden state times the head is the logits: checked where the head is stored in f32.
#[test]
fn logits_are_the_last_hidden_state_times_the_head() {
    let model = common::model("untied");
    let head: Array2<f32> = Arrays::read(&model.weights).matrix("lm_head.weight");
    let hidden = model.expected.hidden("seq0");
    let logits = hidden.last().unwrap().dot(&head.t());
    common::assert_close(logits.view(), model.expected.matrix("seq0.logits").view(), "logits");
}

/// Attention rows are distributions over the positions so far.
#[test]
fn attentions_are_causal_distributions() {
    let model = common::model("pre_ln");
    let attentions = model.expected.get("seq0.attentions.1");
    for head in attentions.axis_iter(Axis(0)) {
        let head = head.into_dimensionality::<ndarray::Ix2>().unwrap();
        for (t, row) in head.rows().into_iter().enumerate() {
            assert!((row.sum() - 1.0).abs() < 1e-5);
            assert!(row.slice(s![t + 1..]).iter().all(|p| *p == 0.0));
        }
    }
}

fn number_or(case: &Generated, key: &str, default: f64) -> f64 {
    case.config.get(key).map_or(default, |v| v.as_f64().unwrap())
}

#[test]
fn beam_scores_are_sums_over_length_to_the_penalty() {
    for case in common::generated("beam") {
        assert_eq!(
            case.outputs.len(),
            number_or(&case, "num_return_sequences", 1.0) as usize,
            "{}",
            case.name
        );
        let penalty = number_or(&case, "length_penalty", 1.0);
        for (scores, found) in case.transition_scores.iter().zip(&case.sequences_scores) {
            let sum: f64 = scores.iter().sum();
            assert!((sum / (scores.len() as f64).powf(penalty) - found).abs() < 1e-4, "{}", case.name);
        }
        assert!(case.sequences_scores.windows(2).all(|w| w[0] >= w[1]), "{}: best first", case.name);
    }
}

#[test]
fn cases_end_as_they_say() {
    for file in ["greedy", "beam", "group_beam", "contrastive"] {
        for case in common::generated(file) {
            for (output, finish) in case.outputs.iter().zip(&case.finish) {
                let eos: Vec<u64> = match case.config.get("eos_token_id") {
                    Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_u64).collect(),
                    Some(id) => id.as_u64().into_iter().collect(),
                    None => vec![2],
                };
                let at_eos = eos.contains(&u64::from(*output.last().unwrap()));
                assert_eq!(at_eos, finish == "eos", "{file} {}", case.name);
                let max = case.config.get("max_new_tokens").and_then(Value::as_u64).map(|n| n as usize);
                let max = max.or_else(|| {
                    let length = case.config.get("max_length").and_then(Value::as_u64);
                    length.map(|n| n as usize - case.prompt.len())
                });
                let max = max.unwrap_or(20);
                assert!(output.len() == max || finish == "eos" && output.len() < max, "{file} {}", case.name);
            }
        }
    }
}

#[test]
fn prefix_rules_describe_their_cases() {
    let mut seen = 0;
    for case in common::generated("greedy").iter().chain(&common::generated("beam")) {
        let Some(rule) = case.prefix_rule() else { continue };
        for output in &case.outputs {
            let mut ids = case.prompt.clone();
            for id in output {
                assert!(rule.allowed(&ids, 97).contains(id), "{}", case.name);
                ids.push(*id);
            }
            seen += 1;
        }
    }
    assert!(seen >= 6);
}

#[test]
fn processor_cases_have_their_rows() {
    let (cases, arrays) = common::processed();
    assert!(cases.len() > 200);
    for case in &cases {
        let scores = arrays.matrix(&format!("{}.scores", case.name));
        let expected = arrays.matrix(&format!("{}.expected", case.name));
        assert_eq!(scores.dim(), expected.dim(), "{}", case.name);
        assert_eq!(scores.nrows(), case.picked.len(), "{}", case.name);
        for (row, id) in expected.rows().into_iter().zip(&case.picked) {
            assert!(row[*id as usize] > f32::NEG_INFINITY, "{}: picked a forbidden token", case.name);
        }
    }
}

#[test]
fn texts_are_whole() {
    for case in common::generated("texts") {
        assert_eq!(case.outputs.len(), case.output_texts.len(), "{}", case.name);
        if !case.stream.is_empty() {
            assert_eq!(case.stream.concat(), case.output_texts[0], "{}", case.name);
        }
    }
    let perplexity = common::perplexity();
    let sum: f64 = perplexity.windows.iter().map(|w| w.nll_sum).sum();
    assert!((sum - perplexity.nll_sum).abs() < 1e-3);
    assert!(((sum / perplexity.scored as f64).exp() - perplexity.perplexity).abs() < 1e-3);
    if let Some(text) = common::held_out(&perplexity) {
        assert!(text.starts_with("Arthur Conan Doyle\n"), "{}", &text[..40]);
    }
    let (logits, arrays) = common::logits();
    let last = arrays.vector("last_logits");
    let top = logits.positions.last().unwrap();
    for (id, value) in top.ids.iter().zip(&top.values) {
        assert!((f64::from(last[*id as usize]) - value).abs() < 1e-6);
    }
    for case in common::sorting().cases {
        let mut sorted = case.prompt.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, case.output);
    }
}
