//! What the products of one training step of an OPT-125m cost beside the packed linear of the same size, and the other
//! ops of a step.
//!
//!     cargo run --release -p opt-backend-cpu --example train_125m [rows: 512] [f32|bf16]

use opt_backend::{
    Activation, AdamW, Attend, Backend, DType, Dropout, HostMatrix, Layout, NormParams, Result, Smoothing,
    Span, Then, Train, ndarray::Array2,
};
use opt_backend_cpu::{Cpu, Tensor};
use std::time::Instant;

const HIDDEN: usize = 768;
const FFN: usize = 3072;
const HEADS: usize = 12;
const VOCAB: usize = 50272;
const RUNS: usize = 7;

fn random(rows: usize, columns: usize) -> Array2<f32> {
    let mut state = 88_172_645_463_325_252_u64 ^ ((rows * 31 + columns) as u64) << 20;
    Array2::from_shape_simple_fn((rows, columns), || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// The shortest of some runs, in seconds: others may use this machine, too.
fn shortest(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn main() -> Result<()> {
    let wrong = |e: String| opt_backend::Error::new(opt_backend::ErrorKind::Unsupported, "arguments", e);
    let mut arguments = std::env::args().skip(1);
    let rows: usize = arguments
        .next()
        .map_or(Ok(512), |rows| rows.parse())
        .map_err(|e: std::num::ParseIntError| wrong(e.to_string()))?;
    let dtype: DType = arguments.next().map_or(Ok(DType::F32), |name| name.parse()).map_err(wrong)?;
    let cpu = &Cpu::new()?;
    println!("{}, {}, {} threads, {rows} rows, {dtype}", cpu.info().device, cpu.simd(), cpu.threads());
    let tensor = |rows, columns| cpu.upload(random(rows, columns).view());

    println!(
        "{:14} {:>11} {:>21} {:>21} {:>21} {:>21} {:>9}",
        "out x in", "linear", "x Wt", "dy W", "dyt x +=", "dy packed W", "pack"
    );
    for [out, input] in
        [[HIDDEN, HIDDEN], [FFN, HIDDEN], [HIDDEN, FFN], [8, HIDDEN], [HIDDEN, 8], [VOCAB, HIDDEN]]
    {
        let flop = 2.0 * (rows * out * input) as f64;
        let (x, w, dy) = (tensor(rows, input)?, tensor(out, input)?, tensor(rows, out)?);
        let linear = cpu.linear_of(&w, None, dtype)?;
        let mut gradient = Some(tensor(out, input)?);
        let seconds = [
            shortest(|| cpu.linear(&x, &linear, Then::Nothing).map(drop))?,
            shortest(|| cpu.matmul(&x, &w, Layout::TimesTransposed, dtype, None).map(drop))?,
            shortest(|| cpu.matmul(&dy, &w, Layout::Times, dtype, None).map(drop))?,
            shortest(|| {
                let sum = cpu.matmul(&dy, &x, Layout::TransposedTimes, dtype, gradient.take())?;
                gradient = Some(sum);
                Ok(())
            })?,
            shortest(|| cpu.linear_grad(&dy, &linear, None).map(drop))?,
            shortest(|| cpu.linear_of(&w, None, dtype).map(drop))?,
        ];
        print!("{:14} {:5.0} GFLOPS", format!("{out} x {input}"), flop / seconds[0] * 1e-9);
        for s in &seconds[1..5] {
            print!(" {:8.2} ms {:6.1} %  ", s * 1e3, 100.0 * seconds[0] / s);
        }
        println!(" {:6.2} ms", seconds[5] * 1e3);
    }

    let show = |what: &str, seconds: f64| println!("{what:24} {:8.3} ms", seconds * 1e3);
    let lengths = [rows];
    for spans in [Span::lay_out(lengths.into_iter()), Span::lay_out((0..rows / 128).map(|_| 128))] {
        let [q, k, v, dy] =
            [tensor(rows, HIDDEN)?, tensor(rows, HIDDEN)?, tensor(rows, HIDDEN)?, tensor(rows, HIDDEN)?];
        let attend = Attend { heads: HEADS, layer: 0, spans: &spans };
        let forward =
            shortest(|| cpu.attend(cpu.copy(&q)?, cpu.copy(&k)?, cpu.copy(&v)?, attend, None).map(drop))?;
        show(&format!("attend, {} spans", spans.len()), forward);
        show("attend_grad", shortest(|| cpu.attend_grad([&q, &k, &v], &dy, attend).map(drop))?);
    }
    let (x, wide, dy) = (tensor(rows, HIDDEN)?, tensor(rows, FFN)?, tensor(rows, HIDDEN)?);
    let norm = cpu.new_norm(NormParams { width: HIDDEN, eps: 1e-5, weight: None, bias: None })?;
    show("layer_norm", shortest(|| cpu.layer_norm(&x, &norm).map(drop))?);
    show("layer_norm_grad", shortest(|| cpu.layer_norm_grad(&x, &norm, &dy).map(drop))?);
    show("layer_norm_grad_params", shortest(|| cpu.layer_norm_grad_params(&x, &norm, &dy).map(drop))?);
    show("copy, ffn", shortest(|| cpu.copy(&wide).map(drop))?);
    let in_place = |op: &dyn Fn(Tensor) -> Result<Tensor>| {
        let mut x = Some(cpu.copy(&wide)?);
        shortest(|| {
            x = x.take().map(op).transpose()?;
            Ok(())
        })
    };
    show("activate_grad, relu", in_place(&|x| cpu.activate_grad(&wide, x, Activation::Relu))?);
    show("activate_grad, gelu", in_place(&|x| cpu.activate_grad(&wide, x, Activation::Gelu))?);
    show("dropout, ffn", in_place(&|x| cpu.dropout(x, Dropout { p: 0.1, seed: 7 }))?);
    show("mul, ffn", in_place(&|x| cpu.mul(x, &wide))?);
    show("sum_rows, ffn", shortest(|| cpu.sum_rows(&wide).map(drop))?);
    let targets: Vec<u32> = (0..rows).map(|i| (i * 7919 % VOCAB) as u32).collect();
    let smoothing = Smoothing { scale: 1.0 / rows as f32, epsilon: 0.0 };
    let mut logits = Some(tensor(rows, VOCAB)?);
    show(
        "cross_entropy",
        shortest(|| {
            if let Some(x) = logits.take() {
                let [_, gradient] = cpu.cross_entropy(x, &targets, smoothing)?;
                logits = Some(gradient);
            }
            Ok(())
        })?,
    );
    let teacher = tensor(rows, VOCAB)?;
    show(
        "soft_targets",
        shortest(|| {
            if let Some(x) = logits.take() {
                let [_, gradient] = cpu.soft_targets(x, &teacher, 2.0, 1.0)?;
                logits = Some(gradient);
            }
            Ok(())
        })?,
    );
    let table = cpu.new_table(HostMatrix::F32(random(VOCAB, HIDDEN).view()), dtype)?;
    show("logits", shortest(|| cpu.logits(&x, &table).map(drop))?);
    show("logits_grad", shortest(|| cpu.logits_grad(&teacher, &table).map(drop))?);
    let mut param = tensor(VOCAB, HIDDEN)?;
    let (gradient, mut moments) =
        (tensor(VOCAB, HIDDEN)?, [cpu.copy(&param)?, cpu.mul(cpu.copy(&param)?, &param)?]);
    let adam = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 1 };
    show("adamw, table", shortest(|| cpu.adamw(&mut param, &gradient, &mut moments, adam, None))?);
    show("sum_squares, table", shortest(|| cpu.sum_squares(&[&gradient]).map(drop))?);
    Ok(())
}
