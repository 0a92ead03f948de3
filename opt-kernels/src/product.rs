//! The one entrance to products: rows times weights, however these are held.

use crate::{Machine, bf16, gemm, output::Product, pack::Packed, quant};
use opt_backend::Result;

/// Computes the products of `x`, `[rows, inputs]`.
///
/// # Safety
/// Every weight has `inputs` inputs and was packed for the machine's level; bias, residual and output have the fitting
/// sizes, and nobody else accesses the outputs.
pub unsafe fn multiply(
    machine: Machine<'_>,
    x: &[f32],
    [rows, inputs]: [usize; 2],
    products: &[Product<'_>],
) -> Result<()> {
    if rows == 0 {
        return Ok(());
    }
    // Those that read the same numbers in the same order go together.
    let (mut dense, mut pairs, mut coded, mut apart) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for product in products {
        match product.weights {
            Packed::Codes(codes) if codes.order().is_some() => apart.push((product, &**codes)),
            Packed::Codes(codes) if codes.as_integers(machine.compute) => coded.push((product, &**codes)),
            Packed::Bf16x2(panels) => pairs.push((product, panels)),
            _ => dense.push(product),
        }
    }
    // SAFETY: the caller's promise; places are the inputs wherever there is no other order.
    unsafe {
        if !dense.is_empty() {
            gemm::multiply(machine, x, [rows, inputs], &dense)?;
        }
        if !pairs.is_empty() {
            bf16::multiply(machine, x, [rows, inputs], &pairs)?;
        }
        if !coded.is_empty() {
            quant::multiply(machine, x, [rows, inputs], &coded)?;
        }
        for (product, codes) in apart {
            let x = codes.in_order(machine, x, [rows, inputs])?;
            match codes.as_integers(machine.compute) {
                false => gemm::multiply(machine, &x, [rows, codes.places()], &[product])?,
                true => quant::multiply(machine, &x, [rows, codes.places()], &[(product, codes)])?,
            }
        }
    }
    Ok(())
}
