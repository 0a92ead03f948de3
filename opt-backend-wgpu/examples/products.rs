//! Products with f32 and with quantized weights: the linears and the head of OPT-125m.
//!
//! ```text
//! cargo run --release -p opt-backend-wgpu --example products -- [--rows N] [--device NAME] [--gpu-kernels]
//! ```
//!
//! Times are the best of several rounds, of one product each, and end when its result is read.

use opt_backend::{
    Backend, DType, HostMatrix, Result, Then,
    ndarray::Array2,
    quant::{Groups, Levels, NF4, Quantized, Zeros},
};
use opt_backend_wgpu::Wgpu;
use std::time::{Duration, Instant};

/// Numbers that look random.
fn random(shape: [usize; 2], mut state: u32) -> Array2<u32> {
    Array2::from_shape_simple_fn(shape, || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 16
    })
}

fn quantized([out, input]: [usize; 2], levels: Levels, group: usize, zeros: bool) -> Result<Quantized> {
    let bits = if let Levels::Integers { bits } = levels { bits } else { 4 };
    let codes = random([out, input], 1).mapv(|v| (v % (1 << bits)) as u8);
    let scales = Array2::from_elem((out, input.div_ceil(group)), 1.0 / 1024.0);
    let zeros = if zeros {
        Zeros::Each(random(scales.dim().into(), 2).mapv(|v| (v % (1 << bits)) as u16))
    } else {
        Zeros::Same(1 << (bits - 1))
    };
    Quantized::new(codes, scales, zeros, levels, Groups::Runs(group))
}

/// The best of several rounds.
fn best(mut round: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..30 {
        let start = Instant::now();
        round()?;
        best = best.min(start.elapsed());
    }
    Ok(best)
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (mut rows, mut builder) = (1, Wgpu::builder());
    while let Some(flag) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{flag}: expected a value"));
        match flag.as_str() {
            "--rows" => rows = value()?.parse()?,
            "--device" => builder = builder.device(value()?),
            "--gpu-kernels" => builder = builder.software(false),
            _ => return Err(format!("unknown flag {flag}").into()),
        }
    }
    let b = builder.build()?;
    println!("{}, {rows} rows", b.info().device);
    let four = Levels::Integers { bits: 4 };
    let eight = Levels::Integers { bits: 8 };
    let formats = [
        ("int8, groups of 32", eight, 32, false),
        ("int4, groups of 32", four, 32, false),
        ("int4, groups of 128", four, 128, false),
        ("int4, groups of 128, zeros", four, 128, true),
        ("nf4, groups of 64", Levels::Table(NF4), 64, false),
    ];
    for [out, input] in [[3072, 768], [768, 3072]] {
        let x = b.upload(random([rows, input], 3).mapv(|v| v as f32 / 65536.0 - 0.5).view())?;
        let time = |linear| best(|| b.block_on(b.read(&b.linear(&x, &linear, Then::Nothing)?)).map(drop));
        let weight = quantized([out, input], eight, 32, false)?.dequantize();
        let plain = time(b.new_linear(HostMatrix::F32(weight.view()), None, DType::F32)?)?;
        println!("[{out}, {input}] f32: {plain:?}");
        let half = time(b.new_linear(HostMatrix::F32(weight.view()), None, DType::F16)?)?;
        println!("[{out}, {input}] f16: {half:?}");
        for (name, levels, group, zeros) in formats {
            let taken = time(b.new_quantized_linear(&quantized([out, input], levels, group, zeros)?, None)?)?;
            let ratio = taken.as_secs_f64() / plain.as_secs_f64();
            println!("[{out}, {input}] {name}: {taken:?}, {ratio:.2} of f32");
        }
    }
    let shape = [50272, 768];
    let x = b.upload(random([rows, shape[1]], 3).mapv(|v| v as f32 / 65536.0 - 0.5).view())?;
    let time = |table| best(|| b.block_on(b.read(&b.logits(&x, &table)?)).map(drop));
    let weight = quantized(shape, eight, 32, false)?.dequantize();
    let plain = time(b.new_table(HostMatrix::F32(weight.view()), DType::F32)?)?;
    println!("{shape:?} f32: {plain:?}");
    for (name, levels, group, zeros) in formats {
        let taken = time(b.new_quantized_table(&quantized(shape, levels, group, zeros)?)?)?;
        let ratio = taken.as_secs_f64() / plain.as_secs_f64();
        println!("{shape:?} {name}: {taken:?}, {ratio:.2} of f32");
    }
    Ok(())
}
