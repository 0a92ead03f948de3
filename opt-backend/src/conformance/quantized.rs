//! Quantized weights: what a backend holds packed is worth what the reference dequantizer says, in every op.

use super::{
    Outcome, Run, Tolerance,
    compare::same_bits,
    data::{Data, read},
    ensure, fail,
};
use crate::{
    Activation, Backend, HostVector, Then, oracle,
    quant::{FP4, Groups, Levels, NF4, Quantized, Zeros},
};
use half::f16;
use ndarray::Array2;

/// A format as tests make it.
#[derive(Clone, Copy)]
pub(super) struct Format {
    pub(super) name: &'static str,
    levels: Levels,
    /// Inputs that share a scale.
    group: usize,
    /// Whether each scale has a zero point.
    zeros: bool,
    /// Whether groups are spread over the row.
    scattered: bool,
    /// Whether scales are numbers of f16.
    half: bool,
    /// Magnitude from which on activations are not to be rounded.
    outliers: Option<f32>,
}

const fn integers(name: &'static str, bits: u32, group: usize, zeros: bool) -> Format {
    Format {
        name,
        levels: Levels::Integers { bits },
        group,
        zeros,
        scattered: false,
        half: true,
        outliers: None,
    }
}

const fn table(name: &'static str, levels: [f32; 16], group: usize) -> Format {
    Format {
        name,
        levels: Levels::Table(levels),
        group,
        zeros: false,
        scattered: false,
        half: false,
        outliers: None,
    }
}

/// What checkpoints hold, and groups that no kernel likes.
pub(super) const FORMATS: [Format; 16] = [
    integers("int8, groups of 32", 8, 32, false),
    integers("int8, groups of 128", 8, 128, false),
    integers("int8, one scale a row", 8, usize::MAX, false),
    integers("int8 with zero points", 8, 64, true),
    integers("int4, groups of 32", 4, 32, false),
    integers("int4, groups of 64 with zero points", 4, 64, true),
    integers("int4, one scale a row with zero points", 4, usize::MAX, true),
    integers("int4, groups of 5", 4, 5, false),
    integers("3 bits, groups of 128 with zero points", 3, 128, true),
    integers("2 bits, groups of 32 with zero points", 2, 32, true),
    Format { scattered: true, ..integers("int4 in GPTQ's act-order", 4, 32, true) },
    Format { half: false, ..integers("int8 with scales in f32", 8, 32, false) },
    // Of normal activations, every twentieth.
    Format { outliers: Some(2.0), ..integers("int8, outliers kept", 8, 64, false) },
    Format {
        scattered: true,
        outliers: Some(2.0),
        ..integers("int8 in act-order, outliers kept", 8, 32, true)
    },
    table("nf4", NF4, 64),
    table("fp4, groups of 16", FP4, 16),
];

impl Format {
    /// A weight `[out, input]` that about keeps the size of what it is applied to.
    pub(super) fn weight(self, data: &mut Data, [out, input]: [usize; 2]) -> Outcome<Quantized> {
        let group = self.group.min(input.max(1));
        let groups = input.div_ceil(group);
        let (count, middle) = match self.levels {
            Levels::Integers { bits } => (1_usize << bits, 1_u16 << (bits - 1)),
            Levels::Table(_) => (16, 0),
        };
        let codes = Array2::from_shape_simple_fn((out, input), || data.below(count) as u8);
        let size = (input.max(1) as f32).sqrt()
            * if self.levels == (Levels::Integers { bits: 8 }) { 70.0 } else { 4.0 };
        let scale = |data: &mut Data| {
            let scale = (0.3 + data.normal().abs()) / size;
            if self.half { f16::from_f32(scale).to_f32() } else { scale }
        };
        let scales = Array2::from_shape_simple_fn((out, groups), || scale(data));
        let zeros = if self.zeros {
            // As far as GPTQ's files go: one past the largest code.
            Zeros::Each(Array2::from_shape_simple_fn((out, groups), || data.below(count + 1) as u16))
        } else {
            Zeros::Same(middle)
        };
        let groups = if self.scattered {
            let mut index: Vec<u32> = (0..input).map(|i| (i / group) as u32).collect();
            (1..input).rev().for_each(|i| index.swap(i, data.below(i + 1)));
            Groups::Index(index)
        } else {
            Groups::Runs(group)
        };
        let weight = Quantized::new(codes, scales, zeros, self.levels, groups)?;
        Ok(match self.outliers {
            Some(threshold) => weight.keep_outliers(threshold),
            None => weight,
        })
    }
}

/// Widths of real models, and such that no vector, group or word divides.
pub(super) const SHAPES: [[usize; 2]; 5] = [[64, 96], [33, 7], [1, 1], [100, 320], [768, 256]];

pub(super) fn run<B: Backend>(run: &mut Run<'_, B>) {
    for format in FORMATS {
        for shape in SHAPES {
            run.case("quantized", format_args!("{}: linear {shape:?}", format.name), |b, data| {
                linear(b, data, format, shape)
            });
        }
        for shape in [[130, 64], [257, 96], [5, 33]] {
            run.case("quantized", format_args!("{}: table {shape:?}", format.name), |b, data| {
                table_of(b, data, format, shape)
            });
        }
    }
    run.case("quantized", "three linears of one input", qkv);
    run.case("quantized", "adversarial values", adversarial);
    run.case("quantized", "arguments that do not fit", |b, data| {
        let weight = FORMATS[0].weight(data, [8, 64])?;
        let bias = data.vector(7);
        shape_error("a bias too short", b.new_quantized_linear(&weight, Some(HostVector::F32(bias.view()))))?;
        let linear = b.new_quantized_linear(&weight, None)?;
        let x = b.upload(data.matrix(2, 63).view())?;
        shape_error("an input too narrow", b.linear(&x, &linear, Then::Nothing))?;
        let table = b.new_quantized_table(&weight)?;
        shape_error("an id too large", b.gather(&table, &[8]))
    });
}

fn shape_error<T>(what: &str, found: crate::Result<T>) -> Outcome {
    match found {
        Err(error) if error.kind() == crate::ErrorKind::Shape => Ok(()),
        Err(error) => fail(format_args!("{what}: expected an error of the kind Shape, found {error}")),
        Ok(_) => fail(format_args!("{what}: expected an error, found none")),
    }
}

fn linear<B: Backend>(b: &B, data: &mut Data, format: Format, [out, input]: [usize; 2]) -> Outcome {
    let weight = format.weight(data, [out, input])?;
    let exact = weight.dequantize();
    let bias = data.vector(out);
    let held = b.new_quantized_linear(&weight, Some(HostVector::F32(bias.view())))?;
    let host = b.block_on(b.read_linear(&held))?;
    same_bits("read back", host.weight.view(), exact.view())?;
    for rows in [1, 2, 5, 8, 13, 40] {
        let x = data.matrix(rows, input);
        let (tensor, tolerance) = (b.upload(x.view())?, data.quantized_tolerance());
        let expected = oracle::linear(x.view(), exact.view(), host.bias_view(), None);
        let found = read(b, &b.linear(&tensor, &held, Then::Nothing)?)?;
        tolerance.compare(&format!("{rows} rows"), found.view(), expected.view())?;
        let expected = oracle::linear(x.view(), exact.view(), host.bias_view(), Some(Activation::Relu));
        let found = read(b, &b.linear(&tensor, &held, Then::Activate(Activation::Relu))?)?;
        tolerance.compare(&format!("{rows} rows, relu"), found.view(), expected.view())?;
        let residual = data.matrix(rows, out);
        let expected = oracle::linear(x.view(), exact.view(), host.bias_view(), None) + &residual;
        let found = read(b, &b.linear(&tensor, &held, Then::Add(b.upload(residual.view())?))?)?;
        tolerance.compare(&format!("{rows} rows, residual"), found.view(), expected.view())?;
    }
    // Without bias, and without rows.
    let held = b.new_quantized_linear(&weight, None)?;
    ensure(b.block_on(b.read_linear(&held))?.bias.is_none(), "a bias came out of nowhere")?;
    let none = b.linear(&b.upload(Array2::zeros((0, input)).view())?, &held, Then::Nothing)?;
    ensure(
        b.shape(&none) == [0, out],
        format_args!("no rows: expected [0, {out}], found {:?}", b.shape(&none)),
    )
}

fn table_of<B: Backend>(b: &B, data: &mut Data, format: Format, [entries, width]: [usize; 2]) -> Outcome {
    let rows = format.weight(data, [entries, width])?;
    let exact = rows.dequantize();
    let table = b.new_quantized_table(&rows)?;
    ensure(b.table_shape(&table) == [entries, width], "the table has another shape")?;
    same_bits("read back", b.block_on(b.read_table(&table, 0..entries))?.view(), exact.view())?;
    let ids: Vec<u32> = (0..9).map(|_| data.below(entries) as u32).chain([0, entries as u32 - 1]).collect();
    let taken = exact.select(ndarray::Axis(0), &ids.iter().map(|id| *id as usize).collect::<Vec<_>>());
    let found = read(b, &b.gather(&table, &ids)?)?;
    data.tolerance().compare("gather", found.view(), taken.view())?;
    let x = data.matrix(ids.len(), width);
    let found = read(b, &b.add_gathered(b.upload(x.view())?, &table, &ids)?)?;
    data.tolerance().compare("add_gathered", found.view(), (&x + &taken).view())?;
    for rows in [1, 3, 11] {
        let x = data.matrix(rows, width);
        let (tensor, tolerance) = (b.upload(x.view())?, data.quantized_tolerance());
        let expected = oracle::linear(x.view(), exact.view(), None, None);
        let logits = b.logits(&tensor, &table)?;
        let found = read(b, &logits)?;
        tolerance.compare(&format!("logits of {rows}"), found.view(), expected.view())?;
        let targets: Vec<u32> = (0..rows).map(|_| data.below(entries) as u32).collect();
        let scores = b.block_on(b.log_probs(&tensor, &table, &targets))?;
        for ((score, row), target) in scores.iter().zip(expected.outer_iter()).zip(&targets) {
            let expected = oracle::target_score(row, *target).log_prob;
            let most = tolerance.max * f64::from(row.iter().fold(1f32, |most, v| most.max(v.abs())));
            ensure(
                f64::from((score.log_prob - expected).abs()) <= 2.0 * most,
                format_args!("log_probs: expected {expected}, found {}", score.log_prob),
            )?;
        }
    }
    Ok(())
}

fn qkv<B: Backend>(b: &B, data: &mut Data) -> Outcome {
    // Formats may differ from linear to linear: a mixed checkpoint is one.
    let weights = [FORMATS[0], FORMATS[10], FORMATS[14]].map(|format| format.weight(data, [48, 96]));
    let [q, k, v] = weights;
    let weights = [q?, k?, v?];
    let [q, k, v] = &weights;
    let held = [q, k, v].map(|weight| b.new_quantized_linear(weight, None));
    let [hq, hk, hv] = held;
    let (hq, hk, hv) = (hq?, hk?, hv?);
    for rows in [1, 7, 20] {
        let x = data.matrix(rows, 96);
        let found = b.qkv(&b.upload(x.view())?, &hq, &hk, &hv)?;
        for ((weight, found), name) in weights.iter().zip(&found).zip(["q", "k", "v"]) {
            let expected = oracle::linear(x.view(), weight.dequantize().view(), None, None);
            let what = format!("{name} of {rows}");
            data.quantized_tolerance().compare(&what, read(b, found)?.view(), expected.view())?;
        }
    }
    Ok(())
}

/// Zeros, one huge value, tiny ones, and sums as large as they get.
fn adversarial<B: Backend>(b: &B, data: &mut Data) -> Outcome {
    let mut x = data.matrix(6, 128);
    x.row_mut(0).fill(0.0);
    x[[1, 37]] = 1e4;
    x.row_mut(2).mapv_inplace(|v| v * 1e-30);
    x.row_mut(3).mapv_inplace(|v| v * 1e-42);
    x.row_mut(4).fill(127.0);
    x.row_mut(5).fill(-1.0);
    let x = data.held(x);
    for format in FORMATS {
        let mut weight = format.weight(data, [40, 128])?;
        let exact = weight.dequantize();
        check_rows(b, data.quantized_tolerance(), &weight, &exact, &x, format.name)?;
        // Every code the largest, and every code the smallest.
        for code in [
            0_u8,
            match format.levels {
                Levels::Integers { bits } => ((1_u32 << bits) - 1) as u8,
                _ => 15,
            },
        ] {
            weight = Quantized::new(
                Array2::from_elem((40, 128), code),
                weight.scales().clone(),
                weight.zeros().clone(),
                weight.levels(),
                weight.groups().clone(),
            )?;
            let exact = weight.dequantize();
            let what = format!("{}, all codes {code}", format.name);
            check_rows(b, data.quantized_tolerance(), &weight, &exact, &x, &what)?;
        }
    }
    Ok(())
}

/// Each row by its own size: one huge row must not hide the others.
fn check_rows<B: Backend>(
    b: &B,
    tolerance: Tolerance,
    weight: &Quantized,
    exact: &Array2<f32>,
    x: &Array2<f32>,
    what: &str,
) -> Outcome {
    let held = b.new_quantized_linear(weight, None)?;
    let found = read(b, &b.linear(&b.upload(x.view())?, &held, Then::Nothing)?)?;
    let expected = oracle::linear(x.view(), exact.view(), None, None);
    for (row, (f, e)) in found.outer_iter().zip(expected.outer_iter()).enumerate() {
        // What sums could be, were nothing to cancel.
        let size = f64::from(x.row(row).iter().map(|v| v.abs()).sum::<f32>())
            * f64::from(exact.iter().fold(0f32, |most, v| most.max(v.abs())));
        let off = f.iter().zip(e).map(|(f, e)| f64::from((f - e).abs())).fold(0.0, f64::max);
        let (finite, bound) = (f.iter().all(|f| f.is_finite()), tolerance.max * size + 1e-35);
        ensure(
            finite && off <= bound,
            format_args!("{what}, row {row}: off by {off:.1e}, at most {bound:.1e}"),
        )?;
    }
    Ok(())
}
