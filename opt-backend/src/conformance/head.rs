//! The LM head: logits, log-probabilities, top-k.

use super::{
    Outcome, Run,
    data::{Data, read},
    ensure, fail,
};
use crate::{Backend, DType, HostMatrix, TopK, oracle};
use ndarray::{Array2, Axis, s};

pub(super) fn run<B: Backend>(run: &mut Run<'_, B>) {
    for dtype in run.dtypes.clone() {
        for [rows, entries, width] in [
            [0, 33, 80],
            [1, 1, 1],
            [1, 257, 80],
            [2, 7, 33],
            [5, 300, 257],
            [33, 67, 7],
            [70, 130, 64],
            [150, 500, 32],
        ] {
            run.case("logits", format_args!("[{rows}, {width}], {entries} entries in {dtype}"), |b, data| {
                check_head(b, data, rows, [entries, width], dtype, false)
            });
        }
    }
    run.case("log_probs", "ties", ties);
    top_k(run);
    large_table(run);
}

/// Logits and log-probabilities of random targets, the latter recomputed from the former in f64.
fn check_head<B: Backend>(
    b: &B,
    data: &mut Data,
    rows: usize,
    [entries, width]: [usize; 2],
    dtype: DType,
    ends_only: bool,
) -> Outcome {
    let weight = data.weight(entries, width).mapv_into(|v| 3.0 * v);
    let table = b.new_table(HostMatrix::F32(weight.view()), dtype)?;
    let held = if ends_only {
        weight.mapv_into(|v| dtype.round(v))
    } else {
        b.block_on(b.read_table(&table, 0..entries))?
    };
    let x = data.matrix(rows, width);
    let tensor = b.upload(x.view())?;
    let logits = oracle::linear(data.met(&x, dtype).view(), held.view(), None, None);
    let found = read(b, &b.logits(&tensor, &table)?)?;
    data.tolerance().compare("logits", found.view(), logits.view())?;

    let mut targets: Vec<u32> = (0..rows).map(|_| data.below(entries) as u32).collect();
    // Some rows get the most probable token as their target.
    for (target, row) in targets.iter_mut().zip(logits.outer_iter()).step_by(2) {
        *target = oracle::argmax(row).unwrap_or(0) as u32;
    }
    let found = b.block_on(b.log_probs(&tensor, &table, &targets))?;
    let expected: Vec<_> =
        logits.outer_iter().zip(&targets).map(|(row, &t)| oracle::target_score(row, t)).collect();
    let [f, e] = [&found, &expected].map(|scores| scores.iter().map(|s| s.log_prob).collect::<Vec<_>>());
    data.tolerance().compare_slices("log_probs", &f, &e)?;
    // Whether the target wins is only asked where no rounding can decide it.
    let close = 4.0 * data.tolerance().max * logits.iter().fold(1.0, |max, &v| f64::from(v.abs()).max(max));
    for (row, ((found, expected), &target)) in found.iter().zip(&expected).zip(&targets).enumerate() {
        let own = logits[[row, target as usize]];
        let others = logits.row(row).into_iter().enumerate().filter(|(id, _)| *id != target as usize);
        let best = others.fold(f32::NEG_INFINITY, |max, (_, &v)| max.max(v));
        ensure(
            found.greedy == expected.greedy || f64::from((own - best).abs()) < close,
            format_args!(
                "log_probs: row {row}: target {target} has logit {own}, the best other {best}, found greedy {}",
                found.greedy
            ),
        )?;
    }
    Ok(())
}

/// Entries that are equal: only the first of the most probable is greedy. Integers, so that their logits are equal
/// whatever the order of summation.
fn ties<B: Backend>(b: &B, data: &mut Data) -> Outcome {
    for entries in [2, 9, 70, 300] {
        let mut table = data.integers(entries, 32, 1);
        let best = Array2::ones((1, 32));
        let (first, last) = (entries / 2 - 1, entries - 1);
        for entry in [first, last] {
            table.slice_mut(s![entry..entry + 1, ..]).assign(&best);
        }
        let x = Array2::from_elem((3, 32), 2.0f32);
        let targets = [first as u32, last as u32, first as u32];
        let table = b.new_table(HostMatrix::F32(table.view()), DType::F32)?;
        let found = b.block_on(b.log_probs(&b.upload(x.view())?, &table, &targets))?;
        let greedy: Vec<bool> = found.iter().map(|score| score.greedy).collect();
        ensure(
            greedy == [true, false, true],
            format_args!(
                "entries {first} and {last} of {entries} tie: expected only {first} greedy, found {greedy:?}"
            ),
        )?;
    }
    Ok(())
}

fn top_k<B: Backend>(run: &mut Run<'_, B>) {
    for [rows, width] in [[0, 7], [1, 1], [1, 33], [3, 257], [5, 1000], [40, 65], [2, 50272]] {
        for k in [0, 1, 2, 5, 64, 300] {
            run.case("top_k", format_args!("{k} of [{rows}, {width}]"), |b, data| {
                let x = data.matrix(rows, width).mapv_into(|v| 4.0 * v);
                check_top_k(b, data, &x, k)
            });
        }
    }
    run.case("top_k", "ties", |b, data| {
        for (width, range) in [(33, 2), (257, 3), (1000, 20)] {
            let x = data.integers(7, width, range);
            for k in [1, 2, 17, width] {
                check_top_k(b, data, &x, k)?;
            }
        }
        // All equal, and zeros of both signs.
        let mut x = Array2::from_elem((2, 70), 1.5f32);
        x.row_mut(1).iter_mut().enumerate().for_each(|(i, v)| *v = if i % 3 == 0 { -0.0 } else { 0.0 });
        check_top_k(b, data, &x, 9)
    });
    run.case("top_k", "large numbers", |b, data| {
        let mut x = data.matrix(4, 257).mapv_into(|v| 16.0 * v);
        [1e4, -1e4].iter().enumerate().for_each(|(i, v)| x.row_mut(i).mapv_inplace(|w| w.round() + v));
        let x = data.held(x);
        check_top_k(b, data, &x, 6)
    });
    run.case("top_k", "suppressed entries (-inf)", |b, data| {
        let mut x = data.matrix(3, 80);
        x.slice_mut(s![.., ..;3]).fill(f32::NEG_INFINITY);
        check_top_k(b, data, &x, 7)
    });
}

fn check_top_k<B: Backend>(b: &B, data: &Data, x: &Array2<f32>, k: usize) -> Outcome {
    let found = b.block_on(b.top_k(&b.upload(x.view())?, k))?;
    let expected: Vec<TopK> = x.outer_iter().map(|row| oracle::top_k(row, k)).collect();
    ensure(
        found.len() == expected.len(),
        format_args!("expected {} rows, found {}", expected.len(), found.len()),
    )?;
    for (row, (found, expected)) in found.iter().zip(&expected).enumerate() {
        ensure(
            found.ids.len() == expected.ids.len() && found.logits.len() == expected.ids.len(),
            format_args!("row {row}: expected {} ids, found {}", expected.ids.len(), found.ids.len()),
        )?;
        let found_pairs = found.ids.iter().zip(&found.logits);
        let differs = found_pairs.zip(expected.ids.iter().zip(&expected.logits)).position(|(f, e)| f != e);
        if let Some(at) = differs {
            return fail(format_args!(
                "row {row}, rank {at}: expected id {} with logit {}, found id {} with logit {}",
                expected.ids[at], expected.logits[at], found.ids[at], found.logits[at]
            ));
        }
        let [f, e] = [found, expected].map(|top| [top.log_sum_exp]);
        data.tolerance().compare_slices("log_sum_exp", &f, &e)?;
    }
    Ok(())
}

/// A table larger than one binding, where the backend names a limit that a test can exceed; OPT's own otherwise.
fn large_table<B: Backend>(run: &mut Run<'_, B>) {
    const WIDTH: usize = 768;
    const OPT_ENTRIES: usize = 50272;
    let limit = run.max_binding.map(|bytes| bytes / (WIDTH * size_of::<f32>()) as u64);
    let entries = match limit {
        Some(entries) if entries <= 3 * OPT_ENTRIES as u64 => entries as usize + 8,
        _ => OPT_ENTRIES,
    };
    if entries > 4096 && !run.suite.heavy {
        return;
    }
    run.case("logits", format_args!("[2, {WIDTH}], large table of {entries} entries"), |b, data| {
        check_head(b, data, 2, [entries, WIDTH], DType::F32, true)
    });
    run.case("gather", format_args!("from a large table of {entries} entries"), |b, data| {
        // Each row is known by its first number: integers up to 2²⁴ are exact.
        let mut rows = Array2::zeros((entries, WIDTH));
        rows.column_mut(0).iter_mut().enumerate().for_each(|(i, v)| *v = i as f32);
        rows.column_mut(WIDTH - 1).iter_mut().enumerate().for_each(|(i, v)| *v = -(i as f32));
        let table = b.new_table(HostMatrix::F32(rows.view()), DType::F32)?;
        // Where parts meet is known only if the backend named its limit: then 8 entries before the end.
        let mut ids: Vec<usize> = (entries.saturating_sub(12)..entries).rev().collect();
        ids.extend((0..300).map(|_| data.below(entries)));
        let expected = rows.select(Axis(0), &ids);
        let narrow: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        let found = read(b, &b.gather(&table, &narrow)?)?;
        data.tolerance().compare("rows", found.view(), expected.view())?;
        let x = Array2::ones((ids.len(), WIDTH));
        let found = read(b, &b.add_gathered(b.upload(x.view())?, &table, &narrow)?)?;
        data.tolerance().compare("added rows", found.view(), (x + expected).view())?;
        let middle = entries / 2 - 2..entries / 2 + 3;
        let found = b.block_on(b.read_table(&table, middle.clone()))?;
        ensure(found == rows.slice(s![middle, ..]), "read_table gives other rows")
    });
}
