//! AdamW with moments in eight bits, as candle's own ops.

use crate::plain::Plain;
use candle_core::{DType, Device, Result as CandleResult, Tensor};
use opt_backend::{
    AdamW, Moments8,
    moments::{BLOCK, DynamicMap, PACKED, SIGNED, UNSIGNED},
};

/// What a pack of three codes is the sum of.
const DIGITS: [f32; 3] = [1.0, 256.0, 65536.0];

/// A map on a device.
#[derive(Debug, Clone)]
struct Map {
    levels: Tensor,
    bounds: Tensor,
}

/// What is looked up to quantize moments.
#[derive(Debug, Clone)]
pub(crate) struct Maps {
    first: Map,
    second: Map,
    digits: Tensor,
}

impl Map {
    fn new(map: &DynamicMap, device: &Device) -> CandleResult<Self> {
        Ok(Self { levels: Tensor::new(&map.levels, device)?, bounds: Tensor::new(&map.bounds, device)? })
    }

    /// The codes of numbers, as f32: how many bounds are below each, by bisection.
    fn codes(&self, x: &Tensor) -> CandleResult<Tensor> {
        let mut codes = x.zeros_like()?;
        for step in [128.0, 64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0] {
            let bounds = self.bounds.index_select(&(&codes + (step - 1.0))?.to_dtype(DType::U32)?, 0)?;
            codes = (codes + (x.gt(&bounds)?.to_dtype(DType::F32)? * step)?)?;
        }
        Ok(codes)
    }

    /// The elements, of which there are `len`, of codes `[blocks, PACKED]` and scales `[blocks, 1]`.
    fn decode(&self, codes: &Tensor, scales: &Tensor, len: usize) -> CandleResult<Tensor> {
        let blocks = codes.dim(0)?;
        let base = f64::from(DIGITS[1]);
        let upper = (codes / base)?.floor()?;
        let high = (&upper / base)?.floor()?;
        let digits = [(codes - (&upper * base)?)?, (&upper - (&high * base)?)?, high];
        let codes = Tensor::stack(&digits, 2)?.reshape((blocks, 3 * PACKED))?.narrow(1, 0, BLOCK)?;
        let levels = self.levels.index_select(&codes.flatten_all()?.to_dtype(DType::U32)?, 0)?;
        levels.reshape((blocks, BLOCK))?.broadcast_mul(scales)?.flatten_all()?.narrow(0, 0, len)
    }
}

impl Maps {
    fn new(device: &Device) -> CandleResult<Self> {
        Ok(Self {
            first: Map::new(&SIGNED, device)?,
            second: Map::new(&UNSIGNED, device)?,
            digits: Tensor::new(&DIGITS, device)?,
        })
    }

    /// Codes `[blocks, PACKED]` and scales `[blocks, 1]` of a vector.
    fn encode(&self, map: &Map, values: &Tensor) -> CandleResult<[Tensor; 2]> {
        let len = values.elem_count();
        let blocks = len.div_ceil(BLOCK);
        let in_blocks = |x: &Tensor| x.pad_with_zeros(0, 0, blocks * BLOCK - len)?.reshape((blocks, BLOCK));
        let values = in_blocks(values)?;
        let scales = values.abs()?.max_keepdim(1)?;
        let inverse = scales.maximum(f64::from(f32::MIN_POSITIVE))?.recip()?;
        let codes = map.codes(&values.broadcast_mul(&inverse)?.flatten_all()?)?;
        // What is no element has the code 0.
        let codes = in_blocks(&codes.narrow(0, 0, len)?)?.pad_with_zeros(1, 0, 3 * PACKED - BLOCK)?;
        let packed = codes.reshape((blocks, PACKED, 3))?.broadcast_mul(&self.digits)?.sum(2)?;
        Ok([packed, scales])
    }
}

impl Plain {
    /// What is looked up, on this device.
    fn maps(&self) -> CandleResult<&Maps> {
        if let Some(maps) = self.maps.get() {
            return Ok(maps);
        }
        let maps = Maps::new(&self.device)?;
        Ok(self.maps.get_or_init(|| maps))
    }

    /// Parameters and moments after the step.
    pub(crate) fn adamw8(
        &self,
        p: &Tensor,
        g: &Tensor,
        moments: Moments8<&Tensor>,
        adam: AdamW,
        factor: Option<&Tensor>,
    ) -> CandleResult<(Tensor, Moments8<Tensor>)> {
        let len = p.elem_count();
        if len == 0 {
            return Ok((p.clone(), moments.try_map(|part| Ok::<_, candle_core::Error>(part.clone()))?));
        }
        let maps = self.maps()?;
        let scales = [moments.scales.narrow(1, 0, 1)?, moments.scales.narrow(1, 1, 1)?];
        let m = maps.first.decode(moments.first, &scales[0], len)?.reshape(p.dims())?;
        let v = maps.second.decode(moments.second, &scales[1], len)?.reshape(p.dims())?;
        let [p, m, v] = self.adamw([p, &m, &v], g, adam, factor)?;
        let [first, first_scales] = maps.encode(&maps.first, &m.flatten_all()?)?;
        let [second, second_scales] = maps.encode(&maps.second, &v.flatten_all()?)?;
        let scales = Tensor::cat(&[first_scales, second_scales], 1)?;
        Ok((p, Moments8 { first, second, scales }))
    }
}
