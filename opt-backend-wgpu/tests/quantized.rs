//! What quantized weights take: memory and dispatches.

mod common;

use common::model::{Model, Numbers, Shape, Weights, quantize};
use opt_backend::{
    Backend, DType, HostVector, Then,
    ndarray::{Array1, Array2},
    oracle,
    quant::{Groups, Levels, Quantized, Zeros},
};
use opt_backend_wgpu::Wgpu;

const SMALL: Shape = Shape { layers: 2, heads: 2, head_dim: 32, ffn: 256, vocabulary: 300, positions: 64 };

fn backend() -> Option<Wgpu> {
    Some(common::builder()?.build().expect("the adapter was there a moment ago"))
}

/// int4 with f16 scales in groups of 32 takes 4.5 bits a weight, int8 8.5, and nothing else is held.
#[test]
fn weights_stay_packed() {
    let Some(b) = backend() else { return };
    let weight = Numbers(1).matrix(1024, 512);
    for (bits, expected) in [(4, 1024 * 512 * 9 / 16), (8, 1024 * 512 * 17 / 16)] {
        let before = b.counters().counts().device_bytes;
        let quantized = quantize(&weight, bits).expect("it fits");
        let bias = Array1::zeros(1024);
        let linear = b.new_quantized_linear(&quantized, Some(HostVector::F32(bias.view()))).expect("linear");
        // The biases and a word or two.
        let held = b.counters().counts().device_bytes - before;
        assert!((expected + 4096..expected + 4200).contains(&held), "int{bits}: {held} bytes");
        drop(linear);
        let table = b.new_quantized_table(&quantized).expect("table");
        let held = b.counters().counts().device_bytes - before;
        assert!((expected..expected + 128).contains(&held), "int{bits}: {held} bytes");
        drop(table);
        assert_eq!(b.counters().counts().device_bytes, before);
    }
}

/// A step takes as many dispatches as with plain weights, and one read.
#[test]
fn steps_take_no_more_dispatches() {
    let Some(b) = backend() else { return };
    let mut each = Vec::new();
    for weights in [Weights::Plain(DType::F32), Weights::Integers(8), Weights::Integers(4)] {
        let model = Model::new(&b, SMALL, weights).expect("loads");
        let mut cache = model.new_cache(&b).expect("cache");
        model.step(&b, &[(&[1, 2, 3], 0)], &mut [&mut cache], 1).expect("steps");
        let before = b.counters().counts();
        model.step(&b, &[(&[4], 3)], &mut [&mut cache], 1).expect("steps");
        let counts = b.counters().counts().since(&before);
        each.push((counts.dispatches, counts.submissions, counts.reads, counts.uploads));
    }
    assert!(each.iter().all(|counts| *counts == each[0]), "{each:?}");
    assert_eq!(each[0].0, 7 * SMALL.layers as u64 + 5);
}

/// Columns in another order are one dispatch more, also for queries, keys and values of one order together.
#[test]
fn another_order_is_one_dispatch_more() {
    let Some(b) = backend() else { return };
    let mut numbers = Numbers(5);
    let weight = |numbers: &mut Numbers| {
        let codes = Array2::from_shape_simple_fn((64, 96), || numbers.below(16) as u8);
        let scales = Array2::from_shape_simple_fn((64, 3), || 0.1 * numbers.next());
        let index = (0..96).map(|i| i * 5 % 3).collect();
        let levels = Levels::Integers { bits: 4 };
        Quantized::new(codes, scales, Zeros::Same(8), levels, Groups::Index(index)).expect("it fits")
    };
    let weights = [(); 3].map(|()| weight(&mut numbers));
    let [q, k, v] = weights.each_ref().map(|weight| b.new_quantized_linear(weight, None).expect("linear"));
    for rows in [1, 40] {
        let x = numbers.matrix(rows, 96);
        let tensor = b.upload(x.view()).expect("upload");
        let before = b.counters().counts().dispatches;
        let found = b.qkv(&tensor, &q, &k, &v).expect("qkv");
        let taken = b.counters().counts().dispatches - before;
        assert_eq!(taken, if rows == 1 { 2 } else { 4 }, "{rows} rows");
        for (found, weight) in found.iter().zip(&weights) {
            let expected = oracle::linear(x.view(), weight.dequantize().view(), None, None);
            let found = b.block_on(b.read(found)).expect("read");
            assert!(found.iter().zip(&expected).all(|(f, e)| (f - e).abs() < 1e-4), "{rows} rows");
        }
        let before = b.counters().counts().dispatches;
        b.linear(&tensor, &q, Then::Nothing).expect("linear");
        assert_eq!(b.counters().counts().dispatches - before, 2, "{rows} rows");
    }
}
