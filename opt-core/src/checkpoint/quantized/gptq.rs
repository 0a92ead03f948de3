//! GPTQ's files, as AutoGPTQ and GPTQModel write them.
//!
//! ```text
//! qweight [in / 32 * bits, out] i32     codes, packed down the inputs
//! qzeros  [groups, out / 32 * bits] i32 zero points, packed along the outputs; one less in the format "gptq"
//! scales  [groups, out] f16
//! g_idx   [in] i32                      the group of each input
//! W[o, i] = scales[g_idx[i], o] * (qweight[i, o] - zero[g_idx[i], o])
//! ```
//!
//! Kernels disagree about a zero point stored as all ones in the format "gptq": most add 1 and have 16 for 4 bits
//! (Triton, ExLlama, AutoGPTQ's current CUDA kernel), some cut it to 0 afterwards. Here it is 16; and a weight with a
//! zero point of 0 is written as "gptq_v2", about which there is no doubt.

use super::{
    bits::{self, UNIT},
    part::{Part, Parts, Stored, collapse, int},
};
use crate::{Error, ErrorKind, Result, checkpoint::FileDType};
use ndarray::{Array2, ArrayView2};
use opt_backend::quant::{Groups, Levels, Quantized, Zeros};
use serde_json::{Value, json};

/// What a configuration says about all weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gptq {
    pub(super) bits: u32,
    /// `None` is one scale a row.
    pub(super) group_size: Option<usize>,
    /// Zero points are stored as they are, not one less.
    pub(super) v2: bool,
    /// Groups are not runs of inputs, so that g_idx must say what they are.
    pub(super) scattered: bool,
}

impl Gptq {
    pub(super) fn parse(config: &Value) -> Result<Self> {
        let bits = int(config, "bits", &[2, 3, 4, 8])? as u32;
        let group_size = super::group_size(config, "group_size")?;
        let fail = |key: &str, expected: &str, found: &Value| {
            let message = format_args!("{key}: expected {expected}, found {found}");
            Err(Error::new(ErrorKind::Unsupported, message))
        };
        if let Some(found @ Value::Bool(true)) = config.get("is_marlin_format") {
            return fail("is_marlin_format", "false", found);
        }
        let format = config.get("checkpoint_format").or_else(|| config.get("format"));
        let v2 = match format {
            None | Some(Value::Null) => false,
            Some(Value::String(format)) if format == "gptq" => false,
            Some(Value::String(format)) if format == "gptq_v2" => true,
            Some(found) => return fail("checkpoint_format", "\"gptq\" or \"gptq_v2\"", found),
        };
        let says = |key: &str| config.get(key) == Some(&Value::Bool(true));
        // Static groups are runs in whatever order columns were quantized; so is one group.
        let scattered = says("desc_act") && !says("static_groups") && group_size.is_some();
        Ok(Self { bits, group_size, v2, scattered })
    }

    pub(super) fn groups(self, input: usize) -> usize {
        self.group_size.map_or(1, |size| input.div_ceil(size))
    }

    /// The tensors of a weight.
    pub(super) fn parts(self, [out, input]: [usize; 2]) -> Vec<Part> {
        let groups = self.groups(input);
        let packed = |n: usize| n / UNIT * self.bits as usize;
        let g_idx = Part::new("g_idx", &[FileDType::I32], [input]);
        vec![
            Part::new("qweight", &[FileDType::I32], [packed(input), out]),
            Part::new("qzeros", &[FileDType::I32], [groups, packed(out)]),
            Part::new("scales", Part::FLOATS, [groups, out]),
            if self.scattered { g_idx } else { g_idx.optional() },
        ]
    }

    /// Why no weight of this shape can be in such files.
    pub(super) fn misfit(shape: [usize; 2]) -> Option<String> {
        let [out, input] = shape;
        (!out.is_multiple_of(UNIT) || !input.is_multiple_of(UNIT)).then(|| {
            format!("GPTQ's layout has multiples of {UNIT} inputs and outputs, found [{out}, {input}]")
        })
    }

    pub(super) fn read(self, parts: &Parts<'_>, [out, input]: [usize; 2]) -> Result<Quantized> {
        let groups = self.groups(input);
        let qweight = parts.required("qweight")?;
        let codes = bits::unpack_down(qweight.matrix::<i32>()?, self.bits);
        let qzeros = parts.required("qzeros")?;
        let add = u16::from(!self.v2);
        let zeros = bits::unpack_along(qzeros.matrix::<i32>()?, self.bits).mapv(|zero| u16::from(zero) + add);
        let scales = parts.required("scales")?.floats()?;
        let scales = ArrayView2::from_shape((groups, out), &scales)
            .map_err(|e| Error::because(ErrorKind::Checkpoint, "scales", e))?;
        let scales = scales.t().as_standard_layout().into_owned();
        let runs = self.group_size.unwrap_or(input);
        let groups = match parts.optional("g_idx")? {
            None => Groups::Runs(runs),
            Some(index) => groups_of(&index, runs, groups)?,
        };
        let levels = Levels::Integers { bits: self.bits };
        parts.build(codes, scales, collapse(zeros), levels, groups)
    }
}

/// The groups of `g_idx`; runs where it says nothing else.
fn groups_of(index: &Stored<'_>, runs: usize, groups: usize) -> Result<Groups> {
    let stored = index.numbers::<i32>()?;
    if let Some((at, found)) =
        stored.iter().enumerate().find(|(_, g)| !(0..groups as i64).contains(&i64::from(**g)))
    {
        return index.fail(format_args!(
            "expected groups from 0 to {}, found {found} at {at}",
            groups.saturating_sub(1)
        ));
    }
    if stored.iter().enumerate().all(|(input, group)| input / runs == *group as usize) {
        return Ok(Groups::Runs(runs));
    }
    Ok(Groups::Index(stored.iter().map(|group| *group as u32).collect()))
}

/// The tensors of a weight, packed.
pub(super) struct Packed {
    pub(super) qweight: Array2<i32>,
    pub(super) qzeros: Array2<i32>,
    /// `[groups, out]`.
    pub(super) scales: Array2<f32>,
    pub(super) g_idx: Vec<i32>,
}

/// Whether every zero point can be stored: one less in a few bits, or (v2) as it is.
pub(super) fn holds_zeros(weight: &Quantized, bits: u32, v2: bool) -> bool {
    let (least, most) = if v2 { (0, (1 << bits) - 1) } else { (1, 1 << bits) };
    let fits = |zero: &u16| (least..=most).contains(zero);
    match weight.zeros() {
        Zeros::Same(zero) => fits(zero),
        Zeros::Each(zeros) => zeros.iter().all(fits),
        _ => false,
    }
}

/// Packs a weight of integers, whose zero points fit ([`holds_zeros`]).
pub(super) fn pack(weight: &Quantized, bits: u32, v2: bool) -> Packed {
    let subtract = u16::from(!v2);
    let stored = |zero: u16| zero.wrapping_sub(subtract) as u8;
    let zeros = match weight.zeros() {
        Zeros::Each(zeros) => zeros.mapv(stored),
        Zeros::Same(zero) => Array2::from_elem(weight.scales().dim(), stored(*zero)),
        _ => Array2::zeros(weight.scales().dim()),
    };
    let [_, input] = weight.shape();
    let g_idx = match weight.groups() {
        Groups::Runs(size) => (0..input).map(|i| (i / size.max(&1)) as i32).collect(),
        Groups::Index(index) => index.iter().map(|group| *group as i32).collect(),
        _ => Vec::new(),
    };
    Packed {
        qweight: bits::pack_down(weight.codes().view(), bits),
        qzeros: bits::pack_along(zeros.view(), bits),
        scales: weight.scales().t().as_standard_layout().into_owned(),
        g_idx,
    }
}

/// The configuration that AutoGPTQ and GPTQModel read.
pub(super) fn describe(gptq: Gptq, desc_act: bool, sym: bool) -> Value {
    json!({
        "quant_method": "gptq",
        "bits": gptq.bits,
        "group_size": gptq.group_size.map_or(-1, |size| size as i64),
        "desc_act": desc_act,
        "sym": sym,
        "true_sequential": true,
        "static_groups": false,
        "lm_head": false,
        "checkpoint_format": if gptq.v2 { "gptq_v2" } else { "gptq" },
    })
}
