//! The pickle of a state dict, as `torch.load(weights_only=True)` reads it.

use super::super::entry::FileDType;

/// A tensor of the state dict to write: a whole storage, stored row after row.
pub(in super::super) struct Written<'a> {
    pub(in super::super) name: &'a str,
    pub(in super::super) dtype: FileDType,
    pub(in super::super) shape: &'a [usize],
    /// The storage's record; tied tensors name the same one.
    pub(in super::super) key: usize,
}

/// The bytes of `data.pkl`, protocol 2. Strides count numbers, and torch wants them spelled out.
pub(in super::super) fn program(tensors: &[Written<'_>]) -> Vec<u8> {
    let mut out = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
    for tensor in tensors {
        string(&mut out, tensor.name);
        let storage = match tensor.dtype {
            FileDType::F16 => "HalfStorage",
            FileDType::BF16 => "BFloat16Storage",
            FileDType::F64 => "DoubleStorage",
            FileDType::I64 => "LongStorage",
            FileDType::I32 => "IntStorage",
            FileDType::I16 => "ShortStorage",
            FileDType::I8 => "CharStorage",
            FileDType::U8 => "ByteStorage",
            FileDType::BOOL => "BoolStorage",
            _ => "FloatStorage",
        };
        let numbers: usize = tensor.shape.iter().product();
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        string(&mut out, "storage");
        out.extend(format!("ctorch\n{storage}\n").as_bytes());
        string(&mut out, &tensor.key.to_string());
        string(&mut out, "cpu");
        integer(&mut out, numbers);
        out.extend(b"tQ");
        integer(&mut out, 0);
        integers(&mut out, tensor.shape.iter().copied());
        let strides = (1..=tensor.shape.len()).map(|axis| tensor.shape.iter().skip(axis).product());
        integers(&mut out, strides);
        // requires_grad = False, no hooks.
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn integer(out: &mut Vec<u8>, value: usize) {
    match i32::try_from(value) {
        Ok(value) => {
            out.push(b'J');
            out.extend(value.to_le_bytes());
        }
        Err(_) => {
            // LONG1 of 8 bytes; no file reaches the sign bit.
            out.extend([0x8a, 8]);
            out.extend((value as u64).to_le_bytes());
        }
    }
}

fn integers(out: &mut Vec<u8>, values: impl Iterator<Item = usize>) {
    out.push(b'(');
    values.for_each(|value| integer(out, value));
    out.push(b't');
}
