//! Backends that train wrongly, in one thing each.

use ndarray::{Array2, ArrayView2, Axis, Zip, array, s};
use opt_backend::{
    Activation, AdamW, Attend, Backend, CacheLayer, CacheSpec, Clip, Counters, DType, Dropout, HostLinear,
    HostMatrix, HostNorm, HostVector, Info, Layout, Moments8, NormParams, Readback, Reference,
    ReferenceCache, Result, Sgd, Smoothing, Span, Train, check,
    moments::{BLOCK, DynamicMap, SIGNED, UNSIGNED},
    oracle::gradient,
};
use std::ops::Range;

/// What can be wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    /// No fault: everything in f32, summed from left to right, as the plainest kernels do.
    PlainF32,
    IntoForgotten,
    IntoForgottenByLinears,
    SummedInHalf,
    WeightTransposed,
    LogitsLoseLastEntries,
    MeanTermForgotten,
    ProductTermForgotten,
    NormOfIgnoresBias,
    SpansRunTogether,
    ScoreScaleForgotten,
    KeysOfLaterRows,
    GapsNotZero,
    SlopeAtZero,
    TanhGelu,
    SmoothingIgnored,
    ExpWithoutMax,
    TemperatureNotSquared,
    LastOfRepeatedRowsWins,
    SumsOfFirst256Rows,
    OnePartSquared,
    MaskRepeatsEachRow,
    MaskOfLowSeed,
    DroppedUnscaled,
    DecayInGradient,
    DecayIgnored,
    ClipIgnored,
    ClipScalesUp,
    EpsInsideRoot,
    NotCorrected,
    MomentsNotKept,
    CodesOfLevelsBelow,
    MovedByCodes,
    PartOfBlockForgotten,
    VelocityNotKept,
    SgdIgnoresClip,
    RefusedStepChangesMoments,
    PanicsOnTargets,
    ErrorOfWrongKind,
}

/// [`Reference`] whose training ops are its own.
pub(crate) struct Wrong {
    pub(crate) inner: Reference,
    pub(crate) fault: Fault,
}

impl Backend for Wrong {
    type Tensor = Array2<f32>;
    type Linear = HostLinear;
    type Norm = HostNorm;
    type Table = Array2<f32>;
    type Cache = ReferenceCache;

    fn info(&self) -> Info {
        let mut info = self.inner.info();
        info.name = format!("{:?}", self.fault);
        info
    }
    fn counters(&self) -> &Counters {
        self.inner.counters()
    }
    fn shape(&self, x: &Array2<f32>) -> [usize; 2] {
        self.inner.shape(x)
    }
    fn upload(&self, x: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
        self.inner.upload(x)
    }
    fn read<'a>(&'a self, x: &Array2<f32>) -> Readback<'a, Array2<f32>> {
        self.inner.read(x)
    }
    fn new_linear(
        &self,
        weight: HostMatrix<'_>,
        bias: Option<HostVector<'_>>,
        dtype: DType,
    ) -> Result<HostLinear> {
        self.inner.new_linear(weight, bias, dtype)
    }
    fn read_linear<'a>(&'a self, linear: &HostLinear) -> Readback<'a, HostLinear> {
        self.inner.read_linear(linear)
    }
    fn new_norm(&self, params: NormParams<'_>) -> Result<HostNorm> {
        self.inner.new_norm(params)
    }
    fn read_norm<'a>(&'a self, norm: &HostNorm) -> Readback<'a, HostNorm> {
        self.inner.read_norm(norm)
    }
    fn new_table(&self, rows: HostMatrix<'_>, dtype: DType) -> Result<Array2<f32>> {
        self.inner.new_table(rows, dtype)
    }
    fn table_shape(&self, table: &Array2<f32>) -> [usize; 2] {
        self.inner.table_shape(table)
    }
    fn read_table<'a>(&'a self, table: &Array2<f32>, rows: Range<usize>) -> Readback<'a, Array2<f32>> {
        self.inner.read_table(table, rows)
    }
    fn new_cache(&self, spec: CacheSpec) -> Result<ReferenceCache> {
        self.inner.new_cache(spec)
    }
    fn cache_len(&self, cache: &ReferenceCache, layer: usize) -> usize {
        self.inner.cache_len(cache, layer)
    }
    fn cache_append(
        &self,
        cache: &mut ReferenceCache,
        layer: usize,
        keys: &Array2<f32>,
        values: &Array2<f32>,
        rows: Range<usize>,
    ) -> Result<()> {
        self.inner.cache_append(cache, layer, keys, values, rows)
    }
    fn cache_read<'a>(&'a self, cache: &ReferenceCache, layer: usize) -> Readback<'a, CacheLayer> {
        self.inner.cache_read(cache, layer)
    }
    fn cache_truncate(&self, cache: &mut ReferenceCache, len: usize) -> Result<()> {
        self.inner.cache_truncate(cache, len)
    }
    fn cache_fork(&self, cache: &ReferenceCache) -> Result<ReferenceCache> {
        self.inner.cache_fork(cache)
    }
}

/// In f32, from left to right.
/// The product, each of whose partial sums is held in `sums`.
fn product(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, layout: Layout, sums: DType) -> Array2<f32> {
    let (a, b) = match layout {
        Layout::TimesTransposed => (a, b),
        Layout::Times => (a, b.reversed_axes()),
        Layout::TransposedTimes => (a.reversed_axes(), b.reversed_axes()),
    };
    // Rows end to end: the loops are long.
    let (a, b) = (a.as_standard_layout().into_owned(), b.as_standard_layout().into_owned());
    Array2::from_shape_fn((a.nrows(), b.nrows()), |(i, j)| {
        a.row(i).iter().zip(b.row(j)).fold(0.0, |sum, (x, y)| sums.round(sum + x * y))
    })
}

impl Wrong {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn plus(
        &self,
        op: &'static str,
        mut product: Array2<f32>,
        into: Option<Array2<f32>>,
    ) -> Result<Array2<f32>> {
        if let Some(into) = into {
            check::same_shape(op, into.dim().into(), product.dim().into())?;
            let forgotten = match op {
                "matmul" => self.is(Fault::IntoForgotten),
                _ => self.is(Fault::IntoForgottenByLinears),
            };
            if !forgotten {
                product += &into;
            }
        }
        Ok(product)
    }

    fn attend_span(&self, [q, k, v, dy]: [ArrayView2<'_, f32>; 4], heads: usize) -> [Array2<f32>; 3] {
        let (rows, width) = q.dim();
        let head_dim = width / heads;
        let scale = (head_dim as f32).sqrt().recip();
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| Array2::<f32>::zeros((rows, width)));
        for head in 0..heads {
            let c = s![.., head * head_dim..(head + 1) * head_dim];
            let [q, k, v, dy] = [q, k, v, dy].map(|x| x.slice(c).to_owned());
            let mut weights = product(q.view(), k.view(), Layout::TimesTransposed, DType::F32) * scale;
            for (row, mut w) in weights.outer_iter_mut().enumerate() {
                let seen = if self.is(Fault::KeysOfLaterRows) { rows } else { row + 1 };
                w.slice_mut(s![seen..]).fill(f32::NEG_INFINITY);
                let max = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                w.mapv_inplace(|s| (s - max).exp());
                let sum = w.sum();
                w /= sum;
            }
            let mut scores = product(dy.view(), v.view(), Layout::TimesTransposed, DType::F32);
            for (mut d, w) in scores.outer_iter_mut().zip(weights.outer_iter()) {
                let mean = d.dot(&w);
                Zip::from(&mut d).and(w).for_each(|d, w| *d = w * (*d - mean));
            }
            if !self.is(Fault::ScoreScaleForgotten) {
                scores *= scale;
            }
            dq.slice_mut(c).assign(&product(scores.view(), k.view(), Layout::Times, DType::F32));
            dk.slice_mut(c).assign(&product(scores.view(), q.view(), Layout::TransposedTimes, DType::F32));
            dv.slice_mut(c).assign(&product(weights.view(), dy.view(), Layout::TransposedTimes, DType::F32));
        }
        [dq, dk, dv]
    }

    /// dx, and the gradients of weight and bias.
    fn norm(
        &self,
        x: &Array2<f32>,
        norm: &HostNorm,
        dy: &Array2<f32>,
    ) -> Result<(Array2<f32>, [Array2<f32>; 2])> {
        check::same_shape("layer_norm_grad", dy.dim().into(), x.dim().into())?;
        check::width("layer_norm_grad", x.ncols(), norm.width)?;
        let (mut dx, n) = (x.clone(), x.ncols() as f32);
        let [mut d_weight, mut d_bias] = [(); 2].map(|()| Array2::zeros((1, x.ncols())));
        for (mut x, dy) in dx.outer_iter_mut().zip(dy.outer_iter()) {
            let mean = x.sum() / n;
            x.mapv_inplace(|v| v - mean);
            let scale = (x.iter().map(|v| v * v).sum::<f32>() / n + norm.eps).sqrt().recip();
            x.mapv_inplace(|v| v * scale);
            Zip::from(d_weight.row_mut(0)).and(&x).and(dy).for_each(|w, x, dy| *w += x * dy);
            d_bias.row_mut(0).scaled_add(1.0, &dy);
            let inner = norm.weight.as_ref().map_or(dy.to_owned(), |weight| &dy * weight);
            let mut mean = inner.sum() / n;
            let mut mean_product = inner.dot(&x) / n;
            if self.is(Fault::MeanTermForgotten) {
                mean = 0.0;
            }
            if self.is(Fault::ProductTermForgotten) {
                mean_product = 0.0;
            }
            Zip::from(&mut x).and(&inner).for_each(|x, g| *x = scale * (g - mean - *x * mean_product));
        }
        Ok((dx, [d_weight, d_bias]))
    }

    fn factor(&self, clip: Option<Clip<'_, Array2<f32>>>) -> Result<f32> {
        let Some(clip) = clip else { return Ok(1.0) };
        check::same_shape("clip", clip.sum_squares.dim().into(), [1, 1])?;
        let factor = clip.max_norm / (clip.sum_squares[[0, 0]].sqrt() + 1e-6);
        Ok(match self.fault {
            Fault::ClipIgnored => 1.0,
            Fault::ClipScalesUp => factor,
            _ => factor.min(1.0),
        })
    }
}

fn log_softmax(row: &mut [f32], shift: bool) {
    let max = if shift { row.iter().copied().fold(f32::NEG_INFINITY, f32::max) } else { 0.0 };
    let total = row.iter().map(|v| (v - max).exp()).sum::<f32>().ln();
    row.iter_mut().for_each(|v| *v = *v - max - total);
}

impl Train for Wrong {
    fn norm_of(&self, weight: &Array2<f32>, bias: &Array2<f32>, eps: f32) -> Result<HostNorm> {
        let width = weight.ncols();
        check::same_shape("norm_of", weight.dim().into(), [1, width])?;
        check::same_shape("norm_of", bias.dim().into(), [1, width])?;
        let bias = if self.is(Fault::NormOfIgnoresBias) { 0.0 * bias } else { bias.clone() };
        let row = |v: &Array2<f32>| Some(v.row(0).to_owned());
        Ok(HostNorm { width, eps, weight: row(weight), bias: row(&bias) })
    }

    fn matmul(
        &self,
        a: &Array2<f32>,
        b: &Array2<f32>,
        layout: Layout,
        dtype: DType,
        into: Option<Array2<f32>>,
    ) -> Result<Array2<f32>> {
        layout.shape(a.dim().into(), b.dim().into())?;
        let [a, b] = [a, b].map(|x| x.mapv(|v| dtype.round(v)));
        let sums = if self.is(Fault::SummedInHalf) { dtype } else { DType::F32 };
        self.plus("matmul", product(a.view(), b.view(), layout, sums), into)
    }

    fn linear_grad(
        &self,
        dy: &Array2<f32>,
        linear: &HostLinear,
        into: Option<Array2<f32>>,
    ) -> Result<Array2<f32>> {
        check::width("linear_grad", dy.ncols(), linear.weight.nrows())?;
        let square = linear.weight.is_square() && self.is(Fault::WeightTransposed);
        let layout = if square { Layout::TimesTransposed } else { Layout::Times };
        self.plus("linear_grad", product(dy.view(), linear.weight.view(), layout, DType::F32), into)
    }

    fn logits_grad(&self, dy: &Array2<f32>, head: &Array2<f32>) -> Result<Array2<f32>> {
        check::width("logits_grad", dy.ncols(), head.nrows())?;
        let lost =
            if self.is(Fault::LogitsLoseLastEntries) && dy.ncols() > 256 { dy.ncols() % 64 } else { 0 };
        let n = dy.ncols() - lost;
        Ok(product(dy.slice(s![.., ..n]), head.slice(s![..n, ..]), Layout::Times, DType::F32))
    }

    fn layer_norm_grad(&self, x: &Array2<f32>, norm: &HostNorm, dy: &Array2<f32>) -> Result<Array2<f32>> {
        Ok(self.norm(x, norm, dy)?.0)
    }

    fn layer_norm_grad_params(
        &self,
        x: &Array2<f32>,
        norm: &HostNorm,
        dy: &Array2<f32>,
    ) -> Result<[Array2<f32>; 2]> {
        Ok(self.norm(x, norm, dy)?.1)
    }

    fn attend_grad(
        &self,
        [q, k, v]: [&Array2<f32>; 3],
        dy: &Array2<f32>,
        attend: Attend<'_>,
    ) -> Result<[Array2<f32>; 3]> {
        check::spans("attend_grad", attend, q.dim().into())?;
        for other in [k, v, dy] {
            check::same_shape("attend_grad", other.dim().into(), q.dim().into())?;
        }
        let whole = [Span { start: 0, len: q.nrows() }];
        let spans = if self.is(Fault::SpansRunTogether) { &whole[..] } else { attend.spans };
        let fill = if self.is(Fault::GapsNotZero) { 1.0 } else { 0.0 };
        let mut all = [(); 3].map(|()| Array2::from_elem(q.dim(), fill));
        for span in spans {
            let rows = s![span.rows(), ..];
            let operands = [q, k, v, dy].map(|x| x.slice(rows));
            for (all, of_span) in all.iter_mut().zip(self.attend_span(operands, attend.heads)) {
                all.slice_mut(rows).assign(&of_span);
            }
        }
        Ok(all)
    }

    fn activate_grad(&self, x: &Array2<f32>, dy: Array2<f32>, activation: Activation) -> Result<Array2<f32>> {
        check::same_shape("activate_grad", dy.dim().into(), x.dim().into())?;
        let gelu = activation == Activation::Gelu && self.is(Fault::TanhGelu);
        let activation = if gelu { Activation::GeluTanh } else { activation };
        Ok(Zip::from(x).and(&dy).map_collect(|&x, dy| {
            let slope = activation.slope(f64::from(x)) as f32;
            dy * if x == 0.0 && self.is(Fault::SlopeAtZero) { 1.0 } else { slope }
        }))
    }

    fn cross_entropy(
        &self,
        mut logits: Array2<f32>,
        targets: &[u32],
        smoothing: Smoothing,
    ) -> Result<[Array2<f32>; 2]> {
        if !self.is(Fault::PanicsOnTargets) {
            check::ids("cross_entropy", targets, logits.ncols())?;
        }
        check::targets("cross_entropy", targets, logits.nrows())?;
        let epsilon = if self.is(Fault::SmoothingIgnored) { 0.0 } else { smoothing.epsilon };
        let (entries, mut loss) = (logits.ncols() as f32, 0.0);
        for (mut row, &target) in logits.outer_iter_mut().zip(targets) {
            let Some(row) = row.as_slice_mut() else { continue };
            log_softmax(row, !self.is(Fault::ExpWithoutMax));
            let mean = row.iter().sum::<f32>() / entries;
            loss -= (1.0 - epsilon) * row[target as usize] + epsilon * mean;
            row.iter_mut().for_each(|v| *v = smoothing.scale * (v.exp() - epsilon / entries));
            row[target as usize] -= smoothing.scale * (1.0 - epsilon);
        }
        Ok([array![[loss * smoothing.scale]], logits])
    }

    fn soft_targets(
        &self,
        mut student: Array2<f32>,
        teacher: &Array2<f32>,
        temperature: f32,
        scale: f32,
    ) -> Result<[Array2<f32>; 2]> {
        check::same_shape("soft_targets", teacher.dim().into(), student.dim().into())?;
        let (mut teacher, mut loss) = (teacher / temperature, 0.0);
        student /= temperature;
        let t = if self.is(Fault::TemperatureNotSquared) { 1.0 } else { temperature };
        for (mut s, mut p) in student.outer_iter_mut().zip(teacher.outer_iter_mut()) {
            let (Some(s), Some(p)) = (s.as_slice_mut(), p.as_slice_mut()) else { continue };
            log_softmax(s, true);
            log_softmax(p, true);
            for (s, p) in s.iter_mut().zip(p) {
                loss += p.exp() * (*p - *s);
                *s = scale * t * (s.exp() - p.exp());
            }
        }
        Ok([array![[loss * scale * t * t]], student])
    }

    fn scatter_add(&self, mut into: Array2<f32>, rows: &[usize], dy: &Array2<f32>) -> Result<Array2<f32>> {
        check::rows("scatter_add", rows, into.nrows())?;
        check::same_shape("scatter_add", dy.dim().into(), [rows.len(), into.ncols()])?;
        let before = into.clone();
        for (&row, dy) in rows.iter().zip(dy.outer_iter()) {
            if self.is(Fault::LastOfRepeatedRowsWins) {
                into.row_mut(row).assign(&before.row(row));
            }
            into.row_mut(row).scaled_add(1.0, &dy);
        }
        Ok(into)
    }

    fn sum_rows(&self, x: &Array2<f32>) -> Result<Array2<f32>> {
        let rows = if self.is(Fault::SumsOfFirst256Rows) { x.nrows().min(256) } else { x.nrows() };
        let zeros = ndarray::Array1::zeros(x.ncols());
        let sum = x.slice(s![..rows, ..]).outer_iter().fold(zeros, |sum, row| sum + row);
        Ok(sum.insert_axis(Axis(0)))
    }

    fn scale(&self, x: Array2<f32>, factor: f32) -> Result<Array2<f32>> {
        Ok(x * factor)
    }

    fn mul_row(&self, x: Array2<f32>, row: &Array2<f32>) -> Result<Array2<f32>> {
        if self.is(Fault::ErrorOfWrongKind) && row.dim() != (1, x.ncols()) {
            return Err(opt_backend::Error::new(opt_backend::ErrorKind::Device, "mul_row", "no"));
        }
        check::same_shape("mul_row", row.dim().into(), [1, x.ncols()])?;
        Ok(x * row)
    }

    fn dropout(&self, mut x: Array2<f32>, dropout: Dropout) -> Result<Array2<f32>> {
        let width = x.ncols();
        let dropout = match self.fault {
            Fault::MaskOfLowSeed => Dropout { seed: dropout.seed & 0xffff_ffff, ..dropout },
            _ => dropout,
        };
        let scale = if self.is(Fault::DroppedUnscaled) { 1.0 } else { dropout.scale() };
        for (i, v) in x.iter_mut().enumerate() {
            let i = if self.is(Fault::MaskRepeatsEachRow) { i % width } else { i };
            *v = if dropout.keeps(i as u32) { *v * scale } else { 0.0 };
        }
        Ok(x)
    }

    fn sum_squares(&self, parts: &[&Array2<f32>]) -> Result<Array2<f32>> {
        let parts = if self.is(Fault::OnePartSquared) { &parts[..parts.len().min(1)] } else { parts };
        // By rows: one sum of a hundred thousand squares is more than plain f32 can do.
        let rows = parts.iter().flat_map(|part| part.outer_iter());
        Ok(array![[rows.map(|row| row.iter().map(|v| v * v).sum::<f32>()).sum::<f32>()]])
    }

    fn adamw(
        &self,
        param: &mut Array2<f32>,
        gradient: &Array2<f32>,
        moments: &mut [Array2<f32>; 2],
        mut adam: AdamW,
        clip: Option<Clip<'_, Array2<f32>>>,
    ) -> Result<()> {
        let shape = param.dim().into();
        if self.is(Fault::RefusedStepChangesMoments) {
            moments[0].fill(7.0);
        }
        for other in [gradient, &moments[0], &moments[1]] {
            check::same_shape("adamw", other.dim().into(), shape)?;
        }
        let factor = self.factor(clip)?;
        let (mut gradient, before) = (gradient.clone(), moments.clone());
        let (mut step_size, mut root) = adam.corrections();
        if self.is(Fault::NotCorrected) {
            (step_size, root) = (adam.lr, 1.0);
        }
        if self.is(Fault::DecayInGradient) {
            gradient.scaled_add(adam.weight_decay, param);
            adam.weight_decay = 0.0;
        }
        if self.is(Fault::DecayIgnored) {
            adam.weight_decay = 0.0;
        }
        let [first, second] = moments;
        Zip::from(param).and(&gradient).and(first).and(second).for_each(|p, &g, m, v| {
            let g = g * factor;
            *m += (1.0 - adam.beta1) * (g - *m);
            *v += (1.0 - adam.beta2) * (g * g - *v);
            let below = match self.fault {
                Fault::EpsInsideRoot => (*v / (root * root) + adam.eps).sqrt(),
                _ => v.sqrt() / root + adam.eps,
            };
            *p -= adam.lr * adam.weight_decay * *p + step_size * *m / below;
        });
        if self.is(Fault::MomentsNotKept) {
            *moments = before;
        }
        Ok(())
    }

    fn adamw8(
        &self,
        param: &mut Array2<f32>,
        gradient: &Array2<f32>,
        moments: &mut Moments8<Array2<f32>>,
        adam: AdamW,
        clip: Option<Clip<'_, Array2<f32>>>,
    ) -> Result<()> {
        let shape = param.dim().into();
        check::same_shape("adamw8", gradient.dim().into(), shape)?;
        check::moments8("adamw8", moments.parts().map(|part| part.dim().into()), shape)?;
        let factor = self.factor(clip)?;
        let [mut first, mut second] = gradient::decode_moments(moments, shape);
        let mut moved = param.clone();
        gradient::adamw(&mut moved, gradient.view(), [&mut first, &mut second], adam, factor);
        if self.is(Fault::CodesOfLevelsBelow) {
            for (map, moment) in [(&SIGNED, &mut first), (&UNSIGNED, &mut second)] {
                let all = moment.as_slice_mut().unwrap_or_default();
                all.chunks_mut(BLOCK).for_each(|block| levels_below(map, block));
            }
        }
        *moments = gradient::encode_moments([&first, &second]);
        if self.is(Fault::PartOfBlockForgotten) {
            let whole = param.len() / BLOCK;
            for part in [&mut moments.first, &mut moments.second, &mut moments.scales] {
                part.slice_mut(s![whole.., ..]).fill(0.0);
            }
        }
        if self.is(Fault::MovedByCodes) {
            let [first, second] = gradient::decode_moments(moments, shape);
            let (step_size, root) = adam.corrections();
            moved = &*param * (1.0 - adam.lr * adam.weight_decay);
            Zip::from(&mut moved).and(&first).and(&second).for_each(|p, m, v| {
                *p -= step_size * m / (v.sqrt() / root + adam.eps);
            });
        }
        *param = moved;
        Ok(())
    }

    fn sgd(
        &self,
        param: &mut Array2<f32>,
        gradient: &Array2<f32>,
        velocity: Option<&mut Array2<f32>>,
        sgd: Sgd,
        clip: Option<Clip<'_, Array2<f32>>>,
    ) -> Result<()> {
        check::same_shape("sgd", gradient.dim().into(), param.dim().into())?;
        if let Some(velocity) = &velocity {
            check::same_shape("sgd", velocity.dim().into(), param.dim().into())?;
        }
        let factor = self.factor(clip)?;
        let factor = if self.is(Fault::SgdIgnoresClip) { 1.0 } else { factor };
        let mut gone = velocity.as_deref().cloned();
        let velocity = if self.is(Fault::VelocityNotKept) { gone.as_mut() } else { velocity };
        gradient::sgd(param, gradient.view(), velocity, sgd, factor);
        Ok(())
    }

    fn mul(&self, x: Array2<f32>, y: &Array2<f32>) -> Result<Array2<f32>> {
        check::same_shape("mul", y.dim().into(), x.dim().into())?;
        Ok(x * y)
    }
}

/// The largest level that is no larger, for each element.
fn levels_below(map: &DynamicMap, block: &mut [f32]) {
    let most = block.iter().fold(0.0_f32, |most, v| most.max(v.abs())).max(f32::MIN_POSITIVE);
    for v in block {
        let above = map.levels.partition_point(|level| *level <= *v / most);
        *v = map.levels[above.saturating_sub(1)] * most;
    }
}
