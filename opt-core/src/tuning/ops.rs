//! Ops that leave a step on the tape, each with its gradient beside it.

use super::{
    tape::{Gradients, Taped, Var},
    weights::{Bias, LinearParts, Lora, NormParts, ParamId, TableParts, Vector, Virtual, Weight},
};
use ndarray::Axis;
use opt_backend::{Activation, Attend, DType, Dropout, Error, ErrorKind, Layout, Result, Span, Then, Train};
use std::sync::Arc;

impl<B: Train> Taped<B> {
    /// The value itself where nobody else has it, else a copy.
    pub(super) fn owned(&self, x: Var<B>) -> Result<B::Tensor> {
        Arc::try_unwrap(x.value).or_else(|shared| self.backend.copy(&shared))
    }

    /// A value that leaves a step if something trainable `reaches` it and the pass is recorded.
    fn link(
        &self,
        reaches: bool,
        value: impl Into<Arc<B::Tensor>>,
        back: impl FnOnce(&Taped<B>, B::Tensor, &mut Gradients<B>) -> Result<()> + Send + 'static,
    ) -> Var<B> {
        match reaches && self.recording() {
            true => self.step(value, back),
            false => Var { value: value.into(), node: None },
        }
    }

    /// x Wᵀ + b and the side paths, and then what `then` says. Of a whole linear that is one op, as without a tape,
    /// unless the gradient needs what lies between.
    pub(super) fn wired_linear(
        &self,
        x: &Var<B>,
        parts: &Arc<LinearParts<B>>,
        then: Then<Var<B>>,
    ) -> Result<Var<B>> {
        let whole = parts.is_whole();
        let follows = x.node.is_some() || parts.is_trained();
        match then {
            Then::Nothing => self.paths(x, parts),
            Then::Activate(f) if whole && !(follows && self.recording()) => {
                Ok(Var::constant(self.product(x, parts, Then::Activate(f))?))
            }
            Then::Activate(Activation::Relu) if whole => {
                // The slope of max(x, 0) can be told from the result.
                let y = Arc::new(self.product(x, parts, Then::Activate(Activation::Relu))?);
                let (x, parts, kept) = (x.clone(), parts.clone(), y.clone());
                Ok(self.step(y, move |taped, dy, gradients| {
                    let dy = taped.backend.activate_grad(&kept, dy, Activation::Relu)?;
                    drop(kept);
                    taped.product_back(&dy, &x, &parts, gradients)
                }))
            }
            Then::Activate(f) => {
                let y = self.paths(x, parts)?;
                self.wired_activate(y, f)
            }
            Then::Add(residual) if whole && !self.drops(self.plan.dropout) => {
                let (x, parts, node) = (x.clone(), parts.clone(), residual.node);
                let y = self.product(&x, &parts, Then::Add(self.owned(residual)?))?;
                Ok(self.link(follows || node.is_some(), y, move |taped, dy, gradients| {
                    taped.product_back(&dy, &x, &parts, gradients)?;
                    gradients.add(&taped.backend, node, dy)
                }))
            }
            Then::Add(residual) => {
                let y = self.paths(x, parts)?;
                let y = self.wired_dropout(y, self.plan.dropout)?;
                self.wired_add(residual, &y)
            }
            other => {
                let message = format_args!("the tape does not know {:?}", std::mem::discriminant(&other));
                Err(Error::new(ErrorKind::Unsupported, "linear", message))
            }
        }
    }

    /// The linear as it is, its bias where it is apart, and its side path.
    fn paths(&self, x: &Var<B>, parts: &Arc<LinearParts<B>>) -> Result<Var<B>> {
        let y = self.product(x, parts, Then::Nothing)?;
        let mut y = {
            let (x, parts) = (x.clone(), parts.clone());
            self.link(x.node.is_some() || parts.trains_weight(), y, move |taped, dy, gradients| {
                taped.product_back(&dy, &x, &parts, gradients)
            })
        };
        if let Some(lora) = &parts.lora {
            y = self.beside(y, x, lora, |a| self.product(a, parts, Then::Nothing))?;
        }
        match &parts.bias {
            Bias::Inside => Ok(y),
            Bias::Trained(_) if parts.trains_weight() => Ok(y),
            Bias::Trained(id) => self.wired_add_param(y, *id),
            Bias::Apart(row) => {
                let node = y.node;
                let sum = self.backend.add_row(self.owned(y)?, row)?;
                Ok(self.link(node.is_some(), sum, move |taped, dy, gradients| {
                    gradients.add(&taped.backend, node, dy)
                }))
            }
        }
    }

    /// y = x Wᵀ and the side path of W. `times_weight` multiplies by Wᵀ.
    fn beside(
        &self,
        y: Var<B>,
        x: &Var<B>,
        lora: &Lora,
        times_weight: impl FnOnce(&Var<B>) -> Result<B::Tensor>,
    ) -> Result<Var<B>> {
        let dropped = self.wired_dropout(x.clone(), lora.dropout)?;
        let inner = self.wired_times_param(&dropped, lora.a)?;
        let y = self.wired_add(y, &self.up(inner, lora)?)?;
        let Some(dora) = &lora.dora else { return Ok(y) };
        let lengths = self.row_lengths(lora, &dora.squares, times_weight)?;
        let y = self.wired_mul_constant(y, lengths)?;
        self.wired_mul_param(y, dora.magnitude)
    }

    /// scale · (B inner + b).
    fn up(&self, inner: Var<B>, lora: &Lora) -> Result<Var<B>> {
        match lora.bias {
            None => self.wired_times_param(&self.wired_scale(inner, lora.scale)?, lora.b),
            Some(bias) => {
                let sum = self.wired_add_param(self.wired_times_param(&inner, lora.b)?, bias)?;
                self.wired_scale(sum, lora.scale)
            }
        }
    }

    /// 1 / ‖W + scale · B A‖ of each row, `[1, out]`. As in PEFT, no gradient goes through it.
    ///
    /// The squared lengths are those of W, plus twice the products of W A ᵀ with B, plus those of B A; none of these
    /// needs W in f32.
    fn row_lengths(
        &self,
        lora: &Lora,
        squares: &[f64],
        times_weight: impl FnOnce(&Var<B>) -> Result<B::Tensor>,
    ) -> Result<B::Tensor> {
        let b = &*self.backend;
        let a = Var { value: self.param(lora.a)?, node: None };
        let crossed = b.block_on(b.read_owned(times_weight(&a)?))?;
        let a = b.block_on(b.read(&a.value))?;
        let up = b.block_on(b.read(&*self.param(lora.b)?))?;
        let gram = a.dot(&a.t());
        let scale = f64::from(lora.scale);
        let lengths = squares.iter().zip(up.outer_iter()).enumerate().map(|(i, (square, up))| {
            let cross: f64 =
                up.iter().zip(crossed.column(i)).map(|(&u, &c)| f64::from(u) * f64::from(c)).sum();
            let own = f64::from(up.dot(&gram.dot(&up)));
            (square + 2.0 * scale * cross + scale * scale * own).max(f64::MIN_POSITIVE).sqrt().recip() as f32
        });
        b.upload(lengths.collect::<ndarray::Array1<f32>>().insert_axis(Axis(0)).view())
    }

    /// What the backend's own linear makes of x: the frozen or trained weight, and the bias unless it is apart.
    fn product(&self, x: &Var<B>, parts: &LinearParts<B>, then: Then<B::Tensor>) -> Result<B::Tensor> {
        match &parts.weight {
            Weight::Frozen(linear) => self.backend.linear(&x.value, linear, then),
            Weight::Trained(id) => {
                let bias = match parts.bias {
                    Bias::Trained(id) => Some(self.param(id)?),
                    _ => None,
                };
                let linear = self.backend.linear_of(&*self.param(*id)?, bias.as_deref(), self.plan.dtype)?;
                self.backend.linear(&x.value, &linear, then)
            }
        }
    }

    fn product_back(
        &self,
        dy: &B::Tensor,
        x: &Var<B>,
        parts: &LinearParts<B>,
        gradients: &mut Gradients<B>,
    ) -> Result<()> {
        match &parts.weight {
            Weight::Frozen(linear) => gradients.grow(x.node, |sum| self.backend.linear_grad(dy, linear, sum)),
            Weight::Trained(id) => {
                if let Bias::Trained(id) = parts.bias {
                    self.add_to_param(id, self.backend.sum_rows(dy)?)?;
                }
                self.times_param_back(dy, x, *id, self.plan.dtype, gradients)
            }
        }
    }

    /// x Pᵀ of a trained P `[out, in]`.
    pub(super) fn wired_times_param(&self, x: &Var<B>, id: ParamId) -> Result<Var<B>> {
        let layout = Layout::TimesTransposed;
        let y = self.backend.matmul(&x.value, &*self.param(id)?, layout, DType::F32, None)?;
        let x = x.clone();
        Ok(self.link(true, y, move |taped, dy, gradients| {
            taped.times_param_back(&dy, &x, id, DType::F32, gradients)
        }))
    }

    fn times_param_back(
        &self,
        dy: &B::Tensor,
        x: &Var<B>,
        id: ParamId,
        dtype: DType,
        gradients: &mut Gradients<B>,
    ) -> Result<()> {
        let b = &*self.backend;
        self.grow_param(id, |sum| b.matmul(dy, &x.value, Layout::TransposedTimes, dtype, sum))?;
        let param = self.param(id)?;
        gradients.grow(x.node, |sum| b.matmul(dy, &param, Layout::Times, dtype, sum))
    }

    pub(super) fn wired_add(&self, x: Var<B>, y: &Var<B>) -> Result<Var<B>> {
        let nodes = [x.node, y.node];
        let sum = self.backend.add(self.owned(x)?, &y.value)?;
        Ok(self.link(nodes != [None, None], sum, move |taped, dy, gradients| {
            let b = &taped.backend;
            match nodes {
                [Some(_), Some(_)] => {
                    gradients.add(b, nodes[0], b.copy(&dy)?)?;
                    gradients.add(b, nodes[1], dy)
                }
                _ => gradients.add(b, nodes[0].or(nodes[1]), dy),
            }
        }))
    }

    pub(super) fn wired_scale(&self, x: Var<B>, factor: f32) -> Result<Var<B>> {
        let node = x.node;
        let y = self.backend.scale(self.owned(x)?, factor)?;
        Ok(self.link(node.is_some(), y, move |taped, dy, gradients| {
            gradients.add(&taped.backend, node, taped.backend.scale(dy, factor)?)
        }))
    }

    /// x times a row that has no gradient.
    fn wired_mul_constant(&self, x: Var<B>, row: B::Tensor) -> Result<Var<B>> {
        let node = x.node;
        let y = self.backend.mul_row(self.owned(x)?, &row)?;
        Ok(self.link(node.is_some(), y, move |taped, dy, gradients| {
            gradients.add(&taped.backend, node, taped.backend.mul_row(dy, &row)?)
        }))
    }

    /// x times a trained row.
    fn wired_mul_param(&self, x: Var<B>, id: ParamId) -> Result<Var<B>> {
        let b = &*self.backend;
        let y = b.mul_row(b.copy(&x.value)?, &*self.param(id)?)?;
        Ok(self.link(true, y, move |taped, dy, gradients| {
            let b = &*taped.backend;
            let of_row = b.mul(b.copy(&dy)?, &x.value)?;
            taped.add_to_param(id, b.sum_rows(&of_row)?)?;
            gradients.add(b, x.node, b.mul_row(dy, &*taped.param(id)?)?)
        }))
    }

    pub(super) fn wired_activate(&self, x: Var<B>, f: Activation) -> Result<Var<B>> {
        let b = &*self.backend;
        if !self.follows(&[&x]) {
            return Ok(Var::constant(b.activate(self.owned(x)?, f)?));
        }
        let y = b.activate(b.copy(&x.value)?, f)?;
        Ok(self.step(y, move |taped, dy, gradients| {
            gradients.add(&taped.backend, x.node, taped.backend.activate_grad(&x.value, dy, f)?)
        }))
    }

    fn wired_dropout(&self, x: Var<B>, p: f32) -> Result<Var<B>> {
        let Some(seed) = self.next_mask().filter(|_| p > 0.0) else { return Ok(x) };
        let (node, dropout) = (x.node, Dropout { p, seed });
        let y = self.backend.dropout(self.owned(x)?, dropout)?;
        // The mask is drawn again rather than kept.
        Ok(self.link(node.is_some(), y, move |taped, dy, gradients| {
            gradients.add(&taped.backend, node, taped.backend.dropout(dy, dropout)?)
        }))
    }

    pub(super) fn wired_take_rows(&self, x: &Var<B>, rows: Vec<usize>) -> Result<Var<B>> {
        let y = self.backend.take_rows(&x.value, &rows)?;
        let (node, shape) = (x.node, self.backend.shape(&x.value));
        Ok(self.link(node.is_some(), y, move |taped, dy, gradients| {
            let b = &*taped.backend;
            gradients.grow(node, |sum| {
                let sum = sum.map_or_else(|| b.zeros(shape), Ok)?;
                b.scatter_add(sum, &rows, &dy)
            })
        }))
    }

    /// The rows of a trained table. Those that are `padding` get no gradient here (torch's `padding_idx`).
    fn wired_take_param(&self, id: ParamId, rows: Vec<usize>, padding: Option<u32>) -> Result<Var<B>> {
        let param = self.param(id)?;
        let y = self.backend.take_rows(&param, &rows)?;
        let shape = self.backend.shape(&param);
        Ok(self.link(true, y, move |taped, mut dy, _| {
            let b = &*taped.backend;
            let learns = |row: usize| padding.is_none_or(|padding| row != padding as usize);
            let mut rows = rows;
            let kept: Vec<usize> =
                (0..rows.len()).filter(|i| rows.get(*i).is_some_and(|row| learns(*row))).collect();
            if kept.len() < rows.len() {
                dy = b.take_rows(&dy, &kept)?;
                rows.retain(|row| learns(*row));
            }
            taped.grow_param(id, |sum| {
                let sum = sum.map_or_else(|| b.zeros(shape), Ok)?;
                b.scatter_add(sum, &rows, &dy)
            })
        }))
    }

    pub(super) fn wired_concat(&self, first: &Var<B>, second: &Var<B>) -> Result<Var<B>> {
        let b = &*self.backend;
        let y = b.concat(&[&first.value, &second.value])?;
        let reaches = first.node.is_some() || second.node.is_some();
        let parts = [(first.node, b.shape(&first.value)[0]), (second.node, b.shape(&second.value)[0])];
        Ok(self.link(reaches, y, move |taped, dy, gradients| {
            let mut start = 0;
            for (node, rows) in parts {
                let rows: Vec<usize> = (start..start + rows).collect();
                start += rows.len();
                if node.is_some() {
                    gradients.add(&taped.backend, node, taped.backend.take_rows(&dy, &rows)?)?;
                }
            }
            Ok(())
        }))
    }

    pub(super) fn wired_layer_norm(&self, x: &Var<B>, norm: &Arc<NormParts<B>>) -> Result<Var<B>> {
        let b = &*self.backend;
        let of_params = |taped: &Self, parts: &[Vector<B>; 2], eps| {
            taped.backend.norm_of(&*taped.vector(&parts[0])?, &*taped.vector(&parts[1])?, eps)
        };
        let y = match &**norm {
            NormParts::Frozen(norm) => b.layer_norm(&x.value, norm)?,
            NormParts::Trained(parts, eps) => b.layer_norm(&x.value, &of_params(self, parts, *eps)?)?,
        };
        let trained = matches!(**norm, NormParts::Trained(..));
        let (x, norm) = (x.clone(), norm.clone());
        Ok(self.link(trained || x.node.is_some(), y, move |taped, dy, gradients| {
            let b = &*taped.backend;
            let made;
            let norm = match &*norm {
                NormParts::Frozen(norm) => norm,
                NormParts::Trained(parts, eps) => {
                    made = of_params(taped, parts, *eps)?;
                    for (part, gradient) in parts.iter().zip(b.layer_norm_grad_params(&x.value, &made, &dy)?)
                    {
                        if let Vector::Trained(id) = part {
                            taped.add_to_param(*id, gradient)?;
                        }
                    }
                    &made
                }
            };
            match x.node {
                Some(_) => gradients.add(b, x.node, b.layer_norm_grad(&x.value, norm, &dy)?),
                None => Ok(()),
            }
        }))
    }

    /// The entries `ids` of a table, and its side path.
    pub(super) fn wired_gather(
        &self,
        table: &TableParts<B>,
        ids: &[u32],
        padding: Option<u32>,
    ) -> Result<Var<B>> {
        let places = || ids.iter().map(|id| *id as usize).collect();
        let y = match &table.rows {
            Weight::Frozen(rows) => Var::constant(self.backend.gather(rows, ids)?),
            Weight::Trained(id) => self.wired_take_param(*id, places(), padding)?,
        };
        let Some(lora) = &table.beside_rows else { return Ok(y) };
        let inner = self.wired_take_param(lora.a, places(), padding)?;
        self.wired_add(y, &self.up(inner, lora)?)
    }

    pub(super) fn wired_logits(&self, x: &Var<B>, table: &Arc<TableParts<B>>) -> Result<Var<B>> {
        let follows = x.node.is_some() || matches!(table.multiplied(), Weight::Trained(_));
        let y = {
            let (x, table) = (x.clone(), table.clone());
            let y = self.logits_product(&x.value, &table)?;
            self.link(follows, y, move |taped, dy, gradients| match table.multiplied() {
                Weight::Frozen(head) => {
                    gradients.add(&taped.backend, x.node, taped.backend.logits_grad(&dy, head)?)
                }
                Weight::Trained(id) => taped.times_param_back(&dy, &x, *id, taped.plan.dtype, gradients),
            })
        };
        match &table.beside_head {
            Some(lora) => self.beside(y, x, lora, |a| self.logits_product(&a.value, table)),
            None => Ok(y),
        }
    }

    /// What the LM head itself makes of x.
    fn logits_product(&self, x: &B::Tensor, table: &TableParts<B>) -> Result<B::Tensor> {
        match table.multiplied() {
            Weight::Frozen(head) => self.backend.logits(x, head),
            Weight::Trained(id) => {
                let (layout, dtype) = (Layout::TimesTransposed, self.plan.dtype);
                self.backend.matmul(x, &*self.param(*id)?, layout, dtype, None)
            }
        }
    }

    /// Attention without caches, within each span and over the virtual tokens of a trained prefix.
    pub(super) fn wired_attend(&self, q: Var<B>, k: Var<B>, v: Var<B>, attend: Attend<'_>) -> Result<Var<B>> {
        let Some(tokens) = self.tokens.get().filter(|tokens| tokens.is_prefix()) else {
            return self.attend_within(q, k, v, attend);
        };
        // The prefix goes in front of each span as rows like others; what comes out in them is dropped.
        let [keys, values] = self.prefix_rows(tokens, attend.layer)?;
        let count = self.backend.shape(&keys.value)[0];
        let (woven, spans) = in_front(count, attend.spans);
        let real: Vec<usize> =
            spans.iter().flat_map(|span| span.start + count..span.start + span.len).collect();
        let k = self.wired_take_rows(&self.wired_concat(&keys, &k)?, woven.clone())?;
        let v = self.wired_take_rows(&self.wired_concat(&values, &v)?, woven.clone())?;
        let nothing = Var::constant(self.backend.zeros(self.backend.shape(&keys.value))?);
        let q = self.wired_take_rows(&self.wired_concat(&nothing, &q)?, woven)?;
        let mixed = self.attend_within(q, k, v, Attend { spans: &spans, ..attend })?;
        self.wired_take_rows(&mixed, real)
    }

    fn attend_within(&self, q: Var<B>, k: Var<B>, v: Var<B>, attend: Attend<'_>) -> Result<Var<B>> {
        let b = &*self.backend;
        if !self.follows(&[&q, &k, &v]) {
            let [q, k, v] = [self.owned(q)?, self.owned(k)?, self.owned(v)?];
            return Ok(Var::constant(b.attend(q, k, v, attend, None)?));
        }
        let mixed = b.attend(b.copy(&q.value)?, b.copy(&k.value)?, b.copy(&v.value)?, attend, None)?;
        let (heads, layer, spans) = (attend.heads, attend.layer, attend.spans.to_vec());
        Ok(self.step(mixed, move |taped, dy, gradients| {
            let attend = Attend { heads, layer, spans: &spans };
            let b = &*taped.backend;
            let [dq, dk, dv] = b.attend_grad([&q.value, &k.value, &v.value], &dy, attend)?;
            gradients.add(b, q.node, dq)?;
            gradients.add(b, k.node, dk)?;
            gradients.add(b, v.node, dv)
        }))
    }

    /// Keys and values `[tokens, hidden_size]` of a trained prefix in one layer.
    fn prefix_rows(&self, tokens: &Virtual, layer: usize) -> Result<[Var<B>; 2]> {
        match *tokens {
            Virtual::Prefix { rows, layers } => {
                let total = self.backend.shape(&*self.param(rows)?)[0];
                let of = |part: usize| (2 * layer + part..total).step_by(2 * layers).collect::<Vec<_>>();
                Ok([self.wired_take_param(rows, of(0), None)?, self.wired_take_param(rows, of(1), None)?])
            }
            Virtual::ProjectedPrefix { embedding, first, second, hidden } => {
                let inner = match self.projected() {
                    Some(inner) => inner,
                    None => {
                        let count = self.backend.shape(&*self.param(embedding)?)[0];
                        let embedded = self.wired_take_param(embedding, (0..count).collect(), None)?;
                        let wide = self.wired_times_param(&embedded, first[0])?;
                        let wide = self.wired_add_param(wide, first[1])?;
                        self.keep_projected(self.wired_activate(wide, Activation::Tanh)?)
                    }
                };
                let part = |part: usize| {
                    let start = (2 * layer + part) * hidden;
                    let rows: Vec<usize> = (start..start + hidden).collect();
                    // Biases lie as `[2 · layers, hidden]`, one row for each part.
                    let weight = self.wired_take_param(second[0], rows, None)?;
                    let y = self.wired_times(&inner, &weight)?;
                    let count = self.backend.shape(&y.value)[0];
                    let bias = self.wired_take_param(second[1], vec![2 * layer + part; count], None)?;
                    self.wired_add(y, &bias)
                };
                Ok([part(0)?, part(1)?])
            }
            Virtual::Prompt(_) => Err(Error::new(ErrorKind::Unsupported, "attend", "a prompt has no keys")),
        }
    }

    /// Adds a trained row to each row.
    pub(super) fn wired_add_param(&self, x: Var<B>, id: ParamId) -> Result<Var<B>> {
        let node = x.node;
        let y = self.backend.add_row(self.owned(x)?, &*self.param(id)?)?;
        Ok(self.link(true, y, move |taped, dy, gradients| {
            taped.add_to_param(id, taped.backend.sum_rows(&dy)?)?;
            gradients.add(&taped.backend, node, dy)
        }))
    }

    /// P x of a matrix that has no gradient.
    pub(super) fn wired_pool(&self, matrix: B::Tensor, x: &Var<B>) -> Result<Var<B>> {
        let y = self.backend.matmul(&matrix, &x.value, Layout::Times, DType::F32, None)?;
        let node = x.node;
        Ok(self.link(node.is_some(), y, move |taped, dy, gradients| {
            let b = &*taped.backend;
            gradients.grow(node, |sum| b.matmul(&matrix, &dy, Layout::TransposedTimes, DType::F32, sum))
        }))
    }

    /// x yᵀ of two values.
    fn wired_times(&self, x: &Var<B>, y: &Var<B>) -> Result<Var<B>> {
        let product = self.backend.matmul(&x.value, &y.value, Layout::TimesTransposed, DType::F32, None)?;
        let (x, y) = (x.clone(), y.clone());
        Ok(self.link(x.node.is_some() || y.node.is_some(), product, move |taped, d, gradients| {
            let b = &*taped.backend;
            gradients.grow(x.node, |sum| b.matmul(&d, &y.value, Layout::Times, DType::F32, sum))?;
            gradients.grow(y.node, |sum| b.matmul(&d, &x.value, Layout::TransposedTimes, DType::F32, sum))
        }))
    }

    /// Embedded tokens `[rows, word_embed_proj_dim]` with the trained prompt in front of each span, and the new spans.
    pub(crate) fn with_prompt(&self, embedded: Var<B>, spans: &[Span]) -> Result<(Var<B>, Vec<Span>)> {
        let Some(Virtual::Prompt(id)) = self.tokens.get().copied() else {
            return Ok((embedded, spans.to_vec()));
        };
        let count = self.backend.shape(&*self.param(id)?)[0];
        let prompt = self.wired_take_param(id, (0..count).collect(), None)?;
        let (woven, wide) = in_front(count, spans);
        let all = self.wired_take_rows(&self.wired_concat(&prompt, &embedded)?, woven)?;
        Ok((all, wide))
    }
}

/// Which rows of `count` virtual ones followed by those of `spans` make up spans that all begin with the virtual rows,
/// and these spans.
fn in_front(count: usize, spans: &[Span]) -> (Vec<usize>, Vec<Span>) {
    let woven = spans.iter().flat_map(|span| (0..count).chain(span.rows().map(|row| count + row))).collect();
    (woven, Span::lay_out(spans.iter().map(|span| span.len + count)))
}
