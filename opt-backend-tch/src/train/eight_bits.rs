//! AdamW with moments in eight bits.

use super::optimizers::{Factor, adamw_composed};
use crate::{
    Tch, Tensor,
    error::{Tried, torch},
    quant::{changeable, contiguous, numbers},
    tensor::Held,
};
use opt_backend::{
    AdamW, Clip, Moments8, Result, check,
    moments::{BLOCK, DynamicMap, PACKED, SIGNED, UNSIGNED},
};
use opt_kernels::gradient;
use tch::{Device, Kind};

/// Blocks of a task of the CPU's threads.
const TASK: usize = 128;

/// Blocks that ops are called with at a time, which is what they need memory for: 16 MiB a tensor.
const AT_ONCE: usize = 1 << 14;

/// What a pack of three codes is the sum of.
const DIGITS: [f32; 3] = [1.0, 256.0, 65536.0];

/// A map on a device.
#[derive(Debug)]
struct Map {
    levels: Held,
    bounds: Held,
}

/// What ops that quantize moments look up.
#[derive(Debug)]
pub(crate) struct Maps {
    first: Map,
    second: Map,
    digits: Held,
}

impl Maps {
    pub(crate) fn new(device: Device) -> Tried<Self> {
        let held = |numbers: &[f32]| tch::Tensor::f_from_slice(numbers)?.f_to_device(device).map(Held::new);
        let map = |map: &DynamicMap| -> Tried<Map> {
            Ok(Map { levels: held(&map.levels)?, bounds: held(&map.bounds)? })
        };
        Ok(Self { first: map(&SIGNED)?, second: map(&UNSIGNED)?, digits: held(&DIGITS)? })
    }

    /// The elements of some blocks, `[blocks * BLOCK]`, of codes `[blocks, PACKED]` and scales `[blocks, 1]`; those
    /// beyond `len` are zero.
    fn decode(&self, map: &Map, codes: &tch::Tensor, scales: &tch::Tensor, len: i64) -> Tried<tch::Tensor> {
        let upper = codes.f_div_scalar(f64::from(DIGITS[1]))?.f_floor()?;
        let high = codes.f_div_scalar(f64::from(DIGITS[2]))?.f_floor()?;
        let low = codes.f_sub(&upper.f_mul_scalar(f64::from(DIGITS[1]))?)?;
        let middle = upper.f_sub(&high.f_mul_scalar(f64::from(DIGITS[1]))?)?;
        let codes = tch::Tensor::f_stack(&[low, middle, high], 2)?.f_reshape([-1, 3 * PACKED as i64])?;
        let codes = codes.f_narrow(1, 0, BLOCK as i64)?.f_reshape([-1])?.f_to_kind(Kind::Int64)?;
        let levels = map.levels.f_index_select(0, &codes)?.f_reshape([-1, BLOCK as i64])?;
        let values = levels.f_mul(scales)?.f_reshape([-1])?;
        clear(&values, len)?;
        Ok(values)
    }

    /// Codes `[blocks, PACKED]` and scales `[blocks, 1]` of elements `[blocks * BLOCK]`, of which those beyond `len` are
    /// zero.
    fn encode(&self, map: &Map, values: &tch::Tensor, len: i64) -> Tried<[tch::Tensor; 2]> {
        let blocks = values.f_reshape([-1, BLOCK as i64])?;
        let scales = blocks.f_abs()?.f_amax([1], true)?;
        let inverse = scales.f_clamp_min(f64::from(f32::MIN_POSITIVE))?.f_reciprocal()?;
        let codes = blocks.f_mul(&inverse)?.f_bucketize(&map.bounds, true, false)?.f_to_kind(Kind::Float)?;
        clear(&codes.f_reshape([-1])?, len)?;
        let rest = (3 * PACKED - BLOCK) as i64;
        let codes = codes.f_constant_pad_nd([0, rest])?.f_reshape([-1, PACKED as i64, 3])?;
        let packed = codes.f_mul(&self.digits)?.f_sum_dim_intlist([2].as_slice(), false, Kind::Float)?;
        Ok([packed, scales])
    }
}

/// Zeroes the elements of a vector from `len` on.
fn clear(values: &tch::Tensor, len: i64) -> Tried<()> {
    let all = values.numel() as i64;
    if len < all {
        let _ = values.f_narrow(0, len, all - len)?.f_zero_()?;
    }
    Ok(())
}

/// See [`opt_backend::Train::adamw8`].
pub(super) fn adamw8(
    tch: &Tch,
    param: &mut Tensor,
    gradient: &Tensor,
    moments: &mut Moments8<Tensor>,
    adam: AdamW,
    clip: Option<Clip<'_, Tensor>>,
) -> Result<()> {
    const OP: &str = "adamw8";
    check::same_shape(OP, gradient.shape(), param.shape())?;
    check::moments8(OP, moments.parts().map(Tensor::shape), param.shape())?;
    let factor = Factor::new(tch, clip)?;
    // All memory is had before anything is written.
    let Moments8 { first, second, scales } = moments;
    let (p, m, v, s) = (param.own(OP)?, first.own(OP)?, second.own(OP)?, scales.own(OP)?);
    let g = contiguous(OP, gradient)?;
    if !tch.host_kernels() {
        return composed(tch.maps(OP)?, p, &g, [m, v, s], adam, &factor).map_err(torch(OP));
    }
    let factor = factor.number();
    let elements = changeable(OP, p)?.chunks_mut(TASK * BLOCK).zip(numbers(OP, &g)?.chunks(TASK * BLOCK));
    let codes =
        changeable(OP, m)?.chunks_mut(TASK * PACKED).zip(changeable(OP, v)?.chunks_mut(TASK * PACKED));
    let moments = codes.zip(changeable(OP, s)?.chunks_mut(TASK * 2));
    tch.host.each(elements.zip(moments).collect(), |((p, g), ((m, v), s))| {
        gradient::adamw8(p, g, [m, v, s], adam, factor);
    })
}

/// The step by LibTorch's ops, some blocks at a time. All of these need the same memory, which the first has, and write
/// when nothing is left that needs any.
fn composed(
    maps: &Maps,
    p: &tch::Tensor,
    g: &tch::Tensor,
    [first, second, scales]: [&mut tch::Tensor; 3],
    adam: AdamW,
    factor: &Factor,
) -> Tried<()> {
    let (p, g) = (p.f_reshape([-1])?, g.f_reshape([1, -1])?);
    let (all, block) = (p.numel() as i64, BLOCK as i64);
    let blocks = p.numel().div_ceil(BLOCK) as i64;
    let mut start = 0;
    while start < blocks {
        let count = (blocks - start).min(AT_ONCE as i64);
        let len = (all - start * block).min(count * block);
        let [codes, second_codes, scales] =
            [&*first, &*second, &*scales].map(|part| part.f_narrow(0, start, count));
        let (mut codes, mut second_codes, scales) = (codes?, second_codes?, scales?);
        let (mut first_scales, mut second_scales) = (scales.f_narrow(1, 0, 1)?, scales.f_narrow(1, 1, 1)?);
        let m = maps.decode(&maps.first, &codes, &first_scales, len)?;
        let v = maps.decode(&maps.second, &second_codes, &second_scales, len)?;
        let mut of_elements = p.f_narrow(0, start * block, len)?;
        // Factors are [1, 1].
        let g = g.f_narrow(1, start * block, len)?;
        let mut moved = of_elements.f_to_dtype(Kind::Float, false, true)?.f_reshape([1, -1])?;
        let [first, second] = [&m, &v].map(|moment| moment.f_narrow(0, 0, len)?.f_reshape([1, -1]));
        adamw_composed(&mut moved, &g, [&mut first?, &mut second?], adam, factor)?;
        let [new_codes, new_scales] = maps.encode(&maps.first, &m, len)?;
        let [new_second_codes, new_second_scales] = maps.encode(&maps.second, &v, len)?;
        of_elements.f_copy_(&moved.f_reshape([-1])?)?;
        codes.f_copy_(&new_codes)?;
        second_codes.f_copy_(&new_second_codes)?;
        first_scales.f_copy_(&new_scales)?;
        second_scales.f_copy_(&new_second_scales)?;
        start += count;
    }
    Ok(())
}
