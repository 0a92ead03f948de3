//! Quantized weights on the CPU: products and rows from the kernels of `opt-kernels`, on the memory of candle's tensors.

use super::{After, Kernels, Product};
use crate::host::{count, numbers, tensor, zeros};
use candle_core::Tensor;
use opt_backend::Result;
use opt_kernels::{
    host::{self, Weight},
    output,
};

impl Kernels {
    /// `x Wᵀ + b` for each product, and what comes after.
    pub(super) fn quantized(
        &self,
        op: &'static str,
        x: &Tensor,
        [rows, depth]: [usize; 2],
        products: &[Product<'_, Weight>],
    ) -> Result<Vec<Tensor>> {
        let lock = Tensor::storage_and_layout;
        let (storage, layout) = lock(x);
        let x = numbers::<f32>(op, &storage, layout)?;
        let locks: Vec<_> = products
            .iter()
            .map(|p| {
                let residual = if let After::Add(residual) = p.after { Some(residual) } else { None };
                (p.bias.map(lock), residual.map(lock))
            })
            .collect();
        let mut calls = Vec::with_capacity(products.len());
        for (product, (bias, residual)) in products.iter().zip(&locks) {
            let bias = bias.as_ref().map(|(storage, layout)| numbers(op, storage, layout)).transpose()?;
            let residual =
                residual.as_ref().map(|(storage, layout)| numbers(op, storage, layout)).transpose()?;
            let after = match (product.after, residual) {
                (After::Activate(activation), _) => output::After::Activate(activation),
                (_, Some(residual)) => output::After::Add(residual),
                _ => output::After::Nothing,
            };
            calls.push(host::Product { weight: product.weight, bias, after });
        }
        let outs = self.host.multiply(op, x, [rows, depth], &calls)?;
        let each = outs.into_iter().zip(products);
        each.map(|(out, product)| tensor(op, out, &[rows, product.weight.shape()[0]])).collect()
    }

    /// The entries `ids` of a quantized table.
    pub(super) fn gather_quantized(&self, op: &'static str, table: &Weight, ids: &[u32]) -> Result<Tensor> {
        let shape = [ids.len(), table.shape()[1]];
        let mut out = zeros(op, count(op, shape)?)?;
        self.host.gather(op, table, ids, &mut out)?;
        tensor(op, out, &shape)
    }
}
