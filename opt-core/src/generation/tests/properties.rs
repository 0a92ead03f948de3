use super::toy::{EMBEDDING, Toy, drive, log_softmax, methods, request};
use crate::generation::*;
use proptest::prelude::*;

const VOCAB: usize = 7;

fn config(max_new: usize, eos: &[u32]) -> GenerationConfig {
    GenerationConfig {
        max_new_tokens: Some(max_new),
        eos_token_id: Some(TokenIds::Many(eos.to_vec())),
        pad_token_id: Some(0),
        ..GenerationConfig::default()
    }
}

/// Config changes that put processors into the chain.
fn processors(which: usize, config: GenerationConfig) -> GenerationConfig {
    match which % 4 {
        0 => config,
        1 => GenerationConfig { repetition_penalty: Some(1.4), ..config },
        2 => GenerationConfig { no_repeat_ngram_size: Some(2), ..config },
        _ => GenerationConfig { min_new_tokens: Some(4), suppress_tokens: Some(vec![3]), ..config },
    }
}

fn prompts() -> impl proptest::strategy::Strategy<Value = Vec<u32>> {
    prop::collection::vec(0..VOCAB as u32, 1..7)
}

fn greedy(prompt: &[u32], config: &GenerationConfig, toy: &Toy) -> SequenceOutput {
    drive(request(prompt, VOCAB, config, |_| {}), toy, None).outputs.remove(0)
}

/// Equal but for the rounding of the log-sum-exp, which comes as f32 with the largest logits.
fn close(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Whatever a method does to the caches, each token's log-probability is the model's own behind exactly the tokens
    /// that are handed out before it; and what was streamed is what is handed out.
    #[test]
    fn log_probabilities_are_those_behind_the_sequence(
        seed in any::<u64>(), prompt in prompts(), embeds in 0usize..3, max_new in 1usize..12, which in 0usize..4,
    ) {
        let (toy, draft) = (Toy::new(seed, VOCAB, 9, 3.0), Toy::new(seed ^ 1, VOCAB, 1, 3.0));
        for (method, do_sample) in methods() {
            let with_model = matches!(method, Method::Assisted { .. });
            let config = GenerationConfig { do_sample: Some(do_sample), ..processors(which, config(max_new, &[2, 5])) };
            let request = request(&prompt, VOCAB, &config, |s| {
                s.embeds_len = if with_model { 0 } else { embeds };
                s.num_return_sequences = match &method {
                    Method::Beam { .. } | Method::GroupBeam { .. } => 3,
                    Method::Single if do_sample => 3,
                    _ => 1,
                };
                (s.method, s.seed) = (method, seed);
            });
            let embeds = request.embeds_len;
            let transcript = drive(request, &toy, with_model.then_some(&draft));
            for (index, output) in transcript.outputs.iter().enumerate() {
                prop_assert!(!output.ids.is_empty() && output.ids.len() <= max_new);
                let mut ids = [vec![EMBEDDING; embeds], prompt.clone()].concat();
                for (&id, &log_prob) in output.ids.iter().zip(&output.log_probs) {
                    let expected = log_softmax(&(toy.logits)(&ids))[id as usize];
                    prop_assert!((expected - f64::from(log_prob)).abs() < 1e-4, "{expected} {log_prob}");
                    ids.push(id);
                }
                let ends = output.ids.iter().position(|id| [2, 5].contains(id)).map(|i| i + 1);
                prop_assert_eq!(output.finish == FinishReason::Eos, ends.is_some());
                prop_assert_eq!(output.ids.len(), ends.unwrap_or(max_new));
                let streamed: Vec<_> = transcript.events.iter().filter(|e| e.sequence == index).collect();
                prop_assert_eq!(streamed.iter().map(|e| e.id).collect::<Vec<_>>(), output.ids.clone());
                let finishes: Vec<_> = streamed.iter().map(|e| e.finish).collect();
                let mut expected = vec![None; output.ids.len()];
                expected[output.ids.len() - 1] = Some(output.finish);
                prop_assert_eq!(finishes, expected);
            }
        }
    }

    #[test]
    fn greedy_takes_the_most_probable(seed in any::<u64>(), prompt in prompts()) {
        let toy = Toy::new(seed, VOCAB, 5, 3.0);
        let mut ids = prompt.clone();
        while ids.len() < prompt.len() + 10 && ids.last() != Some(&2) {
            ids.push(math::argmax(&(toy.logits)(&ids)).expect("a row") as u32);
            if ids.last() == Some(&2) { break; }
        }
        prop_assume!(prompt.last() != Some(&2));
        let output = greedy(&prompt, &config(10, &[2]), &toy);
        prop_assert_eq!(output.ids, &ids[prompt.len()..]);
    }

    /// A draft changes how fast, never what: whether the draft model agrees always, often or hardly ever.
    #[test]
    fn drafts_leave_greedy_as_it_is(
        seed in any::<u64>(), prompt in prompts(), tokens in 1usize..6, max_new in 1usize..20, which in 0usize..4,
        confidence in prop_oneof![Just(0.0f32), 0.1f32..0.9], kind in 0usize..3, heuristic: bool, ngram in 1usize..4,
    ) {
        let toy = Toy::new(seed, VOCAB, 2, 3.0);
        let draft = Toy::new(seed ^ u64::from(kind == 2), VOCAB, if kind == 0 { 2 } else { 1 }, 3.0);
        let config = processors(which, config(max_new, &[2]));
        let expected = greedy(&prompt, &config, &toy);
        let schedule = if heuristic { AssistantSchedule::Heuristic } else { AssistantSchedule::Constant };
        let assisted = Method::Assisted { tokens, schedule, confidence };
        for method in [assisted, Method::PromptLookup { tokens, max_ngram: ngram }] {
            for keep in [false, true] {
                let request = request(&prompt, VOCAB, &config, |s| {
                    (s.method, s.keep_scores, s.keep_logits) = (method.clone(), keep, keep);
                });
                let model = matches!(method, Method::Assisted { .. }).then_some(&draft);
                let output = drive(request, &toy, model).outputs.remove(0);
                prop_assert_eq!(&output.ids, &expected.ids);
                prop_assert!(close(&output.log_probs, &expected.log_probs));
                prop_assert_eq!(output.finish, expected.finish);
                let rows = if keep { output.ids.len() } else { 0 };
                prop_assert_eq!((output.scores.len(), output.logits.len()), (rows, rows));
            }
        }
    }

    /// Prompt lookup draws what plain sampling of the same seed draws.
    #[test]
    fn prompt_lookup_samples_like_plain_sampling(seed in any::<u64>(), prompt in prompts()) {
        let toy = Toy::new(seed, VOCAB, 1, 4.0);
        let config = GenerationConfig { do_sample: Some(true), seed: Some(seed), ..config(15, &[2]) };
        let plain = greedy(&prompt, &config, &toy);
        let lookup = request(&prompt, VOCAB, &config, |s| {
            s.method = Method::PromptLookup { tokens: 4, max_ngram: 2 };
        });
        prop_assert_eq!(drive(lookup, &toy, None).outputs.remove(0), plain);
    }

    #[test]
    fn one_beam_and_contrast_without_a_choice_are_greedy(
        seed in any::<u64>(), prompt in prompts(), yes: bool, penalty in 0.0f32..2.0, which in 0usize..4,
    ) {
        let toy = Toy::new(seed, VOCAB, 3, 3.0);
        let early_stopping = Some(if yes { EarlyStopping::Yes } else { EarlyStopping::No });
        let config =
            GenerationConfig { early_stopping, length_penalty: Some(penalty), ..processors(which, config(10, &[2])) };
        // Beams follow log-probabilities, on which a penalty that divides acts otherwise.
        prop_assume!(config.repetition_penalty.is_none());
        let expected = greedy(&prompt, &config, &toy);
        let methods = [
            Method::Beam { beams: 1 },
            Method::Contrastive { alpha: 0.0, k: 4 },
            Method::Contrastive { alpha: 0.8, k: 1 },
        ];
        for method in methods {
            let output = drive(request(&prompt, VOCAB, &config, |s| s.method = method), &toy, None).outputs.remove(0);
            prop_assert_eq!(&output.ids, &expected.ids);
            prop_assert!(close(&output.log_probs, &expected.log_probs));
        }
    }

    /// With as many beams as there are sequences, the best are found, in order.
    #[test]
    fn enough_beams_find_the_best(seed in any::<u64>(), vocab in 2usize..5, max_new in 1usize..5, linear: bool) {
        let toy = Toy::new(seed, vocab, 6, 2.0);
        let penalty = if linear { 1.0 } else { 0.0 };
        let mut all = Vec::new();
        let mut open = vec![(Vec::new(), 0.0f64)];
        while let Some((ids, sum)) = open.pop() {
            let row = log_softmax(&(toy.logits)(&[&[1u32, 0][..], &ids].concat()));
            for (id, log_prob) in row.into_iter().enumerate() {
                let longer = ([&ids[..], &[id as u32]].concat(), sum + log_prob);
                match id == 0 || longer.0.len() == max_new {
                    true => all.push((longer.1 / (longer.0.len() as f64).powf(penalty), longer.0)),
                    false => open.push(longer),
                }
            }
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let beams = vocab.pow(max_new as u32);
        let config = GenerationConfig {
            early_stopping: Some(EarlyStopping::Never),
            length_penalty: Some(penalty as f32),
            ..config(max_new, &[0])
        };
        let wanted = all.len().min(6);
        let outputs = drive(
            request(&[1, 0], vocab, &config, |s| {
                (s.method, s.num_return_sequences) = (Method::Beam { beams }, wanted);
            }),
            &toy,
            None,
        )
        .outputs;
        prop_assert_eq!(outputs.len(), wanted);
        for (output, (score, ids)) in outputs.iter().zip(&all) {
            prop_assert!((f64::from(output.score.unwrap_or(0.0)) - score).abs() < 1e-5);
            prop_assert_eq!(&output.ids, ids);
        }
    }

    /// More beams than a small vocabulary can fill at first; and no sequence twice.
    #[test]
    fn beams_are_distinct(seed in any::<u64>(), vocab in 2usize..5, beams in 1usize..9, sample: bool) {
        let toy = Toy::new(seed, vocab, 4, 2.0);
        let config = GenerationConfig { do_sample: Some(sample), seed: Some(seed), ..config(8, &[1]) };
        let outputs = drive(
            request(&[0], vocab, &config, |s| {
                (s.method, s.num_return_sequences) = (Method::Beam { beams }, beams);
            }),
            &toy,
            None,
        )
        .outputs;
        prop_assert_eq!(outputs.len(), beams);
        for (i, a) in outputs.iter().enumerate() {
            prop_assert!(outputs[..i].iter().all(|b| a.ids != b.ids));
            prop_assert!(outputs[..i].iter().all(|b| a.score <= b.score));
            let sum: f32 = a.log_probs.iter().sum();
            prop_assert!((sum / a.ids.len() as f32 - a.score.unwrap_or(0.0)).abs() < 1e-4);
        }
    }

    /// Without a penalty for what others chose, all groups do the same.
    #[test]
    fn groups_without_diversity_agree(seed in any::<u64>(), prompt in prompts(), groups in 2usize..4) {
        let toy = Toy::new(seed, VOCAB, 3, 3.0);
        let outputs = drive(
            request(&prompt, VOCAB, &config(8, &[2]), |s| {
                s.method = Method::GroupBeam { beams: 2 * groups, groups, diversity: 0.0 };
                s.num_return_sequences = 2 * groups;
            }),
            &toy,
            None,
        )
        .outputs;
        for same in outputs.chunks(groups) {
            prop_assert!(same.iter().all(|o| o.ids == same[0].ids && o.score == same[0].score));
        }
        prop_assert_ne!(&outputs[0].ids, &outputs[groups].ids);
    }

    /// Wherever a request is cut off: it stops, hands out what it has, and says why.
    #[test]
    fn interruption(seed in any::<u64>(), prompt in prompts(), after in 0usize..8, between: bool) {
        let (toy, draft) = (Toy::new(seed, VOCAB, 3, 3.0), Toy::new(seed, VOCAB, 1, 3.0));
        for (method, do_sample) in methods() {
            let config = GenerationConfig { do_sample: Some(do_sample), ..config(12, &[2]) };
            let request = request(&prompt, VOCAB, &config, |s| s.method = method);
            let mut driver = super::toy::Driver::new(&toy, Some(&draft));
            let mut strategy = strategy(request).expect("a strategy");
            let mut events = Vec::new();
            for _ in 0..after {
                let plan = strategy.plan();
                if plan.runs.is_empty() { break; }
                strategy.advance(driver.carry_out(plan)).expect("an answer");
                events.extend(strategy.take_events());
            }
            let was_done = if between {
                let plan = strategy.plan();
                let done = plan.runs.is_empty();
                let replies = driver.carry_out(plan);
                strategy.interrupt(FinishReason::Length);
                strategy.advance(replies).expect("an answer that comes too late");
                done
            } else {
                strategy.interrupt(FinishReason::Length);
                events.iter().any(|e: &TokenEvent| e.finish.is_some())
            };
            prop_assert!(strategy.plan().runs.is_empty());
            events.extend(strategy.take_events());
            let outputs = strategy.finish();
            prop_assert_eq!(outputs.len(), 1);
            let streamed: Vec<u32> = events.iter().map(|e| e.id).collect();
            prop_assert_eq!(&streamed, &outputs[0].ids);
            if !was_done && outputs[0].ids.last() != Some(&2) {
                prop_assert_eq!(outputs[0].finish, FinishReason::Length);
            }
        }
    }
}
