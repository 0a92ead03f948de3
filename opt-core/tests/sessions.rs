//! Conversations that keep their cache: each turn as one fresh run over all that was said.

mod common;

use common::{
    backend::{self, assert_same, prop_assert_same},
    named,
    tiny::Tiny,
};
use opt_core::{
    ErrorKind, Opt, Request, Session,
    generation::{FinishReason, GenerationConfig},
    prompt::Overflow,
    tokenizer::Bos,
};
use proptest::{collection::vec, prelude::*, test_runner::Config};
use std::{fs, sync::LazyLock};

const CONTEXT: usize = 96;

static OPT: LazyLock<Opt> = LazyLock::new(|| Tiny::default().opt());

#[derive(Debug, Clone)]
enum Turn {
    Append(Vec<u32>),
    Generate(Vec<u32>, GenerationConfig),
    /// Read so many tokens of the stream, then hand it back.
    Stream(Vec<u32>, GenerationConfig, usize),
    Truncate(usize),
    /// Go on with a fork; the original must not notice.
    Fork(Vec<u32>),
    /// Go on with what was restored from a file.
    Restore,
}

fn settings() -> impl Strategy<Value = GenerationConfig> {
    let plain = || GenerationConfig::default();
    let method = prop_oneof![
        Just(plain()),
        Just(plain().use_cache(false)),
        any::<u64>().prop_map(move |seed| plain().do_sample(true).seed(seed).num_return_sequences(2)),
        (2usize..4).prop_map(move |beams| plain().num_beams(beams).num_return_sequences(beams)),
        Just(plain().penalty_alpha(0.6).top_k(3)),
        Just(plain().prompt_lookup_num_tokens(4)),
    ];
    (method, 0usize..9).prop_map(|(config, new)| config.max_new_tokens(new))
}

fn turn() -> impl Strategy<Value = Turn> {
    let ids = || vec(0u32..61, 0..12);
    prop_oneof![
        ids().prop_map(Turn::Append),
        (ids(), settings()).prop_map(|(ids, config)| Turn::Generate(ids, config)),
        (ids(), settings(), 0usize..5).prop_map(|(ids, config, n)| Turn::Stream(ids, config, n)),
        (0usize..60).prop_map(Turn::Truncate),
        ids().prop_map(Turn::Fork),
        Just(Turn::Restore),
    ]
}

proptest! {
    #![proptest_config(Config { cases: 64, failure_persistence: None, ..Config::default() })]

    #[test]
    fn turns_as_fresh_runs(turns in vec(turn(), 1..12)) {
        let dir = tempfile::tempdir().unwrap();
        let mut session = OPT.session();
        let mut expected: Vec<u32> = Vec::new();
        for turn in turns {
            match turn {
                Turn::Append(ids) => {
                    let fits = expected.len() + ids.len() <= CONTEXT;
                    prop_assert_eq!(session.append(&ids[..]).is_ok(), fits);
                    if fits {
                        expected.extend(ids);
                    }
                }
                Turn::Generate(ids, config) => {
                    let all = [&expected[..], &ids].concat();
                    match (OPT.generate(&all[..], &config), session.generate(&ids[..], &config)) {
                        (Ok(fresh), Ok(found)) => {
                            prop_assert_same!(found.sequences, fresh.sequences);
                            expected = [&all[..], fresh.ids()].concat();
                        }
                        (Err(fresh), Err(found)) => prop_assert_eq!(found.to_string(), fresh.to_string()),
                        (fresh, found) => prop_assert!(false, "{:?}, fresh {:?}", found, fresh),
                    }
                }
                Turn::Stream(ids, config, read) => {
                    let all = [&expected[..], &ids].concat();
                    let Ok(fresh) = OPT.generate(&all[..], &config) else { continue };
                    let mut stream = session.start(Request::new(&ids[..]).config(config)).unwrap();
                    stream.by_ref().take(read).for_each(|token| assert!(token.is_ok()));
                    prop_assert_same!(session.absorb(stream).unwrap().sequences, fresh.sequences);
                    expected = [&all[..], fresh.ids()].concat();
                }
                Turn::Truncate(len) => {
                    session.truncate(len).unwrap();
                    expected.truncate(len);
                }
                Turn::Fork(ids) => {
                    let fork = session.fork().unwrap();
                    let _ = session.append(&ids[..]);
                    session = fork;
                }
                Turn::Restore => {
                    let file = dir.path().join("session");
                    session.save(&file).unwrap();
                    session = Session::restore(&OPT, &file).unwrap();
                }
            }
            prop_assert_eq!(session.ids(), &expected[..]);
        }
    }
}

#[test]
fn a_fork_and_its_original_go_their_own_ways() {
    let config = GenerationConfig::default().max_new_tokens(10);
    let mut one = OPT.session();
    one.append(&[5u32, 9, 13, 40, 2, 2, 7][..]).unwrap();
    let mut other = one.fork().unwrap();
    let (left, right) = ([1u32, 2, 3], [50u32]);
    // In turns, so that each writes while the other holds the shared past.
    for _ in 0..3 {
        let fresh = |session: &Session, new: &[u32]| {
            OPT.generate([session.ids(), new].concat(), &config).unwrap().sequences
        };
        let expected = (fresh(&one, &left), fresh(&other, &right));
        assert_same(&one.generate(&left[..], &config).unwrap().sequences, &expected.0);
        assert_same(&other.generate(&right[..], &config).unwrap().sequences, &expected.1);
    }
}

#[test]
fn bos_stands_before_the_first_text_only() {
    let opt = named("opt-novels");
    let config = GenerationConfig::default().max_new_tokens(5);
    let mut session = opt.session();
    session.append("The old house").unwrap();
    assert_eq!(session.ids()[0], 2);
    session.generate(" stood upon", &config).unwrap();
    session.append(" and").unwrap();
    assert_eq!(session.ids().iter().filter(|id| **id == 2).count(), 1);
    assert!(session.text().unwrap().starts_with("The old house stood upon"));

    let mut session = opt.session();
    session.run(Request::new("The old house").config(config).bos(Bos::Never)).unwrap();
    assert_ne!(session.ids()[0], 2);
}

#[test]
fn at_the_end_of_the_context() {
    let mut session = OPT.session();
    session.append(vec![7u32; CONTEXT]).unwrap();
    // One token fits behind the last position, since it is never run.
    let found = session.generate(Vec::<u32>::new(), &GenerationConfig::default()).unwrap();
    assert_eq!((found.ids().len(), found.sequences[0].finish), (1, FinishReason::Length));
    let error = session.generate(Vec::<u32>::new(), &GenerationConfig::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Prompt);
    assert_eq!(error.to_string(), "the prompt is too long: expected at most 96 tokens, found 97");
    let error = session.append(&[1u32][..]).unwrap_err();
    assert_eq!(error.to_string(), "session: expected at most 96 tokens (the context), found 98");
    assert_eq!(session.ids().len(), CONTEXT + 1);

    // Cut on the left, as asked for: every token moves, and the cache is of no use.
    let config = GenerationConfig::default().max_new_tokens(10);
    let request = |ids: Vec<u32>| Request::new(ids).config(config.clone()).overflow(Overflow::TruncateLeft);
    let mut cut = session.fork().unwrap();
    let expected = OPT.generate_batch([request([cut.ids(), &[3, 4]].concat())]).unwrap().remove(0);
    let found = cut.run(request(vec![3, 4])).unwrap();
    assert_same(&found.sequences, &expected.sequences);
    assert_eq!(cut.ids().len(), CONTEXT + 1);

    session.truncate(80).unwrap();
    let expected = OPT.generate(session.ids(), &config).unwrap();
    assert_same(&session.generate(Vec::<u32>::new(), &config).unwrap().sequences, &expected.sequences);
}

#[test]
fn a_turn_that_fails_leaves_the_session_as_it_was() {
    let config = GenerationConfig::default().max_new_tokens(6);
    let mut session = OPT.session();
    session.append(&[1u32, 2, 3][..]).unwrap();
    for error in [
        session.append(&[4u32, 61][..]).unwrap_err(),
        session.append("text without a tokenizer").unwrap_err(),
        session.append(ndarray::Array2::zeros((1, 32))).unwrap_err(),
        session.generate(&[61u32][..], &config).unwrap_err(),
        session.generate(&[6u32][..], &config.clone().top_p(2.0)).unwrap_err(),
        OPT.session().generate(Vec::<u32>::new(), &config).unwrap_err(),
    ] {
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    // Neither does a stream of another conversation, another model, or several requests.
    let mut other = OPT.session();
    other.append(&[9u32, 9][..]).unwrap();
    let of_other = other.start(Request::new(&[5u32][..])).unwrap();
    let mut same_ids = Tiny::default().opt().session();
    same_ids.append(session.ids()).unwrap();
    let of_same_ids = same_ids.start(Request::new(&[5u32][..])).unwrap();
    let two = OPT.stream_batch([&[1u32, 2, 3, 4][..], &[1u32, 2, 3, 5][..]]).unwrap();
    let none = OPT.stream_batch(Vec::<Request>::new()).unwrap();
    let rows = OPT.stream_batch([ndarray::Array2::zeros((4, 32))]).unwrap();
    for stream in [of_other, of_same_ids, two, none, rows] {
        assert_eq!(session.absorb(stream).unwrap_err().kind(), ErrorKind::Option);
    }
    // A turn that was begun before something else was added.
    let early = session.fork().unwrap().start(Request::new(&[8u32][..])).unwrap();
    assert_eq!(session.ids(), [1, 2, 3]);
    let expected = OPT.generate(&[1u32, 2, 3, 7][..], &config).unwrap();
    assert_same(&session.generate(&[7u32][..], &config).unwrap().sequences, &expected.sequences);
    assert_eq!(session.absorb(early).unwrap_err().kind(), ErrorKind::Option);
    assert_eq!(session.ids().len(), 4 + 6);
}

#[test]
fn a_long_session_restored() {
    let tiny = Tiny { context: 1300, ..Tiny::default() };
    let opt = tiny.opt();
    let ids = common::tiny::random_ids(5, 1200, 61);
    let mut session = opt.session();
    session.append(&ids[..700]).unwrap();
    session.append(&ids[700..]).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    session.save(file.path()).unwrap();
    let config = GenerationConfig::default().max_new_tokens(20);
    let expected = opt.generate(&ids[..], &config).unwrap().sequences;
    assert_same(&session.generate(Vec::<u32>::new(), &config).unwrap().sequences, &expected);
    // The same weights, loaded once more on another number of threads.
    let mut restored = Session::restore(&tiny.on_threads(1), file.path()).unwrap();
    assert_same(&restored.generate(Vec::<u32>::new(), &config).unwrap().sequences, &expected);
}

#[test]
fn files_that_are_no_session_of_this_model() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("session");
    let mut session = OPT.session();
    session.append(&[1u32, 2, 3][..]).unwrap();
    session.generate(&[4u32][..], &GenerationConfig::default()).unwrap();
    session.save(&file).unwrap();
    let refused = |opt: &Opt, part: &str| {
        let error = Session::restore(opt, &file).err().unwrap_or_else(|| panic!("accepted: {part}"));
        let line = error.to_string();
        assert!(line.contains(part) && !line.contains('\n') && line.len() < 300, "{line}");
        assert!(line.starts_with(&file.display().to_string()), "{line}");
        error.kind()
    };
    let other = Tiny { seed: 77, ..Tiny::default() }.opt();
    assert_eq!(refused(&other, "another model of the same shape"), ErrorKind::Checkpoint);
    let small = Tiny { hidden: 16, embed: 16, ..Tiny::default() }.opt();
    assert_eq!(refused(&small, "another shape"), ErrorKind::Checkpoint);
    refused(&Tiny { heads: 4, ..Tiny::default() }.opt(), "another shape");
    refused(&Tiny { context: 64, ..Tiny::default() }.opt(), "another shape");

    // The same model as bf16: the same words, with a bf16 model's rounding.
    let bf16 = Tiny::default().load(backend::load().dtype(opt_core::DType::BF16));
    Session::restore(&bf16, &file).unwrap();

    // Damage at every place: refused, or what was damaged is only a number.
    let whole = fs::read(&file).unwrap();
    for at in (0..whole.len()).step_by(whole.len() / 400 + 1).chain(0..16) {
        fs::write(&file, &whole[..at]).unwrap();
        assert_eq!(refused(&OPT, "not a usable session"), ErrorKind::Checkpoint);
        let mut flipped = whole.clone();
        flipped[at] ^= 0x41;
        fs::write(&file, &flipped).unwrap();
        match Session::restore(&OPT, &file) {
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
            Ok(mut session) => drop(session.generate(&[1u32][..], &GenerationConfig::default())),
        }
    }
    fs::write(&file, b"").unwrap();
    refused(&OPT, "not a usable session");
    fs::write(&file, Tiny::default().weights()).unwrap();
    refused(&OPT, "expected format");
    fs::remove_file(&file).unwrap();
    assert_eq!(refused(&OPT, "cannot read"), ErrorKind::NotFound);
    fs::create_dir(&file).unwrap();
    assert_eq!(refused(&OPT, "cannot read"), ErrorKind::Io);
}

#[test]
fn saving_is_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let mut session = OPT.session();
    session.append(&[1u32, 2, 3][..]).unwrap();
    let missing = dir.path().join("missing/session");
    let error = session.save(&missing).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().starts_with(&missing.display().to_string()), "{error}");

    // A directory in the place of the file: it stays, and nothing is left beside it.
    let taken = dir.path().join("taken");
    fs::create_dir_all(taken.join("inside")).unwrap();
    assert_eq!(session.save(&taken).unwrap_err().kind(), ErrorKind::Io);
    assert!(taken.join("inside").is_dir());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    // Another session's file is replaced whole.
    let file = dir.path().join("session");
    session.save(&file).unwrap();
    session.append(&[4u32; 40][..]).unwrap();
    session.save(&file).unwrap();
    assert_eq!(Session::restore(&OPT, &file).unwrap().ids(), session.ids());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn with_a_draft_model() {
    let draft = Tiny { layers: 1, ..Tiny::default() }.opt();
    let config = GenerationConfig::default().max_new_tokens(12);
    let mut session = OPT.session();
    for turn in [&[5u32, 6, 7][..], &[], &[9, 8, 9, 8]] {
        let expected = OPT.generate([session.ids(), turn].concat(), &config).unwrap();
        let found = session.run(Request::new(turn).config(config.clone()).assistant(draft.clone())).unwrap();
        assert_same(&found.sequences, &expected.sequences);
    }
}
