//! Constrained decoding, held to others: jsonschema validates, regex matches, and automata of regex-automata say of
//! every token of the vocabulary whether it may follow.

mod common;

use common::{backend, named, novels, test_data, tiny::Tiny};
use opt_core::{
    ErrorKind, Generated, Opt, Request,
    checkpoint::Checkpoint,
    config::OptConfig,
    constraint::Constraint,
    generation::{Extras, FinishReason, GenerationConfig, Hooks, ProcessorChain, Random},
    tokenizer::Tokenizer,
};
use proptest::prelude::*;
use regex_automata::{
    Anchored, MatchKind,
    dfa::{Automaton, StartKind, dense},
    util::{primitives::StateID, start, syntax},
};
use serde_json::{Value, json};
use std::sync::LazyLock;

static NOVELS: LazyLock<Opt> = LazyLock::new(|| named("opt-novels"));
/// Of random weights, with the vocabulary of opt-novels and a few rows more.
static RANDOM: LazyLock<Opt> = LazyLock::new(|| random(11));

fn random(seed: u64) -> Opt {
    let tokenizer = Tokenizer::from_dir(novels()).unwrap();
    let tiny = Tiny { vocab: tokenizer.vocab_size() + 45, context: 320, seed, ..Tiny::default() };
    let checkpoint = Checkpoint::from_bytes(&tiny.config(), vec![tiny.weights()]).unwrap();
    let ends = GenerationConfig::default().eos_token_id([2]);
    Opt::assemble(&checkpoint, Some(tokenizer), Some(ends), backend::load_with_threads(Some(2))).unwrap()
}

fn settings(tokens: usize) -> GenerationConfig {
    GenerationConfig::default().max_new_tokens(tokens)
}

fn sampled(tokens: usize, seed: u64) -> GenerationConfig {
    settings(tokens).do_sample(true).top_k(0).seed(seed)
}

/// Every way of generating that knows no draft model.
fn ways(tokens: usize) -> Vec<GenerationConfig> {
    let mut ways = vec![
        settings(tokens),
        settings(tokens).num_beams(3).num_return_sequences(2),
        settings(tokens).num_beams(2).do_sample(true).seed(5),
        settings(tokens).num_beams(4).num_beam_groups(2).diversity_penalty(0.5),
        settings(tokens).penalty_alpha(0.6).top_k(4),
        settings(tokens).prompt_lookup_num_tokens(4),
        sampled(tokens, 1).num_return_sequences(4),
        sampled(tokens, 2).temperature(2.0),
    ];
    ways.extend((3..6).map(|seed| sampled(tokens, seed)));
    ways
}

/// The texts of sequences, all of which must have ended by themselves.
fn ended(generated: &[Generated]) -> Vec<&str> {
    let sequences = generated.iter().flat_map(|one| &one.sequences);
    sequences
        .map(|one| {
            assert_eq!(one.finish, FinishReason::Eos, "{:?}", one.text);
            one.text.as_deref().unwrap()
        })
        .collect()
}

#[test]
fn json_is_valid_under_its_schema() {
    let schemas = [
        json!({
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 12},
                "age": {"type": "integer", "minimum": 1, "maximum": 120},
                "mood": {"enum": ["merry", "grave", null, 3]},
            },
            "required": ["name", "age", "mood"],
            "additionalProperties": false,
        }),
        json!({
            "type": "object",
            "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}, "c": {"const": "ünï\"x"}},
            "required": ["b"],
            "additionalProperties": false,
        }),
        json!({
            "type": "array", "minItems": 2, "maxItems": 3,
            "items": {"type": "array", "items": {"type": "integer", "minimum": -20, "maximum": 20}, "maxItems": 2},
        }),
        json!({"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25, "multipleOf": 0.25}),
        json!({"type": "integer", "exclusiveMinimum": 99, "maximum": 1000, "multipleOf": 7}),
        json!({"type": "string", "pattern": "^[A-Z][a-z]{1,5}( [IVX]{1,3})?$"}),
        json!({
            "type": "object",
            "properties": {
                "day": {"type": "string", "format": "date"},
                "id": {"type": "string", "format": "uuid"},
                "host": {"type": "string", "format": "ipv4"},
                "mail": {"type": "string", "format": "email", "maxLength": 20},
            },
            "required": ["day", "id", "host", "mail"],
            "additionalProperties": false,
        }),
        json!({
            "$defs": {"word": {"type": "string", "maxLength": 6}},
            "anyOf": [
                {"type": "object", "properties": {"w": {"$ref": "#/$defs/word"}}, "required": ["w"],
                 "additionalProperties": false},
                {"type": "array", "prefixItems": [{"$ref": "#/$defs/word"}, {"type": "boolean"}], "items": false,
                 "minItems": 2},
            ],
        }),
        json!({
            "oneOf": [{"type": "string", "maxLength": 3}, {"type": "integer", "minimum": 0, "maximum": 9}],
        }),
    ];
    let mut checked = 0;
    for opt in [&*NOVELS, &*RANDOM] {
        for schema in &schemas {
            let constraint = Constraint::json_schema(opt, schema).unwrap_or_else(|e| panic!("{schema}: {e}"));
            assert_eq!(constraint.warnings(), [""; 0], "{schema}");
            let validator = jsonschema::options().should_validate_formats(true).build(schema).unwrap();
            let requests = ways(160)
                .into_iter()
                .map(|way| Request::new("The answer is, in short: ").config(way).constrain(&constraint));
            for text in ended(&opt.generate_batch(requests).unwrap()) {
                let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
                assert!(validator.is_valid(&value), "{text} under {schema}");
                checked += 1;
            }
        }
    }
    assert!(checked > 200, "{checked}");
}

#[test]
fn json_is_laid_out_as_asked() {
    let text = |schema: Value| {
        let constraint = Constraint::json_schema(&NOVELS, &schema).unwrap();
        let made = NOVELS.generate_batch([Request::new("It:").config(settings(60)).constrain(&constraint)]);
        ended(&made.unwrap())[0].to_owned()
    };
    assert_eq!(text(json!({"const": [1, 2]})), "[1, 2]");
    let schema = json!({
        "type": "object",
        "properties": {"b": {"const": 1}, "a": {"type": "array", "items": {"const": 2}, "minItems": 2, "maxItems": 2}},
        "required": ["a", "b"], "additionalProperties": false,
    });
    // In the order of the schema, where the features of serde_json keep it.
    assert_eq!(text(schema.clone()), r#"{"b": 1, "a": [2, 2]}"#);
    let mut tight = schema;
    tight["x-guidance"] = json!({"whitespace_flexible": false});
    assert_eq!(text(tight), r#"{"b":1,"a":[2,2]}"#);
}

#[test]
fn any_json_object() {
    let constraint = Constraint::json_object(&NOVELS).unwrap();
    let requests = (0..16).map(|seed| Request::new("Say").config(sampled(200, seed)).constrain(&constraint));
    let made = NOVELS.generate_batch(requests).unwrap();
    let mut whole = 0;
    for one in made.iter().flat_map(|one| &one.sequences) {
        let text = one.text.as_deref().unwrap();
        assert!(text.starts_with('{'), "{text}");
        if one.finish == FinishReason::Eos {
            assert!(serde_json::from_str::<Value>(text).unwrap().is_object(), "{text}");
            whole += 1;
        } else {
            assert!(serde_json::from_str::<Value>(text).is_err(), "{text} was whole and went on");
        }
    }
    assert!(whole > 0);
}

const PATTERNS: [&str; 14] = [
    r"[a-z]+",
    r" (yes|no|perhaps)",
    r"(ab|cd){1,4}e?",
    r"\d{3}-\d{4}",
    r"[^a]{1,3}x",
    r"(?i)hello|World",
    r"\p{Greek}{2,5}",
    r"[А-Яа-я]{1,3}, [😀-🙏]{2}",
    r"(a*b){0,3}",
    r"",
    r"/\*.{0,5}\*/",
    r"\w+\s\w+",
    r#""([^"\\]|\\["\\n]){0,8}""#,
    r"naïve\.?",
];

#[test]
fn texts_match_their_pattern() {
    let mut checked = 0;
    for opt in [&*NOVELS, &*RANDOM] {
        for pattern in PATTERNS {
            let constraint = Constraint::regex(opt, pattern).unwrap_or_else(|e| panic!("{pattern}: {e}"));
            let whole = regex::Regex::new(&format!(r"\A(?:{pattern})\z")).unwrap();
            let automaton = Oracle::new(pattern);
            let requests =
                ways(24).into_iter().map(|way| Request::new("It is").config(way).constrain(&constraint));
            for one in opt.generate_batch(requests).unwrap().iter().flat_map(|one| &one.sequences) {
                let text = one.text.as_deref().unwrap();
                match one.finish {
                    FinishReason::Eos => assert!(whole.is_match(text), "{text:?} by {pattern}"),
                    _ => assert!(automaton.after(&bytes(opt, &one.ids)).is_some(), "{text:?} by {pattern}"),
                }
                checked += usize::from(one.finish == FinishReason::Eos);
            }
        }
    }
    assert!(checked > 250, "{checked}");
}

#[test]
fn a_batch_of_many_kinds() {
    let (word, number) =
        (Constraint::regex(&NOVELS, " [a-z]{3}").unwrap(), Constraint::regex(&NOVELS, " [0-9]{4}"));
    let (number, schema) =
        (number.unwrap(), json!({"type": "array", "items": {"type": "boolean"}, "maxItems": 3}));
    let list = Constraint::json_schema(&NOVELS, &schema).unwrap();
    let request = |config: GenerationConfig| Request::new("The year was").config(config);
    let requests = || {
        vec![
            request(settings(12)),
            request(settings(12)).constrain(&word),
            request(sampled(12, 4)),
            request(settings(20).num_beams(3)).constrain(&number),
            request(sampled(20, 4).num_return_sequences(3)).constrain(&list),
            request(sampled(12, 4)).constrain(&word),
        ]
    };
    let together = NOVELS.generate_batch(requests()).unwrap();
    for (request, found) in requests().into_iter().zip(&together) {
        assert_eq!(NOVELS.generate_batch([request]).unwrap()[0].sequences, found.sequences);
    }
    let free = |config| NOVELS.generate("The year was", &config).unwrap();
    assert_eq!(together[0].ids(), free(settings(12)).ids());
    assert_eq!(together[2].ids(), free(sampled(12, 4)).ids());
    let three = regex::Regex::new(r"\A [a-z]{3}\z").unwrap();
    for i in [1, 5] {
        assert!(three.is_match(together[i].text()));
    }
    assert!(together[3].text().trim_start().parse::<u32>().is_ok());
    for text in ended(&together[4..5]) {
        assert!(serde_json::from_str::<Vec<bool>>(text).unwrap().len() < 4);
    }
}

#[test]
fn drafts_change_nothing() {
    let constraint = Constraint::regex(&RANDOM, r"([a-m]{2} ?){3,9}\.").unwrap();
    let request = |config: GenerationConfig| Request::new("So").config(config).constrain(&constraint);
    let plain = RANDOM.generate_batch([request(settings(60))]).unwrap().remove(0);
    let drafted = request(settings(60)).assistant(random(12));
    assert_eq!(RANDOM.generate_batch([drafted]).unwrap()[0].ids(), plain.ids());
    let drawn = (0..6).map(|seed| request(sampled(60, seed)).assistant(random(12)));
    let whole = regex::Regex::new(r"\A([a-m]{2} ?){3,9}\.\z").unwrap();
    for text in ended(&RANDOM.generate_batch(drawn).unwrap()) {
        assert!(whole.is_match(text), "{text:?}");
    }
}

#[test]
fn what_is_cut_is_a_beginning() {
    let constraint = Constraint::regex(&NOVELS, r" once upon a time there was a (king|queen)\.").unwrap();
    let request = |tokens| Request::new("And").config(settings(tokens)).constrain(&constraint);
    let cut = NOVELS.generate_batch([request(4)]).unwrap().remove(0);
    assert_eq!((cut.sequences[0].finish, cut.ids().len()), (FinishReason::Length, 4));
    assert!(" once upon a time".starts_with(cut.text()), "{:?}", cut.text());
    let whole = NOVELS.generate_batch([request(60)]).unwrap().remove(0);
    assert_eq!(whole.sequences[0].finish, FinishReason::Eos);
    assert!(whole.text().ends_with("king.") || whole.text().ends_with("queen."));
}

#[test]
fn streams_and_any_end_token() {
    // `.` as the end: it is text in the middle of others' texts, and here only where the text may end.
    let dot = NOVELS.tokenizer().unwrap().token_to_id(".").unwrap();
    let constraint = Constraint::regex(&NOVELS, r" [a-z]{4} [a-z]{2}\.?").unwrap();
    let request = Request::new("And").config(settings(20).eos_token_id([dot, 2])).constrain(&constraint);
    let mut text = String::new();
    for token in NOVELS.stream_batch([request]).unwrap() {
        text += &token.unwrap().text;
    }
    assert!(regex::Regex::new(r"\A [a-z]{4} [a-z]{2}\.?\z").unwrap().is_match(&text), "{text:?}");
}

/// What may follow, by a dense automaton: it dies as soon as no match is left.
struct Oracle(dense::DFA<Vec<u32>>);

impl Oracle {
    fn new(pattern: &str) -> Self {
        let config = dense::Config::new().start_kind(StartKind::Anchored).match_kind(MatchKind::All);
        let dfa = dense::Builder::new()
            .configure(config)
            .syntax(syntax::Config::new())
            .build(&format!(r"(?:{pattern})\z"))
            .unwrap();
        Self(dfa)
    }

    fn start(&self) -> StateID {
        self.0.start_state(&start::Config::new().anchored(Anchored::Yes)).unwrap()
    }

    fn walk(&self, state: StateID, bytes: &[u8]) -> Option<StateID> {
        let end = bytes.iter().try_fold(state, |state, byte| {
            Some(self.0.next_state(state, *byte)).filter(|next| !self.0.is_dead_state(*next))
        });
        end.filter(|end| !self.0.is_dead_state(*end))
    }

    fn after(&self, bytes: &[u8]) -> Option<StateID> {
        self.walk(self.start(), bytes)
    }

    fn may_end(&self, state: StateID) -> bool {
        self.0.is_match_state(self.0.next_eoi_state(state))
    }
}

/// The bytes of text ids.
fn bytes(opt: &Opt, ids: &[u32]) -> Vec<u8> {
    let strings = opt.tokenizer().unwrap().token_strings();
    let text = ids.iter().filter(|id| !strings.is_special(**id));
    text.flat_map(|id| strings.get(*id).unwrap().to_vec()).collect()
}

/// The processors of a request that begins with one token.
fn chain(constraint: &Constraint, vocab: usize, eos: u32) -> ProcessorChain {
    let mut model = OptConfig::default();
    (model.vocab_size, model.max_position_embeddings) = (vocab, 512);
    let config = GenerationConfig::default().eos_token_id([eos]).max_new_tokens(300);
    let (settings, _) = config.resolve(&model, &[2], 0, &Extras::default()).unwrap();
    let mut hooks = Hooks::default();
    hooks.constraint = Some(constraint.clone());
    ProcessorChain::new(&config, &settings, &hooks).unwrap()
}

/// The ids that may follow `produced`.
fn allowed(chain: &ProcessorChain, vocab: usize, produced: &[u32]) -> Vec<u32> {
    let ids: Vec<u32> = [2].iter().chain(produced).copied().collect();
    let mut scores: Vec<f32> = (0..vocab).map(|id| id as f32).collect();
    chain.apply(&ids, &mut scores).unwrap();
    for (id, score) in scores.iter().enumerate() {
        assert!(*score == id as f32 || *score == f32::NEG_INFINITY, "{id}: {score}");
    }
    (0..vocab as u32).filter(|id| scores[*id as usize].is_finite()).collect()
}

/// Walks at random through texts of a form and compares, at each place, every token's fate with the automaton's.
fn compare(
    tokenizer: &Tokenizer,
    constraint: &Constraint,
    pattern: &str,
    vocab: usize,
    walks: u64,
    most: usize,
) {
    let oracle = Oracle::new(pattern);
    let strings = tokenizer.token_strings();
    let chain = chain(constraint, vocab, 2);
    assert_eq!(chain.names(), ["prefix_allowed_tokens_fn"]);
    for seed in 0..walks {
        let mut random = Random::new(seed, 7);
        let mut produced = Vec::new();
        let mut state = oracle.start();
        for _ in 0..most {
            let found = allowed(&chain, vocab, &produced);
            let text = strings.iter().filter(|(id, bytes)| {
                !strings.is_special(*id) && !bytes.is_empty() && oracle.walk(state, bytes).is_some()
            });
            let mut expected: Vec<u32> = text.map(|(id, _)| id).collect();
            if oracle.may_end(state) {
                expected.push(2);
                expected.sort_unstable();
            }
            assert_eq!(found, expected, "{pattern} behind {produced:?}");
            let next = found[(random.uniform() * found.len() as f64) as usize];
            if next == 2 {
                break;
            }
            state = oracle.walk(state, strings.get(next).unwrap()).unwrap();
            produced.push(next);
        }
    }
}

#[test]
fn every_token_as_the_automaton_says() {
    let tokenizer = NOVELS.tokenizer().unwrap();
    for pattern in PATTERNS {
        let constraint = Constraint::regex(&NOVELS, pattern).unwrap();
        compare(tokenizer, &constraint, pattern, 8192 + 45, 6, 8);
    }
    // JSON of a bounded form is a regular language too.
    let schema = json!({
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 1, "maximum": 99}, "b": {"type": "boolean"},
                       "c": {"enum": ["x", "y z"]}},
        "required": ["a", "b"], "additionalProperties": false,
    });
    let constraint = Constraint::json_schema(&NOVELS, &schema).unwrap();
    let pattern = r#"\{"a": [1-9][0-9]?, "b": (true|false)(, "c": ("x"|"y z"))?\}"#;
    compare(tokenizer, &constraint, pattern, 8192, 8, 30);
    // And a grammar without recursion.
    let grammar = r#"
        start: greeting ("," " " name){0,2} END
        greeting: "hello" | "good " ("day" | "night")
        name: /[A-Z][a-z]{1,6}/
        END: "!" | "."
    "#;
    let constraint = Constraint::lark(&NOVELS, grammar).unwrap();
    let pattern = r"(hello|good (day|night))(, [A-Z][a-z]{1,6}){0,2}[!.]";
    compare(tokenizer, &constraint, pattern, 8192, 8, 30);
}

#[test]
fn every_token_of_the_published_vocabulary() {
    let Some(dir) = test_data("opt-tokenizer") else { return };
    let tokenizer = Tokenizer::from_dir(dir).unwrap();
    let tiny = Tiny { vocab: 50272, hidden: 8, embed: 8, heads: 1, layers: 1, ..Tiny::default() };
    let checkpoint = Checkpoint::from_bytes(&tiny.config(), vec![tiny.weights()]).unwrap();
    let opt = Opt::assemble(&checkpoint, Some(tokenizer.clone()), None, backend::load()).unwrap();
    for pattern in PATTERNS {
        let constraint = Constraint::regex(&opt, pattern).unwrap();
        compare(&tokenizer, &constraint, pattern, 50272, 2, 6);
    }
}

#[test]
fn nothing_is_remembered_wrongly() {
    let constraint = Constraint::regex(&NOVELS, r"([a-e]{1,3}[0-9])*").unwrap();
    let once = chain(&constraint, 8192, 2);
    // Many beginnings, in an order that evicts and comes back.
    let mut random = Random::new(3, 0);
    let mut beginnings = vec![Vec::new()];
    while beginnings.len() < 120 {
        let mut ids = beginnings[(random.uniform() * beginnings.len() as f64) as usize].clone();
        let next = allowed(&once, 8192, &ids);
        let next = next[(random.uniform() * next.len() as f64) as usize];
        if next != 2 {
            ids.push(next);
            beginnings.push(ids);
        }
    }
    for ids in beginnings.iter().chain(beginnings.iter().rev()) {
        assert_eq!(allowed(&once, 8192, ids), allowed(&chain(&constraint, 8192, 2), 8192, ids), "{ids:?}");
    }
}

#[test]
fn many_threads_share_one() {
    let constraint = Constraint::regex(&NOVELS, r"( [a-z]{2,6}){3}").unwrap();
    let whole = regex::Regex::new(r"\A( [a-z]{2,6}){3}\z").unwrap();
    let run = |seed| {
        let request = Request::new("The").config(sampled(40, seed)).constrain(&constraint);
        NOVELS.generate_batch([request]).unwrap().remove(0)
    };
    let alone: Vec<Generated> = (0..6).map(run).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6).map(|seed| scope.spawn(move || run(seed))).collect();
        for (thread, alone) in threads.into_iter().zip(&alone) {
            let found = thread.join().unwrap();
            assert_eq!(&found, alone);
            assert!(whole.is_match(ended(&[found])[0]));
        }
    });
}

fn nested(levels: usize) -> Value {
    (0..levels).fold(json!({"type": "null"}), |inner, _| json!({"type": "array", "items": inner}))
}

#[test]
fn what_cannot_be_meant_is_one_line() {
    let refused = |found: opt_core::Result<Constraint>, part: &str| {
        let error = found.err().unwrap_or_else(|| panic!("{part}: expected an error"));
        let line = error.to_string();
        assert_eq!(error.kind(), ErrorKind::Option, "{line}");
        assert!(line.contains(part) && !line.contains('\n') && line.len() < 300, "{line}");
    };
    for (pattern, part) in [
        ("(", "unclosed group"),
        ("a\\", "backslash"),
        ("*", "repetition"),
        (r"[a&&b]", "no text"),
        (r"\bword", ""),
        (r"(?=a)b", "look-around"),
        (r"(a)\1", "backreference"),
    ] {
        refused(Constraint::regex(&NOVELS, pattern), part);
    }
    refused(Constraint::regex(&NOVELS, &"a".repeat(1 << 19)), "at most");
    refused(Constraint::regex(&NOVELS, &"(".repeat(50_000)), "");
    for (schema, part) in [
        (json!(false), "false"),
        (json!(7), "expected an object"),
        (json!({"type": "integer", "minimum": 5, "maximum": 3}), ""),
        (json!({"type": "string", "minLength": 5, "maxLength": 3}), ""),
        (json!({"type": "nonsense"}), "nonsense"),
        (json!({"not": {"type": "string"}}), "not"),
        (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
        (json!({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}), "oneOf"),
        (json!({"$ref": "https://example.com/schema"}), "ref"),
        (json!({"$ref": "#/$defs/none"}), "none"),
        (json!({"allOf": [{"$ref": "#"}]}), ""),
        (json!({"type": "string", "pattern": "("}), "unclosed group"),
        (json!({"type": "string", "format": "shoe-size"}), "shoe-size"),
        (json!({"enum": []}), ""),
        (json!({"allOf": [{"type": "string"}, {"type": "null"}]}), ""),
        (
            json!({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "x-guidance": 3}),
            "",
        ),
        (nested(200), "levels"),
        (json!({"enum": (0..300_000).map(|i| i.to_string()).collect::<Vec<_>>()}), ""),
    ] {
        refused(Constraint::json_schema(&NOVELS, &schema), part);
    }
    Constraint::json_schema(&NOVELS, &nested(40)).unwrap();
    for (grammar, part) in [
        ("", ""),
        ("start: missing", "missing"),
        ("start: <|endoftext|>", "special token"),
        ("start: <[2]>", "no text"),
        ("start: /(/", ""),
    ] {
        refused(Constraint::lark(&NOVELS, grammar), part);
    }
    refused(Constraint::lark(&NOVELS, &format!("start: {}\"a\"", "(".repeat(20_000))), "");
}

#[test]
fn what_does_not_fit_the_model_is_an_error() {
    let none = Tiny::default().opt();
    assert_eq!(Constraint::regex(&none, "a").unwrap_err().kind(), ErrorKind::Tokenizer);
    let constraint = Constraint::regex(&NOVELS, "ab").unwrap();
    let error = |opt: &Opt, request: Request| {
        let error = opt.generate_batch([request.constrain(&constraint)]).unwrap_err();
        assert!(!error.to_string().contains('\n'), "{error}");
        error.kind()
    };
    assert_eq!(error(&none, Request::new(vec![5, 6])), ErrorKind::Tokenizer);
    // The same vocabulary, loaded again, is no other.
    let made = RANDOM.generate_batch([Request::new("A").config(settings(9)).constrain(&constraint)]).unwrap();
    assert_eq!(ended(&made), ["ab"]);
    if let Some(dir) = test_data("opt-tokenizer") {
        let tiny = Tiny { vocab: 50272, ..Tiny::default() };
        let checkpoint = Checkpoint::from_bytes(&tiny.config(), vec![tiny.weights()]).unwrap();
        let tokenizer = Tokenizer::from_dir(dir).unwrap();
        let other = Opt::assemble(&checkpoint, Some(tokenizer), None, backend::load()).unwrap();
        assert_eq!(error(&other, Request::new("A")), ErrorKind::Option);
    }
    // Without an end, and with the only end ruled out.
    let endless = Request::new("A").config(settings(9).eos_token_id([]));
    assert_eq!(error(&NOVELS, endless), ErrorKind::Option);
    let kept = Request::new("A").config(settings(30).min_new_tokens(20));
    assert_eq!(error(&NOVELS, kept), ErrorKind::Option);
}

/// Small patterns, without anything that the two crates read differently.
fn pattern() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        prop::sample::select(vec!["a", "b", "the", " of", "é", "😀", "\\.", "0"]).prop_map(str::to_owned),
        prop::sample::select(vec!["[a-d]", "[^a-y]", "\\d", "[é-ü]", ".", " ?"]).prop_map(str::to_owned),
    ];
    leaf.prop_recursive(4, 16, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..4).prop_map(|parts| parts.concat()),
            prop::collection::vec(inner.clone(), 1..4).prop_map(|parts| format!("({})", parts.join("|"))),
            (inner.clone(), 0u8..3, 0u8..3)
                .prop_map(|(one, low, more)| format!("({one}){{{low},{}}}", low + more)),
            inner.clone().prop_map(|one| format!("({one})*")),
            inner.prop_map(|one| format!("({one})+")),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn random_patterns(pattern in pattern(), seed in 0u64..1000) {
        let constraint = Constraint::regex(&RANDOM, &pattern).unwrap();
        let whole = regex::Regex::new(&format!(r"\A(?:{pattern})\z")).unwrap();
        compare(RANDOM.tokenizer().unwrap(), &constraint, &pattern, 8192, 1, 4);
        let request = |config| Request::new("x").config(config).constrain(&constraint);
        let requests = [request(settings(16)), request(sampled(16, seed)), request(settings(16).num_beams(3))];
        for one in RANDOM.generate_batch(requests).unwrap().iter().flat_map(|one| &one.sequences) {
            let text = one.text.as_deref().unwrap();
            if one.finish == FinishReason::Eos {
                prop_assert!(whole.is_match(text), "{:?} by {}", text, pattern);
            } else {
                prop_assert!(Oracle::new(&pattern).after(&bytes(&RANDOM, &one.ids)).is_some());
            }
        }
    }
}
