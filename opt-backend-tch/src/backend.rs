//! [`Backend`] for [`Tch`].

use crate::{
    Cache, Linear, Norm, Table, Tch, Tensor,
    activation::activate,
    attention, device,
    error::torch,
    quant::{self, Coded, unknown},
    tensor::{read_matrix, upload},
    vocab,
    weights::{self, Dense, Kept},
};
use opt_backend::{
    Activation, Attend, Backend, CacheLayer, CacheSpec, Counters, DType, HostLinear, HostMatrix, HostNorm,
    HostVector, Info, NormParams, Readback, Result, TargetScore, Then, TopK, check, host_memory,
    ndarray::{Array2, ArrayView1, ArrayView2, Ix2},
    quant::Quantized,
    ready,
};
use opt_kernels::Compute;
use std::ops::Range;
use tch::{Device, Kind, NoGradGuard, utils};

impl Tch {
    /// To be held while LibTorch is called: no gradients, and this value's number of threads.
    pub(crate) fn at_work(&self) -> NoGradGuard {
        // Both settings are the calling thread's own. These calls, dropping a tensor, and asking one where and how it
        // lies are the only ones of tch here without a fallible form: they read and set numbers, and LibTorch refuses
        // only numbers of threads below 1.
        if self.device == Device::Cpu && tch::get_num_threads() != self.threads {
            tch::set_num_threads(self.threads);
        }
        tch::no_grad_guard()
    }

    /// Indices on the device.
    pub(crate) fn indices(
        &self,
        op: &'static str,
        indices: impl Iterator<Item = i64>,
    ) -> Result<tch::Tensor> {
        let indices: Vec<i64> = indices.collect();
        self.counters().upload(size_of_val(&indices[..]));
        upload(op, ArrayView1::from(&indices), self.device())
    }
}

/// `x + y`, in f32 and in the memory of `x` if it can be had.
pub(crate) fn sum(op: &'static str, x: Tensor, y: &tch::Tensor) -> Result<Tensor> {
    let shape = x.shape();
    let mut x = x.into_f32(op)?;
    let _ = x.f_add_(y).map_err(torch(op))?;
    Ok(Tensor::new(x, Kind::Float, shape))
}

impl Backend for Tch {
    type Tensor = Tensor;
    type Linear = Linear;
    type Norm = Norm;
    type Table = Table;
    type Cache = Cache;

    fn info(&self) -> Info {
        let mut info = Info::new("tch", device::name(self.device()));
        info.dtypes = vec![DType::F32, DType::F16, DType::BF16];
        info.details.push(("LibTorch".to_owned(), device::version_text()));
        let compute = if self.host_kernels() { self.host.compute() } else { Compute::F32 };
        info.details.push(("quantized weights".to_owned(), format!("multiplied in {compute}")));
        if let Device::Cuda(index) = self.device() {
            info.memory = device::cuda_memory(index);
        }
        if self.device() == Device::Cpu {
            info.threads = usize::try_from(self.threads).unwrap_or(0);
            info.memory = host_memory();
            let parts =
                [("OpenMP", utils::has_openmp()), ("MKL", utils::has_mkl()), ("oneDNN", utils::has_mkldnn())];
            let has: Vec<&str> = parts.iter().filter(|(_, has)| *has).map(|(name, _)| *name).collect();
            info.details.push(("libraries".to_owned(), has.join(", ")));
        }
        info
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn shape(&self, x: &Tensor) -> [usize; 2] {
        x.shape()
    }

    fn upload(&self, x: ArrayView2<'_, f32>) -> Result<Tensor> {
        let _at_work = self.at_work();
        self.counters.upload(size_of::<f32>() * x.len());
        let data = upload::<f32, Ix2>("upload", x, self.device())?;
        Ok(Tensor::new(data, Kind::Float, x.dim().into()))
    }

    fn read<'a>(&'a self, x: &Tensor) -> Readback<'a, Array2<f32>> {
        let _at_work = self.at_work();
        let [rows, width] = x.shape();
        self.counters.read(size_of::<f32>() * rows * width);
        ready(x.matrix("read").and_then(|matrix| read_matrix("read", &matrix, [rows, width])))
    }

    fn new_linear(
        &self,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<Linear> {
        let _at_work = self.at_work();
        Dense::new(self, weight, bias, dtype).map(|dense| Linear(Kept::Dense(dense)))
    }

    fn new_quantized_linear(&self, weight: &Quantized, bias: Option<HostVector<'_>>) -> Result<Linear> {
        let _at_work = self.at_work();
        Coded::new("new_linear", self, weight, bias).map(|coded| Linear(Kept::Coded(coded)))
    }

    fn new_quantized_table(&self, rows: &Quantized) -> Result<Table> {
        let _at_work = self.at_work();
        Coded::new("new_table", self, rows, None).map(Table::quantized)
    }

    fn read_linear<'a>(&'a self, linear: &Linear) -> Readback<'a, HostLinear> {
        let _at_work = self.at_work();
        ready(linear.read())
    }

    fn new_norm(&self, params: NormParams<'_>) -> Result<Norm> {
        let _at_work = self.at_work();
        Norm::new(self, params)
    }

    fn read_norm<'a>(&'a self, norm: &Norm) -> Readback<'a, HostNorm> {
        let _at_work = self.at_work();
        ready(norm.read())
    }

    fn new_table(&self, rows: HostMatrix<'_>, dtype: DType) -> Result<Table> {
        let _at_work = self.at_work();
        Table::new(self, rows, dtype)
    }

    fn table_shape(&self, table: &Table) -> [usize; 2] {
        table.shape
    }

    fn read_table<'a>(&'a self, table: &Table, rows: Range<usize>) -> Readback<'a, Array2<f32>> {
        const OP: &str = "read_table";
        let _at_work = self.at_work();
        ready(table.read(OP, rows))
    }

    fn new_cache(&self, spec: CacheSpec) -> Result<Cache> {
        Cache::new(spec, self.device())
    }

    fn cache_len(&self, cache: &Cache, layer: usize) -> usize {
        cache.len(layer)
    }

    fn cache_append(
        &self,
        cache: &mut Cache,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        rows: Range<usize>,
    ) -> Result<()> {
        const OP: &str = "cache_append";
        let _at_work = self.at_work();
        check::same_shape(OP, values.shape(), keys.shape())?;
        cache.check(OP, layer, keys.shape()[1])?;
        check::range(OP, &rows, keys.shape()[0])?;
        cache.append(OP, layer, keys, values, rows)
    }

    fn cache_read<'a>(&'a self, cache: &Cache, layer: usize) -> Readback<'a, CacheLayer> {
        let _at_work = self.at_work();
        ready(cache.read(layer))
    }

    fn cache_truncate(&self, cache: &mut Cache, len: usize) -> Result<()> {
        cache.truncate(len);
        Ok(())
    }

    fn cache_fork(&self, cache: &Cache) -> Result<Cache> {
        Ok(cache.fork())
    }

    fn gather(&self, table: &Table, ids: &[u32]) -> Result<Tensor> {
        let _at_work = self.at_work();
        let rows = table.gather("gather", self, ids)?;
        Ok(Tensor::new(rows, Kind::Float, [ids.len(), table.shape[1]]))
    }

    fn add_gathered(&self, x: Tensor, table: &Table, ids: &[u32]) -> Result<Tensor> {
        const OP: &str = "add_gathered";
        let _at_work = self.at_work();
        check::same_shape(OP, [ids.len(), table.shape[1]], x.shape())?;
        sum(OP, x, &table.gather(OP, self, ids)?)
    }

    fn layer_norm(&self, x: &Tensor, norm: &Norm) -> Result<Tensor> {
        const OP: &str = "layer_norm";
        let _at_work = self.at_work();
        check::width(OP, x.shape()[1], norm.width)?;
        let y = norm.apply(&x.matrix_as(OP, Kind::Float)?)?;
        Ok(Tensor::new(y, Kind::Float, x.shape()))
    }

    fn linear(&self, x: &Tensor, linear: &Linear, then: Then<Tensor>) -> Result<Tensor> {
        const OP: &str = "linear";
        let _at_work = self.at_work();
        let [out, input] = linear.shape();
        check::width(OP, x.shape()[1], input)?;
        let shape = [x.shape()[0], out];
        if let Then::Add(residual) = &then {
            check::same_shape(OP, residual.shape(), shape)?;
        }
        let dense = match &linear.0 {
            Kept::Dense(dense) => dense,
            Kept::Coded(coded) => return coded.apply(OP, self, x, then),
        };
        let relu = matches!(then, Then::Activate(Activation::Relu));
        let (y, kind) = dense.apply(OP, self, x, relu)?;
        match then {
            Then::Nothing | Then::Activate(Activation::Relu) => Ok(Tensor::new(y, kind, shape)),
            Then::Activate(activation) => {
                let (y, kind) = activate(OP, activation, y, kind)?;
                Ok(Tensor::new(y, kind, shape))
            }
            Then::Add(residual) => sum(OP, residual, &y),
            other => Err(unknown(OP, &other)),
        }
    }

    fn qkv(&self, x: &Tensor, q: &Linear, k: &Linear, v: &Linear) -> Result<[Tensor; 3]> {
        const OP: &str = "qkv";
        let _at_work = self.at_work();
        let all = [q, k, v];
        for linear in all {
            check::width(OP, x.shape()[1], linear.shape()[1])?;
        }
        match all.map(|linear| &linear.0) {
            [Kept::Dense(q), Kept::Dense(k), Kept::Dense(v)] => weights::qkv(self, x, [q, k, v]),
            [Kept::Coded(q), Kept::Coded(k), Kept::Coded(v)] => quant::qkv(OP, self, x, [q, k, v]),
            _ => {
                let [q, k, v] = all.map(|linear| self.linear(x, linear, Then::Nothing));
                Ok([q?, k?, v?])
            }
        }
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        const OP: &str = "add";
        let _at_work = self.at_work();
        check::same_shape(OP, y.shape(), x.shape())?;
        let y = y.matrix(OP)?;
        sum(OP, x, &y)
    }

    fn attend(
        &self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attend: Attend<'_>,
        caches: Option<&mut [&mut Cache]>,
    ) -> Result<Tensor> {
        let _at_work = self.at_work();
        attention::attend(self, &q, &k, &v, attend, caches)
    }

    fn take_rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        const OP: &str = "take_rows";
        let _at_work = self.at_work();
        let [available, width] = x.shape();
        check::rows(OP, rows, available)?;
        let shape = [rows.len(), width];
        let matrix = x.matrix(OP)?;
        let first = rows.first().copied().unwrap_or(0);
        let taken = if rows.iter().enumerate().all(|(i, row)| *row == first + i) {
            matrix.f_narrow_copy(0, first as i64, rows.len() as i64)
        } else {
            matrix.f_index_select(0, &self.indices(OP, rows.iter().map(|row| *row as i64))?)
        };
        Ok(Tensor::new(taken.map_err(torch(OP))?, x.kind(), shape))
    }

    fn logits(&self, x: &Tensor, head: &Table) -> Result<Tensor> {
        const OP: &str = "logits";
        let _at_work = self.at_work();
        let [entries, width] = head.shape;
        check::width(OP, x.shape()[1], width)?;
        let (logits, kind) = head.logits(OP, self, x)?;
        Ok(Tensor::new(logits, kind, [x.shape()[0], entries]))
    }

    fn log_probs<'a>(&'a self, x: &Tensor, head: &Table, targets: &[u32]) -> Readback<'a, Vec<TargetScore>> {
        let _at_work = self.at_work();
        ready(vocab::log_probs(self, x, head, targets))
    }

    fn top_k<'a>(&'a self, logits: &Tensor, k: usize) -> Readback<'a, Vec<TopK>> {
        let _at_work = self.at_work();
        ready(vocab::top_k(self, logits, k))
    }
}
