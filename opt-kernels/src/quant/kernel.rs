//! Products in int8.
//!
//! For each run of 32 places the products of codes are added up in integers, which is exact; then one conversion, and
//! scale of the weight times scale of the activations. Sums over runs are a chain of fused multiply-adds in ascending
//! order whatever the number of rows, so a row's result is bit-equal in any batch.

use super::{
    RUN,
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
/// Rows from which on it pays to unpack a panel first.
const UNPACK: usize = 12;

/// Computes the products of `x`, `[rows, places]`, in one parallel region.
///
/// # Safety
/// Every weight has `places` places and was packed for the machine's level; bias, residual and output have the fitting
/// sizes, and nobody else accesses the outputs.
pub unsafe fn multiply(
    machine: Machine<'_>,
    x: &[f32],
    [rows, places]: [usize; 2],
    products: &[(&Product<'_>, &Codes)],
) -> Result<()> {
    let Machine { pool, level, .. } = machine;
    let threshold = products.iter().filter_map(|(_, codes)| codes.outlier_threshold).reduce(f32::min);
    let quantized = Rows::new(machine, x, [rows, places], threshold)?;
    let groups = rows.div_ceil(ROW_GROUP);
    let group_rows = rows.div_ceil(groups).next_multiple_of(6);
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
            match (form, S::INT_ROWS) {
                (Form::Bytes, 6) => self.panel::<S, 6, { Form::Bytes as u8 }>(s, panel, codes),
                (Form::Bytes, 3) => self.panel::<S, 3, { Form::Bytes as u8 }>(s, panel, codes),
                (Form::Bytes, _) => self.panel::<S, 2, { Form::Bytes as u8 }>(s, panel, codes),
                (Form::Loose, 6) => self.panel::<S, 6, { Form::Loose as u8 }>(s, panel, codes),
                (Form::Loose, 3) => self.panel::<S, 3, { Form::Loose as u8 }>(s, panel, codes),
                (Form::Loose, _) => self.panel::<S, 2, { Form::Loose as u8 }>(s, panel, codes),
                (Form::Nibbles, 6) => self.panel::<S, 6, { Form::Nibbles as u8 }>(s, panel, codes),
                (Form::Nibbles, 3) => self.panel::<S, 3, { Form::Nibbles as u8 }>(s, panel, codes),
                (Form::Nibbles, _) => self.panel::<S, 2, { Form::Nibbles as u8 }>(s, panel, codes),
                (Form::Table, 6) => self.panel::<S, 6, { Form::Table as u8 }>(s, panel, codes),
                (Form::Table, 3) => self.panel::<S, 3, { Form::Table as u8 }>(s, panel, codes),
                (Form::Table, _) => self.panel::<S, 2, { Form::Table as u8 }>(s, panel, codes),
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

    /// One panel times the rows, `M` at a time.
    #[inline(always)]
    fn panel<S: Simd, const M: usize, const FORM: u8>(&self, s: S, panel: usize, codes: &[u8]) {
        let mut sums = [0.0_f32; TILE];
        let mut row = self.rows.start;
        while row < self.rows.end {
            let rows = row..self.rows.end.min(row + M);
            // SAFETY: the rows and the panel exist, and their outputs belong to this task alone.
            unsafe {
                match (rows.len(), &self.codes.scales) {
                    (1, Scales::Half(scales)) => {
                        self.tile::<S, _, 1, FORM>(
                            s,
                            panel,
                            codes,
                            scales.as_slice(),
                            rows.clone(),
                            &mut sums,
                        );
                    }
                    (1, Scales::Single(scales)) => {
                        self.tile::<S, _, 1, FORM>(
                            s,
                            panel,
                            codes,
                            scales.as_slice(),
                            rows.clone(),
                            &mut sums,
                        );
                    }
                    (2, Scales::Half(scales)) if M > 2 => {
                        self.tile::<S, _, 2, FORM>(
                            s,
                            panel,
                            codes,
                            scales.as_slice(),
                            rows.clone(),
                            &mut sums,
                        );
                    }
                    (_, Scales::Half(scales)) => {
                        self.tile::<S, _, M, FORM>(
                            s,
                            panel,
                            codes,
                            scales.as_slice(),
                            rows.clone(),
                            &mut sums,
                        );
                    }
                    (_, Scales::Single(scales)) => {
                        self.tile::<S, _, M, FORM>(
                            s,
                            panel,
                            codes,
                            scales.as_slice(),
                            rows.clone(),
                            &mut sums,
                        );
                    }
                }
                self.add_outliers::<S>(rows.clone(), panel, &mut sums);
                self.output.copy_out(s, &sums, rows.clone(), panel);
                self.output.finish(s, rows.clone(), panel);
            }
            row = rows.end;
        }
    }

    /// `M` rows, the last of `rows` standing in for those missing, into `sums`.
    ///
    /// # Safety
    /// The rows and the panel exist; `rows` is not empty and not longer than `M`.
    #[inline(always)]
    unsafe fn tile<S: Simd, W: Weight, const M: usize, const FORM: u8>(
        &self,
        s: S,
        panel: usize,
        codes: &[u8],
        scales: &[W],
        rows: std::ops::Range<usize>,
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
        let runs = self.x.runs();
        let row = |r: usize| rows.start + r.min(rows.len() - 1);
        let x: [*const i8; M] = std::array::from_fn(|r| self.x.codes[row(r) * self.x.places..].as_ptr());
        let x_scales: [*const f32; M] = std::array::from_fn(|r| self.x.scales[row(r) * runs..].as_ptr());
        let x_sums: [*const i32; M] = std::array::from_fn(|r| self.x.sums[row(r) * runs..].as_ptr());
        let beside = self.codes.beside(panel);
        let group_runs = self.codes.group / RUN;
        let mut totals = [[s.splat(0.0); 2]; M];
        let (mut group, mut left) = (0, group_runs);
        for run in 0..runs {
            if left == 0 {
                (group, left) = (group + 1, group_runs);
            }
            left -= 1;
            // SAFETY: by the caller's promise there are `runs` runs of codes, and of everything beside them.
            unsafe {
                let mut dots = [[s.splat_int(0); 2]; M];
                if zero != 0 {
                    for r in 0..M {
                        dots[r] = [s.splat_int(-zero * *x_sums[r].add(run)); 2];
                    }
                }
                let start = codes.as_ptr().add(run * RUN * width / if packed { 2 } else { 1 });
                if packed {
                    for pair in 0..RUN / 8 {
                        let at = start.add(pair * width * 4);
                        s.prefetch(at.wrapping_add(AHEAD));
                        s.prefetch(at.wrapping_add(AHEAD + 4 * S::LANES));
                        let both = [s.load_bytes(at), s.load_bytes(at.add(4 * S::LANES))];
                        let mut low = both.map(|b| s.low_nibbles(b));
                        let mut high = both.map(|b| s.high_nibbles(b));
                        if FORM == Form::Table as u8 {
                            low = low.map(|b| s.lookup_bytes(&table, b));
                            high = high.map(|b| s.lookup_bytes(&table, b));
                        }
                        for r in 0..M {
                            let at = x[r].add(run * RUN + pair * 8);
                            let (first, second) = (s.splat_quad(at), s.splat_quad(at.add(4)));
                            for n in 0..2 {
                                dots[r][n] = if bytes {
                                    s.dot_bytes(s.dot_bytes(dots[r][n], low[n], first), high[n], second)
                                } else {
                                    s.dot_nibbles(s.dot_nibbles(dots[r][n], low[n], first), high[n], second)
                                };
                            }
                        }
                    }
                } else {
                    for quad in 0..RUN / 4 {
                        let at = start.add(quad * width * 4);
                        s.prefetch(at.wrapping_add(AHEAD));
                        s.prefetch(at.wrapping_add(AHEAD + 4 * S::LANES));
                        let both = [s.load_bytes(at), s.load_bytes(at.add(4 * S::LANES))];
                        for r in 0..M {
                            let x = s.splat_quad(x[r].add(run * RUN + quad * 4));
                            for n in 0..2 {
                                dots[r][n] = if bytes {
                                    s.dot_bytes(dots[r][n], both[n], x)
                                } else {
                                    s.dot_nibbles(dots[r][n], both[n], x)
                                };
                            }
                        }
                    }
                }
                let at = beside + group * width;
                for n in 0..2 {
                    let scale = W::load(s, scales.as_ptr().add(at + n * S::LANES));
                    let zero = zeros.map(|zeros| {
                        let zero = s.load_f16(zeros.as_ptr().add(at + n * S::LANES));
                        s.sub(s.splat(centre as f32), zero)
                    });
                    for r in 0..M {
                        let mut dot = s.int_to_float(dots[r][n]);
                        if let Some(zero) = zero {
                            // Integers below 2^24: exact.
                            dot = s.fma(zero, s.splat(*x_sums[r].add(run) as f32), dot);
                        }
                        let scale = s.mul(scale, s.splat(unit * *x_scales[r].add(run)));
                        totals[r][n] = s.fma(dot, scale, totals[r][n]);
                    }
                }
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

/// Bytes between the codes that are multiplied and those that are asked for.
const AHEAD: usize = 2048;
