//! Ops on one element at a time.

use crate::{
    Tch,
    error::{Tried, torch},
    quant::changeable,
    tensor::{Tensor, sizes},
};
use opt_backend::{Activation, Dropout, Error, ErrorKind, Result, check};
use opt_kernels::gradient;
use tch::Kind;

/// Elements of a task of the CPU's threads.
const ELEMENTS: usize = 1 << 15;

/// See [`opt_backend::Train::activate_grad`].
pub(crate) fn activate_grad(x: &Tensor, dy: Tensor, activation: Activation) -> Result<Tensor> {
    const OP: &str = "activate_grad";
    let shape = x.shape();
    check::same_shape(OP, dy.shape(), shape)?;
    // LibTorch's own compute in f32 and round once.
    let kind = if x.kind() == dy.kind() && known(activation) { x.kind() } else { Kind::Float };
    let x = x.matrix_as(OP, kind)?;
    let dy = if kind == Kind::Float { dy.into_own(OP)? } else { dy.into_kind(OP)?.0 };
    let dy = times_slope(&x, dy, activation).map_err(torch(OP))?.ok_or_else(|| {
        let message = format_args!("this backend does not know the activation {activation}");
        Error::new(ErrorKind::Unsupported, OP, message)
    })?;
    Ok(Tensor::new(dy, kind, shape))
}

/// Whether LibTorch has a function for the whole gradient.
fn known(activation: Activation) -> bool {
    !matches!(
        activation,
        Activation::Gelu10 | Activation::QuickGelu | Activation::Relu2 | Activation::Laplace
    )
}

// MEGA rounds its constants: 0.707107 is not 1/√2.
#[allow(clippy::approx_constant)]
fn times_slope(x: &tch::Tensor, mut dy: tch::Tensor, activation: Activation) -> Tried<Option<tch::Tensor>> {
    match activation {
        Activation::Linear => {}
        Activation::Relu => drop(x.f_threshold_backward_grad_input(&dy, &dy, 0.0)?),
        Activation::Gelu => drop(x.f_gelu_backward_grad_input(&dy, &dy, "none")?),
        Activation::GeluTanh => drop(x.f_gelu_backward_grad_input(&dy, &dy, "tanh")?),
        Activation::Silu => drop(x.f_silu_backward_grad_input(&dy, &dy)?),
        Activation::Sigmoid => drop(tch::Tensor::f_sigmoid_backward_grad_input(&dy, &dy, &x.f_sigmoid()?)?),
        Activation::Tanh => drop(tch::Tensor::f_tanh_backward_grad_input(&dy, &dy, &x.f_tanh()?)?),
        Activation::Relu6 => drop(x.f_hardtanh_backward_grad_input(&dy, &dy, 0.0, 6.0)?),
        Activation::LeakyRelu => drop(x.f_leaky_relu_backward_grad_input(&dy, &dy, 0.01, false)?),
        Activation::Mish => return Ok(Some(x.f_mish_backward(&dy)?)),
        Activation::Gelu10 => {
            drop(x.f_gelu_backward_grad_input(&dy, &dy, "none")?);
            // The function is nowhere near -10.
            let beyond = x.f_gelu("none")?.f_gt(10.0)?;
            drop(dy.f_masked_fill_(&beyond, 0.0)?);
        }
        Activation::QuickGelu => {
            // σ(z) (1 + z (1 - σ(z))), z = 1.702 x
            let z = x.f_mul_scalar(1.702)?;
            let gate = z.f_sigmoid()?;
            let mut slope = gate.f_rsub_scalar(1.0)?;
            drop(slope.f_mul_(&z)?);
            drop(slope.f_add_scalar_(1.0)?);
            drop(slope.f_mul_(&gate)?);
            drop(dy.f_mul_(&slope)?);
        }
        Activation::Relu2 => {
            let mut slope = x.f_relu()?;
            drop(slope.f_mul_scalar_(2.0)?);
            drop(dy.f_mul_(&slope)?);
        }
        Activation::Laplace => {
            // The density of the normal distribution whose integral the function is.
            let (mean, width) = (0.707107, 0.282095);
            let mut slope = x.f_sub_scalar(mean)?;
            drop(slope.f_div_scalar_(width)?);
            drop(slope.f_square_()?);
            drop(slope.f_mul_scalar_(-0.5)?);
            drop(slope.f_exp_()?);
            drop(slope.f_div_scalar_(width * std::f64::consts::TAU.sqrt())?);
            drop(dy.f_mul_(&slope)?);
        }
        _ => return Ok(None),
    }
    Ok(Some(dy))
}

/// See [`opt_backend::Train::dropout`].
pub(crate) fn dropout(tch: &Tch, x: Tensor, dropout: Dropout) -> Result<Tensor> {
    const OP: &str = "dropout";
    let shape = x.shape();
    let mut x = x.into_own(OP)?;
    if tch.host_kernels() {
        let tasks = changeable(OP, &mut x)?.chunks_mut(ELEMENTS).enumerate().collect();
        tch.host.each(tasks, |(i, part): (usize, &mut [f32])| {
            gradient::dropout(part, i * ELEMENTS, dropout);
        })?;
    } else {
        dropped(tch, &mut x, shape, dropout).map_err(torch(OP))?;
    }
    Ok(Tensor::new(x, Kind::Float, shape))
}

/// [`Dropout::keeps`] in integers of 32 bits with a sign, which wrap.
fn dropped(tch: &Tch, x: &mut tch::Tensor, shape: [usize; 2], dropout: Dropout) -> Tried<()> {
    let signed = |bits: u32| i64::from(bits.cast_signed());
    let count = shape[0] as i64 * shape[1] as i64;
    let mut hash = tch::Tensor::f_arange(count, (Kind::Int64, tch.device()))?.f_totype(Kind::Int)?;
    for word in dropout.words() {
        let _ = hash.f_bitwise_xor_(signed(word))?;
        for (shift, factor) in [(16, 0x7feb_352d), (15, 0x846c_a68b), (16, 1)] {
            // Shifts keep the sign; the mask takes it away.
            let mut high = hash.f_bitwise_right_shift_tensor_scalar(shift)?;
            let _ = high.f_bitwise_and_(i64::from(u32::MAX >> shift))?;
            let _ = hash.f_bitwise_xor_tensor_(&high)?;
            if factor != 1 {
                let _ = hash.f_mul_scalar_(signed(factor))?;
            }
        }
    }
    // With the first bit flipped, numbers with a sign are in the order of those without.
    const FIRST: u32 = 1 << 31;
    let _ = hash.f_bitwise_xor_(signed(FIRST))?;
    let dropped = hash.f_lt(signed(dropout.threshold() ^ FIRST))?.f_reshape(sizes(shape))?;
    let _ = x.f_mul_scalar_(f64::from(dropout.scale()))?;
    let _ = x.f_masked_fill_(&dropped, 0.0)?;
    Ok(())
}
