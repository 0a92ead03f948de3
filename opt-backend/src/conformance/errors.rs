//! Arguments that do not fit: an error of kind Shape, no panic, nothing changed.

use super::{
    Outcome, Run,
    compare::refused,
    data::{Data, new_linear, read},
    ensure,
};
use crate::{
    Activation, Attend, Backend, CacheDType, CacheSpec, DType, HostMatrix, HostVector, NormParams, Span, Then,
};
use ndarray::{Array1, Array2};
use std::ops::Range;

pub(super) fn run<B: Backend>(run: &mut Run<'_, B>) {
    run.case("errors", "new_linear, new_norm, read_table", weights);
    run.case("errors", "gather, add_gathered", gather);
    run.case("errors", "add, layer_norm, take_rows", rows);
    run.case("errors", "linear, qkv", linear);
    run.case("errors", "attend", |b, data| attend(b, data, false));
    run.case("errors", "attention_weights", |b, data| attend(b, data, true));
    run.case("errors", "logits, log_probs", head);
    run.case("errors", "cache_append, cache_seed, cache_read", cache);
}

fn ones<B: Backend>(b: &B, rows: usize, width: usize) -> Outcome<B::Tensor> {
    Ok(b.upload(Array2::ones((rows, width)).view())?)
}

fn weights<B: Backend>(b: &B, data: &mut Data) -> Outcome {
    let weight = data.weight(4, 3);
    for len in [0, 3, 5] {
        let bias = Array1::zeros(len);
        refused("bias length", new_linear(b, weight.view(), Some(bias.view()), DType::F32))?;
        let vector = || Some(HostVector::F32(bias.view()));
        let params = NormParams { width: 4, eps: 1e-5, weight: vector(), bias: None };
        refused("norm weight length", b.new_norm(params))?;
        let params = NormParams { width: 4, eps: 1e-5, weight: None, bias: vector() };
        refused("norm bias length", b.new_norm(params))?;
    }
    let table = b.new_table(HostMatrix::F32(weight.view()), DType::F32)?;
    for rows in [0..5, 4..5, 7..9, 0..usize::MAX, Range { start: 3, end: 1 }] {
        refused(&format!("read_table {rows:?}"), b.block_on(b.read_table(&table, rows)))?;
    }
    Ok(())
}

fn gather<B: Backend>(b: &B, data: &mut Data) -> Outcome {
    let table = b.new_table(HostMatrix::F32(data.weight(4, 3).view()), DType::F32)?;
    for ids in [&[4][..], &[0, 1, u32::MAX], &[1 << 31, 0]] {
        refused(&format!("gather {ids:?}"), b.gather(&table, ids))?;
        refused(&format!("add_gathered {ids:?}"), b.add_gathered(ones(b, ids.len(), 3)?, &table, ids))?;
    }
    for [rows, width] in [[1, 3], [3, 3], [2, 2], [2, 4], [0, 3]] {
        let x = ones(b, rows, width)?;
        refused(&format!("add_gathered 2 to [{rows}, {width}]"), b.add_gathered(x, &table, &[0, 1]))?;
    }
    Ok(())
}

fn rows<B: Backend>(b: &B, _: &mut Data) -> Outcome {
    for [rows, width] in [[2, 4], [3, 3], [1, 4], [3, 1], [0, 4], [4, 3]] {
        let found = b.add(ones(b, 3, 4)?, &ones(b, rows, width)?);
        refused(&format!("add [3, 4] and [{rows}, {width}]"), found)?;
    }
    let norm = b.new_norm(NormParams { width: 4, eps: 1e-5, weight: None, bias: None })?;
    for width in [1, 3, 5, 8] {
        refused(&format!("layer_norm of width {width}"), b.layer_norm(&ones(b, 2, width)?, &norm))?;
    }
    for rows in [&[3][..], &[0, usize::MAX], &[0, 1, 2, 4]] {
        refused(&format!("take_rows {rows:?}"), b.take_rows(&ones(b, 3, 4)?, rows))?;
    }
    refused("take_rows of none", b.take_rows(&ones(b, 0, 4)?, &[0]))
}

fn linear<B: Backend>(b: &B, data: &mut Data) -> Outcome {
    let new = |out, input, data: &mut Data| new_linear(b, data.weight(out, input).view(), None, DType::F32);
    let fits = new(5, 3, data)?;
    for width in [1, 2, 4, 6] {
        let x = ones(b, 2, width)?;
        refused(&format!("width {width}"), b.linear(&x, &fits, Then::Nothing))?;
        let then = Then::Activate(Activation::Gelu);
        refused(&format!("width {width}, then gelu"), b.linear(&x, &fits, then))?;
        let wrong = new(3, width, data)?;
        let x = ones(b, 2, 3)?;
        for (i, [q, k, v]) in
            [[&wrong, &fits, &fits], [&fits, &wrong, &fits], [&fits, &fits, &wrong]].into_iter().enumerate()
        {
            refused(&format!("qkv, number {i} of width {width}"), b.qkv(&x, q, k, v))?;
        }
    }
    for [rows, width] in [[1, 5], [3, 5], [2, 4], [2, 6], [0, 5], [5, 2]] {
        let then = Then::Add(ones(b, rows, width)?);
        refused(&format!("then add [{rows}, {width}]"), b.linear(&ones(b, 2, 3)?, &fits, then))?;
    }
    Ok(())
}

fn attend<B: Backend>(b: &B, data: &mut Data, weights_too: bool) -> Outcome {
    const ROWS: usize = 5;
    const WIDTH: usize = 6;
    let span = |start, len| Span { start, len };
    let good = [span(0, 2), span(2, 3)];
    let spec =
        |heads, head_dim| CacheSpec { layers: 2, heads, head_dim, dtype: CacheDType::F32, capacity_hint: 8 };
    let held = data.matrix(3, WIDTH);
    let mut caches = Vec::new();
    for _ in 0..2 {
        let mut cache = b.new_cache(spec(2, 3))?;
        b.cache_seed(&mut cache, 1, held.view(), held.view())?;
        caches.push(cache);
    }
    let right = [[ROWS, WIDTH]; 3];
    type Call<'a, C> = (Attend<'a>, [[usize; 2]; 3], Option<&'a mut [C]>);
    let call = |what: &str, (attend, shapes, caches): Call<'_, B::Cache>| -> Outcome {
        let [q, k, v] = shapes.map(|[rows, width]| ones(b, rows, width));
        let (q, k, v) = (q?, k?, v?);
        let mut borrowed: Option<Vec<&mut B::Cache>> = caches.map(|caches| caches.iter_mut().collect());
        let borrowed = borrowed.as_deref_mut();
        if weights_too {
            refused(what, b.attention_weights(q, k, v, attend, borrowed).map(|_| ()))
        } else {
            refused(what, b.attend(q, k, v, attend, borrowed).map(|_| ()))
        }
    };
    for cached in [false, true] {
        let name = |what: &str| format!("{what}, {}", if cached { "cached" } else { "no cache" });
        let mut with = |what: &str, heads, layer, spans: &[Span], shapes| {
            let caches = cached.then_some(&mut caches[..]);
            call(&name(what), (Attend { heads, layer, spans }, shapes, caches))
        };
        for heads in [0, 4, 5, 7, usize::MAX] {
            with(&format!("{heads} heads of width {WIDTH}"), heads, 1, &good, right)?;
        }
        for bad in [span(2, 4), span(6, 1), span(usize::MAX, 2), span(1, usize::MAX), span(5, 1)] {
            with(&format!("{bad:?}"), 2, 1, &[good[0], bad], right)?;
        }
        for which in 0..3 {
            for wrong in [[4, WIDTH], [6, WIDTH], [ROWS, 4], [ROWS, 8], [0, WIDTH]] {
                let mut shapes = right;
                shapes[which] = wrong;
                with(&format!("operand {which} of shape {wrong:?}"), 2, 1, &good, shapes)?;
            }
        }
    }
    for spans in [&good[..1], &[good[0], good[1], span(0, 0)], &[]] {
        let attend = Attend { heads: 2, layer: 1, spans };
        call(&format!("2 caches for {} spans", spans.len()), (attend, right, Some(&mut caches[..])))?;
    }
    for layer in [2, usize::MAX] {
        let attend = Attend { heads: 2, layer, spans: &good };
        call(&format!("layer {layer} of 2"), (attend, right, Some(&mut caches[..])))?;
    }
    let mut wide = vec![b.new_cache(spec(2, 4))?, b.new_cache(spec(2, 4))?];
    let attend = Attend { heads: 2, layer: 0, spans: &good };
    call("caches of another width", (attend, right, Some(&mut wide[..])))?;
    for cache in &caches {
        let now = b.block_on(b.cache_read(cache, 1))?;
        ensure(now.keys == held && now.values == held, "a call that was refused changed a cache")?;
        ensure(b.cache_len(cache, 0) == 0, "a call that was refused changed another layer")?;
    }
    Ok(())
}

fn head<B: Backend>(b: &B, data: &mut Data) -> Outcome {
    let table = b.new_table(HostMatrix::F32(data.weight(4, 3).view()), DType::F32)?;
    for width in [1, 2, 4] {
        let x = ones(b, 2, width)?;
        refused(&format!("logits of width {width}"), b.logits(&x, &table))?;
        refused(&format!("log_probs of width {width}"), b.block_on(b.log_probs(&x, &table, &[0, 1])))?;
    }
    let x = ones(b, 2, 3)?;
    for targets in [&[][..], &[0], &[0, 1, 2], &[0, 4], &[u32::MAX, 0]] {
        refused(
            &format!("log_probs of 2 rows at {targets:?}"),
            b.block_on(b.log_probs(&x, &table, targets)),
        )?;
    }
    // The backend is none the worse for it.
    ensure(read(b, &b.logits(&x, &table)?)?.dim() == (2, 4), "logits do not work any more")
}

fn cache<B: Backend>(b: &B, data: &mut Data) -> Outcome {
    let spec = CacheSpec { layers: 2, heads: 2, head_dim: 3, dtype: CacheDType::F32, capacity_hint: 0 };
    let mut cache = b.new_cache(spec)?;
    let held = data.matrix(4, 6);
    b.cache_seed(&mut cache, 0, held.view(), held.view())?;
    let mut append = |what: &str, layer, keys: [usize; 2], values: [usize; 2], rows| -> Outcome {
        let (keys, values) = (ones(b, keys[0], keys[1])?, ones(b, values[0], values[1])?);
        refused(what, b.cache_append(&mut cache, layer, &keys, &values, rows))
    };
    for layer in [2, usize::MAX] {
        append(&format!("layer {layer} of 2"), layer, [3, 6], [3, 6], 0..3)?;
    }
    for rows in [0..4, 3..4, 5..5, 0..usize::MAX, Range { start: 2, end: 1 }] {
        append(&format!("rows {rows:?} of 3"), 0, [3, 6], [3, 6], rows)?;
    }
    for width in [1, 5, 7, 12] {
        append(&format!("keys of width {width}"), 0, [3, width], [3, 6], 0..3)?;
        append(&format!("values of width {width}"), 0, [3, 6], [3, width], 0..3)?;
        append(&format!("both of width {width}"), 0, [3, width], [3, width], 0..3)?;
    }
    append("fewer keys", 0, [2, 6], [3, 6], 0..3)?;
    append("fewer values", 0, [3, 6], [2, 6], 0..3)?;
    for ([rows, width], other) in [([3, 5], [3, 5]), ([3, 6], [2, 6]), ([2, 6], [3, 6]), ([3, 6], [3, 5])] {
        let (keys, values) = (Array2::ones((rows, width)), Array2::ones((other[0], other[1])));
        let found = b.cache_seed(&mut cache, 0, keys.view(), values.view());
        refused(&format!("seed keys [{rows}, {width}], values {other:?}"), found)?;
    }
    refused("seed layer 2 of 2", b.cache_seed(&mut cache, 2, held.view(), held.view()))?;
    refused("read layer 2 of 2", b.block_on(b.cache_read(&cache, 2)))?;
    let now = b.block_on(b.cache_read(&cache, 0))?;
    ensure(now.keys == held && now.values == held, "a call that was refused changed the cache")?;
    ensure(b.cache_len(&cache, 1) == 0, "a call that was refused changed another layer")
}
