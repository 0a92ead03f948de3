//! Quantized weights read back.

use crate::{packed::Layout, pool::Slice, weights::Matrix};
use half::f16;
use opt_backend::{Error, Result, ndarray::Array2};
use std::ops::Range;

/// The rows of a quantized matrix on their way to the host, where they are expanded: GPUs may round differently.
pub(crate) struct PackedRows {
    layout: Layout,
    /// For each part the rows of it that are read.
    parts: Vec<Range<usize>>,
    /// The element at each place.
    inputs: Option<Vec<u32>>,
    shape: [usize; 2],
}

impl PackedRows {
    /// Rows of a matrix, and the bytes to read.
    pub(crate) fn new<'a>(
        matrix: &'a Matrix,
        layout: &Layout,
        rows: &Range<usize>,
    ) -> (Self, Vec<Slice<'a>>) {
        let mut slices = Vec::new();
        let mut parts = Vec::new();
        for part in &matrix.parts {
            let (start, end) = (part.rows.start.max(rows.start), part.rows.end.min(rows.end));
            let (true, Some(parameters)) = (start < end, &part.parameters) else { continue };
            let local = start - part.rows.start..end - part.rows.start;
            let row = layout.row_bytes() as u64;
            slices.push(part.buffer.slice(local.start as u64 * row, local.len() as u64 * row));
            let quads = local.start / 4..local.end.div_ceil(4);
            let bytes = |entries: usize| (4 * layout.packed.entry() * entries) as u64;
            let mut entries = |at: usize| {
                let first = at + quads.start * layout.groups;
                slices.push(parameters.slice(bytes(first), bytes(quads.len() * layout.groups)));
            };
            entries(layout.packed.header());
            if layout.packed.zeros {
                entries(layout.zeros_at(part.rows.len()));
            }
            parts.push(local);
        }
        let inputs = matrix.order.as_ref().map(|order| order.inputs.clone());
        let shape = [rows.len(), matrix.shape[1]];
        (Self { layout: layout.clone(), parts, inputs, shape }, slices)
    }

    /// Number `i` of entries.
    fn number(&self, entries: &[u8], i: usize) -> f32 {
        let bytes = |size: usize| entries.get(i * size..(i + 1) * size);
        if self.layout.packed.half {
            bytes(2).and_then(|b| b.try_into().ok()).map_or(0.0, |b| f16::from_le_bytes(b).to_f32())
        } else {
            bytes(4).and_then(|b| b.try_into().ok()).map_or(0.0, f32::from_le_bytes)
        }
    }

    /// The rows from the bytes of the slices.
    pub(crate) fn decode(&self, op: &'static str, mut bytes: &[u8]) -> Result<Array2<f32>> {
        let layout = &self.layout;
        let packed = layout.packed;
        let short = || Error::shape(op, "fewer bytes arrived than were asked for");
        let mut take = |count: usize| {
            let (taken, rest) = bytes.split_at_checked(count).ok_or_else(short)?;
            bytes = rest;
            Ok::<_, Error>(taken)
        };
        let mut out = Array2::zeros(self.shape);
        let mut rows = out.outer_iter_mut();
        for part in &self.parts {
            let codes = take(part.len() * layout.row_bytes())?;
            let first = part.start / 4;
            let entries = (part.end.div_ceil(4) - first) * layout.groups * 4 * packed.entry();
            let scales = take(entries)?;
            let zeros = if packed.zeros { Some(take(entries)?) } else { None };
            for (i, codes) in part.clone().zip(codes.chunks_exact(layout.row_bytes().max(1))) {
                let Some(mut row) = rows.next() else { return Err(short()) };
                for place in 0..layout.codes() {
                    let to = match &self.inputs {
                        Some(inputs) => inputs.get(place).map_or(usize::MAX, |input| *input as usize),
                        None => place,
                    };
                    // Not for padding.
                    let Some(value) = row.get_mut(to) else { continue };
                    let code = match packed.bits {
                        8 => codes.get(place).copied().unwrap_or(0),
                        _ => codes.get(place / 2).map_or(0, |pair| pair >> (4 * (place % 2)) & 15),
                    };
                    let at = 4 * ((i / 4 - first) * layout.groups + place / layout.group) + i % 4;
                    let level = if packed.table {
                        layout.levels.get(usize::from(code)).copied().unwrap_or(0.0)
                    } else {
                        let zero = zeros.map_or(f32::from(layout.zero), |zeros| self.number(zeros, at));
                        f32::from(code) - zero
                    };
                    *value = self.number(scales, at) * layout.unit * level;
                }
            }
        }
        Ok(out)
    }
}
