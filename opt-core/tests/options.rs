//! generation_config.json and the settings of a request: what is read, written, warned about and refused.

use opt_core::{
    ErrorKind,
    config::OptConfig,
    generation::{AssistantSchedule, EarlyStopping, Extras, GenerationConfig, Method, Settings, TokenIds},
};
use std::{fs, time::Duration};

fn config() -> GenerationConfig {
    GenerationConfig::default()
}

fn model() -> OptConfig {
    let mut model = OptConfig::default();
    (model.vocab_size, model.max_position_embeddings) = (100, 64);
    model
}

fn resolve(config: &GenerationConfig) -> opt_core::Result<(Settings, Vec<String>)> {
    config.resolve(&model(), &[2, 7, 8], 0, &Extras::default())
}

fn settings(config: GenerationConfig) -> Settings {
    resolve(&config).unwrap().0
}

/// Written by `GenerationConfig.save_pretrained` of transformers 4.57.6.
const SAVED: &str = r#"{
  "_from_model_config": true,
  "bad_words_ids": [
    [
      5
    ],
    [
      6,
      7
    ]
  ],
  "begin_suppress_tokens": [
    220,
    50256
  ],
  "bos_token_id": 2,
  "do_sample": true,
  "early_stopping": "never",
  "eos_token_id": [
    2,
    50118
  ],
  "exponential_decay_length_penalty": [
    15,
    1.6
  ],
  "length_penalty": 0.8,
  "max_new_tokens": 64,
  "num_beams": 4,
  "pad_token_id": 1,
  "sequence_bias": [
    [
      [
        9,
        10
      ],
      -2.5
    ]
  ],
  "stop_strings": [
    "\n"
  ],
  "temperature": 0.7,
  "top_k": null,
  "top_p": 0.9,
  "transformers_version": "4.57.6"
}
"#;

#[test]
fn a_file_of_transformers_is_read_and_written_in_its_format() {
    let found = GenerationConfig::from_json(SAVED).unwrap();
    let expected = config()
        .bad_words_ids(vec![vec![5], vec![6, 7]])
        .begin_suppress_tokens([220, 50256])
        .bos_token_id(2)
        .do_sample(true)
        .early_stopping(EarlyStopping::Never)
        .eos_token_id([2, 50118])
        .exponential_decay_length_penalty((15, 1.6))
        .length_penalty(0.8)
        .max_new_tokens(64)
        .num_beams(4)
        .pad_token_id(1)
        .sequence_bias([(vec![9, 10], -2.5)].into())
        .stop_strings(["\n"])
        .temperature(0.7)
        .top_k(0)
        .top_p(0.9);
    assert_eq!(found, expected);

    let mut lines: Vec<&str> = SAVED.lines().collect();
    lines.retain(|line| !line.contains("_from_model") && !line.contains("transformers_version"));
    let text =
        lines.join("\n").replace("\"top_k\": null", "\"top_k\": 0").replace("0.9,\n}", "0.9\n}") + "\n";
    assert_eq!(found.to_json(), text);
}

#[test]
fn every_option_survives_json_and_serde() {
    let full = config()
        .max_length(40)
        .max_new_tokens(5)
        .min_length(3)
        .min_new_tokens(2)
        .early_stopping(EarlyStopping::Yes)
        .max_time(1.5)
        .stop_strings(["a", "é"])
        .do_sample(true)
        .num_beams(4)
        .num_beam_groups(2)
        .diversity_penalty(0.1)
        .length_penalty(-0.3)
        .num_return_sequences(3)
        .penalty_alpha(0.6)
        .temperature(0.7)
        .top_k(7)
        .top_p(0.9)
        .min_p(0.05)
        .typical_p(0.8)
        .epsilon_cutoff(3e-4)
        .eta_cutoff(2e-3)
        .repetition_penalty(1.2)
        .no_repeat_ngram_size(3)
        .bad_words_ids(vec![vec![1, 2], vec![3]])
        .sequence_bias([(vec![4], 1.25), (vec![5, 6], f32::NEG_INFINITY)].into())
        .suppress_tokens([7])
        .begin_suppress_tokens([8, 9])
        .forced_bos_token_id(10)
        .forced_eos_token_id([11])
        .remove_invalid_values(true)
        .exponential_decay_length_penalty((3, 1.1))
        .renormalize_logits(true)
        .guidance_scale(1.0)
        .prompt_lookup_num_tokens(10)
        .max_matching_ngram_size(3)
        .num_assistant_tokens(5)
        .num_assistant_tokens_schedule("heuristic")
        .assistant_confidence_threshold(0.3)
        .pad_token_id(1)
        .bos_token_id(2)
        .eos_token_id([2, 3])
        .use_cache(false)
        .seed(u64::MAX);
    let text = full.to_json();
    assert_eq!(text.matches("\n  \"").count(), 43, "every option is written");
    let read = GenerationConfig::from_json(&text).unwrap();
    // JSON has no infinity.
    let finite = full.clone().sequence_bias([(vec![4], 1.25), (vec![5, 6], f32::MIN)].into());
    assert_eq!(read, finite);
    assert_eq!(
        serde_json::from_str::<GenerationConfig>(&serde_json::to_string(&full).unwrap()).unwrap(),
        finite
    );

    // Layers: what is set stays, what is not comes from below.
    assert_eq!(config().over(&full), full);
    assert_eq!(full.clone().over(&config().top_k(1).seed(1)), full);
    let lower = config().top_p(0.3).min_p(0.4);
    assert_eq!(config().top_p(0.2).over(&lower), config().top_p(0.2).min_p(0.4));
}

#[test]
fn files_are_written_whole_and_errors_name_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(GenerationConfig::FILE_NAME);
    let missing = GenerationConfig::from_file(&path).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(missing.to_string().contains(path.to_str().unwrap()), "{missing}");

    config().top_p(0.5).save(&path).unwrap();
    config().top_p(0.6).save(&path).unwrap();
    assert_eq!(GenerationConfig::from_file(&path).unwrap(), config().top_p(0.6));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    assert_eq!(config().save(folder.path().join("no/such.json")).unwrap_err().kind(), ErrorKind::Io);

    fs::write(&path, b"{\"top_k\": \xff}").unwrap();
    let error = GenerationConfig::from_file(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains(folder.path().to_str().unwrap()), "{error}");
}

#[test]
fn values_of_the_wrong_type_are_named() {
    let cases = [
        ("", "not usable JSON"),
        ("[1]", "expected a JSON object"),
        (r#"{"top_k": 1"#, "not usable JSON"),
        (r#"{"max_length": 20.0}"#, "max_length: expected a whole number of at least 0, found 20.0"),
        (r#"{"top_k": -1}"#, "top_k: expected a whole number of at least 0, found -1"),
        (r#"{"num_beams": true}"#, "num_beams: expected a whole number of at least 0, found true"),
        (r#"{"temperature": "hot"}"#, "temperature: expected a number, found \"hot\""),
        (r#"{"temperature": 1e200}"#, "temperature: expected a number, found 1e+200"),
        (r#"{"do_sample": 1}"#, "do_sample: expected true or false, found 1"),
        (r#"{"early_stopping": "always"}"#, "early_stopping: expected true, false or \"never\""),
        (r#"{"eos_token_id": [2, -1]}"#, "eos_token_id: expected a token id or a list of token ids"),
        (r#"{"eos_token_id": 4294967296}"#, "eos_token_id: expected a token id"),
        (r#"{"bad_words_ids": [1]}"#, "bad_words_ids: expected a list of lists of token ids, found [1]"),
        (r#"{"stop_strings": [1]}"#, "stop_strings: expected a list of texts"),
        (r#"{"sequence_bias": {"[1]": 2.0}}"#, "sequence_bias: expected [[[ids], bias], ...]"),
        (r#"{"exponential_decay_length_penalty": [1]}"#, "expected [start, factor], found [1]"),
    ];
    for (text, expected) in cases {
        let error = GenerationConfig::from_json(text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{text}");
        let message = error.to_string();
        assert!(message.starts_with("generation_config.json: ") && message.contains(expected), "{message}");
        assert!(!message.contains('\n') && message.len() < 200, "{message}");
    }
    let long = format!(r#"{{"do_sample": "{}"}}"#, "é".repeat(5000));
    assert!(GenerationConfig::from_json(&long).unwrap_err().to_string().len() < 300);
    assert!(GenerationConfig::from_json(&"[".repeat(100_000)).is_err());
}

#[test]
fn loose_values_that_transformers_takes() {
    let found = GenerationConfig::from_json(
        r#"{"temperature": 1, "stop_strings": "x", "eos_token_id": null, "top_p": null, "early_stopping": false,
            "forced_eos_token_id": 3, "unknown": {"a": [1]}, "max_time": 2, "force_words_ids": [[1]], "encoder_no_repeat_ngram_size": 2,
            "watermarking_config": null, "encoder_repetition_penalty": 1.0, "token_healing": false}"#,
    )
    .unwrap();
    let expected =
        config().temperature(1.0).stop_strings(["x"]).early_stopping(EarlyStopping::No).max_time(2.0);
    let mut expected = expected;
    expected.forced_eos_token_id = Some(TokenIds::One(3));
    let (_, warnings) = resolve(&found).unwrap();
    let ignored = ["force_words_ids", "encoder_no_repeat_ngram_size"];
    assert_eq!(warnings, ignored.map(|name| format!("{name} is not supported and ignored")));
    assert_eq!(found.to_json(), expected.to_json());
}

#[test]
fn lengths() {
    let length = |config: GenerationConfig| settings(config).max_length;
    assert_eq!(length(config()), 23, "20 new tokens, not 20 in all");
    assert_eq!(length(config().max_length(9)), 9);
    assert_eq!(length(config().max_length(9).max_new_tokens(10)), 13);
    // The last token is never run, so that it may stand one past the last position.
    assert_eq!(length(config().max_new_tokens(usize::MAX)), 65);
    assert_eq!(length(config().max_length(1000)), 65);
    assert_eq!(length(config().penalty_alpha(0.5).max_length(1000)), 64);
    let (_, warnings) = resolve(&config().max_length(1000)).unwrap();
    assert_eq!(warnings, ["1000 tokens are more than the context of 64: it ends there"]);

    // With the default length near the end of the context there is nothing to warn of.
    let prompt = [5; 60];
    let (near, warnings) = config().resolve(&model(), &prompt, 0, &Extras::default()).unwrap();
    assert_eq!((near.max_length, warnings.len()), (65, 0));

    // Rows of embeddings count, but are not ids.
    let embeds = |config: GenerationConfig| {
        config.resolve(&model(), &[2], 10, &Extras::default()).map(|(s, _)| s.max_length)
    };
    assert_eq!(embeds(config()).unwrap(), 21);
    assert_eq!(embeds(config().max_length(15)).unwrap(), 5);
    assert_eq!(embeds(config().max_new_tokens(99)).unwrap(), 55);
    assert!(embeds(config().max_length(11)).is_err());

    let (_, warnings) = resolve(&config().max_length(9).min_length(12)).unwrap();
    assert_eq!(warnings, ["min_length: 12 tokens cannot be reached, the longest are 9"]);
    let (_, warnings) = resolve(&config().max_new_tokens(2).min_new_tokens(3)).unwrap();
    assert_eq!(warnings, ["prompt and min_new_tokens: 6 tokens cannot be reached, the longest are 5"]);
}

#[test]
fn methods() {
    let with = |config: GenerationConfig| settings(config).method;
    assert_eq!(with(config()), Method::Single);
    assert_eq!(with(config().num_beams(3)), Method::Beam { beams: 3 });
    assert_eq!(
        with(config().num_beams(4).num_beam_groups(2).diversity_penalty(0.5)),
        Method::GroupBeam { beams: 4, groups: 2, diversity: 0.5 }
    );
    assert_eq!(with(config().penalty_alpha(0.6).top_k(4)), Method::Contrastive { alpha: 0.6, k: 4 });
    assert_eq!(with(config().penalty_alpha(0.6)), Method::Contrastive { alpha: 0.6, k: 50 });
    assert_eq!(with(config().penalty_alpha(0.6).top_k(500)), Method::Contrastive { alpha: 0.6, k: 100 });
    assert_eq!(with(config().penalty_alpha(0.6).top_k(1)), Method::Single);
    assert_eq!(with(config().penalty_alpha(0.0).top_k(4)), Method::Single);
    assert_eq!(with(config().prompt_lookup_num_tokens(5)), Method::PromptLookup { tokens: 5, max_ngram: 2 });
    let mut extras = Extras::default();
    extras.has_assistant = true;
    let assisted = |config: GenerationConfig| config.resolve(&model(), &[2], 0, &extras).unwrap().0.method;
    let schedule = AssistantSchedule::Constant;
    assert_eq!(assisted(config()), Method::Assisted { tokens: 20, schedule, confidence: 0.4 });
    let schedule = AssistantSchedule::Heuristic;
    assert_eq!(
        assisted(config().num_assistant_tokens(3).num_assistant_tokens_schedule("heuristic")),
        Method::Assisted { tokens: 3, schedule, confidence: 0.4 }
    );

    let two =
        settings(config().eos_token_id([4, 5]).max_time(0.5).seed(9).do_sample(true).num_return_sequences(3));
    assert_eq!((two.eos, two.max_time, two.seed), (vec![4, 5], Some(Duration::from_millis(500)), 9));
    assert_eq!((two.do_sample, two.num_return_sequences, two.pad), (true, 3, None));
    assert!(settings(config()).eos.is_empty(), "nothing ends a sequence unless a config says so");
    assert_eq!(settings(GenerationConfig::from_model(&model())).eos, [2]);
    assert!(settings(config().eos_token_id([])).eos.is_empty());
    assert_ne!(settings(config()).seed, settings(config()).seed, "a seed of its own for each request");
}

#[test]
fn unused_options_are_warned_about() {
    let warned = |config: GenerationConfig| resolve(&config).unwrap().1;
    assert!(warned(config().do_sample(true).temperature(0.5).top_p(0.9).top_k(3)).is_empty());
    assert!(warned(config().temperature(1.0).top_k(50).top_p(1.0)).is_empty(), "neutral values");
    let found = warned(config().temperature(0.5).top_p(0.9).top_k(3).min_p(0.1).length_penalty(2.0));
    let names = ["temperature", "top_k", "top_p", "min_p", "length_penalty"];
    assert_eq!(found.len(), names.len(), "{found:?}");
    assert!(found.iter().zip(names).all(|(line, name)| line.starts_with(name)), "{found:?}");
    assert!(!resolve(&config().temperature(0.5)).unwrap().0.do_sample, "stays greedy");

    let (cold, warnings) = resolve(&config().do_sample(true).temperature(0.0)).unwrap();
    assert!(!cold.do_sample && warnings[0].starts_with("temperature is 0"), "{warnings:?}");
}

#[test]
fn impossible_options_are_refused_by_name() {
    let beams = config().num_beams(4);
    let cases = [
        (config().temperature(-1.0), "temperature: expected a number above 0, found -1"),
        (config().temperature(f32::NAN), "temperature: expected a number above 0, found NaN"),
        (config().temperature(f32::INFINITY), "temperature: expected"),
        (config().top_p(0.0), "top_p: expected a number above 0 and at most 1, found 0"),
        (config().top_p(1.01), "top_p: expected"),
        (config().min_p(-0.1), "min_p: expected a number from 0 to 1"),
        (config().min_p(1.1), "min_p: expected"),
        (config().typical_p(0.0), "typical_p: expected"),
        (config().typical_p(1.5), "typical_p: expected"),
        (config().epsilon_cutoff(1.0), "epsilon_cutoff: expected a number from 0 to below 1, found 1"),
        (config().eta_cutoff(-0.1), "eta_cutoff: expected"),
        (config().repetition_penalty(0.0), "repetition_penalty: expected a number above 0, found 0"),
        (config().repetition_penalty(-2.0), "repetition_penalty: expected"),
        (config().length_penalty(f32::NAN), "length_penalty: expected"),
        (config().penalty_alpha(1.5), "penalty_alpha: expected"),
        (config().max_time(-1.0), "max_time: expected"),
        (config().max_new_tokens(0), "max_new_tokens: expected at least 1, found 0"),
        (config().max_length(3), "max_length: expected more than the prompt's 3 tokens, found 3"),
        (config().num_beams(0), "num_beams: expected at least 1, found 0"),
        (config().num_beams(1 << 40), "num_beams: expected at most 4096"),
        (config().num_return_sequences(0), "num_return_sequences: expected at least 1"),
        (config().num_return_sequences(2), "num_return_sequences: expected 1 without do_sample"),
        (
            beams.clone().num_return_sequences(5),
            "num_return_sequences: expected at most num_beams 4, found 5",
        ),
        (beams.clone().num_beam_groups(3), "num_beams: expected a multiple of num_beam_groups 3, found 4"),
        (config().num_beam_groups(2), "num_beams: expected a multiple of num_beam_groups 2, found 1"),
        (beams.clone().num_beam_groups(2), "diversity_penalty: expected a number above 0"),
        (
            beams.clone().num_beam_groups(2).diversity_penalty(1.0).do_sample(true),
            "num_beam_groups and do_sample contradict each other",
        ),
        (config().penalty_alpha(0.5).do_sample(true), "penalty_alpha and do_sample contradict"),
        (beams.clone().penalty_alpha(0.5), "penalty_alpha and num_beams above 1 contradict"),
        (
            beams.clone().prompt_lookup_num_tokens(3),
            "prompt_lookup_num_tokens and num_beams above 1 contradict",
        ),
        (config().prompt_lookup_num_tokens(0), "prompt_lookup_num_tokens: expected at least 1"),
        (
            config().prompt_lookup_num_tokens(3).do_sample(true).num_return_sequences(2),
            "num_return_sequences: expected 1 with",
        ),
        (config().num_assistant_tokens_schedule("fast"), "num_assistant_tokens_schedule: expected constant"),
        (config().assistant_confidence_threshold(2.0), "assistant_confidence_threshold: expected"),
        (config().stop_strings([""]), "stop_strings: expected texts, found an empty one"),
        (
            config().eos_token_id([2, 100]),
            "eos_token_id: expected token ids below the vocabulary of 100, found 100",
        ),
        (
            config().suppress_tokens([101]),
            "suppress_tokens: expected token ids below the vocabulary of 100, found 101",
        ),
        (config().begin_suppress_tokens([101]), "begin_suppress_tokens: expected"),
        (config().forced_bos_token_id(100), "forced_bos_token_id: expected"),
        (config().forced_eos_token_id([100]), "forced_eos_token_id: expected"),
        (config().forced_eos_token_id([]), "forced_eos_token_id: expected at least one"),
        (config().bad_words_ids(vec![vec![1], vec![2, 555]]), "bad_words_ids: expected token ids below"),
        (
            config().bad_words_ids(vec![vec![]]),
            "bad_words_ids: expected sequences of token ids, found an empty one",
        ),
        (config().sequence_bias([(vec![1, 100], 1.0)].into()), "sequence_bias: expected token ids below"),
        (config().sequence_bias([(vec![1], f32::NAN)].into()), "sequence_bias: expected a finite bias"),
        (
            config().eos_token_id([]).exponential_decay_length_penalty((1, 1.1)),
            "exponential_decay_length_penalty: expected an eos_token_id",
        ),
    ];
    for (config, expected) in cases {
        let error = resolve(&config).expect_err(expected);
        assert_eq!(error.kind(), ErrorKind::Option, "{error}");
        assert!(error.to_string().starts_with(expected), "{error}\nexpected: {expected}");
    }
    let error = resolve(&config().guidance_scale(1.5)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");

    let mut extras = Extras::default();
    extras.has_assistant = true;
    for (config, other) in [
        (beams, "num_beams above 1"),
        (config().penalty_alpha(0.5), "penalty_alpha"),
        (config().prompt_lookup_num_tokens(5), "prompt_lookup_num_tokens"),
    ] {
        let error = config.resolve(&model(), &[2], 0, &extras).unwrap_err();
        assert!(error.to_string().starts_with(&format!("a draft model and {other} contradict")), "{error}");
    }
}

#[test]
fn impossible_prompts_are_refused() {
    let fail = |prompt: &[u32], embeds| {
        let error = config().resolve(&model(), prompt, embeds, &Extras::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Prompt, "{error}");
        error.to_string()
    };
    assert_eq!(fail(&[], 0), "prompt: expected at least one token, found none");
    assert_eq!(
        fail(&[2, 5, 100], 0),
        "prompt: expected token ids below the vocabulary of 100, found 100 at 2"
    );
    assert_eq!(fail(&[2; 65], 0), "prompt: expected at most 64 tokens (the context), found 65");
    let contrastive = config().penalty_alpha(0.5).resolve(&model(), &[2; 64], 0, &Extras::default());
    let message = contrastive.unwrap_err().to_string();
    assert_eq!(message, "prompt: expected less than 64 tokens, found 64: none can follow");
    assert!(fail(&[2; 60], 5).starts_with("prompt: expected at most 64 tokens"));
    assert!(config().resolve(&model(), &[], 3, &Extras::default()).is_ok(), "embeddings alone");
    assert!(config().resolve(&model(), &[2], 0, &Extras::default()).is_ok(), "the first token alone");
}

#[test]
fn what_the_fuzzer_calls_tells_configs_from_others() {
    use opt_core::generation::fuzzing;
    assert!(fuzzing::generation_config(SAVED.as_bytes()) && fuzzing::generation_config(b"{}"));
    assert!(!fuzzing::generation_config(b"{\"top_k\": \"\xff\"}") && !fuzzing::generation_config(b"3"));
    assert!(fuzzing::config(br#"{"model_type": "opt"}"#) && !fuzzing::config(br#"{"model_type": "gpt2"}"#));
}
