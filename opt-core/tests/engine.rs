//! The engine by hand: what cannot be run is one line, and caches hold what they held before.

mod common;

use common::{
    backend::assert_same_array,
    tiny::{Tiny, random_ids},
};
use ndarray::{Array2, s};
use opt_core::{
    CacheDType, CancelToken, ErrorKind, Opt, Result,
    engine::{Forward, Hidden, KvCache, Output, Sequence, Want},
};

fn run<'a>(opt: &'a Opt, sequences: Vec<Sequence<'a>>) -> Result<Vec<Output>> {
    opt.engine().forward_blocking(Forward { sequences, ..Forward::default() })
}

fn with_cache<'a>(ids: &'a [u32], cache: &'a mut KvCache, want: Want<'a>) -> Sequence<'a> {
    let mut sequence = Sequence::new(ids).want(want);
    sequence.cache = Some(cache);
    sequence
}

#[test]
fn refusals_leave_caches_as_they_were() {
    let opt = Tiny::default().opt();
    let ids = random_ids(1, 20, 61);
    let whole = opt.logits(&ids).unwrap();
    let mut cache = opt.engine().new_cache(CacheDType::F32).unwrap();
    run(&opt, vec![with_cache(&ids[..10], &mut cache, Want::Nothing)]).unwrap();

    let (wide, past) = (Array2::<f32>::zeros((2, 33)), [96u32]);
    let too_long = vec![1u32; 87];
    let cancelled = CancelToken::new();
    cancelled.cancel();
    for case in 0..10 {
        let mut other = opt.engine().new_cache(CacheDType::F32).unwrap();
        let mut sequence = with_cache(&ids[10..11], &mut cache, Want::Nothing);
        let mut kind = ErrorKind::Prompt;
        let mut batch = Forward::default();
        match case {
            0 => sequence.input = (&[3u32, 61][..]).into(),
            1 => sequence.input = wide.view().into(),
            2 => sequence.input = (&too_long[..]).into(),
            3 => sequence.want = Want::Logits { rows: 2 },
            4 => sequence.want = Want::LogProbs { targets: &[61] },
            5 => sequence.positions = Some(&[]),
            6 => sequence.positions = Some(&past),
            7 => {
                kind = ErrorKind::Cancelled;
                batch.cancel = Some(&cancelled);
            }
            // The sequence is fine; the one beside it is not.
            8 => batch.sequences.push(with_cache(&[99], &mut other, Want::Nothing)),
            _ => {
                kind = ErrorKind::Option;
                batch.sequences.push(Sequence::new(&ids[..3]));
            }
        }
        batch.sequences.push(sequence);
        let error = opt.engine().forward_blocking(batch).err().unwrap_or_else(|| panic!("case {case}"));
        assert_eq!(error.kind(), kind, "case {case}: {error}");
        assert!(!error.to_string().contains('\n'), "{error}");
        assert_eq!((cache.len(), other.len()), (10, 0), "case {case}");
    }
    // Broken off between layers.
    let mut stop = |report: opt_core::Progress<'_>| match report.done {
        0 => std::ops::ControlFlow::Continue(()),
        _ => std::ops::ControlFlow::Break(()),
    };
    let sequences = vec![with_cache(&ids[10..15], &mut cache, Want::Nothing)];
    let batch = Forward { sequences, cancel: None, watch: Some(&mut stop) };
    assert_eq!(opt.engine().forward_blocking(batch).err().unwrap().kind(), ErrorKind::Cancelled);
    assert_eq!(cache.len(), 10);

    let found =
        run(&opt, vec![with_cache(&ids[10..], &mut cache, Want::Logits { rows: 10 })]).unwrap().remove(0);
    assert_same_array(found.logits.unwrap().view(), whole.slice(s![10.., ..]));
}

#[test]
fn caches_of_other_models() {
    let opt = Tiny::default().opt();
    let others = [
        Tiny { layers: 1, ..Tiny::default() },
        Tiny { layers: 3, ..Tiny::default() },
        Tiny { hidden: 16, embed: 16, ..Tiny::default() },
        Tiny { heads: 4, ..Tiny::default() },
    ];
    for other in others {
        let mut cache = other.opt().engine().new_cache(CacheDType::F32).unwrap();
        let error = run(&opt, vec![with_cache(&[1, 2], &mut cache, Want::Nothing)]).err();
        let error = error.unwrap_or_else(|| panic!("took a cache of {other:?}"));
        assert_eq!(error.kind(), ErrorKind::Option, "{error}");
        assert!(!error.to_string().contains('\n'), "{error}");
        assert_eq!(cache.len(), 0);
    }
    // Fuller than this model's context.
    let longer = Tiny { context: 200, ..Tiny::default() }.opt();
    let mut cache = longer.engine().new_cache(CacheDType::F32).unwrap();
    run(&longer, vec![with_cache(&[1; 150], &mut cache, Want::Nothing)]).unwrap();
    assert_eq!(
        run(&opt, vec![with_cache(&[1], &mut cache, Want::Nothing)]).err().unwrap().kind(),
        ErrorKind::Prompt
    );
}

#[test]
fn nothing_to_do() {
    let opt = Tiny::default().opt();
    assert!(run(&opt, Vec::new()).unwrap().is_empty());
    let mut cache = opt.engine().new_cache(CacheDType::F32).unwrap();
    let ids = [4u32, 5];
    let empty: &[u32] = &[];
    let found = run(
        &opt,
        vec![
            Sequence::new(empty),
            Sequence::new(&ids[..]).want(Want::TopK { rows: 1, k: 0 }),
            Sequence::new(&ids[..]).want(Want::TopK { rows: 2, k: usize::MAX }),
            Sequence::new(empty).want(Want::LogProbs { targets: &[] }),
            Sequence::new(&ids[..]).want(Want::Logits { rows: 0 }),
            Sequence::new(&ids[..]).want(Want::Logits { rows: 1 }),
        ],
    )
    .unwrap();
    assert_eq!(found.len(), 6);
    assert_eq!(found[1].top_k.iter().map(|top| top.ids.len()).collect::<Vec<_>>(), [0]);
    assert_eq!(found[2].top_k.iter().map(|top| top.ids.len()).collect::<Vec<_>>(), [61, 61]);
    assert_same_array(found[5].logits.as_ref().unwrap().row(0), opt.logits(&ids).unwrap().row(1));
    run(&opt, vec![with_cache(empty, &mut cache, Want::Nothing)]).unwrap();
    assert!(cache.is_empty());
}

#[test]
fn each_sequence_of_a_batch_gets_what_it_asks_for() {
    let opt = Tiny::default().opt();
    let ids: Vec<Vec<u32>> = (0..4).map(|i| random_ids(i, 4 + 3 * i as usize, 61)).collect();
    let mut all = Sequence::new(&ids[0][..]);
    all.hidden = Hidden::All;
    let mut last = Sequence::new(&ids[1][..]).want(Want::Logits { rows: 2 });
    last.hidden = Hidden::Last;
    let scored = Sequence::new(&ids[2][..]).want(Want::LogProbs { targets: &ids[2][1..] });
    let top = Sequence::new(&ids[3][..]).want(Want::TopK { rows: 3, k: 5 });
    let found = run(&opt, vec![all, last, scored, top]).unwrap();
    let alone = [opt.hidden_states(&ids[0]).unwrap(), opt.hidden_states(&ids[1]).unwrap()[2..].to_vec()];
    for (found, alone) in found.iter().zip(&alone) {
        assert_eq!(found.hidden.len(), alone.len());
        for (found, alone) in found.hidden.iter().zip(alone) {
            assert_same_array(found.view(), alone.view());
        }
    }
    let logits = opt.logits(&ids[1]).unwrap();
    assert_same_array(found[1].logits.as_ref().unwrap().view(), logits.slice(s![5.., ..]));
    assert!(found[2].hidden.is_empty() && found[3].logits.is_none());
    assert_eq!(found[2].log_probs.len(), ids[2].len() - 1);
    let logits = opt.logits(&ids[3]).unwrap();
    for (top, row) in found[3].top_k.iter().zip(logits.slice(s![10.., ..]).outer_iter()) {
        let mut order: Vec<u32> = (0..61).collect();
        order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
        assert_eq!(top.ids, order[..5]);
    }
}

#[test]
fn attention_weights_of_one_sequence_of_a_batch() {
    let opt = Tiny::default().opt();
    let ids: Vec<Vec<u32>> = (0..3).map(|i| random_ids(i, 5 + 4 * i as usize, 61)).collect();
    let sequences = ids.iter().enumerate().map(|(i, ids)| {
        let mut sequence = Sequence::new(&ids[..]).want(Want::Logits { rows: ids.len() });
        sequence.attentions = i == 1;
        sequence
    });
    let found = run(&opt, sequences.collect()).unwrap();
    for (i, found) in found.iter().enumerate() {
        let expected = opt.logits(&ids[i]).unwrap();
        common::assert_close(found.logits.as_ref().unwrap().view(), expected.view(), &format!("logits {i}"));
        assert_eq!(found.attentions.len(), if i == 1 { 2 } else { 0 });
    }
    for (found, alone) in found[1].attentions.iter().zip(opt.attentions(&ids[1]).unwrap()) {
        assert_same_array(found.view(), alone.view());
    }
    for weights in &found[1].attentions {
        assert_eq!(weights.dim(), (2, 9, 9));
        for ((_, row, column), weight) in weights.indexed_iter() {
            assert!(column <= row || *weight == 0.0, "position {row} looks at {column}");
        }
        for sum in weights.sum_axis(ndarray::Axis(2)) {
            assert!((sum - 1.0).abs() < 1e-5);
        }
    }
}
