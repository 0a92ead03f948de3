//! Products of integers.
//!
//! For each run of 32 places the products of codes are added up in integers, which is exact; then one conversion, and
//! scale of the weight times scale of the activations. Sums over runs are a chain of fused multiply-adds in ascending
//! order whatever the number of rows, so a row's result is bit-equal in any batch.

use super::{
    FINE, RUN,
    activations::Rows,
    codes::{Codes, Offsets, Scales},
};
use crate::{
    Machine,
    output::{Output, Product, TILE},
    pack::Source,
    simd::{Kernel, Simd, Weight},
};
use opt_backend::Result;

/// Bytes of codes that are worth a task of their own when few rows are multiplied.
const TASK_BYTES: usize = 48 << 10;
/// Rows that a task handles at most: their codes should stay in the second cache.
const ROW_GROUP: usize = 192;
/// Bytes between the codes that are multiplied and those that are asked for, when they come from memory.
const AHEAD: usize = 4096;
/// Rows up to which a panel's first tile waits for memory, and so should ask for codes early.
const STREAMED: usize = 36;
/// Rows from which on it pays to unpack a panel first.
const UNPACK: usize = 12;

/// Computes the products of `x`, `[rows, places]`, in one parallel region.
///
/// # Safety
/// Every weight has `places` places and was packed for the machine's level; bias, residual and output have the fitting
/// sizes, and nobody else accesses the outputs.
pub(crate) unsafe fn multiply(
    machine: Machine<'_>,
    x: &[f32],
    [rows, places]: [usize; 2],
    products: &[(&Product<'_>, &Codes)],
) -> Result<()> {
    let Machine { pool, level, .. } = machine;
    let threshold = products.iter().filter_map(|(_, codes)| codes.outlier_threshold).reduce(f32::min);
    let tile = tile_for(level.int_tiles(), rows);
    let quantized = Rows::new(machine, x, [rows, places], tile, threshold)?;
    let groups = rows.div_ceil(ROW_GROUP);
    let group_rows = rows.div_ceil(groups).next_multiple_of(tile);
    let panels: usize = products.iter().map(|(_, codes)| codes.count()).sum();
    let bytes = products.iter().map(|(_, codes)| codes.bytes(codes.places())).max().unwrap_or(0).max(1);
    let share = panels / (pool.threads() * 8);
    let share = if rows > UNPACK { share.clamp(1, 8) } else { share.max(TASK_BYTES / bytes).max(1) };
    let tasks: Vec<(usize, usize, usize)> = (0..groups)
        .flat_map(|group| {
            products.iter().enumerate().flat_map(move |(i, (_, codes))| {
                (0..codes.count()).step_by(share).map(move |first| (group, i, first))
            })
        })
        .collect();
    let body = |task: usize| {
        let (group, i, first) = tasks[task];
        let (product, codes) = products[i];
        let output = Output { product, outputs: codes.shape()[0], level };
        level.run(Block {
            x: &quantized,
            rows: group * group_rows..rows.min((group + 1) * group_rows),
            codes,
            panels: first..codes.count().min(first + share),
            output,
        });
    };
    // A region costs more than a product this small.
    if rows * places * panels < 1 << 13 {
        (0..tasks.len()).for_each(body);
        return Ok(());
    }
    pool.run(tasks.len(), &body)
}

/// The tile for so many rows: the one that leaves the fewest of its rows empty, and of such the largest; but one of a
/// row or two, which reads codes more often, only where others would leave more than a quarter empty.
fn tile_for(tiles: &[usize], rows: usize) -> usize {
    let cost = |tile: usize| rows.next_multiple_of(tile) * if tile < 3 { 4 } else { 3 };
    tiles.iter().rev().copied().min_by_key(|&tile| cost(tile)).unwrap_or(1)
}

/// How the codes of a panel lie and what they are.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// Eight bits.
    Bytes,
    /// Four bits in bytes of their own.
    Loose,
    /// Four bits, two to a byte.
    Nibbles,
    /// Four bits, two to a byte, that stand for the bytes of a table.
    Table,
}

/// Some panels times some rows.
struct Block<'a> {
    x: &'a Rows,
    rows: std::ops::Range<usize>,
    codes: &'a Codes,
    panels: std::ops::Range<usize>,
    output: Output<'a>,
}

impl Kernel for Block<'_> {
    type Output = ();
    const BYTES: bool = true;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let form = match (self.codes.nibbles, &self.codes.table) {
            (false, _) => Form::Bytes,
            (true, None) => Form::Nibbles,
            (true, Some(_)) => Form::Table,
        };
        let unpack = form != Form::Bytes && self.rows.len() > UNPACK;
        let mut unpacked = if unpack { vec![0; self.codes.places() * 2 * S::LANES] } else { Vec::new() };
        for panel in self.panels.clone() {
            let packed = self.codes.panel(panel);
            let (form, codes) = if unpack {
                // SAFETY: room for a byte for each code was made.
                unsafe { self.unpack(s, packed, &mut unpacked) };
                (if form == Form::Table { Form::Bytes } else { Form::Loose }, &unpacked[..])
            } else {
                (form, packed)
            };
            match self.x.tile {
                1 => self.panel_of::<S, 1>(s, form, panel, codes),
                2 => self.panel_of::<S, 2>(s, form, panel, codes),
                3 => self.panel_of::<S, 3>(s, form, panel, codes),
                4 => self.panel_of::<S, 4>(s, form, panel, codes),
                _ => self.panel_of::<S, 6>(s, form, panel, codes),
            }
        }
    }
}

impl Block<'_> {
    /// Writes the codes of a panel one to a byte, those of a table as the bytes they stand for.
    ///
    /// # Safety
    /// `codes` is a panel of two codes to a byte, and `out` has twice its length.
    #[inline(always)]
    unsafe fn unpack<S: Simd>(&self, s: S, codes: &[u8], out: &mut [u8]) {
        let width = 2 * S::LANES;
        let table = self.codes.table.as_ref().map(|table| &table.bytes);
        for pair in 0..self.codes.places() / 8 {
            for n in 0..2 {
                let column = n * S::LANES;
                // SAFETY: the caller's promise.
                unsafe {
                    let both = s.load_bytes(codes.as_ptr().add((pair * width + column) * 4));
                    let halves = [s.low_nibbles(both), s.high_nibbles(both)];
                    for (i, half) in halves.into_iter().enumerate() {
                        let half = table.map_or(half, |table| s.lookup_bytes(table, half));
                        s.store_bytes(out.as_mut_ptr().add(((2 * pair + i) * width + column) * 4), half);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn panel_of<S: Simd, const M: usize>(&self, s: S, form: Form, panel: usize, codes: &[u8]) {
        // Known when this is compiled: a level has code for its own tiles only.
        if !S::INT_TILES.contains(&M) {
            unreachable!("a tile of {M} rows");
        }
        match form {
            Form::Bytes => self.panel::<S, M, { Form::Bytes as u8 }>(s, panel, codes),
            Form::Loose => self.panel::<S, M, { Form::Loose as u8 }>(s, panel, codes),
            Form::Nibbles => self.panel::<S, M, { Form::Nibbles as u8 }>(s, panel, codes),
            Form::Table => self.panel::<S, M, { Form::Table as u8 }>(s, panel, codes),
        }
    }

    /// One panel times the rows, a tile of `M` at a time.
    #[inline(always)]
    fn panel<S: Simd, const M: usize, const FORM: u8>(&self, s: S, panel: usize, codes: &[u8]) {
        let mut sums = [0.0_f32; TILE];
        for first in self.rows.clone().step_by(M) {
            let rows = first..self.rows.end.min(first + M);
            // SAFETY: the tile and the panel exist, and the outputs of the rows belong to this task alone.
            unsafe {
                match &self.codes.scales {
                    Scales::Half(scales) => {
                        self.tile::<S, _, M, FORM>(s, panel, codes, scales.as_slice(), first / M, &mut sums);
                    }
                    Scales::Single(scales) => {
                        self.tile::<S, _, M, FORM>(s, panel, codes, scales.as_slice(), first / M, &mut sums);
                    }
                }
                self.add_outliers::<S>(rows.clone(), panel, &mut sums);
                self.output.copy_out(s, &sums, rows.clone(), panel);
                self.output.finish(s, rows, panel);
            }
        }
    }

    /// The `M` rows of tile `tile` into `sums`.
    ///
    /// # Safety
    /// The tile, which is of `M` rows, and the panel exist.
    #[inline(always)]
    unsafe fn tile<S: Simd, W: Weight, const M: usize, const FORM: u8>(
        &self,
        s: S,
        panel: usize,
        codes: &[u8],
        scales: &[W],
        tile: usize,
        sums: &mut [f32; TILE],
    ) {
        let width = 2 * S::LANES;
        let bytes = FORM == Form::Bytes as u8 || FORM == Form::Table as u8;
        let packed = FORM == Form::Nibbles as u8 || FORM == Form::Table as u8;
        // What dot products have taken off already.
        let centre = if bytes { S::CENTRE } else { 0 };
        let (unit, table) = match &self.codes.table {
            Some(table) => (table.unit, table.bytes),
            None => (1.0, [0; 16]),
        };
        let (zero, zeros) = match &self.codes.zeros {
            _ if self.codes.table.is_some() => (128 - centre, None),
            Offsets::Same(zero) => (zero - centre, None),
            Offsets::Each(zeros) => (0, Some(zeros.as_slice())),
        };
        let zero = s.splat_int(-zero);
        let runs = self.x.runs();
        // One step a run for all streams.
        let mut x = self.x.codes[tile * M * self.x.places * self.x.bytes..].as_ptr();
        let mut x_scales = self.x.scales[tile * M * runs..].as_ptr();
        let mut x_sums = self.x.sums[tile * M * runs..].as_ptr();
        let mut codes = codes.as_ptr();
        let mut beside = self.codes.beside(panel);
        let group_runs = self.codes.group / RUN;
        let mut left = group_runs;
        let mut totals = [[s.splat(0.0); 2]; M];
        // Those behind the first tile find the codes in a cache.
        let early = self.rows.len() <= STREAMED && tile * M == self.rows.start;
        for _ in 0..runs {
            if left == 0 {
                (beside, left) = (beside + width, group_runs);
            }
            left -= 1;
            // SAFETY: by the caller's promise there are `runs` runs of codes, and of everything beside them.
            unsafe {
                // Where sums start: what zero points take off.
                let mut start = [[s.splat_int(0); 2]; M];
                if zeros.is_none() {
                    for (r, start) in start.iter_mut().enumerate() {
                        *start = [s.mul_int(zero, s.load_int(x_sums.add(r))); 2];
                    }
                }
                let mut dots = if self.x.bytes == 1 { start } else { [[s.splat_int(0); 2]; M] };
                if self.x.bytes == 2 && 2 * M <= S::ROWS {
                    // There are registers for the sums of both bytes: codes are read once.
                    let mut fine = start;
                    each_quad::<S, FORM>(s, codes, early, &table, |quad| {
                        add_quad::<S, M, FORM>(s, &mut dots, quad, x);
                        add_quad::<S, M, FORM>(s, &mut fine, quad, x.add(RUN * M));
                        x = x.add(4 * M);
                    });
                    x = x.add(RUN * M);
                    scale_and_add(s, &mut dots, &fine);
                } else {
                    each_quad::<S, FORM>(s, codes, early, &table, |quad| {
                        add_quad::<S, M, FORM>(s, &mut dots, quad, x);
                        x = x.add(4 * M);
                    });
                    if self.x.bytes == 2 {
                        scale_and_add(s, &mut dots, &start);
                        each_quad::<S, FORM>(s, codes, false, &table, |quad| {
                            add_quad::<S, M, FORM>(s, &mut dots, quad, x);
                            x = x.add(4 * M);
                        });
                    }
                }
                codes = codes.add(RUN * width / if packed { 2 } else { 1 });
                for n in 0..2 {
                    let at = beside + n * S::LANES;
                    let mut scale = W::load(s, scales.as_ptr().add(at));
                    if FORM == Form::Table as u8 || bytes && unit != 1.0 {
                        scale = s.mul(scale, s.splat(unit));
                    }
                    for (r, total) in totals.iter_mut().enumerate() {
                        let mut dot = s.int_to_float(dots[r][n]);
                        if let Some(zeros) = zeros {
                            // Both are integers; the sum is rounded once.
                            let zero = s.sub(s.splat(centre as f32), s.load_f16(zeros.as_ptr().add(at)));
                            dot = s.fma(zero, s.int_to_float(s.load_int(x_sums.add(r))), dot);
                        }
                        total[n] = s.fma(dot, s.mul(scale, s.splat(*x_scales.add(r))), total[n]);
                    }
                }
                x_scales = x_scales.add(M);
                x_sums = x_sums.add(M);
            }
        }
        for (r, total) in totals.into_iter().enumerate() {
            for (n, total) in total.into_iter().enumerate() {
                // SAFETY: `sums` has room for M rows of two vectors.
                unsafe { s.store(sums.as_mut_ptr().add(r * width + n * S::LANES), total) };
            }
        }
    }

    /// Adds what was kept out of the rows' codes.
    #[inline(always)]
    fn add_outliers<S: Simd>(&self, rows: std::ops::Range<usize>, panel: usize, sums: &mut [f32; TILE]) {
        if self.x.outliers.is_empty() {
            return;
        }
        let width = 2 * S::LANES;
        let first = self.x.outliers.partition_point(|outlier| outlier.0 < rows.start);
        for &(row, place, x) in self.x.outliers[first..].iter().take_while(|outlier| outlier.0 < rows.end) {
            for column in 0..width.min(self.codes.shape[0] - panel * width) {
                sums[(row - rows.start) * width + column] +=
                    x * self.codes.value(panel * width + column, place);
            }
        }
    }
}

/// Calls `add` with the codes of each quad of a run, two vectors of them; `early` asks for those of later runs.
///
/// # Safety
/// There is a run of codes.
#[inline(always)]
unsafe fn each_quad<S: Simd, const FORM: u8>(
    s: S,
    mut codes: *const u8,
    early: bool,
    table: &[u8; 16],
    mut add: impl FnMut([S::B; 2]),
) {
    let packed = FORM == Form::Nibbles as u8 || FORM == Form::Table as u8;
    // Two quads to a load where two codes share a byte.
    for _ in 0..RUN / if packed { 8 } else { 4 } {
        if early {
            s.prefetch(codes.wrapping_add(AHEAD));
            s.prefetch(codes.wrapping_add(AHEAD + 4 * S::LANES));
        }
        // SAFETY: the caller's promise.
        let both = unsafe { [s.load_bytes(codes), s.load_bytes(codes.add(4 * S::LANES))] };
        codes = codes.wrapping_add(8 * S::LANES);
        if packed {
            for mut half in [both.map(|b| s.low_nibbles(b)), both.map(|b| s.high_nibbles(b))] {
                if FORM == Form::Table as u8 {
                    half = half.map(|b| s.lookup_bytes(table, b));
                }
                add(half);
            }
        } else {
            add(both);
        }
    }
}

/// First bytes' sums in units of the second, and `more`.
#[inline(always)]
fn scale_and_add<S: Simd, const M: usize>(s: S, dots: &mut [[S::I; 2]; M], more: &[[S::I; 2]; M]) {
    for (dots, more) in dots.iter_mut().zip(more) {
        for (dot, more) in dots.iter_mut().zip(more) {
            *dot = s.add_int(s.mul_int(*dot, s.splat_int(FINE)), *more);
        }
    }
}

/// Adds the products of one quad of codes of two vectors and of each of `M` rows.
///
/// # Safety
/// `x` has a quad of each row.
#[inline(always)]
unsafe fn add_quad<S: Simd, const M: usize, const FORM: u8>(
    s: S,
    dots: &mut [[S::I; 2]; M],
    codes: [S::B; 2],
    x: *const i8,
) {
    let bytes = FORM == Form::Bytes as u8 || FORM == Form::Table as u8;
    for (r, dots) in dots.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let x = unsafe { s.splat_quad(x.add(4 * r)) };
        for (dot, codes) in dots.iter_mut().zip(codes) {
            *dot = if bytes { s.dot_bytes(*dot, codes, x) } else { s.dot_nibbles(*dot, codes, x) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_full_and_large() {
        let sixteen_lanes = |rows| tile_for(&[1, 2, 4, 6], rows);
        let found = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 31, 32, 33, 64].map(sixteen_lanes);
        assert_eq!(found, [1, 2, 4, 4, 6, 6, 4, 4, 6, 6, 4, 4, 4, 6, 4]);
        assert_eq!(
            [1, 2, 3, 4, 5, 7, 8, 31].map(|rows| tile_for(&[1, 2, 3], rows)),
            [1, 2, 3, 2, 3, 3, 3, 3]
        );
        assert_eq!([1, 2, 3, 4].map(|rows| tile_for(&[1, 2], rows)), [1, 2, 1, 2]);
    }
}
