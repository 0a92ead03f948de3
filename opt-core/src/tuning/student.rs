//! Students made of some of a teacher's layers.

use crate::{
    Error, ErrorKind, Result,
    checkpoint::{Checkpoint, Weight, array_bytes, model_files},
};
use ndarray::{Array2, Axis};
use opt_backend::DType;
use serde_json::Value;

/// The layers of a teacher that a student of `student` layers begins with: evenly spaced, the first and the last among
/// them, which of 12 layers are 0, 2, 4, 7, 9, 11 for six (DistilBERT's choice). A single one is the first.
///
/// ```
/// assert_eq!(opt_core::tuning::student_layers(6, 3)?, [0, 3, 5]);
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Option`] for no layers, and for more than the teacher has.
pub fn student_layers(teacher: usize, student: usize) -> Result<Vec<usize>> {
    if student == 0 || student > teacher {
        let message = format_args!("student layers: expected 1 to {teacher}, found {student}");
        return Err(Error::new(ErrorKind::Option, message));
    }
    let gaps = (student - 1).max(1);
    Ok((0..student).map(|i| (2 * i * (teacher - 1) + gaps) / (2 * gaps)).collect())
}

/// A student of `layers` of a teacher's layers, chosen as [`student_layers`] says; embeddings, projections, final
/// LayerNorm and head are the teacher's. Weights are f32; packed ones are unpacked.
///
/// Returns the student, and the files that stand beside its weights (config.json, and the tokenizer of a teacher on
/// disk) for [`super::Tuner::files`].
///
/// ```
/// use opt_core::{checkpoint::Checkpoint, tuning::student_of};
///
/// let teacher = Checkpoint::open("../models/opt-novels")?;
/// let (student, files) = student_of(&teacher, 3)?;
/// assert_eq!(student.config().num_hidden_layers, 3);
/// assert!(files.iter().any(|(name, _)| name == "tokenizer.json"));
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Option`] as [`student_layers`]; [`ErrorKind::Checkpoint`] and [`ErrorKind::NotFound`] for weights that
/// do not fit the config; [`ErrorKind::Io`].
pub fn student_of(teacher: &Checkpoint, layers: usize) -> Result<(Checkpoint, super::SideFiles)> {
    let mut config = teacher.config().clone();
    let chosen = student_layers(config.num_hidden_layers, layers)?;
    config.num_hidden_layers = layers;
    let mut tensors = Vec::new();
    for (name, shape) in config.tensor_shapes() {
        let values = read(teacher, &source(&name, &chosen), &shape)?;
        tensors.push((name, shape, values));
    }
    let mut files = model_files(teacher, Some(DType::F32))?;
    let unusable = |e| Error::because(ErrorKind::Config, "config.json is not usable", e);
    for (name, contents) in &mut files {
        if name == "config.json" {
            let mut text: Value = serde_json::from_slice(contents).map_err(unusable)?;
            if let Some(map) = text.as_object_mut() {
                map.insert("num_hidden_layers".to_owned(), layers.into());
                map.remove("quantization_config");
            }
            *contents = (serde_json::to_string_pretty(&text).map_err(unusable)? + "\n").into_bytes();
        }
    }
    let config = serde_json::to_string(&config).map_err(unusable)?;
    Ok((Checkpoint::from_bytes(&config, vec![array_bytes(&tensors)?])?, files))
}

/// What the teacher calls the tensor that the student calls `name`.
fn source(name: &str, chosen: &[usize]) -> String {
    let layer = || {
        let (layer, rest) = name.strip_prefix("layers.")?.split_once('.')?;
        Some(format!("layers.{}.{rest}", chosen.get(layer.parse::<usize>().ok()?)?))
    };
    layer().unwrap_or_else(|| name.to_owned())
}

fn read(teacher: &Checkpoint, name: &str, shape: &[usize]) -> Result<Array2<f32>> {
    let &[rows, width] = shape else {
        return Ok(teacher.tensor(name, shape)?.vector()?.to_f32().insert_axis(Axis(0)));
    };
    Ok(match teacher.weight(name, [rows, width])? {
        Weight::Plain(weight) => weight.matrix()?.to_f32(),
        Weight::Quantized(weight) => weight.dequantize(),
    })
}
