//! The device as a thing that can be missing, full, shared or lost.

mod common;

use common::model::{Model, Numbers, Shape};
use opt_backend::{
    Backend, DType, Error, ErrorKind, HostMatrix, Then, block_on,
    ndarray::{Array2, array},
};
use opt_backend_wgpu::Wgpu;
use std::sync::Arc;

const SMALL: Shape = Shape { layers: 2, heads: 2, head_dim: 16, ffn: 96, vocabulary: 300, positions: 128 };

fn backend() -> Option<Wgpu> {
    Some(common::builder()?.build().expect("the adapter was there a moment ago"))
}

#[test]
fn an_unknown_adapter_is_an_error_that_lists_those_there_are() {
    let Some(_) = common::builder() else { return };
    let adapters = opt_backend_wgpu::adapters();
    let mut unknown = vec!["no such adapter".to_owned(), String::new(), "99".to_owned()];
    unknown.push(adapters.len().to_string());
    // Digits that occur in a name, as in "llvmpipe (LLVM 15.0.6, 256 bits)", do not name that adapter.
    for adapter in &adapters {
        let numbers = adapter.name.split(|c: char| !c.is_ascii_digit());
        let beyond = |number: &&str| number.parse::<usize>().is_ok_and(|index| index >= adapters.len());
        unknown.extend(numbers.filter(beyond).map(str::to_owned));
    }
    for name in unknown {
        let error = Wgpu::builder().device(&name).build().expect_err("there is none of that name");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        for adapter in &adapters {
            assert!(error.to_string().contains(&adapter.name), "{error}");
        }
    }
    for adapter in adapters {
        let b = Wgpu::builder().device(adapter.index.to_string()).build().expect("by index");
        assert_eq!(b.info().device, adapter.name);
        let b = Wgpu::builder().device(adapter.name.to_uppercase()).build().expect("by name");
        assert_eq!(b.info().device, adapter.name);
    }
}

#[test]
fn info_says_what_was_found() {
    let Some(builder) = common::builder() else { return };
    let b = builder.clone().default_limits().features(false, false).memory(1 << 30).build().expect("builds");
    let info = b.info();
    assert_eq!((info.name.as_str(), info.max_binding), ("wgpu", Some(128 << 20)));
    assert_eq!(info.memory, Some(1 << 30));
    let detail = |name: &str| info.details.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    assert_eq!((detail("subgroups"), detail("f16")), (Some("no"), Some("no")));
    let adapters = detail("adapters").expect("they are listed");
    for adapter in opt_backend_wgpu::adapters() {
        assert!(adapters.contains(&format!("{}: {}", adapter.index, adapter.name)), "{adapters}");
    }
}

/// 1,000 decode steps: one submission and one read each, always as many dispatches, and no memory gained.
#[test]
fn a_thousand_steps_leave_memory_flat() {
    let Some(b) = backend() else { return };
    let model = Model::new(&b, SMALL, DType::F32).expect("loads");
    let mut cache = model.new_cache(&b).expect("cache");
    let mut token = 5;
    let mut held = None;
    let mut step = None;
    for i in 0..1000 {
        let position = b.cache_len(&cache, 0);
        let before = b.counters().counts();
        let best = model.step(&b, &[(&[token], position)], &mut [&mut cache], 1).expect("steps");
        token = best[0].ids[0];
        let counts = b.counters().counts();
        if i >= 200 {
            let counts = counts.since(&before);
            let each = (counts.dispatches, counts.submissions, counts.reads, counts.uploads);
            assert_eq!(*step.get_or_insert(each), each, "step {i}");
            assert_eq!((each.1, each.2, each.3), (1, 1, 0), "step {i}");
            assert_eq!(*held.get_or_insert(counts.device_bytes), counts.device_bytes, "step {i}");
        }
        if position + 1 == SMALL.positions {
            b.cache_truncate(&mut cache, 3).expect("truncates");
        }
    }
    // ln, qkv, attend, out, ln, fc1, fc2 a layer; two embeddings, the last norm, the head, the best token.
    assert_eq!(step.map(|(dispatches, ..)| dispatches), Some(7 * SMALL.layers as u64 + 5));
}

/// Four beams that are forked anew each step.
#[test]
fn beams_leave_memory_flat() {
    let Some(b) = backend() else { return };
    let model = Model::new(&b, SMALL, DType::F32).expect("loads");
    let mut beams: Vec<_> = (0..4).map(|_| model.new_cache(&b).expect("cache")).collect();
    let mut held = None;
    for i in 0..300 {
        let position = b.cache_len(&beams[0], 0);
        let before = b.counters().counts();
        let tokens: Vec<u32> = (0..4).map(|beam| (i * 7 + beam) as u32 % 300).collect();
        let rows: Vec<_> = tokens.chunks(1).map(|token| (token, position)).collect();
        let mut borrowed: Vec<_> = beams.iter_mut().collect();
        model.step(&b, &rows, &mut borrowed, 8).expect("steps");
        let counts = b.counters().counts();
        assert!(
            counts.since(&before).dispatches <= 7 * SMALL.layers as u64 + 6,
            "step {i}: a fork took a dispatch"
        );
        if i >= 150 {
            assert_eq!(*held.get_or_insert(counts.device_bytes), counts.device_bytes, "step {i}");
        }
        let parents = [i % 4, i % 3, 0, 2];
        beams = parents.iter().map(|&parent| b.cache_fork(&beams[parent]).expect("forks")).collect();
        if position + 1 == SMALL.positions {
            beams.iter_mut().for_each(|beam| b.cache_truncate(beam, 3).expect("truncates"));
        }
    }
    drop(beams);
}

#[test]
fn everything_is_given_back() {
    let Some(b) = backend() else { return };
    let before = b.counters().counts().device_bytes;
    {
        let model = Model::new(&b, SMALL, DType::F16).expect("loads");
        let mut cache = model.new_cache(&b).expect("cache");
        model.step(&b, &[(&[1, 2, 3], 0)], &mut [&mut cache], 3).expect("steps");
    }
    let mut last = b.counters().counts().device_bytes;
    assert!(last > before, "the pool keeps some");
    // A second model of the same shape takes no more than the first.
    for _ in 0..3 {
        let model = Model::new(&b, SMALL, DType::F16).expect("loads");
        let mut cache = model.new_cache(&b).expect("cache");
        model.step(&b, &[(&[1, 2, 3], 0)], &mut [&mut cache], 3).expect("steps");
        drop((model, cache));
        let now = b.counters().counts().device_bytes;
        assert!(now <= last, "{now} bytes held, {last} before");
        last = now;
    }
}

#[test]
fn a_model_larger_than_its_memory_leaves_nothing_allocated() {
    let Some(builder) = common::builder() else { return };
    let b = builder.memory(8 << 20).build().expect("builds");
    let held = b.counters().counts().device_bytes;
    let rows = Array2::<f32>::zeros((4096, 768));
    let error = b.new_table(HostMatrix::F32(rows.view()), DType::F32).expect_err("12 MiB in 8");
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    let text = error.to_string();
    assert!(text.contains(&b.info().device) && text.contains("12582912"), "{text}");
    assert_eq!(b.counters().counts().device_bytes, held);

    // Tensor by tensor, as models are loaded.
    let mut linears = Vec::new();
    let error = loop {
        match b.new_linear(HostMatrix::F32(rows.slice(opt_backend::ndarray::s![..512, ..])), None, DType::F32)
        {
            Ok(linear) => linears.push(linear),
            Err(error) => break error,
        }
    };
    assert_eq!((error.kind(), linears.len()), (ErrorKind::OutOfMemory, 5));
    drop(linears);
    assert_eq!(b.counters().counts().device_bytes, held);
    // And it still works.
    let y = b.add(
        b.upload(array![[1.0]].view()).expect("upload"),
        &b.upload(array![[2.0]].view()).expect("upload"),
    );
    assert_eq!(b.block_on(b.read(&y.expect("add"))).expect("read"), array![[3.0]]);
}

#[test]
fn a_lost_device_refuses_further_work() {
    let Some(b) = backend() else { return };
    let model = Model::new(&b, SMALL, DType::F32).expect("loads");
    let mut cache = model.new_cache(&b).expect("cache");
    model.step(&b, &[(&[1, 2, 3], 0)], &mut [&mut cache], 1).expect("steps");
    let x = b.upload(Array2::ones((3, 32)).view()).expect("upload");
    let name = b.info().device;
    let lost = |what: &str, error: Error| {
        assert_eq!(error.kind(), ErrorKind::DeviceLost, "{what}: {error}");
        assert!(error.to_string().contains(&name), "{what}: {error}");
    };
    // Recorded and not submitted; submitted and on its way.
    let recorded = b.add(x.clone(), &x).expect("add");
    let mut other = model.new_cache(&b).expect("cache");
    let logits = model.logits(&b, &[(&[4; 100], 0)], &mut [&mut other]).expect("logits");
    let in_flight = b.read(&logits);
    let awaited = b.read(&x);
    b.lose_device();
    // What was under way may still arrive; it must not hang.
    for (what, readback) in [("a read in flight", b.block_on(in_flight)), ("one awaited", block_on(awaited))]
    {
        if let Err(error) = readback {
            lost(what, error);
        }
    }
    lost("step", model.step(&b, &[(&[4], 3)], &mut [&mut cache], 1).expect_err("lost"));
    lost("upload", b.upload(Array2::ones((3, 32)).view()).expect_err("lost"));
    lost("read", b.block_on(b.read(&recorded)).expect_err("lost"));
    lost("await", block_on(b.read(&recorded)).expect_err("lost"));
    lost("add", b.add(recorded, &x).expect_err("lost"));
    lost("new_cache", model.new_cache(&b).expect_err("lost"));
    lost("cache_fork", b.cache_fork(&cache).expect_err("lost"));
    lost("cache_read", b.block_on(b.cache_read(&cache, 0)).expect_err("lost"));
    let weight = array![[1.0f32, 2.0]];
    lost("new_linear", b.new_linear(HostMatrix::F32(weight.view()), None, DType::F32).expect_err("lost"));
    drop((model, cache, b));
    // A new backend is as good as the first was.
    let b = backend().expect("the adapter was there a moment ago");
    let model = Model::new(&b, SMALL, DType::F32).expect("loads");
    let mut cache = model.new_cache(&b).expect("cache");
    model.step(&b, &[(&[1, 2, 3], 0)], &mut [&mut cache], 1).expect("steps");
}

/// A future is polled by whoever likes to; dropped ones leave nothing behind.
#[test]
fn readbacks_may_be_awaited_anywhere_or_dropped() {
    let Some(b) = backend() else { return };
    let mut numbers = Numbers(1);
    let x = numbers.matrix(40, 30);
    let tensor = b.upload(x.view()).expect("upload");
    let mut held = None;
    for i in 0..50 {
        assert_eq!(block_on(b.read(&tensor)).expect("read"), x);
        drop(b.read(&tensor));
        let (first, second) = (b.read(&tensor), b.read(&tensor));
        assert_eq!(block_on(second).expect("read"), x);
        assert_eq!(b.block_on(first).expect("read"), x);
        if i >= 10 {
            let now = b.counters().counts().device_bytes;
            assert_eq!(*held.get_or_insert(now), now, "round {i}");
        }
    }
}

/// Any thread's poll may take the callbacks of all others: a read whose callback is in another's hands still arrives.
#[test]
fn reads_of_many_threads() {
    let Some(b) = backend() else { return };
    std::thread::scope(|scope| {
        for thread in 0..8u16 {
            let b = &b;
            scope.spawn(move || {
                for i in 0..400u16 {
                    let x = array![[f32::from(thread), f32::from(i)]];
                    let tensor = b.upload(x.view()).expect("upload");
                    let readback = b.read(&tensor);
                    // Every third is left behind while its callback is due.
                    if i % 3 == 0 {
                        drop(b.read(&tensor));
                    }
                    let found = if (thread + i) % 2 == 0 { b.block_on(readback) } else { block_on(readback) };
                    assert_eq!(found.expect("read"), x, "thread {thread}, read {i}");
                }
            });
        }
    });
}

/// Many threads on one backend get what one thread gets.
#[test]
fn many_threads() {
    let Some(b) = backend() else { return };
    let model = Model::new(&b, SMALL, DType::F32).expect("loads");
    let generate = |start: u32| {
        let mut cache = model.new_cache(&b).expect("cache");
        let mut tokens = vec![start];
        for position in 0..24 {
            let token = *tokens.last().expect("not empty");
            let best = model.step(&b, &[(&[token], position)], &mut [&mut cache], 2).expect("steps");
            // Not the best: the model would repeat itself.
            tokens.push((best[0].ids[1] + 1) % 300);
        }
        tokens
    };
    let alone: Vec<_> = (0..4).map(|i| generate(i * 60)).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|i| scope.spawn(move || generate(i * 60))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    assert_eq!(alone, together);
}

/// Two backends on one adapter do not disturb each other, and one may go first.
#[test]
fn two_backends_on_one_adapter() {
    let (Some(a), Some(b)) = (backend(), backend()) else { return };
    let mut numbers = Numbers(2);
    let (weight, x) = (numbers.matrix(40, 30), numbers.matrix(5, 30));
    let run = |b: &Wgpu| {
        let linear = b.new_linear(HostMatrix::F32(weight.view()), None, DType::F32)?;
        let y = b.linear(&b.upload(x.view())?, &linear, Then::Nothing)?;
        b.block_on(b.read(&y))
    };
    let first = run(&a).expect("a");
    assert_eq!(run(&b).expect("b"), first);
    a.lose_device();
    drop(a);
    assert_eq!(run(&b).expect("b, alone"), first);
}

/// A readback outlives what it was read from, and a backend is kept by what it made.
#[test]
fn dropped_in_any_order() {
    let Some(b) = backend() else { return };
    let b = Arc::new(b);
    let x = b.upload(array![[1.0, 2.0]].view()).expect("upload");
    let readback = b.read(&x);
    drop(x);
    assert_eq!(b.block_on(readback).expect("read"), array![[1.0, 2.0]]);
    let x = b.upload(array![[1.0, 2.0]].view()).expect("upload");
    let cache = Model::new(&*b, SMALL, DType::F32).and_then(|model| model.new_cache(&*b)).expect("cache");
    drop(b);
    drop((x, cache));
}
