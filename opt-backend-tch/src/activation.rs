//! The functions of the feed-forward block.

use crate::error::{Tried, torch};
use opt_backend::{Activation, Error, ErrorKind, Result};
use tch::{Kind, Tensor};

/// Applies `activation` to each element of `y`, whose elements are `kind`; returns what the result's are.
///
/// LibTorch's own functions compute in f32 and round once. Those composed of several run on f32.
pub(crate) fn activate(
    op: &'static str,
    activation: Activation,
    y: Tensor,
    kind: Kind,
) -> Result<(Tensor, Kind)> {
    let known = match activation {
        Activation::Linear => Ok(y),
        // Also part of the product, where it is the function of a linear.
        Activation::Relu => in_place(y, |y| y.f_relu_()),
        Activation::Gelu => in_place(y, |y| y.f_gelu_("none")),
        Activation::GeluTanh => in_place(y, |y| y.f_gelu_("tanh")),
        Activation::Silu => in_place(y, |y| y.f_silu_()),
        Activation::Sigmoid => in_place(y, |y| y.f_sigmoid_()),
        Activation::Tanh => in_place(y, |y| y.f_tanh_()),
        Activation::Relu6 => in_place(y, |y| y.f_relu6_()),
        Activation::LeakyRelu => in_place(y, |y| y.f_leaky_relu_()),
        Activation::Mish => in_place(y, |y| y.f_mish_()),
        other => {
            let wide = y.f_to_dtype(Kind::Float, false, false).map_err(torch(op))?;
            let result = composed(other, wide).ok_or_else(|| unknown(op, other))?;
            return Ok((result.map_err(torch(op))?, Kind::Float));
        }
    };
    Ok((known.map_err(torch(op))?, kind))
}

fn unknown(op: &'static str, activation: Activation) -> Error {
    let message = format_args!("this backend does not know the activation {activation}");
    Error::new(ErrorKind::Unsupported, op, message)
}

fn in_place(mut y: Tensor, f: impl FnOnce(&mut Tensor) -> Tried<Tensor>) -> Tried<Tensor> {
    let _ = f(&mut y)?;
    Ok(y)
}

// MEGA rounds its constants: 0.707107 is not 1/√2.
#[allow(clippy::approx_constant)]
fn composed(activation: Activation, mut x: Tensor) -> Option<Tried<Tensor>> {
    Some(match activation {
        Activation::Gelu10 => in_place(x, |x| {
            let _ = x.f_gelu_("none")?;
            x.f_clamp_(-10.0, 10.0)
        }),
        Activation::QuickGelu => (|| {
            let gate = in_place(x.f_mul_scalar(1.702)?, |x| x.f_sigmoid_())?;
            in_place(x, |x| x.f_mul_(&gate))
        })(),
        Activation::Relu2 => in_place(x, |x| {
            let _ = x.f_relu_()?;
            x.f_square_()
        }),
        Activation::Laplace => (|| {
            x = x.f_sub_scalar(0.707107)?;
            in_place(x, |x| {
                let _ = x.f_div_scalar_(0.282095 * std::f64::consts::SQRT_2)?;
                let _ = x.f_erf_()?;
                let _ = x.f_add_scalar_(1.0)?;
                x.f_mul_scalar_(0.5)
            })
        })(),
        _ => return None,
    })
}
