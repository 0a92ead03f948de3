//! The shaders of training.

use crate::{
    kernels::{Access, Format},
    template::Defines,
};
use opt_backend::{DType, Layout};

/// What is done to each element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Each {
    Zero,
    Scale,
    Dropout,
    Activate,
    // With a second operand.
    ActivateGrad,
    Mul,
    // With one row of it.
    AddRow,
    MulRow,
}

impl Each {
    #[cfg(test)]
    const ALL: [Self; 8] = [
        Each::Zero,
        Each::Scale,
        Each::Dropout,
        Each::Activate,
        Each::ActivateGrad,
        Each::Mul,
        Each::AddRow,
        Each::MulRow,
    ];

    fn name(self) -> &'static str {
        match self {
            Each::Zero => "ZERO",
            Each::Scale => "SCALE",
            Each::Dropout => "DROPOUT",
            Each::Activate => "ACTIVATE",
            Each::ActivateGrad => "ACTIVATE_GRAD",
            Each::Mul => "MUL",
            Each::AddRow => "ADD_ROW",
            Each::MulRow => "MUL_ROW",
        }
    }

    fn operand(self) -> bool {
        matches!(self, Each::ActivateGrad | Each::Mul | Each::AddRow | Each::MulRow)
    }
}

/// A shader of training with all that is fixed when it is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Training {
    Each(Each),
    /// A product of tensors, in tiles or by threads apart.
    Multiply {
        layout: Layout,
        tiled: bool,
    },
    /// A tensor times a weight.
    Grad {
        format: Format,
        tiled: bool,
    },
    /// A tensor held as a weight.
    Hold(DType),
    /// The gradient of LayerNorm, or what that of its parameters needs.
    LayerNorm {
        stats: bool,
        threads: u32,
    },
    /// Sums of columns.
    Columns {
        norm: bool,
    },
    /// Gradients of attention with heads of so many elements, of queries or of keys and values.
    Attend {
        rows: bool,
        head: u32,
    },
    CrossEntropy,
    SoftTargets,
    Total,
    Squares,
    Scatter,
    AdamW {
        clip: bool,
    },
    AdamW8 {
        clip: bool,
    },
    Sgd {
        velocity: bool,
        clip: bool,
    },
}

/// Threads of the gradient of attention.
const ATTEND_THREADS: usize = 64;

impl Training {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Training::Each(_) => "each",
            Training::Multiply { tiled: true, .. } | Training::Grad { tiled: true, .. } => "multiply",
            Training::Multiply { .. } | Training::Grad { .. } => "multiply_apart",
            Training::Hold(_) => "hold",
            Training::LayerNorm { .. } => "layer_norm_grad",
            Training::Columns { .. } => "columns",
            Training::Attend { .. } => "attend_grad",
            Training::CrossEntropy => "cross_entropy",
            Training::SoftTargets => "soft_targets",
            Training::Total => "total",
            Training::Squares => "squares",
            Training::Scatter => "scatter",
            Training::AdamW { .. } => "adamw",
            Training::AdamW8 { .. } => "adamw8",
            Training::Sgd { .. } => "sgd",
        }
    }

    /// How the weights are held that it reads.
    pub(crate) fn format(self) -> Option<Format> {
        match self {
            Training::Grad { format, .. } => Some(format),
            Training::Multiply { .. } => Some(Format::Plain(DType::F32)),
            _ => None,
        }
    }

    /// See [`crate::kernels::Variant::bindings`].
    pub(crate) fn bindings(self, packed: bool) -> &'static [Access] {
        use Access::{Read as R, Write as W};
        match self {
            Training::Each(each) if each.operand() => &[W, R],
            Training::Each(_) => &[W],
            Training::Grad { .. } if packed => &[W, R, R, R],
            Training::Multiply { .. } | Training::Grad { .. } => &[W, R, R],
            Training::Hold(_) | Training::Total | Training::Squares => &[W, R],
            Training::LayerNorm { stats: true, .. } => &[W, R],
            Training::LayerNorm { stats: false, .. } => &[W, R, R, R],
            Training::Columns { norm: true } => &[W, W, R, R, R],
            Training::Columns { norm: false } => &[W, R],
            Training::Attend { rows: true, .. } => &[R, W, W, R, R, R, R],
            Training::Attend { rows: false, .. } => &[R, R, W, W, R, R, R, R],
            Training::CrossEntropy => &[R, W, W],
            Training::SoftTargets => &[W, W, R],
            Training::Scatter => &[R, W, R],
            Training::AdamW { clip: true } => &[W, W, W, R, R],
            Training::AdamW { clip: false } => &[W, W, W, R],
            Training::AdamW8 { clip: true } => &[W, W, W, W, R, R],
            Training::AdamW8 { clip: false } => &[W, W, W, W, R],
            Training::Sgd { velocity: true, clip: true } => &[W, R, W, R],
            Training::Sgd { velocity: true, clip: false } => &[W, R, W],
            Training::Sgd { velocity: false, clip: true } => &[W, R, R],
            Training::Sgd { velocity: false, clip: false } => &[W, R],
        }
    }

    /// What the shader needs to know, but for the format of weights.
    pub(crate) fn define(self, defines: &mut Defines) {
        let mut define = |name: &'static str, value: usize| {
            defines.insert(name, value.to_string());
        };
        // Which lanes a subgroup adds up first differs from one adapter to the next, and it would save little here.
        define("SUBGROUPS", 0);
        define("THREADS", 256);
        match self {
            Training::Each(each) => {
                define(each.name(), 1);
                define("OPERAND", each.operand().into());
            }
            Training::Multiply { layout, .. } => {
                define("UNROLLED", 4);
                define("ACROSS_A", (layout == Layout::TransposedTimes).into());
                define("ACROSS_B", (layout != Layout::TimesTransposed).into());
            }
            Training::Grad { tiled, format } => {
                define("ACROSS_B", 1);
                define("UNROLLED", if matches!(format, Format::Packed(_)) { 1 } else { 4 });
                define("TREE", (!tiled).into());
            }
            Training::Hold(dtype) => {
                let (name, unit) = match dtype {
                    DType::F16 => ("F16", "vec2<u32>"),
                    DType::BF16 => ("BF16", "vec2<u32>"),
                    _ => ("F32", "vec4<f32>"),
                };
                define(name, 1);
                defines.insert("UNIT", unit.into());
            }
            Training::LayerNorm { stats, threads } => {
                define("STATS", stats.into());
                define("THREADS", threads as usize);
            }
            Training::Columns { norm } => define("NORM", norm.into()),
            Training::Attend { rows, head } => {
                define("ROWS", rows.into());
                let quads = head.is_multiple_of(4);
                let units = if quads { head / 4 } else { head } as usize;
                let shares = (ATTEND_THREADS / units.max(1)).max(1);
                define("QUADS", quads.into());
                define("HEAD", units);
                define("SHARES", shares);
                define("SUMS", units * shares);
                define("THREADS", ATTEND_THREADS);
                defines.insert("UNIT", if quads { "vec4<f32>" } else { "f32" }.into());
            }
            Training::AdamW { clip } | Training::AdamW8 { clip } => define("CLIP", clip.into()),
            Training::Sgd { velocity, clip } => {
                define("VELOCITY", velocity.into());
                define("CLIP", clip.into());
            }
            Training::CrossEntropy
            | Training::SoftTargets
            | Training::Total
            | Training::Squares
            | Training::Scatter => {}
        }
    }

    /// Every kind of shader that the backend asks for.
    #[cfg(test)]
    pub(crate) fn all(formats: impl Iterator<Item = Format>) -> Vec<Self> {
        let both = [false, true];
        let mut all = vec![Training::CrossEntropy, Training::SoftTargets, Training::Total];
        all.extend([Training::Squares, Training::Scatter]);
        all.extend(Each::ALL.map(Training::Each));
        for layout in [Layout::Times, Layout::TimesTransposed, Layout::TransposedTimes] {
            all.extend(both.map(|tiled| Training::Multiply { layout, tiled }));
        }
        all.extend(formats.flat_map(|format| both.map(|tiled| Training::Grad { format, tiled })));
        all.extend(crate::weights::DTYPES.map(Training::Hold));
        for stats in both {
            all.extend([64, 256].map(|threads| Training::LayerNorm { stats, threads }));
        }
        all.extend(both.map(|norm| Training::Columns { norm }));
        for head in [1, 4, 64, 511, crate::kernels::HEAD_DIM_MOST as u32] {
            all.extend(both.map(|rows| Training::Attend { rows, head }));
        }
        all.extend(both.map(|clip| Training::AdamW { clip }));
        all.extend(both.map(|clip| Training::AdamW8 { clip }));
        for velocity in both {
            all.extend(both.map(|clip| Training::Sgd { velocity, clip }));
        }
        all
    }
}
