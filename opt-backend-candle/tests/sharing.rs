//! One value used from many threads, several values on one device, and caches that share memory.
//!
//! `OPT_TEST_DEVICE` names the device, as for the conformance suite.

use opt_backend::{
    Activation, Attend, Backend, CacheDType, CacheSpec, DType, ErrorKind, HostMatrix, HostVector, Result,
    Span, Then,
    ndarray::{Array1, Array2},
};
use opt_backend_candle::{Builder, Cache, Candle, Linear, candle_core::Device};
use std::thread;

const WIDTH: usize = 96;
const HEADS: usize = 4;

/// Every device has two ways here; other devices than the CPU compute alike in both.
fn builders() -> [Builder; 2] {
    let device = std::env::var("OPT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    [false, true].map(|plain| Candle::builder().device(&device).threads(2).plain(plain))
}

fn numbers(rows: usize, width: usize, seed: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, width), |(i, j)| ((i * 31 + j * 7 + seed * 13) % 23) as f32 / 23.0 - 0.5)
}

/// One decoder layer, about.
struct Layer {
    q: Linear,
    wide: Linear,
    narrow: Linear,
}

impl Layer {
    fn new(b: &Candle, dtype: DType) -> Result<Self> {
        let linear = |out, input, seed| {
            let bias = Array1::from_elem(out, 0.01);
            let bias = Some(HostVector::F32(bias.view()));
            b.new_linear(HostMatrix::F32(numbers(out, input, seed).view()), bias, dtype)
        };
        Ok(Self {
            q: linear(WIDTH, WIDTH, 1)?,
            wide: linear(4 * WIDTH, WIDTH, 2)?,
            narrow: linear(WIDTH, 4 * WIDTH, 3)?,
        })
    }

    /// Runs rows behind a cache.
    fn run(&self, b: &Candle, cache: &mut Cache, x: &Array2<f32>) -> Result<Array2<f32>> {
        let h = b.upload(x.view())?;
        let [q, k, v] = b.qkv(&h, &self.q, &self.q, &self.q)?;
        let spans = [Span { start: 0, len: x.nrows() }];
        let attend = Attend { heads: HEADS, layer: 0, spans: &spans };
        let mixed = b.attend(q, k, v, attend, Some(&mut [cache]))?;
        let wide = b.linear(&mixed, &self.wide, Then::Activate(Activation::Gelu))?;
        let h = b.linear(&wide, &self.narrow, Then::Add(h))?;
        b.block_on(b.read_owned(h))
    }

    fn sequence(&self, b: &Candle, seed: usize) -> Result<Vec<Array2<f32>>> {
        let mut cache = new_cache(b, CacheDType::F32)?;
        let prompt = self.run(b, &mut cache, &numbers(70, WIDTH, seed))?;
        let mut all = vec![prompt];
        for step in 0..8 {
            all.push(self.run(b, &mut cache, &numbers(1, WIDTH, seed + step))?);
        }
        Ok(all)
    }
}

fn new_cache(b: &Candle, dtype: CacheDType) -> Result<Cache> {
    b.new_cache(CacheSpec { layers: 1, heads: HEADS, head_dim: WIDTH / HEADS, dtype, capacity_hint: 0 })
}

#[test]
fn many_threads_use_one_value() -> Result<()> {
    for builder in builders() {
        for dtype in [DType::F32, DType::BF16] {
            let b = builder.clone().build()?;
            let layer = Layer::new(&b, dtype)?;
            let alone: Vec<_> = (0..4).map(|seed| layer.sequence(&b, seed)).collect::<Result<_>>()?;
            thread::scope(|scope| {
                let runs: Vec<_> = (0..8)
                    .map(|i| {
                        let (b, layer) = (&b, &layer);
                        scope.spawn(move || layer.sequence(b, i % 4))
                    })
                    .collect();
                for (i, run) in runs.into_iter().enumerate() {
                    let found = run.join().expect("no panic").expect("no error");
                    assert_eq!(found, alone[i % 4], "thread {i}, weights {dtype}");
                }
            });
        }
    }
    Ok(())
}

#[test]
fn two_values_on_one_device() -> Result<()> {
    for builder in builders() {
        let first = builder.clone().build()?;
        let layer = Layer::new(&first, DType::F32)?;
        let expected = layer.sequence(&first, 5)?;
        let second = Candle::builder().device("cpu").threads(1).build()?;
        let other = Layer::new(&second, DType::F16)?;
        thread::scope(|scope| {
            let run = scope.spawn(|| (0..3).map(|_| other.sequence(&second, 6)).collect::<Result<Vec<_>>>());
            for _ in 0..3 {
                assert_eq!(layer.sequence(&first, 5).expect("no error"), expected);
            }
            let runs = run.join().expect("no panic").expect("no error");
            assert!(runs.windows(2).all(|pair| pair[0] == pair[1]));
        });
        // The one goes, the other stays.
        drop((other, second));
        assert_eq!(layer.sequence(&first, 5)?, expected);
    }
    Ok(())
}

/// candle's clones share storage and are written in place: after a fork nothing of the one side may show on the other.
#[test]
fn forks_do_not_see_each_other() -> Result<()> {
    for builder in builders() {
        let b = builder.build()?;
        for dtype in [CacheDType::F32, CacheDType::F16, CacheDType::Int8] {
            let append = |cache: &mut Cache, rows: usize, seed: usize| -> Result<()> {
                let (k, v) = (numbers(rows, WIDTH, seed), numbers(rows, WIDTH, seed + 100));
                let (k, v) = (b.upload(k.view())?, b.upload(v.view())?);
                b.cache_append(cache, 0, &k, &v, 0..rows)
            };
            let read = |cache: &Cache| b.block_on(b.cache_read(cache, 0));
            for held in [1, 63, 64, 65, 200] {
                let mut original = new_cache(&b, dtype)?;
                append(&mut original, held, 1)?;
                let before = read(&original)?;
                let mut forks = vec![b.cache_fork(&original)?, b.cache_fork(&original)?];
                append(&mut forks[0], 3, 2)?;
                let first = read(&forks[0])?;
                assert_eq!(read(&original)?, before, "{dtype:?} at {held}: the fork grew");
                append(&mut original, 2, 3)?;
                assert_eq!(read(&forks[0])?, first, "{dtype:?} at {held}: the original grew");
                assert_eq!(read(&forks[1])?, before, "{dtype:?} at {held}: both grew");
                // Into what is shared: the second fork shortens, and writes over what the others hold.
                b.cache_truncate(&mut forks[1], held / 2)?;
                append(&mut forks[1], 5, 4)?;
                assert_eq!(read(&forks[0])?, first, "{dtype:?} at {held}: another fork shortened");
                let kept = read(&original)?;
                assert_eq!(kept.keys.slice(opt_backend::ndarray::s![..held, ..]), before.keys);
                // The others go; what is left is its own.
                drop(original);
                let last = forks.remove(0);
                drop(forks);
                assert_eq!(read(&last)?, first);
            }
        }
    }
    Ok(())
}

#[test]
fn a_device_that_candle_has_opened() -> Result<()> {
    let b = Candle::on(Device::Cpu)?;
    assert!(b.device().is_cpu());
    let info = b.info();
    assert_eq!((info.name.as_str(), info.device.as_str()), ("candle", "cpu"));
    assert_eq!(info.threads, opt_backend_candle::candle_core::utils::get_num_threads());
    assert_eq!(info.dtypes, [DType::F32, DType::F16, DType::BF16]);
    assert!(info.simd.is_some() && info.details.iter().any(|(name, _)| name == "candle"));
    if cfg!(target_os = "linux") {
        assert!(info.memory.is_some_and(|bytes| bytes > 0));
    }
    Ok(())
}

#[test]
fn what_cannot_be_built() {
    for threads in [0, 1 << 20] {
        let error = Candle::builder().threads(threads).build().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains(&threads.to_string()), "{error}");
    }
    // More than can be addressed, or than there is.
    let b = Candle::new().expect("the CPU");
    let spec =
        |heads, head_dim| CacheSpec { layers: 1, heads, head_dim, dtype: CacheDType::F32, capacity_hint: 0 };
    for (heads, head_dim) in [(0, 4), (4, 0), (usize::MAX, 2), (1 << 40, 1 << 40)] {
        assert!(b.new_cache(spec(heads, head_dim)).is_err(), "{heads} heads of {head_dim}");
    }
    // A hint is no limit, and no reservation.
    let mut hinted = spec(2, 4);
    hinted.capacity_hint = usize::MAX;
    let mut cache = b.new_cache(hinted).expect("a cache");
    let x = b.upload(Array2::ones((3, 8)).view()).expect("an upload");
    b.cache_append(&mut cache, 0, &x, &x, 0..3).expect("an append");
    assert_eq!(b.cache_len(&cache, 0), 3);
}
