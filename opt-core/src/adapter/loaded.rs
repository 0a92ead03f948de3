//! Putting adapters beside a model's weights.

use super::{
    applied::{Adapted, Down, Layout, Linear, LowRank, RowMap, Side, Table, Tensor, Variants, Worn},
    config::AdapterMethod,
    file::{Adapter, Parts},
    target::TargetKind,
    term::Term,
};
use crate::{
    Decoder, Error, ErrorKind, Result,
    checkpoint::Checkpoint,
    config::{LAYER_NORM_EPS, OptConfig},
    decoder::WeightMut,
    engine::{Front, LoadedAdapter, Piece, Wardrobe},
    quantize::{Held, Holding},
};
use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};
use opt_backend::{CacheLayer, HostMatrix, HostVector, NormParams, Train};
use std::{collections::HashMap, sync::Arc};

/// The adapters of a model on a backend.
pub(crate) struct Loaded<B: Train> {
    adapters: Vec<LoadedAdapter>,
    /// For each adapter what stands before the first token.
    fronts: Vec<Start<B>>,
}

enum Start<B: Train> {
    Nothing,
    Prefix(Vec<CacheLayer>),
    /// `[virtual tokens, word_embed_proj_dim]`.
    Prompt(B::Tensor, usize),
}

impl<B: Train> Loaded<B> {
    /// Gives the weights of `decoder` what the adapters add.
    pub(crate) fn attach(
        backend: &Adapted<B>,
        decoder: &mut Decoder<Adapted<B>>,
        checkpoint: &Checkpoint,
        holding: &Holding,
        adapters: &[Adapter],
    ) -> Result<Self> {
        let model = checkpoint.config();
        let parts: Vec<Parts<'_>> =
            adapters.iter().map(|adapter| adapter.parts(model)).collect::<Result<_>>()?;
        let mut builder =
            Builder { inner: &backend.inner, checkpoint, holding, parts: &parts, layouts: HashMap::new() };
        decoder.visit_mut(&mut |name, weight| match weight {
            WeightMut::Linear(linear) => builder.linear(name, linear),
            WeightMut::Norm(norm) => builder.norm(name, norm),
            WeightMut::Table(table) => builder.table(name, table),
        })?;
        let mut loaded = Self { adapters: Vec::new(), fronts: Vec::new() };
        for (adapter, parts) in adapters.iter().zip(&parts) {
            if loaded.adapters.iter().any(|other| *other.name == *adapter.name()) {
                let message =
                    format_args!("two adapters are called {:?}; give one another name", adapter.name());
                return Err(Error::new(ErrorKind::Option, message));
            }
            let virtual_tokens = adapter.config().virtual_tokens();
            if virtual_tokens >= model.max_position_embeddings {
                let most = model.max_position_embeddings;
                let message = format_args!(
                    "adapter {:?}: expected less than {most} virtual tokens (the context), found {virtual_tokens}",
                    adapter.name()
                );
                return Err(Error::new(ErrorKind::Config, message));
            }
            loaded.adapters.push(LoadedAdapter { name: adapter.name().into(), virtual_tokens });
            loaded.fronts.push(match (&adapter.config().method, parts.virtual_rows()?) {
                (AdapterMethod::Prefix(_), Some(rows)) => Start::Prefix(prefix_layers(rows, model)?),
                (AdapterMethod::Prompt(_), Some(rows)) => {
                    Start::Prompt(backend.inner.upload(rows.as_standard_layout().view())?, rows.nrows())
                }
                _ => Start::Nothing,
            });
        }
        Ok(loaded)
    }
}

/// Keys and values of each layer: a row of a prefix holds K0, V0, K1, V1 and so on, head by head within each.
pub(crate) fn prefix_layers(rows: ArrayView2<'_, f32>, model: &OptConfig) -> Result<Vec<CacheLayer>> {
    let hidden = model.hidden_size;
    if rows.ncols() != 2 * model.num_hidden_layers * hidden {
        let message = format_args!("a prefix of width {} does not fit the model", rows.ncols());
        return Err(Error::new(ErrorKind::Checkpoint, message));
    }
    let part = |index: usize| rows.slice(s![.., index * hidden..(index + 1) * hidden]).to_owned();
    let layer = |layer: usize| CacheLayer { keys: part(2 * layer), values: part(2 * layer + 1) };
    Ok((0..model.num_hidden_layers).map(layer).collect())
}

impl<B: Train> Wardrobe<Adapted<B>> for Loaded<B> {
    fn adapters(&self) -> &[LoadedAdapter] {
        &self.adapters
    }

    fn front(&self, adapter: usize) -> Front<'_> {
        match self.fronts.get(adapter) {
            None | Some(Start::Nothing) => Front::Nothing,
            Some(Start::Prefix(layers)) => Front::Prefix(layers),
            Some(Start::Prompt(_, tokens)) => Front::Prompt(*tokens),
        }
    }

    fn embed(
        &self,
        backend: &Adapted<B>,
        table: &Table<B>,
        pieces: &[(Piece<'_>, Option<usize>)],
    ) -> Result<Tensor<B>> {
        let worn = |adapter: &Option<usize>| adapter.map_or(0, |index| index + 1);
        let (mut ids, mut of_ids, mut of) = (Vec::<u32>::new(), Vec::<Worn>::new(), Vec::<Worn>::new());
        for (piece, adapter) in pieces {
            let rows = match piece {
                Piece::Ids(new) => {
                    ids.extend(*new);
                    of_ids.extend(std::iter::repeat_n(worn(adapter), new.len()));
                    new.len()
                }
                Piece::Embeds(rows) => rows.nrows(),
                Piece::Prompt(tokens) => *tokens,
            };
            of.extend(std::iter::repeat_n(worn(adapter), rows));
        }
        if ids.len() == of.len() {
            return Ok(backend.gather_worn(table, &ids, RowMap::new(of))?);
        }
        // Others than the table's rows: all lie one after another, and are then put into order.
        let inner = &backend.inner;
        let mut parts = Vec::new();
        let mut end = 0;
        if !ids.is_empty() {
            parts.push(Lent::Own(backend.gather_worn(table, &ids, RowMap::new(of_ids))?.inner));
            end = ids.len();
        }
        let (mut order, mut from_ids) = (Vec::with_capacity(of.len()), 0);
        for (piece, adapter) in pieces {
            match piece {
                Piece::Ids(new) => {
                    order.extend(from_ids..from_ids + new.len());
                    from_ids += new.len();
                }
                Piece::Embeds(rows) => {
                    parts.push(Lent::Own(inner.upload(rows.as_standard_layout().view())?));
                    order.extend(end..end + rows.nrows());
                    end += rows.nrows();
                }
                Piece::Prompt(tokens) => {
                    let start = adapter.and_then(|index| self.fronts.get(index));
                    let Some(Start::Prompt(rows, _)) = start else {
                        return Err(Error::new(ErrorKind::Option, "expected an adapter with a prompt"));
                    };
                    parts.push(Lent::Borrowed(rows));
                    order.extend(end..end + tokens);
                    end += tokens;
                }
            }
        }
        let parts: Vec<&B::Tensor> = parts.iter().map(Lent::get).collect();
        let all = inner.concat(&parts)?;
        Ok(Tensor { inner: inner.take_rows(&all, &order)?, rows: RowMap::new(of) })
    }
}

enum Lent<'a, T> {
    Own(T),
    Borrowed(&'a T),
}

impl<T> Lent<'_, T> {
    fn get(&self) -> &T {
        match self {
            Lent::Own(own) => own,
            Lent::Borrowed(lent) => lent,
        }
    }
}

/// Makes what adapters add.
struct Builder<'a, B: Train> {
    inner: &'a B,
    checkpoint: &'a Checkpoint,
    holding: &'a Holding,
    parts: &'a [Parts<'a>],
    layouts: HashMap<Vec<(Worn, usize)>, Arc<Layout>>,
}

impl<B: Train> Builder<'_, B> {
    fn linear(&mut self, name: &str, linear: &mut Linear<B>) -> Result<()> {
        let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
        linear.side = self.side(name, name)?;
        for (index, parts) in self.parts.iter().enumerate() {
            let Some(matrix) = parts.instead_matrix(&weight)? else { continue };
            let theirs = parts.instead_vector(&bias)?;
            let base = if theirs.is_none() { self.base_vector(&bias, matrix.nrows())? } else { None };
            let theirs = theirs.or(base.as_ref().map(|base| base.view())).map(HostVector::F32);
            let own = self.inner.new_linear(HostMatrix::F32(matrix), theirs, self.holding.dtype)?;
            linear.weights.own.push((index + 1, own));
        }
        Ok(())
    }

    fn norm(&mut self, name: &str, norm: &mut Variants<B::Norm>) -> Result<()> {
        let width = self.checkpoint.config().hidden_size;
        let names = ["weight", "bias"].map(|part| format!("{name}.{part}"));
        for (index, parts) in self.parts.iter().enumerate() {
            if names.iter().all(|name| parts.instead(name).is_none()) {
                continue;
            }
            let vector = |name: &String| -> Result<Option<Array1<f32>>> {
                match parts.instead_vector(name)? {
                    Some(own) => Ok(Some(own.to_owned())),
                    None => self.base_vector(name, width),
                }
            };
            let [weight, bias] = [vector(&names[0])?, vector(&names[1])?];
            let params = NormParams {
                width,
                eps: LAYER_NORM_EPS,
                weight: weight.as_ref().map(|v| HostVector::F32(v.view())),
                bias: bias.as_ref().map(|v| HostVector::F32(v.view())),
            };
            norm.own.push((index + 1, self.inner.new_norm(params)?));
        }
        Ok(())
    }

    fn table(&mut self, name: &str, table: &mut Table<B>) -> Result<()> {
        let tied = self.checkpoint.config().tie_word_embeddings;
        if name != "lm_head" {
            table.side = self.side(name, name)?;
            table.rows.own = self.own_tables(name)?;
        }
        if name == "lm_head" || name == "embed_tokens" && tied {
            table.head_side = self.side("lm_head", name)?;
            table.heads = self.own_tables("lm_head")?;
        }
        Ok(())
    }

    fn own_tables(&self, name: &str) -> Result<Vec<(Worn, B::Table)>> {
        let mut own = Vec::new();
        for (index, parts) in self.parts.iter().enumerate() {
            if let Some(rows) = parts.instead_matrix(&format!("{name}.weight"))? {
                own.push((index + 1, self.inner.new_table(HostMatrix::F32(rows), self.holding.dtype)?));
            }
        }
        Ok(own)
    }

    /// What adapters add to the result of `module`, whose weight is called `stored`.
    fn side(&mut self, module: &str, stored: &str) -> Result<Option<Side<B>>> {
        let (bias_name, weight_name) = (format!("{module}.bias"), format!("{module}.weight"));
        let mut terms: Vec<(Worn, Term<'_>, Option<Array1<f32>>)> = Vec::new();
        let mut gains: Vec<(Worn, Array1<f32>)> = Vec::new();
        let mut offsets: Vec<(Worn, Array1<f32>)> = Vec::new();
        for (index, parts) in self.parts.iter().enumerate() {
            let worn = index + 1;
            let term = parts.term(module)?;
            let bias = match parts.instead(&weight_name) {
                // A weight of its own has its bias with it.
                Some(_) => None,
                None => parts.instead_vector(&bias_name)?,
            };
            let out = match (&term, &bias) {
                (Some(term), _) => term.target.shape[0],
                (None, Some(bias)) => bias.len(),
                (None, None) => continue,
            };
            let gain = match &term {
                Some(term) if term.magnitude.is_some() => {
                    let weight = self.held(stored, term)?;
                    term.gain(weight.view())
                }
                _ => None,
            };
            // Of the result y = W x + b become g (W x) + b' = g y + (b' - g b).
            let base =
                if bias.is_some() || gain.is_some() { self.base_vector(&bias_name, out)? } else { None };
            let base = base.unwrap_or_else(|| Array1::zeros(out));
            let mut offset = bias.map_or_else(|| base.clone(), |bias| bias.to_owned());
            offset -= &match &gain {
                Some(gain) => &base * gain,
                None => base,
            };
            if let Some(own) =
                term.as_ref().and_then(|term| term.own_bias.map(|own| own.mapv(|v| v * term.scale())))
            {
                offset += &own;
            }
            if offset.iter().any(|v| *v != 0.0) {
                offsets.push((worn, offset));
            }
            if let Some(term) = term {
                terms.push((worn, term, gain.clone()));
            }
            gains.extend(gain.map(|gain| (worn, gain)));
        }
        if terms.is_empty() && offsets.is_empty() {
            return Ok(None);
        }
        let low_rank = if terms.is_empty() { None } else { Some(self.low_rank(&terms)?) };
        Ok(Some(Side { low_rank, gains: self.rows(&gains, 1.0)?, offsets: self.rows(&offsets, 0.0)? }))
    }

    fn low_rank(&mut self, terms: &[(Worn, Term<'_>, Option<Array1<f32>>)]) -> Result<LowRank<B>> {
        let key: Vec<(Worn, usize)> = terms.iter().map(|(worn, term, _)| (*worn, term.target.rank)).collect();
        let number = self.layouts.len();
        let layout = self.layouts.entry(key).or_insert_with_key(|key| {
            let mut width = 0;
            let columns = key.iter().map(|&(worn, rank)| {
                width += rank;
                (worn, width - rank..width)
            });
            let columns = columns.collect();
            Arc::new(Layout { number, columns, width })
        });
        let failed = |e| Error::because(ErrorKind::Checkpoint, "low-rank matrices of unequal width", e);
        let downs: Vec<ArrayView2<'_, f32>> = terms.iter().map(|(_, term, _)| term.a).collect();
        let a = concatenate(Axis(0), &downs).map_err(failed)?;
        let ups: Vec<Array2<f32>> =
            terms.iter().map(|(_, term, gain)| term.scaled_b(gain.as_ref())).collect();
        let ups: Vec<ArrayView2<'_, f32>> = ups.iter().map(|b| b.view()).collect();
        let b = concatenate(Axis(1), &ups).map_err(failed)?;
        let embedding = terms.iter().any(|(_, term, _)| term.target.kind == TargetKind::Embedding);
        let a = if embedding {
            let rows = a.t();
            Down::Table(
                self.inner
                    .new_table(HostMatrix::F32(rows.as_standard_layout().view()), Default::default())?,
            )
        } else {
            Down::Matrix(self.inner.upload(a.view())?)
        };
        let b = self.inner.upload(b.as_standard_layout().view())?;
        Ok(LowRank { layout: Arc::clone(layout), a, b })
    }

    /// One row for the model without adapter and one for each adapter; those that are not named have `neutral`.
    fn rows(&self, of: &[(Worn, Array1<f32>)], neutral: f32) -> Result<Option<B::Tensor>> {
        let Some((_, first)) = of.first() else { return Ok(None) };
        let mut rows = Array2::from_elem((self.parts.len() + 1, first.len()), neutral);
        for (worn, values) in of {
            rows.row_mut(*worn).assign(values);
        }
        Ok(Some(self.inner.upload(rows.view())?))
    }

    /// The model's weight as it is held, `[out, in]` of the term.
    fn held(&self, stored: &str, term: &Term<'_>) -> Result<Array2<f32>> {
        let [out, input] = term.target.shape;
        let shape = if term.is_transposed() { [input, out] } else { [out, input] };
        let weight = match self.holding.weight(self.checkpoint, &format!("{stored}.weight"), shape)? {
            Held::Plain(weight) => weight.matrix()?.to_f32().mapv_into(|v| self.holding.dtype.round(v)),
            Held::Quantized(weight) => weight.dequantize(),
        };
        Ok(if term.is_transposed() { weight.t().as_standard_layout().into_owned() } else { weight })
    }

    /// A vector of the model's, if it has it.
    fn base_vector(&self, name: &str, len: usize) -> Result<Option<Array1<f32>>> {
        let model = self.checkpoint.config();
        if !model.tensor_shapes().iter().any(|(known, _)| known == name) {
            return Ok(None);
        }
        let vector = self.checkpoint.tensor(name, &[len])?;
        Ok(Some(vector.vector()?.to_f32()))
    }
}
