//! Opening models: progress, cancelling, and what cannot be opened; and calls that cannot be made.

mod common;

use common::{
    backend::{assert_same, load},
    novels,
    tiny::Tiny,
};
use opt_core::{
    CancelToken, DType, ErrorKind, Load, Opt, Request, ScoreInput,
    backends::{self, BackendOptions},
    checkpoint::Checkpoint,
    generation::GenerationConfig,
    tokenizer::Bos,
};
use std::{fs, ops::ControlFlow, path::Path};

#[test]
fn progress_is_told_and_can_end_it() {
    let mut reports = Vec::new();
    let mut watch = |report: opt_core::Progress<'_>| {
        reports.push((report.item.to_owned(), report.done, report.total));
        ControlFlow::Continue(())
    };
    Opt::load(novels(), load().progress(&mut watch)).unwrap();
    let total = reports[0].2;
    assert_eq!(reports.len() as u64, total + 1);
    assert!(reports.iter().enumerate().all(|(i, report)| (report.1, report.2) == (i as u64, total)));
    assert!(reports.iter().any(|report| report.0 == "layers.1.fc1.weight"), "{reports:?}");

    for stop_at in [0, 1, total / 2, total] {
        let mut count = 0;
        let mut watch = |_: opt_core::Progress<'_>| {
            count += 1;
            if count > stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let error = Opt::load(novels(), load().progress(&mut watch)).err().unwrap();
        assert_eq!((error.kind(), count), (ErrorKind::Cancelled, stop_at + 1));
    }
}

#[test]
fn a_token_ends_it() {
    let cancel = CancelToken::new();
    let (mut count, elsewhere) = (0, cancel.clone());
    let mut watch = |_: opt_core::Progress<'_>| {
        count += 1;
        if count == 3 {
            let elsewhere = elsewhere.clone();
            std::thread::spawn(move || elsewhere.cancel()).join().unwrap();
        }
        ControlFlow::Continue(())
    };
    let watched = load().cancel(cancel.clone()).progress(&mut watch);
    assert_eq!(Opt::load(novels(), watched).err().unwrap().kind(), ErrorKind::Cancelled);
    assert_eq!(count, 3);
    let error = Opt::load(novels(), load().cancel(cancel)).err().unwrap();
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::Cancelled, "loading was cancelled".to_owned()));
}

/// A folder with files of these contents.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(dir.path().join(name), bytes).unwrap());
    dir
}

#[track_caller]
fn refused(path: impl AsRef<Path>, kind: ErrorKind, part: &str) {
    let error =
        Opt::load(&path, load()).err().unwrap_or_else(|| panic!("{} was opened", path.as_ref().display()));
    let line = error.to_string();
    assert_eq!(error.kind(), kind, "{line}");
    assert!(line.contains(part) && !line.contains('\n'), "{line}");
}

#[test]
fn what_cannot_be_opened() {
    let tiny = Tiny::default();
    let (config, weights) = (tiny.config(), tiny.weights());
    let (config, weights): (&[u8], &[u8]) = (config.as_bytes(), &weights);
    let dir = folder(&[("config.json", config), ("model.safetensors", weights)]);
    let opt = Opt::load(dir.path(), load()).unwrap();
    let by_file = Opt::load(dir.path().join("model.safetensors"), load()).unwrap();
    let settings = GenerationConfig::default();
    assert_eq!(
        opt.generate(&[1u32][..], &settings).unwrap().ids(),
        by_file.generate(&[1u32][..], &settings).unwrap().ids()
    );
    assert!(opt.tokenizer().is_none() && opt.warnings().is_empty());
    for error in [
        opt.generate("text", &settings).err().unwrap(),
        ScoreInput::pair(&opt, "a", "b", Bos::Model).err().unwrap(),
        opt.generate(&[1u32][..], &settings.clone().stop_strings(["x"])).err().unwrap(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Tokenizer, "{error}");
    }

    refused(dir.path().join("nowhere"), ErrorKind::NotFound, "nowhere");
    refused(dir.path().join("config.json"), ErrorKind::Unsupported, "config.json");
    refused(folder(&[]).path(), ErrorKind::NotFound, "");
    refused(folder(&[("config.json", config)]).path(), ErrorKind::NotFound, "");
    refused(folder(&[("model.safetensors", weights)]).path(), ErrorKind::NotFound, "config.json");
    let with = |name: &str, bytes: &[u8]| {
        folder(&[("config.json", config), ("model.safetensors", weights), (name, bytes)])
    };
    refused(with("model.safetensors", &weights[..weights.len() / 2]).path(), ErrorKind::Checkpoint, "");
    refused(with("config.json", b"{").path(), ErrorKind::Config, "config.json");
    let other_heads = tiny.config().replace("\"num_attention_heads\":2", "\"num_attention_heads\":5");
    refused(with("config.json", other_heads.as_bytes()).path(), ErrorKind::Config, "");
    let more_layers = tiny.config().replace("\"num_hidden_layers\":2", "\"num_hidden_layers\":3");
    refused(with("config.json", more_layers.as_bytes()).path(), ErrorKind::Checkpoint, "missing");
    let more_words = tiny.config().replace("\"vocab_size\":61", "\"vocab_size\":62");
    refused(with("config.json", more_words.as_bytes()).path(), ErrorKind::Checkpoint, "[62, 32]");
    let unknown = tiny.config().replacen('{', "{\"activation_function\":\"tango\",", 1);
    refused(with("config.json", unknown.as_bytes()).path(), ErrorKind::Config, "tango");
    let generation = "generation_config.json";
    refused(with(generation, b"{\"top_k\": \"many\"}").path(), ErrorKind::Config, generation);
    refused(with("tokenizer.json", b"{}").path(), ErrorKind::Tokenizer, "tokenizer.json");
    refused(with("vocab.json", b"{}").path(), ErrorKind::Tokenizer, "merges.txt");

    // One of the caller's numbers in generation_config.json counts, and one out of range fails when it is used.
    let opt = Opt::load(with(generation, b"{\"max_new_tokens\": 3}").path(), load()).unwrap();
    assert_eq!(opt.generate(&[1u32][..], &settings).unwrap().ids().len(), 3);
    let opt = Opt::load(with(generation, b"{\"top_p\": 3}").path(), load()).unwrap();
    assert_eq!(opt.generate(&[1u32][..], &settings).unwrap_err().kind(), ErrorKind::Option);
}

#[test]
fn a_tokenizer_that_knows_more_than_the_model() {
    let tiny = Tiny::default();
    let checkpoint = Checkpoint::from_bytes(&tiny.config(), vec![tiny.weights()]).unwrap();
    let tokenizer = Opt::load(novels(), load()).unwrap().tokenizer().cloned();
    let opt = Opt::assemble(&checkpoint, tokenizer, None, load()).unwrap();
    assert_eq!(opt.warnings().len(), 1);
    let error = opt.generate("The river", &GenerationConfig::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Prompt);
    assert!(error.to_string().contains("61"), "{error}");
}

#[test]
fn backends_by_name() {
    let options = BackendOptions::default();
    let message = |name: &str, options: &BackendOptions| {
        let error = backends::choose(name, options).err().unwrap_or_else(|| panic!("{name} was chosen"));
        assert!(!error.to_string().contains('\n'));
        (error.kind(), error.to_string())
    };
    assert!(backends::choose("cpu", &options).is_ok());
    let unknown = message("abacus", &options);
    assert_eq!(unknown.0, ErrorKind::Option);
    assert!(backends::NAMES.iter().all(|name| unknown.1.contains(name)), "{}", unknown.1);
    let mut device = BackendOptions::default();
    device.device = Some("cuda:0".to_owned());
    assert_eq!(message("cpu", &device).0, ErrorKind::Option);
    let mut threads = BackendOptions::default();
    threads.threads = Some(0);
    assert_eq!(message("cpu", &threads).0, ErrorKind::Option);
    threads.threads = Some(3);
    let opt = Opt::load(novels(), Load::with(backends::choose("cpu", &threads).unwrap())).unwrap();
    assert_eq!(opt.info().threads, 3);
    assert!(backends::list(&options).iter().any(|(name, info)| *name == "cpu" && info.is_ok()));
}

#[test]
fn half_precision_says_the_same() {
    let tiny = Tiny::default();
    let ids = common::tiny::random_ids(4, 40, 61);
    let exact = tiny.opt().logits(&ids).unwrap();
    for dtype in [DType::BF16, DType::F16] {
        let half = tiny.load(load().dtype(dtype)).logits(&ids).unwrap();
        let off: f32 = (&half - &exact).mapv(|x| x * x).sum();
        let length: f32 = exact.mapv(|x| x * x).sum();
        assert!(off > 0.0 && off / length < 2e-3, "{dtype:?}: {}", off / length);
    }
}

/// Calls that cannot be made: each one line, of the kind that says whose mistake it is.
#[test]
fn bad_calls() {
    let opt = Tiny::default().opt();
    let c = GenerationConfig::default;
    let calls: Vec<(GenerationConfig, ErrorKind)> = vec![
        (c().temperature(-1.0).do_sample(true), ErrorKind::Option),
        (c().temperature(f32::NAN).do_sample(true), ErrorKind::Option),
        (c().top_p(0.0), ErrorKind::Option),
        (c().top_p(1.1), ErrorKind::Option),
        (c().num_beams(0), ErrorKind::Option),
        (c().num_beams(2).num_return_sequences(3), ErrorKind::Option),
        (c().num_return_sequences(0), ErrorKind::Option),
        (c().num_return_sequences(2), ErrorKind::Option),
        (c().num_beams(3).num_beam_groups(2).diversity_penalty(1.0), ErrorKind::Option),
        (c().max_length(3), ErrorKind::Option),
        (c().max_time(f64::NAN), ErrorKind::Option),
        (c().max_time(-1.0), ErrorKind::Option),
        (c().repetition_penalty(0.0), ErrorKind::Option),
        (c().repetition_penalty(f32::INFINITY), ErrorKind::Option),
        (c().length_penalty(f32::NAN).num_beams(2), ErrorKind::Option),
        (c().bad_words_ids(vec![vec![]]), ErrorKind::Option),
        (c().bad_words_ids(vec![vec![61]]), ErrorKind::Option),
        (c().suppress_tokens(0..61), ErrorKind::Option),
        (c().penalty_alpha(0.5).num_beams(2), ErrorKind::Option),
        (c().penalty_alpha(0.5).do_sample(true), ErrorKind::Option),
        (c().prompt_lookup_num_tokens(0), ErrorKind::Option),
        (c().guidance_scale(2.0), ErrorKind::Unsupported),
    ];
    for (config, kind) in calls {
        let error = match opt.generate(&[1u32, 2, 3][..], &config) {
            Err(error) => error,
            Ok(_) => panic!("accepted: {}", config.to_json()),
        };
        assert_eq!(error.kind(), kind, "{}: {error}", config.to_json());
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    // Sizes past any memory are refused or cut, not tried.
    for config in [c().max_new_tokens(usize::MAX), c().max_length(usize::MAX), c().min_new_tokens(usize::MAX)]
    {
        let _ = opt.generate(&[1u32, 2, 3][..], &config);
    }

    let wide = ndarray::Array2::<f32>::zeros((2, 33));
    let none = ndarray::Array2::<f32>::zeros((0, 32));
    let small = Tiny { context: 20, ..Tiny::default() }.opt();
    let other_words = Tiny { vocab: 60, ..Tiny::default() }.opt();
    let assisted = |draft: &Opt| Request::new(&[1u32][..]).assistant(draft.clone());
    let requests: Vec<(Request, ErrorKind)> = vec![
        (Request::new(Vec::<u32>::new()), ErrorKind::Prompt),
        (Request::new(vec![61]), ErrorKind::Prompt),
        (Request::new(vec![u32::MAX]), ErrorKind::Prompt),
        (Request::new(vec![1; 97]), ErrorKind::Prompt),
        (Request::new(wide), ErrorKind::Prompt),
        (Request::new(none), ErrorKind::Prompt),
        (Request::new("text"), ErrorKind::Tokenizer),
        (assisted(&other_words), ErrorKind::Option),
        (assisted(&small).config(c().max_new_tokens(30)), ErrorKind::Option),
        (assisted(&small).config(c().num_beams(2)), ErrorKind::Option),
        (Request::new(vec![1]).allow_only(|_| Vec::new()), ErrorKind::Option),
    ];
    for (i, (request, kind)) in requests.into_iter().enumerate() {
        let batch = [Request::new(vec![1]), request.clone()];
        let in_batch = opt.generate_batch(batch).err().unwrap_or_else(|| panic!("request {i} was accepted"));
        let alone = opt.generate_batch([request]).unwrap_err();
        assert_eq!((alone.kind(), in_batch.kind()), (kind, kind), "{i}: {alone}; {in_batch}");
        assert!(!alone.to_string().contains('\n') && !in_batch.to_string().contains('\n'));
    }
    assert!(opt.generate_batch([vec![1], vec![99]]).unwrap_err().to_string().starts_with("request 2: "));
    assert!(opt.generate_batch(Vec::<Request>::new()).unwrap().is_empty());
    // A draft model whose context is just enough.
    let config = c().max_new_tokens(21);
    let found = opt.generate_batch([assisted(&small).config(config.clone())]).unwrap().remove(0);
    assert_same(&found.sequences, &opt.generate(&[1u32][..], &config).unwrap().sequences);

    for (ids, part) in [(vec![], "at least one token"), (vec![61], "below"), (vec![1; 97], "at most 96")] {
        for error in [
            opt.logits(&ids).unwrap_err(),
            opt.hidden_states(&ids).unwrap_err(),
            opt.attentions(&ids).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Prompt);
            assert!(error.to_string().contains(part), "{error}");
        }
    }
    let score = |ids: Vec<u32>, from: usize| opt.score(&[ScoreInput { ids, from }]);
    assert!(opt.score(&[]).unwrap().is_empty());
    assert_eq!(score(vec![5], 1).unwrap()[0].log_probs, [0f32; 0]);
    assert_eq!(score(vec![1; 97], 1).unwrap()[0].log_probs.len(), 96);
    for (ids, from) in [(vec![], 1), (vec![1; 98], 1), (vec![1, 2], 0), (vec![1, 2], 3), (vec![1, 61], 1)] {
        let error = score(ids, from).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Prompt);
        assert!(error.to_string().starts_with("input 1: "), "{error}");
    }
}

/// Weights that overflowed, as float16 does: nothing can be chosen among NaN, and that is said.
#[test]
fn a_model_that_says_nan() {
    let tiny = Tiny::default();
    let weights = tiny.weights();
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let broken: Vec<u8> =
        weights[..header].iter().copied().chain((header..weights.len()).map(|_| 0xff)).collect();
    let checkpoint = Checkpoint::from_bytes(&tiny.config(), vec![broken]).unwrap();
    let opt = Opt::assemble(&checkpoint, None, None, load()).unwrap();
    let c = GenerationConfig::default;
    for config in [
        c(),
        c().repetition_penalty(1.3),
        c().do_sample(true),
        c().num_beams(3),
        c().num_beams(2).num_beam_groups(2).diversity_penalty(1.0),
        c().penalty_alpha(0.5).top_k(3),
        c().prompt_lookup_num_tokens(3),
    ] {
        match opt.generate(&[1u32, 2, 1][..], &config) {
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
            Ok(found) => panic!("{:?} came of NaN with {}", found.ids(), config.to_json()),
        }
    }
    let _ = opt.score(&[ScoreInput::all(vec![1, 2, 3])]).unwrap();
    assert!(opt.session().append(vec![1, 2, 3]).is_ok());
}
