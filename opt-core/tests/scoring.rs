//! Pairs of context and continuation, and scores of many inputs.

mod common;

use common::{backend::same_numbers, fixtures, json, named, tiny::Tiny, tiny::random_ids};
use opt_core::{ErrorKind, ScoreInput, tokenizer::Bos};
use serde::Deserialize;

/// Texts, and their ids by transformers and the rule of lm-evaluation-harness (`_encode_pair`): white space at the end
/// of the context (Python's `rstrip`) moves to the continuation, whose ids are those of the whole text behind as many as
/// the context has.
#[derive(Deserialize)]
struct Pair {
    context: String,
    continuation: String,
    context_ids: Vec<u32>,
    continuation_ids: Vec<u32>,
}

#[test]
fn pairs_as_in_lm_evaluation_harness() {
    let pairs: Vec<Pair> = json(fixtures().join("texts/pairs.json"));
    assert!(pairs.len() > 10);
    let opt = named("opt-novels");
    for Pair { context, continuation, context_ids, continuation_ids } in pairs {
        for (bos, start) in [(Bos::Model, &[2u32][..]), (Bos::Never, &[])] {
            let found = ScoreInput::pair(&opt, &context, &continuation, bos).unwrap();
            let what = format!("{context:?} and {continuation:?}, {bos:?}");
            assert_eq!(found.ids, [start, &context_ids, &continuation_ids].concat(), "{what}");
            assert_eq!(found.from, start.len() + context_ids.len(), "{what}");
        }
    }
}

#[test]
fn a_blank_context_is_bos() {
    let opt = named("opt-novels");
    let the = [266u32];
    let blank = [224u32, 266];
    for bos in [Bos::Model, Bos::Never] {
        let found = ScoreInput::pair(&opt, "", " the", bos).unwrap();
        assert_eq!((&found.ids[..], found.from), (&[&[2], &the[..]].concat()[..], 1));
        let found = ScoreInput::pair(&opt, " ", " the", bos).unwrap();
        assert_eq!((&found.ids[..], found.from), (&[&[2], &blank[..]].concat()[..], 1));
    }
}

/// A score of nothing would be the best there is.
#[test]
fn a_continuation_without_a_token_of_its_own() {
    let opt = named("opt-novels");
    // The last two merge into the context's last token.
    for (context, continuation) in [("The river", ""), ("", ""), ("The hou", "se stood"), ("I wi", "ll")] {
        let error = ScoreInput::pair(&opt, context, continuation, Bos::Model).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Prompt);
        assert!(
            error.to_string().contains("at least one token") && !error.to_string().contains('\n'),
            "{error}"
        );
    }
}

#[test]
fn many_inputs_come_back_in_order() {
    let opt = Tiny { context: 700, ..Tiny::default() }.opt();
    // Around the size of a batch, and single inputs above it.
    let lengths = [1, 2, 511, 512, 513, 1, 701, 3, 200, 300, 12, 13, 600, 5];
    let inputs: Vec<ScoreInput> =
        lengths.iter().map(|len| ScoreInput::all(random_ids(*len as u64, *len, 61))).collect();
    let mut reports = Vec::new();
    let mut progress = |report: opt_core::Progress<'_>| {
        reports.push((report.done, report.total));
        std::ops::ControlFlow::Continue(())
    };
    let cancel = opt_core::CancelToken::new();
    let scored = opt.score_with(&inputs, &cancel, &mut progress).unwrap();
    assert_eq!(scored.len(), inputs.len());
    for (input, together) in inputs.iter().zip(&scored) {
        let alone = opt.score(std::slice::from_ref(input)).unwrap().remove(0);
        assert_eq!((&alone.ids, alone.greedy), (&together.ids, together.greedy));
        assert!(same_numbers(&alone.log_probs, &together.log_probs));
    }
    assert_eq!(reports.last(), Some(&(14, 14)));
    assert!(reports.len() > 5 && reports.is_sorted(), "{reports:?}");

    let mut stop = |_: opt_core::Progress<'_>| std::ops::ControlFlow::Break(());
    assert_eq!(opt.score_with(&inputs, &cancel, &mut stop).unwrap_err().kind(), ErrorKind::Cancelled);
    cancel.cancel();
    assert_eq!(opt.score_with(&inputs, &cancel, &mut stop).unwrap_err().kind(), ErrorKind::Cancelled);
}
