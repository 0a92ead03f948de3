use crate::{
    Activation, Attend, Backend, DType, HostMatrix, HostVector, Moments8, NormParams, Op, Result, check,
    oracle,
};
use ndarray::{Array2, ArrayView1, Axis, array, s};

/// Which of the operands of [`Train::matmul`] are transposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// a bᵀ, `[n, k]` and `[m, k]` to `[n, m]`: a linear, x Wᵀ.
    TimesTransposed,
    /// a b, `[n, k]` and `[k, m]` to `[n, m]`: a linear's gradient with respect to its input, dy W.
    Times,
    /// aᵀ b, `[k, n]` and `[k, m]` to `[n, m]`: a linear's gradient with respect to its weight, dyᵀ x.
    TransposedTimes,
}

impl Layout {
    /// The shape of the product of matrices of these shapes.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Shape`] if they do not fit.
    pub fn shape(self, a: [usize; 2], b: [usize; 2]) -> Result<[usize; 2]> {
        let (k, found, shape) = match self {
            Layout::TimesTransposed => (a[1], b[1], [a[0], b[0]]),
            Layout::Times => (a[1], b[0], [a[0], b[1]]),
            Layout::TransposedTimes => (a[0], b[0], [a[1], b[1]]),
        };
        if k != found {
            let message =
                format_args!("{self:?}: expected operands that share a depth, found {a:?} and {b:?}");
            return Err(crate::Error::shape("matmul", message));
        }
        Ok(shape)
    }
}

/// How losses are summed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Smoothing {
    /// Multiplies the loss and its gradient: one over the number of targets of the whole step.
    pub scale: f32,
    /// Label smoothing, `0.0..1.0`.
    pub epsilon: f32,
}

/// Which elements are dropped: element i of a tensor in row order is kept or not by a hash of seed and i, so that the
/// backward pass and a recomputation repeat the mask of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The probability of an element to be dropped, `0.0..1.0`.
    pub p: f32,
    /// Names this mask.
    pub seed: u64,
}

impl Dropout {
    /// What kept elements are multiplied by.
    #[inline]
    pub fn scale(self) -> f32 {
        (1.0 - self.p).recip()
    }

    /// Elements whose hash is below are dropped.
    #[inline]
    pub fn threshold(self) -> u32 {
        (f64::from(self.p) * 2.0_f64.powi(32)) as u32
    }

    /// Both halves of the seed, low first.
    #[inline]
    pub fn words(self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }

    /// Whether element `index` is kept.
    #[inline]
    pub fn keeps(self, index: u32) -> bool {
        let [low, high] = self.words();
        mix(mix(index ^ low) ^ high) >= self.threshold()
    }
}

/// An integer hash of 32 bits with little bias (C. Wellons' "lowbias32").
#[inline]
const fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// The settings of one step of AdamW (arXiv 1711.05101), for one group of parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Which step this is, from 1.
    pub step: u64,
}

impl AdamW {
    /// lr / (1 - β₁ᵗ), and √(1 - β₂ᵗ).
    pub fn corrections(self) -> (f32, f32) {
        let power = |beta: f32| 1.0 - f64::from(beta).powf(self.step as f64);
        ((f64::from(self.lr) / power(self.beta1)) as f32, power(self.beta2).sqrt() as f32)
    }
}

/// The settings of one step of stochastic gradient descent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sgd {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the velocity.
    pub momentum: f32,
    /// Added to the gradient as so much of the parameter.
    pub weight_decay: f32,
}

/// Scales gradients down where the norm of all of them is too large, without reading it back.
#[derive(Debug)]
pub struct Clip<'a, T> {
    /// The sum of all gradients' squares, `[1, 1]`; see [`Train::sum_squares`].
    pub sum_squares: &'a T,
    /// The largest norm that is left as it is.
    pub max_norm: f32,
}

/// What a [`Backend`] must offer so that OPT can be trained on it: the gradients of its ops, and optimizers.
///
/// Everything has a default body that goes through the host and [`oracle::gradient`], counted like those of
/// [`Backend`]: `impl Train for MyBackend {}` is right from the first day.
///
/// Trainable parameters are plain tensors `[out, in]` (vectors are `[1, width]`), from which [`Train::linear_of`] and
/// its like make what the forward ops take. Frozen weights stay whatever the backend made of them.
///
/// # Errors
/// As those of [`Backend`]'s ops. Where a call fails, what it was given by `&mut` is as it was.
pub trait Train: Backend {
    /// A linear whose weight `[out, in]` and bias `[1, out]` lie on the device, held as `dtype`.
    fn linear_of(
        &self,
        weight: &Self::Tensor,
        bias: Option<&Self::Tensor>,
        dtype: DType,
    ) -> Result<Self::Linear> {
        self.counters().default_body(Op::LinearOf);
        if let Some(bias) = bias {
            check::same_shape("linear_of", self.shape(bias), [1, self.shape(weight)[0]])?;
        }
        let (weight, bias) = (host(self, weight)?, bias.map(|bias| host(self, bias)).transpose()?);
        let bias = bias.as_ref().map(|bias| HostVector::F32(bias.row(0)));
        self.new_linear(HostMatrix::F32(weight.view()), bias, dtype)
    }

    /// A LayerNorm whose weight and bias, `[1, width]`, lie on the device.
    fn norm_of(&self, weight: &Self::Tensor, bias: &Self::Tensor, eps: f32) -> Result<Self::Norm> {
        self.counters().default_body(Op::NormOf);
        let [_, width] = self.shape(weight);
        for vector in [weight, bias] {
            check::same_shape("norm_of", self.shape(vector), [1, width])?;
        }
        let (weight, bias) = (host(self, weight)?, host(self, bias)?);
        let [weight, bias] = [&weight, &bias].map(|v| Some(HostVector::F32(v.row(0))));
        self.new_norm(NormParams { width, eps, weight, bias })
    }

    /// A tensor of zeros.
    fn zeros(&self, shape: [usize; 2]) -> Result<Self::Tensor> {
        self.counters().default_body(Op::Zeros);
        self.upload(Array2::zeros(shape).view())
    }

    /// A copy that later ops on `x` leave as it is.
    fn copy(&self, x: &Self::Tensor) -> Result<Self::Tensor> {
        self.counters().default_body(Op::Copy);
        self.upload(host(self, x)?.view())
    }

    /// A product of matrices, of operands rounded to `dtype` and summed in f32, plus `into`, of the result's shape.
    ///
    /// A backend without arithmetic in `dtype` may keep operands as they are; one with it may round the product to
    /// `dtype` before `into` is added.
    fn matmul(
        &self,
        a: &Self::Tensor,
        b: &Self::Tensor,
        layout: Layout,
        dtype: DType,
        into: Option<Self::Tensor>,
    ) -> Result<Self::Tensor> {
        self.counters().default_body(Op::Matmul);
        layout.shape(self.shape(a), self.shape(b))?;
        let [a, b] = [host(self, a)?, host(self, b)?].map(|m| m.mapv(|v| dtype.round(v)));
        accumulated(self, "matmul", oracle::gradient::matmul(a.view(), b.view(), layout), into)
    }

    /// The gradient of [`Backend::linear`] with respect to its input: dy W, `[rows, out]` to `[rows, in]`, plus
    /// `into`. The weight may be held in any format, packed as it is.
    fn linear_grad(
        &self,
        dy: &Self::Tensor,
        linear: &Self::Linear,
        into: Option<Self::Tensor>,
    ) -> Result<Self::Tensor> {
        self.counters().default_body(Op::LinearGrad);
        let dy = host(self, dy)?;
        let weight = self.block_on(self.read_linear(linear))?.weight;
        check::width("linear_grad", dy.ncols(), weight.nrows())?;
        let dx = oracle::gradient::matmul(dy.view(), weight.view(), Layout::Times);
        accumulated(self, "linear_grad", dx, into)
    }

    /// The gradient of [`Backend::logits`] with respect to the hidden rows: dy T, `[rows, entries]` to
    /// `[rows, width]`.
    fn logits_grad(&self, dy: &Self::Tensor, head: &Self::Table) -> Result<Self::Tensor> {
        self.counters().default_body(Op::LogitsGrad);
        let dy = host(self, dy)?;
        let [entries, _] = self.table_shape(head);
        check::width("logits_grad", dy.ncols(), entries)?;
        let rows = self.block_on(self.read_table(head, 0..entries))?;
        self.upload(oracle::gradient::matmul(dy.view(), rows.view(), Layout::Times).view())
    }

    /// The gradient of [`Backend::layer_norm`] with respect to its input.
    fn layer_norm_grad(
        &self,
        x: &Self::Tensor,
        norm: &Self::Norm,
        dy: &Self::Tensor,
    ) -> Result<Self::Tensor> {
        self.counters().default_body(Op::LayerNormGrad);
        Ok(layer_norm_grads(self, x, norm, dy)?.0)
    }

    /// The gradients of [`Backend::layer_norm`] with respect to its weight and bias, `[1, width]` each.
    fn layer_norm_grad_params(
        &self,
        x: &Self::Tensor,
        norm: &Self::Norm,
        dy: &Self::Tensor,
    ) -> Result<[Self::Tensor; 2]> {
        self.counters().default_body(Op::LayerNormGradParams);
        let (_, weight, bias) = layer_norm_grads(self, x, norm, dy)?;
        Ok([weight, bias])
    }

    /// The gradients of [`Backend::attend`] without caches with respect to queries, keys and values. The attention
    /// weights are computed again rather than kept. Those of rows that no span covers are zero.
    fn attend_grad(
        &self,
        [q, k, v]: [&Self::Tensor; 3],
        dy: &Self::Tensor,
        attend: Attend<'_>,
    ) -> Result<[Self::Tensor; 3]> {
        self.counters().default_body(Op::AttendGrad);
        let shape = self.shape(q);
        check::spans("attend_grad", attend, shape)?;
        for other in [k, v, dy] {
            check::same_shape("attend_grad", self.shape(other), shape)?;
        }
        let [q, k, v, dy] = [host(self, q)?, host(self, k)?, host(self, v)?, host(self, dy)?];
        let mut gradients = [(); 3].map(|()| Array2::zeros(shape));
        for span in attend.spans {
            let rows = s![span.rows(), ..];
            let [q, k, v, dy] = [&q, &k, &v, &dy].map(|x| x.slice(rows));
            let of_span = oracle::gradient::attend(q, k, v, attend.heads, dy);
            for (all, of_span) in gradients.iter_mut().zip(of_span) {
                all.slice_mut(rows).assign(&of_span);
            }
        }
        let [dq, dk, dv] = gradients;
        Ok([self.upload(dq.view())?, self.upload(dk.view())?, self.upload(dv.view())?])
    }

    /// The function of each element.
    fn activate(&self, x: Self::Tensor, activation: Activation) -> Result<Self::Tensor> {
        self.counters().default_body(Op::Activate);
        let x = self.block_on(self.read_owned(x))?;
        self.upload(x.mapv(|v| activation.apply(f64::from(v)) as f32).view())
    }

    /// The gradient of [`Train::activate`] with respect to its input `x`, given that of its result.
    fn activate_grad(
        &self,
        x: &Self::Tensor,
        dy: Self::Tensor,
        activation: Activation,
    ) -> Result<Self::Tensor> {
        self.counters().default_body(Op::ActivateGrad);
        check::same_shape("activate_grad", self.shape(&dy), self.shape(x))?;
        let (x, dy) = (host(self, x)?, self.block_on(self.read_owned(dy))?);
        self.upload(oracle::gradient::activate(x.view(), dy.view(), activation).view())
    }

    /// The cross-entropy of logits `[rows, entries]` and one target a row, summed to `[1, 1]`, and its gradient in
    /// the place of the logits, both scaled; see [`oracle::gradient::cross_entropy`]. Log-softmax is in f32.
    fn cross_entropy(
        &self,
        logits: Self::Tensor,
        targets: &[u32],
        smoothing: Smoothing,
    ) -> Result<[Self::Tensor; 2]> {
        self.counters().default_body(Op::CrossEntropy);
        let [rows, entries] = self.shape(&logits);
        check::ids("cross_entropy", targets, entries)?;
        check::targets("cross_entropy", targets, rows)?;
        let logits = self.block_on(self.read_owned(logits))?;
        let (loss, gradient) = oracle::gradient::cross_entropy(logits.view(), targets, smoothing);
        Ok([self.upload(array![[loss]].view())?, self.upload(gradient.view())?])
    }

    /// The loss against a teacher's logits at a temperature, summed to `[1, 1]`, and its gradient in the place of the
    /// student's logits, both times `scale`; see [`oracle::gradient::soft_targets`].
    fn soft_targets(
        &self,
        student: Self::Tensor,
        teacher: &Self::Tensor,
        temperature: f32,
        scale: f32,
    ) -> Result<[Self::Tensor; 2]> {
        self.counters().default_body(Op::SoftTargets);
        check::same_shape("soft_targets", self.shape(teacher), self.shape(&student))?;
        let (student, teacher) = (self.block_on(self.read_owned(student))?, host(self, teacher)?);
        let (loss, gradient) =
            oracle::gradient::soft_targets(student.view(), teacher.view(), temperature, scale);
        Ok([self.upload(array![[loss]].view())?, self.upload(gradient.view())?])
    }

    /// `into` plus row i of `dy` at row `rows[i]`, which may repeat: the gradient of [`Backend::take_rows`].
    fn scatter_add(&self, into: Self::Tensor, rows: &[usize], dy: &Self::Tensor) -> Result<Self::Tensor> {
        self.counters().default_body(Op::ScatterAdd);
        let [entries, width] = self.shape(&into);
        check::rows("scatter_add", rows, entries)?;
        check::same_shape("scatter_add", self.shape(dy), [rows.len(), width])?;
        let (mut into, dy) = (self.block_on(self.read_owned(into))?, host(self, dy)?);
        oracle::gradient::scatter_add(&mut into, rows, dy.view());
        self.upload(into.view())
    }

    /// The rows of all parts, one part after the other.
    fn concat(&self, parts: &[&Self::Tensor]) -> Result<Self::Tensor> {
        self.counters().default_body(Op::Concat);
        let width = parts.first().map_or(0, |part| self.shape(part)[1]);
        for part in parts {
            check::width("concat", self.shape(part)[1], width)?;
        }
        let parts: Vec<Array2<f32>> = parts.iter().map(|part| host(self, part)).collect::<Result<_>>()?;
        let rows = parts.iter().map(Array2::nrows).sum();
        let mut all = Array2::zeros((rows, width));
        let mut start = 0;
        for part in &parts {
            all.slice_mut(s![start..start + part.nrows(), ..]).assign(part);
            start += part.nrows();
        }
        self.upload(all.view())
    }

    /// The sum of each column, `[1, width]`: the gradient of a bias.
    fn sum_rows(&self, x: &Self::Tensor) -> Result<Self::Tensor> {
        self.counters().default_body(Op::SumRows);
        self.upload(oracle::gradient::sum_rows(host(self, x)?.view()).view())
    }

    /// `x` plus `row`, `[1, width]`, in each row.
    fn add_row(&self, x: Self::Tensor, row: &Self::Tensor) -> Result<Self::Tensor> {
        self.counters().default_body(Op::AddRow);
        check::same_shape("add_row", self.shape(row), [1, self.shape(&x)[1]])?;
        let x = self.block_on(self.read_owned(x))?;
        self.upload((x + &host(self, row)?).view())
    }

    /// `x` times `row`, `[1, width]`, in each row.
    fn mul_row(&self, x: Self::Tensor, row: &Self::Tensor) -> Result<Self::Tensor> {
        self.counters().default_body(Op::MulRow);
        check::same_shape("mul_row", self.shape(row), [1, self.shape(&x)[1]])?;
        let x = self.block_on(self.read_owned(x))?;
        self.upload((x * &host(self, row)?).view())
    }

    /// `x` times `y`, element by element, of equal shapes.
    fn mul(&self, x: Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor> {
        self.counters().default_body(Op::Mul);
        check::same_shape("mul", self.shape(y), self.shape(&x))?;
        let x = self.block_on(self.read_owned(x))?;
        self.upload((x * &host(self, y)?).view())
    }

    /// `x` times a number.
    fn scale(&self, x: Self::Tensor, factor: f32) -> Result<Self::Tensor> {
        self.counters().default_body(Op::Scale);
        let x = self.block_on(self.read_owned(x))?;
        self.upload((x * factor).view())
    }

    /// `x` without the elements that are dropped, the others scaled by 1 / (1 - p).
    fn dropout(&self, x: Self::Tensor, dropout: Dropout) -> Result<Self::Tensor> {
        self.counters().default_body(Op::Dropout);
        let mut x = self.block_on(self.read_owned(x))?;
        oracle::gradient::dropout(&mut x, dropout);
        self.upload(x.view())
    }

    /// The sum of the squares of all elements of all parts, `[1, 1]`.
    fn sum_squares(&self, parts: &[&Self::Tensor]) -> Result<Self::Tensor> {
        self.counters().default_body(Op::SumSquares);
        let mut sum = 0.0;
        for part in parts {
            sum += host(self, part)?.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
        }
        self.upload(array![[sum as f32]].view())
    }

    /// One step of AdamW: updates parameters and both moments, all of one shape.
    fn adamw(
        &self,
        param: &mut Self::Tensor,
        gradient: &Self::Tensor,
        moments: &mut [Self::Tensor; 2],
        adam: AdamW,
        clip: Option<Clip<'_, Self::Tensor>>,
    ) -> Result<()> {
        self.counters().default_body(Op::AdamW);
        let shape = self.shape(param);
        for other in [gradient, &moments[0], &moments[1]] {
            check::same_shape("adamw", self.shape(other), shape)?;
        }
        let factor = clip_factor(self, clip)?;
        let (mut p, g) = (host(self, param)?, host(self, gradient)?);
        let [mut m, mut v] = [host(self, &moments[0])?, host(self, &moments[1])?];
        oracle::gradient::adamw(&mut p, g.view(), [&mut m, &mut v], adam, factor);
        let updated = [self.upload(m.view())?, self.upload(v.view())?];
        *param = self.upload(p.view())?;
        *moments = updated;
        Ok(())
    }

    /// [`Train::adamw`] with moments in eight bits: they are decoded, the step is made in f32, and they are encoded
    /// again; see [`oracle::gradient::adamw8`].
    fn adamw8(
        &self,
        param: &mut Self::Tensor,
        gradient: &Self::Tensor,
        moments: &mut Moments8<Self::Tensor>,
        adam: AdamW,
        clip: Option<Clip<'_, Self::Tensor>>,
    ) -> Result<()> {
        self.counters().default_body(Op::AdamW8);
        let shape = self.shape(param);
        check::same_shape("adamw8", self.shape(gradient), shape)?;
        check::moments8("adamw8", moments.parts().map(|part| self.shape(part)), shape)?;
        let factor = clip_factor(self, clip)?;
        let (mut p, g) = (host(self, param)?, host(self, gradient)?);
        let mut updated = moments.parts_of(|part| host(self, part))?;
        oracle::gradient::adamw8(&mut p, g.view(), &mut updated, adam, factor);
        let updated = updated.try_map(|part| self.upload(part.view()))?;
        *param = self.upload(p.view())?;
        *moments = updated;
        Ok(())
    }

    /// One step of stochastic gradient descent: updates parameters and, where there is one, the velocity.
    fn sgd(
        &self,
        param: &mut Self::Tensor,
        gradient: &Self::Tensor,
        velocity: Option<&mut Self::Tensor>,
        sgd: Sgd,
        clip: Option<Clip<'_, Self::Tensor>>,
    ) -> Result<()> {
        self.counters().default_body(Op::Sgd);
        check::same_shape("sgd", self.shape(gradient), self.shape(param))?;
        if let Some(velocity) = &velocity {
            check::same_shape("sgd", self.shape(velocity), self.shape(param))?;
        }
        let factor = clip_factor(self, clip)?;
        let (mut p, g) = (host(self, param)?, host(self, gradient)?);
        let mut v = velocity.as_ref().map(|velocity| host(self, velocity)).transpose()?;
        oracle::gradient::sgd(&mut p, g.view(), v.as_mut(), sgd, factor);
        let p = self.upload(p.view())?;
        if let (Some(velocity), Some(v)) = (velocity, v) {
            *velocity = self.upload(v.view())?;
        }
        *param = p;
        Ok(())
    }
}

fn host<B: Backend + ?Sized>(backend: &B, x: &B::Tensor) -> Result<Array2<f32>> {
    backend.block_on(backend.read(x))
}

fn accumulated<B: Backend + ?Sized>(
    backend: &B,
    op: &'static str,
    mut product: Array2<f32>,
    into: Option<B::Tensor>,
) -> Result<B::Tensor> {
    if let Some(into) = into {
        check::same_shape(op, backend.shape(&into), product.dim().into())?;
        product += &backend.block_on(backend.read_owned(into))?;
    }
    backend.upload(product.view())
}

fn layer_norm_grads<B: Backend + ?Sized>(
    backend: &B,
    x: &B::Tensor,
    norm: &B::Norm,
    dy: &B::Tensor,
) -> Result<(B::Tensor, B::Tensor, B::Tensor)> {
    check::same_shape("layer_norm_grad", backend.shape(dy), backend.shape(x))?;
    let norm = backend.block_on(backend.read_norm(norm))?;
    check::width("layer_norm_grad", backend.shape(x)[1], norm.width)?;
    let (x, dy) = (host(backend, x)?, host(backend, dy)?);
    let weight: Option<ArrayView1<'_, f32>> = norm.weight.as_ref().map(|weight| weight.view());
    let (dx, weight, bias) = oracle::gradient::layer_norm(x.view(), weight, norm.eps, dy.view());
    let row = |v: ndarray::Array1<f32>| backend.upload(v.insert_axis(Axis(0)).view());
    Ok((backend.upload(dx.view())?, row(weight)?, row(bias)?))
}

fn clip_factor<B: Backend + ?Sized>(backend: &B, clip: Option<Clip<'_, B::Tensor>>) -> Result<f32> {
    let Some(clip) = clip else { return Ok(1.0) };
    check::same_shape("clip", backend.shape(clip.sum_squares), [1, 1])?;
    Ok(oracle::gradient::clip_factor(host(backend, clip.sum_squares)?[[0, 0]], clip.max_norm))
}
