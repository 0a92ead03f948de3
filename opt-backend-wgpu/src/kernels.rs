//! The shaders and their variants, compiled when first needed and kept.

use crate::{
    packed::Packed,
    template::{self, Defines},
    train::Training,
};
use opt_backend::{CacheDType, DType};
use std::{collections::HashMap, sync::Arc};

/// Positions of a page of a KV cache.
pub(crate) const PAGE: usize = 32;
/// Columns of a tile of `matmul.wgsl`; rows as well.
pub(crate) const TILE: usize = 64;
/// Candidates that one workgroup of `sort.wgsl` sorts.
pub(crate) const SORTED: usize = 1024;
/// Threads of `attend.wgsl`, and positions of its tiles: few for short sequences, many for long ones.
pub(crate) const ATTEND_THREADS: [u32; 2] = [64, 256];
/// The widest head that `attend.wgsl` can do: four columns a thread, and its vectors fit workgroup memory.
pub(crate) const HEAD_DIM_MOST: usize = 512;

/// How weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Format {
    /// As numbers.
    Plain(DType),
    /// As codes and scales.
    Packed(Packed),
}

impl Format {
    /// The same, for kernels that read single words of codes.
    pub(crate) fn single(self) -> Self {
        match self {
            Format::Packed(packed) => Format::Packed(packed.single()),
            plain => plain,
        }
    }

    /// Whether each code is looked up in a table.
    pub(crate) fn looks_up(self) -> bool {
        self.packed().is_some_and(|packed| packed.table)
    }

    fn packed(self) -> Option<Packed> {
        match self {
            Format::Plain(_) => None,
            Format::Packed(packed) => Some(packed),
        }
    }

    /// What shaders that read such weights need to know.
    fn define(self, extras: Extras, defines: &mut Defines) {
        match self {
            Format::Packed(packed) => packed.define(defines),
            Format::Plain(dtype) => {
                let name = match dtype {
                    DType::F16 => "F16",
                    DType::BF16 => "BF16",
                    _ => "F32",
                };
                let native = extras.f16 && dtype == DType::F16;
                let quad = match dtype {
                    DType::F16 if native => "vec4<f16>",
                    DType::F16 | DType::BF16 => "vec2<u32>",
                    _ => "vec4<f32>",
                };
                defines.insert(name, "1".into());
                defines.insert("NATIVE", usize::from(native).to_string());
                defines.insert("QUAD", quad.into());
            }
        }
    }
}

/// A shader with all that is fixed when it is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Variant {
    /// x Wᵀ for up to `rows` rows a workgroup, `lanes` of its threads to four columns; of three W at once where `three`.
    MatVec {
        format: Format,
        rows: u32,
        threads: u32,
        lanes: u32,
        residual: bool,
        three: bool,
    },
    /// x Wᵀ in tiles.
    MatMul {
        format: Format,
        residual: bool,
    },
    /// Table entries by id, added to another tensor where `add`.
    Gather {
        format: Format,
        add: bool,
        /// Whether elements lie in another order in the table than in the rows taken from it.
        places: bool,
    },
    /// Columns in the order of a quantized weight.
    Arrange,
    Add,
    LayerNorm {
        threads: u32,
    },
    Append {
        dtype: CacheDType,
        quads: u32,
    },
    /// Attention of up to `queries` rows of a sequence; with `new`, of one row that is not in the cache yet.
    Attend {
        dtype: CacheDType,
        quads: u32,
        queries: u32,
        threads: u32,
        new: bool,
    },
    Stats {
        targets: bool,
    },
    Sort {
        merge: bool,
    },
    Train(Training),
}

/// What shaders may use beyond WebGPU's core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extras {
    pub(crate) subgroups: bool,
    pub(crate) f16: bool,
}

/// How a shader binds a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    Read,
    Write,
}

macro_rules! sources {
    ($($name:literal),*) => {
        /// The shader or part named `name`.
        fn source(name: &str) -> Option<&'static str> {
            match name {
                $($name => Some(include_str!(concat!("shaders/", $name, ".wgsl"))),)*
                _ => None,
            }
        }
    };
}

sources!(
    "activation",
    "adamw",
    "adamw8",
    "add",
    "append",
    "arrange",
    "attend",
    "attend_grad",
    "cache",
    "clip",
    "columns",
    "cross_entropy",
    "each",
    "encode",
    "gather",
    "hold",
    "keys",
    "layer_norm",
    "layer_norm_grad",
    "matmul",
    "matvec",
    "multiply",
    "multiply_apart",
    "operands",
    "packed",
    "packed_sums",
    "product",
    "reduce",
    "scatter",
    "sgd",
    "slope",
    "soft_targets",
    "softmax",
    "sort",
    "squares",
    "stats",
    "total",
    "weights"
);

impl Variant {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Variant::MatVec { .. } => "matvec",
            Variant::MatMul { .. } => "matmul",
            Variant::Gather { .. } => "gather",
            Variant::Arrange => "arrange",
            Variant::Add => "add",
            Variant::LayerNorm { .. } => "layer_norm",
            Variant::Append { .. } => "append",
            Variant::Attend { .. } => "attend",
            Variant::Stats { .. } => "stats",
            Variant::Sort { .. } => "sort",
            Variant::Train(training) => training.name(),
        }
    }

    /// How the weights are held that it reads.
    fn format(self) -> Option<Format> {
        match self {
            Variant::MatVec { format, .. }
            | Variant::MatMul { format, .. }
            | Variant::Gather { format, .. } => Some(format),
            Variant::Train(training) => training.format(),
            _ => None,
        }
    }

    /// The storage buffers, in the order of their bindings. The uniforms come before them.
    pub(crate) fn bindings(self) -> &'static [Access] {
        use Access::{Read as R, Write as W};
        // The parameters of quantized weights come last.
        let packed = self.format().is_some_and(|format| format.packed().is_some());
        match self {
            Variant::MatVec { three: true, .. } if packed => &[R, W, R, R, R, R, R, R],
            Variant::MatVec { three: true, .. } => &[R, W, R, R, R],
            Variant::MatVec { residual, .. } | Variant::MatMul { residual, .. } if residual && packed => {
                &[R, W, R, R, R]
            }
            Variant::MatVec { residual, .. } | Variant::MatMul { residual, .. } if residual || packed => {
                &[R, W, R, R]
            }
            Variant::MatVec { .. } | Variant::MatMul { .. } => &[R, W, R],
            Variant::Gather { add: true, .. } if packed => &[R, W, R, R, R],
            Variant::Gather { add, .. } if add || packed => &[R, W, R, R],
            Variant::Gather { .. } => &[R, W, R],
            Variant::Arrange => &[R, W, R],
            Variant::Add => &[W, R, R],
            Variant::LayerNorm { .. } => &[R, W, R],
            Variant::Append { .. } => &[R, W, R, R],
            Variant::Attend { new: true, .. } => &[R, R, W, W, R, R],
            Variant::Attend { .. } => &[R, R, W, R],
            Variant::Stats { .. } => &[R, R, W],
            Variant::Sort { .. } => &[R, W],
            Variant::Train(training) => training.bindings(packed),
        }
    }

    /// The WGSL of this variant.
    pub(crate) fn text(self, extras: Extras) -> Result<String, String> {
        let mut defines = Defines::new();
        let mut define = |name: &'static str, value: usize| {
            defines.insert(name, value.to_string());
        };
        let on = usize::from;
        define("SUBGROUPS", on(extras.subgroups));
        match self {
            Variant::MatVec { rows, threads, lanes, residual, three, .. } => {
                let (rows, threads, lanes) = (rows as usize, threads as usize, lanes as usize);
                // Subgroups can add up the sums of a workgroup, not those of some lanes of it.
                let subgroups = extras.subgroups && lanes == threads;
                define("SUBGROUPS", on(subgroups));
                define("SHARED", on(lanes > 1));
                define("ROWS", rows);
                define("THREADS", threads);
                define("LANES", lanes);
                define("TEAMS", threads / lanes.max(1));
                define("RESIDUAL", on(residual));
                define("THREE", on(three));
                // Subgroups have at least four invocations.
                define("SUBGROUPS_MOST", threads / 4);
                define("PARTIALS", if subgroups { rows * threads / 4 } else { rows * threads });
                define("VECTORS", 1);
                define("PARTS", on(rows <= 2));
                define("TREE", on(lanes == 1));
            }
            Variant::MatMul { residual, .. } => define("RESIDUAL", on(residual)),
            Variant::Gather { add, places, .. } => {
                define("ADD", on(add));
                define("PLACES", on(places));
                define("TREE", 1);
            }
            Variant::LayerNorm { threads } => {
                define("THREADS", threads as usize);
                define("SUBGROUPS_MOST", threads as usize / 4);
            }
            Variant::Append { quads, .. } => {
                define("PAGE", PAGE);
                define("HEAD_QUADS", quads as usize);
            }
            Variant::Attend { quads, queries, threads, new, .. } => {
                let (quads, queries, threads) = (quads as usize, queries as usize, threads as usize);
                define("PAGE", PAGE);
                define("HEAD_QUADS", quads);
                define("QUERIES", queries);
                define("QUERY_QUADS", quads * queries);
                define("NEW", on(new));
                define("THREADS", threads);
                define("SHARES", threads / quads.max(1));
                define("SCORES", score_words(queries, threads));
                define("PARTIALS", 16 * queries);
                define("TILE_PAGES", threads / PAGE);
                define("JOB_WORDS", if new { 6 } else { 4 });
            }
            Variant::Stats { targets } => define("TARGETS", on(targets)),
            Variant::Sort { merge } => define("MERGE", on(merge)),
            Variant::Train(training) => training.define(&mut defines),
            Variant::Add | Variant::Arrange => {}
        }
        let mut define = |name: &'static str, value: usize| {
            defines.insert(name, value.to_string());
        };
        // The parameters are bound last.
        define(
            "PARAMETERS",
            self.bindings().len() - if matches!(self, Variant::MatVec { three: true, .. }) { 2 } else { 0 },
        );
        match self {
            Variant::Append { dtype, .. } | Variant::Attend { dtype, .. } => {
                let (name, unit) = match dtype {
                    CacheDType::F16 => ("F16", "vec2<u32>"),
                    CacheDType::Int8 => ("Int8", "u32"),
                    _ => ("F32", "vec4<f32>"),
                };
                define(name, 1);
                defines.insert("UNIT", unit.into());
            }
            _ => {}
        }
        if let Some(format) = self.format() {
            format.define(extras, &mut defines);
        }
        let text = source(self.name()).unwrap_or_default();
        template::expand(text, &defines, &source).map_err(|error| format!("{}.wgsl: {error}", self.name()))
    }
}

/// Words of workgroup memory that attention keeps scores in; at least a vec4 a thread.
fn score_words(queries: usize, threads: usize) -> usize {
    threads * queries.max(4)
}

/// The most rows an attention workgroup of `threads` can take, up to eight, within `limit` bytes of workgroup memory.
pub(crate) fn queries_most(quads: usize, threads: usize, limit: usize) -> u32 {
    let fits = |queries: &u32| {
        let queries = *queries as usize;
        let bytes =
            4 * (score_words(queries, threads) + 16 * queries + threads / PAGE) + 16 * quads * queries;
        // Sixteen threads look for the largest score of each row.
        16 * queries <= threads && bytes <= limit
    };
    [8, 4, 2].into_iter().find(fits).unwrap_or(1)
}

/// A compiled shader.
pub(crate) struct Kernel {
    pub(crate) pipeline: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
    /// Kernels of equal bindings share a layout, and so bind groups.
    pub(crate) layout_id: u64,
    pub(crate) id: u64,
}

/// Compiled shaders and their layouts.
#[derive(Default)]
pub(crate) struct Kernels {
    kernels: HashMap<Variant, Arc<Kernel>>,
    layouts: HashMap<&'static [Access], (u64, wgpu::BindGroupLayout)>,
}

/// Bytes of uniforms of a dispatch.
pub(crate) const UNIFORM_BYTES: u64 = 64;

impl Kernels {
    /// The kernel, if it is compiled.
    pub(crate) fn ready(&self, variant: Variant) -> Option<Arc<Kernel>> {
        self.kernels.get(&variant).cloned()
    }

    /// Compiles a kernel and keeps it. What the device finds wrong with it, it reports to the error scope.
    pub(crate) fn compile(
        &mut self,
        device: &wgpu::Device,
        extras: Extras,
        variant: Variant,
    ) -> Result<(), String> {
        let text = variant.text(extras)?;
        let label = Some(variant.name());
        let descriptor =
            wgpu::ShaderModuleDescriptor { label, source: wgpu::ShaderSource::Wgsl(text.into()) };
        let checks =
            wgpu::ShaderRuntimeChecks { force_loop_bounding: false, ..wgpu::ShaderRuntimeChecks::checked() };
        // SAFETY: every check stays on but that which bounds loops, and every loop of these shaders counts up to, or
        // halves down from, a number that does not change inside it.
        let module = unsafe { device.create_shader_module_trusted(descriptor, checks) };
        let next = self.layouts.len() as u64;
        let bindings = variant.bindings();
        let (layout_id, layout) =
            self.layouts.entry(bindings).or_insert_with(|| (next, layout_of(device, bindings))).clone();
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[],
                // Every kernel writes workgroup memory before it reads it.
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        });
        let id = self.kernels.len() as u64;
        self.kernels.insert(variant, Arc::new(Kernel { pipeline, layout, layout_id, id }));
        Ok(())
    }
}

fn layout_of(device: &wgpu::Device, bindings: &[Access]) -> wgpu::BindGroupLayout {
    let entry = |binding: usize, ty, has_dynamic_offset, min_binding_size| wgpu::BindGroupLayoutEntry {
        binding: binding as u32,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size },
        count: None,
    };
    let uniform = entry(0, wgpu::BufferBindingType::Uniform, true, wgpu::BufferSize::new(UNIFORM_BYTES));
    let storage = bindings.iter().enumerate().map(|(i, access)| {
        let read_only = *access == Access::Read;
        entry(i + 1, wgpu::BufferBindingType::Storage { read_only }, false, None)
    });
    let entries: Vec<_> = std::iter::once(uniform).chain(storage).collect();
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::DTYPES;

    /// Every kind of variant that the backend asks for.
    fn variants() -> Vec<Variant> {
        let mut all = vec![
            Variant::Add,
            Variant::Arrange,
            Variant::Stats { targets: false },
            Variant::Stats { targets: true },
        ];
        all.extend([false, true].map(|merge| Variant::Sort { merge }));
        let plain = DTYPES.map(Format::Plain);
        let single = Packed::all().map(|packed| Format::Packed(packed).single());
        all.extend(Training::all(plain.into_iter().chain(single)).into_iter().map(Variant::Train));
        all.extend([64, 256].map(|threads| Variant::LayerNorm { threads }));
        for format in plain.into_iter().chain(Packed::all().map(Format::Packed)) {
            let single = format.single();
            for add in [false, true] {
                all.extend([false, true].map(|places| Variant::Gather { format: single, add, places }));
            }
            for residual in [false, true] {
                all.push(Variant::MatMul { format: single, residual });
                for rows in [1, 2, 4, 8] {
                    let shapes =
                        [(64, 64), (64, 16), (64, 1)].into_iter().chain((rows <= 2).then_some((256, 256)));
                    for (threads, lanes) in shapes {
                        let variant = |residual, three| Variant::MatVec {
                            format,
                            rows,
                            threads,
                            lanes,
                            residual,
                            three,
                        };
                        all.extend([variant(residual, false), variant(false, true)]);
                    }
                }
            }
        }
        for dtype in [CacheDType::F32, CacheDType::F16, CacheDType::Int8] {
            for quads in [1, 2, 16, 20, 32, 128] {
                all.push(Variant::Append { dtype, quads });
                for threads in ATTEND_THREADS.into_iter().filter(|threads| quads <= *threads) {
                    let mut queries = 1;
                    while queries <= queries_most(quads as usize, threads as usize, 16 << 10) {
                        all.push(Variant::Attend { dtype, quads, queries, threads, new: false });
                        queries *= 2;
                    }
                    if dtype == CacheDType::F32 {
                        all.push(Variant::Attend { dtype, quads, queries: 1, threads, new: true });
                    }
                }
            }
        }
        all
    }

    /// Parses and validates every shader, without a GPU, and holds it to WebGPU's default limits.
    #[test]
    fn every_variant_is_valid() {
        let mut checked = 0;
        for extras in [(false, false), (true, false), (false, true), (true, true)] {
            let extras = Extras { subgroups: extras.0, f16: extras.1 };
            let mut capabilities = naga::valid::Capabilities::empty();
            capabilities.insert(naga::valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32);
            capabilities.set(naga::valid::Capabilities::SUBGROUP, extras.subgroups);
            capabilities.set(naga::valid::Capabilities::SHADER_FLOAT16, extras.f16);
            let mut validator =
                naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities);
            validator.subgroup_stages(naga::valid::ShaderStages::COMPUTE);
            validator.subgroup_operations(naga::valid::SubgroupOperationSet::all());
            for variant in variants() {
                // What is packed does not use native f16.
                if extras.f16 && variant.format().is_some_and(|format| format.packed().is_some()) {
                    continue;
                }
                let text = variant.text(extras).expect("the template is well formed");
                let module = match naga::front::wgsl::parse_str(&text) {
                    Ok(module) => module,
                    Err(error) => panic!("{variant:?}: {}", error.emit_to_string(&text)),
                };
                if let Err(error) = validator.validate(&module) {
                    panic!("{variant:?}: {}\n{text}", error.emit_to_string(&text));
                }
                within_default_limits(variant, &module);
                checked += 1;
            }
        }
        println!("{checked} shaders");
    }

    fn within_default_limits(variant: Variant, module: &naga::Module) {
        let [entry] = &module.entry_points[..] else { panic!("{variant:?}: one entry point expected") };
        assert_eq!(entry.name, "main");
        assert!(
            entry.workgroup_size.iter().product::<u32>() <= 256,
            "{variant:?}: {:?}",
            entry.workgroup_size
        );
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).expect("types have layouts");
        let (mut workgroup, mut storage) = (0, Vec::new());
        for (_, global) in module.global_variables.iter() {
            match global.space {
                naga::AddressSpace::WorkGroup => workgroup += layouter[global.ty].size.next_multiple_of(16),
                naga::AddressSpace::Storage { access } => {
                    let binding = global.binding.expect("storage is bound").binding;
                    storage.push((binding, access.contains(naga::StorageAccess::STORE)));
                }
                naga::AddressSpace::Uniform => {
                    assert!(u64::from(layouter[global.ty].size) <= UNIFORM_BYTES, "{variant:?}: uniforms");
                }
                _ => {}
            }
        }
        assert!(workgroup <= 16 << 10, "{variant:?}: {workgroup} bytes of workgroup memory");
        assert!(storage.len() <= 8, "{variant:?}: {} storage buffers", storage.len());
        storage.sort_unstable();
        let expected = variant.bindings().iter().zip(1..).map(|(access, i)| (i, *access == Access::Write));
        assert_eq!(storage, expected.collect::<Vec<_>>(), "{variant:?}: bindings");
    }
}
