//! Safetensors files taken apart and put together.

use opt_core::checkpoint::Checkpoint;
use safetensors::{
    Dtype, SafeTensors,
    tensor::{TensorView, serialize},
};
use serde_json::Value;
use std::{collections::BTreeMap, fs, path::Path};

/// The number format, shape and bytes of a tensor.
pub(crate) type Raw = (Dtype, Vec<usize>, Vec<u8>);

/// A checkpoint as a config and tensors, to be changed and opened.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Raw>,
}

impl Parts {
    pub(crate) fn read(folder: &Path) -> Self {
        let config = serde_json::from_str(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
        Self { config, tensors: tensors(&folder.join("model.safetensors")) }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        serialize(views, None).unwrap()
    }

    pub(crate) fn open(&self) -> opt_core::Result<Checkpoint> {
        Checkpoint::from_bytes(&self.config.to_string(), vec![self.bytes()])
    }

    /// Without its quantized weights' tensors, with plain ones in f16 in their place.
    pub(crate) fn plain(&self, checkpoint: &Checkpoint) -> Self {
        let mut plain = self.clone();
        plain.config.as_object_mut().unwrap().remove("quantization_config");
        for (name, weight) in super::weights(checkpoint) {
            let module = format!("model.decoder.{}", name.strip_suffix(".weight").unwrap());
            let bias = format!("{module}.bias");
            plain.tensors.retain(|name, _| !name.starts_with(&format!("{module}.")) || *name == bias);
            let numbers = weight.dequantize();
            let bytes = numbers.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
            plain.tensors.insert(format!("{module}.weight"), (Dtype::F16, numbers.shape().to_vec(), bytes));
        }
        plain
    }
}

/// All tensors of a file.
pub(crate) fn tensors(path: &Path) -> BTreeMap<String, Raw> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let raw = |view: TensorView<'_>| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    file.iter().map(|(name, view)| (name.to_owned(), raw(view))).collect()
}
