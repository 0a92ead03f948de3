//! Tokens per second of the op sequence of an OPT-125m with random weights: what the kernels can give, before
//! tokenizer, sampling and checkpoint have a part in it.
//!
//!     cargo run --release -p opt-backend-cpu --example shape_125m [f32|f16|bf16|int8|int4|nf4] [compute: int16|int8|f32]
//!
//! Decoding one token reads every weight once: 124 million of them, 0.5 GB in f32. Prefill of 512 tokens with all
//! logits is 131 GFLOP: 87 in the layers, 40 in the LM head, 5 in attention.

use opt_backend::{
    Activation, Attend, Backend, CacheDType, CacheSpec, DType, HostMatrix, HostVector, NormParams, Result,
    Span, Then,
    ndarray::{Array1, Array2},
    quant::{Groups, Levels, NF4, Quantized, Zeros},
};
use opt_backend_cpu::{Cache, Compute, Cpu, Linear, Norm, Table, Tensor};
use std::time::Instant;

const HIDDEN: usize = 768;
const FFN: usize = 3072;
const HEADS: usize = 12;
const LAYERS: usize = 12;
const VOCAB: usize = 50272;

struct Layer {
    norms: [Norm; 2],
    qkvo: [Linear; 4],
    ffn: [Linear; 2],
}

struct Model {
    cpu: Cpu,
    tokens: Table,
    positions: Table,
    layers: Vec<Layer>,
    last: Norm,
}

fn random(rows: usize, columns: usize, scale: f32) -> Array2<f32> {
    let mut state = 88_172_645_463_325_252_u64 ^ ((rows * 31 + columns) as u64) << 20;
    Array2::from_shape_simple_fn((rows, columns), || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale
    })
}

/// How weights are held.
#[derive(Clone, Copy)]
enum Held {
    Dense(DType),
    Quantized(Levels),
}

/// Random codes in groups of 32, of tables 64.
fn codes(levels: Levels, outputs: usize, inputs: usize) -> Result<Quantized> {
    let (count, group) = match levels {
        Levels::Integers { bits } => (1 << bits, 32),
        _ => (16, 64),
    };
    let codes =
        random(outputs, inputs, 1.0).mapv(|x| (((x + 1.0) * 0.5 * count as f32) as u32).min(count - 1) as u8);
    let scales = Array2::from_elem((outputs, inputs.div_ceil(group)), 0.125 / count as f32);
    Quantized::new(codes, scales, Zeros::Same(count as u16 / 2), levels, Groups::Runs(group))
}

impl Model {
    fn new(cpu: Cpu, held: Held) -> Result<Self> {
        let table = |rows, held| match held {
            Held::Dense(dtype) => cpu.new_table(HostMatrix::F32(random(rows, HIDDEN, 0.05).view()), dtype),
            // Where weights are narrower, the table stays at eight bits.
            Held::Quantized(_) => {
                cpu.new_quantized_table(&codes(Levels::Integers { bits: 8 }, rows, HIDDEN)?)
            }
        };
        let linear = |outputs, inputs| {
            let bias = Array1::<f32>::zeros(outputs);
            let bias = Some(HostVector::F32(bias.view()));
            match held {
                Held::Dense(dtype) => {
                    cpu.new_linear(HostMatrix::F32(random(outputs, inputs, 0.05).view()), bias, dtype)
                }
                Held::Quantized(levels) => cpu.new_quantized_linear(&codes(levels, outputs, inputs)?, bias),
            }
        };
        let ones = Array1::<f32>::ones(HIDDEN);
        let norm = || {
            let ones = Some(HostVector::F32(ones.view()));
            cpu.new_norm(NormParams { width: HIDDEN, eps: 1e-5, weight: ones, bias: ones })
        };
        let layers = (0..LAYERS).map(|_| {
            let square = || linear(HIDDEN, HIDDEN);
            Ok(Layer {
                norms: [norm()?, norm()?],
                qkvo: [square()?, square()?, square()?, square()?],
                ffn: [linear(FFN, HIDDEN)?, linear(HIDDEN, FFN)?],
            })
        });
        let layers = layers.collect::<Result<_>>()?;
        Ok(Self {
            layers,
            tokens: table(VOCAB, held)?,
            positions: table(2050, Held::Dense(DType::F32))?,
            last: norm()?,
            cpu,
        })
    }

    fn caches(&self, batch: usize) -> Result<Vec<Cache>> {
        let spec = CacheSpec {
            layers: LAYERS,
            heads: HEADS,
            head_dim: HIDDEN / HEADS,
            dtype: CacheDType::F32,
            capacity_hint: 640,
        };
        (0..batch).map(|_| self.cpu.new_cache(spec)).collect()
    }

    /// Final hidden rows of `new` more tokens a sequence.
    fn forward(&self, ids: &[u32], new: usize, start: usize, caches: &mut [Cache]) -> Result<Tensor> {
        let cpu = &self.cpu;
        let positions: Vec<u32> =
            caches.iter().flat_map(|_| (start..start + new).map(|p| p as u32 + 2)).collect();
        let spans = Span::lay_out(caches.iter().map(|_| new));
        let mut x = cpu.add_gathered(cpu.gather(&self.tokens, ids)?, &self.positions, &positions)?;
        for (layer, weights) in self.layers.iter().enumerate() {
            let normed = cpu.layer_norm(&x, &weights.norms[0])?;
            let [q, k, v, o] = &weights.qkvo;
            let [q, k, v] = cpu.qkv(&normed, q, k, v)?;
            let attend = Attend { heads: HEADS, layer, spans: &spans };
            let mixed = cpu.attend(q, k, v, attend, Some(&mut caches.iter_mut().collect::<Vec<_>>()))?;
            x = cpu.linear(&mixed, o, Then::Add(x))?;
            let normed = cpu.layer_norm(&x, &weights.norms[1])?;
            let inner = cpu.linear(&normed, &weights.ffn[0], Then::Activate(Activation::Relu))?;
            x = cpu.linear(&inner, &weights.ffn[1], Then::Add(x))?;
        }
        cpu.layer_norm(&x, &self.last)
    }

    fn prefill(&self, length: usize, all: bool) -> Result<f64> {
        let ids: Vec<u32> = (0..length).map(|i| (i * 7919 % VOCAB) as u32).collect();
        let start = Instant::now();
        let hidden = self.forward(&ids, length, 0, &mut self.caches(1)?)?;
        let rows = if all { hidden } else { self.cpu.take_rows(&hidden, &[length - 1])? };
        let logits = self.cpu.block_on(self.cpu.read_owned(self.cpu.logits(&rows, &self.tokens)?))?;
        assert!(logits[[0, 0]].is_finite());
        Ok(length as f64 / start.elapsed().as_secs_f64())
    }

    fn decode(&self, batch: usize, new: usize) -> Result<f64> {
        let mut caches = self.caches(batch)?;
        let ids: Vec<u32> = (0..batch * 32).map(|i| (i * 7919 % VOCAB) as u32).collect();
        self.forward(&ids, 32, 0, &mut caches)?;
        let start = Instant::now();
        let mut ids: Vec<u32> = ids.into_iter().step_by(32).collect();
        for step in 0..new {
            let hidden = self.forward(&ids, 1, 32 + step, &mut caches)?;
            let logits = self.cpu.logits(&hidden, &self.tokens)?;
            let top = self.cpu.block_on(self.cpu.top_k(&logits, 1))?;
            ids = top.iter().map(|top| top.ids[0]).collect();
        }
        Ok((batch * new) as f64 / start.elapsed().as_secs_f64())
    }
}

/// Seconds the main thread has run on a processor, where the system says.
fn busy_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/schedstat").ok()?;
    Some(stat.split_whitespace().next()?.parse::<f64>().ok()? * 1e-9)
}

fn main() -> Result<()> {
    let wrong = |e| opt_backend::Error::new(opt_backend::ErrorKind::Unsupported, "arguments", e);
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or("f32".to_owned());
    let held = match &name[..] {
        "int8" => Held::Quantized(Levels::Integers { bits: 8 }),
        "int4" => Held::Quantized(Levels::Integers { bits: 4 }),
        "nf4" => Held::Quantized(Levels::Table(NF4)),
        name => Held::Dense(name.parse().map_err(wrong)?),
    };
    let compute = arguments.next().map_or(Ok(Compute::default()), |name| name.parse()).map_err(wrong)?;
    let cpu = Cpu::builder().compute(compute).build()?;
    println!("{}, {}, {} threads, {name}", cpu.info().device, cpu.simd(), cpu.threads());
    let model = Model::new(cpu, held)?;
    let runs = 5;
    let print = |what: &str, run: &dyn Fn() -> Result<f64>| {
        let speeds = (0..runs).map(|_| {
            let (wall, busy) = (Instant::now(), busy_seconds());
            let speed = run()?;
            // With one thread, processor time tells the speed also on a machine that others use.
            Ok((speed, busy.zip(busy_seconds()).map(|(a, b)| (b - a) / wall.elapsed().as_secs_f64())))
        });
        let mut speeds = speeds.collect::<Result<Vec<_>>>()?;
        speeds.sort_by(|a, b| a.0.total_cmp(&b.0));
        let ((median, _), (best, _)) = (speeds[runs / 2], speeds[runs - 1]);
        let mut busy: Vec<f64> = speeds.iter().filter_map(|(speed, share)| Some(speed / (*share)?)).collect();
        busy.sort_by(f64::total_cmp);
        let busy =
            busy.get(runs / 2).map_or(String::new(), |b| format!(", {b:8.1} per second of the main thread"));
        println!("{what:28} {median:8.1} tok/s median, {best:8.1} best{busy}");
        Ok::<(), opt_backend::Error>(())
    };
    print("decode, batch 1", &|| model.decode(1, 64))?;
    print("decode, batch 8", &|| model.decode(8, 32))?;
    print("decode, batch 16", &|| model.decode(16, 16))?;
    print("prefill 128, all logits", &|| model.prefill(128, true))?;
    print("prefill 512, all logits", &|| model.prefill(512, true))?;
    print("prefill 512, last logits", &|| model.prefill(512, false))?;
    Ok(())
}
