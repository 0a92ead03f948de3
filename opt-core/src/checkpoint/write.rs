//! Writing tensors: the number formats, and the two file formats, one tensor at a time.

use super::{
    Checkpoint, TensorInfo,
    entry::{FileDType, damaged},
    pickle::write::{Written, program},
    zip::{self, cannot_write},
};
use crate::{CancelToken, Error, ErrorKind, Progress, ProgressFn, Result};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use safetensors::tensor::{Dtype, Metadata};
use std::{
    collections::HashMap,
    io::{Seek, Write},
    ops::ControlFlow,
};

/// A tensor to write: where it comes from, under which name and in which format.
#[derive(Debug)]
pub(super) struct Planned<'a> {
    pub(super) name: String,
    pub(super) info: &'a TensorInfo,
    pub(super) dtype: FileDType,
    /// The name, in the same file, of the tensor whose numbers this one shares.
    pub(super) tied_to: Option<String>,
}

impl Planned<'_> {
    /// Bytes it adds to its file.
    pub(super) fn bytes(&self) -> u64 {
        if self.tied_to.is_some() { 0 } else { (self.info.len() * self.dtype.size()) as u64 }
    }
}

/// A conversion under way.
pub(super) struct Job<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) progress: Option<Box<ProgressFn<'a>>>,
    pub(super) cancel: CancelToken,
    /// Bytes written, and to write.
    pub(super) done: u64,
    pub(super) total: u64,
    /// Tensors with numbers that became infinite in their new format, and how many did.
    pub(super) overflowed: Vec<(String, u64)>,
}

impl Job<'_> {
    fn wrote(&mut self, name: &str, bytes: u64) -> Result<()> {
        self.done += bytes;
        self.cancel.check("converting")?;
        let report = Progress::new(name, self.done, self.total);
        match self.progress.as_mut().map(|progress| progress(report)) {
            Some(ControlFlow::Break(())) => Err(Error::new(ErrorKind::Cancelled, "converting was cancelled")),
            _ => Ok(()),
        }
    }
}

/// Numbers converted at a time: small against any model, large against a call.
const CHUNK: usize = 1 << 16;

/// Writes a safetensors file; tensors of wider numbers come first, so that all are aligned.
pub(super) fn safetensors_file(
    tensors: &[Planned<'_>],
    out: &mut dyn Write,
    job: &mut Job<'_>,
) -> Result<()> {
    let mut order: Vec<&Planned<'_>> = tensors.iter().collect();
    order.sort_by_key(|planned| std::cmp::Reverse(planned.dtype.size()));
    let tensors =
        order.iter().map(|planned| (planned.name.clone(), planned.dtype, planned.info.shape.clone()));
    out.write_all(&safetensors_header(tensors)?).map_err(cannot_write)?;
    order.into_iter().try_for_each(|planned| numbers(planned, out, job))
}

/// The first bytes of a safetensors file whose tensors, of these names, formats and shapes, lie end to end.
pub(super) fn safetensors_header(
    tensors: impl IntoIterator<Item = (String, FileDType, Vec<usize>)>,
) -> Result<Vec<u8>> {
    let (mut end, mut infos) = (0, Vec::new());
    for (name, number, shape) in tensors {
        let start = end;
        end += shape.iter().product::<usize>() * number.size();
        let dtype = dtype(number);
        infos.push((name, safetensors::tensor::TensorInfo { dtype, shape, data_offsets: (start, end) }));
    }
    // transformers refuses a file that does not say which library's tensors it holds.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let invalid = |e| Error::because(ErrorKind::Checkpoint, "cannot write the safetensors header", e);
    let metadata = Metadata::new(Some(format), infos).map_err(invalid)?;
    let mut header = serde_json::to_vec(&metadata)
        .map_err(|e| Error::because(ErrorKind::Checkpoint, "cannot write the safetensors header", e))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut header);
    Ok(bytes)
}

/// Writes what `torch.load` reads.
pub(super) fn pickle_file(
    tensors: &[Planned<'_>],
    out: &mut (impl Write + Seek),
    job: &mut Job<'_>,
) -> Result<()> {
    let key = |name: &String| tensors.iter().position(|planned| planned.name == *name);
    let mut written = Vec::with_capacity(tensors.len());
    for (number, planned) in tensors.iter().enumerate() {
        let key = planned.tied_to.as_ref().and_then(key).unwrap_or(number);
        written.push(Written { name: &planned.name, dtype: planned.dtype, shape: &planned.info.shape, key });
    }
    let program = program(&written);
    let mut zip = zip::Writer::new(out);
    let small = |zip: &mut zip::Writer<_>, name: &str, bytes: &[u8]| {
        zip.record(name, bytes.len() as u64, |out| out.write_all(bytes).map_err(cannot_write))
    };
    small(&mut zip, "archive/data.pkl", &program)?;
    small(&mut zip, "archive/byteorder", b"little")?;
    for (number, planned) in tensors.iter().enumerate().filter(|(_, planned)| planned.tied_to.is_none()) {
        let name = format!("archive/data/{number}");
        zip.record(&name, planned.bytes(), |out| numbers(planned, out, job))?;
    }
    small(&mut zip, "archive/version", b"3\n")?;
    zip.finish().map(drop)
}

fn numbers(planned: &Planned<'_>, out: &mut dyn Write, job: &mut Job<'_>) -> Result<()> {
    let (from, to) = (planned.info.dtype, planned.dtype);
    let checkpoint = job.checkpoint;
    let tensor = checkpoint.read(planned.info)?;
    let (mut overflowed, mut buffer) = (0, Vec::new());
    for chunk in tensor.bytes().chunks(CHUNK * from.size()) {
        buffer.clear();
        overflowed += convert(chunk, from, to, &mut buffer)?;
        out.write_all(&buffer).map_err(cannot_write)?;
        job.wrote(&planned.name, buffer.len() as u64)?;
    }
    if overflowed > 0 {
        job.overflowed.push((planned.name.clone(), overflowed));
    }
    Ok(())
}

/// Appends `bytes` in another format, rounded to nearest even; says how many finite numbers became infinite.
pub(super) fn convert(bytes: &[u8], from: FileDType, to: FileDType, out: &mut Vec<u8>) -> Result<u64> {
    if from == to {
        out.extend(bytes);
        return Ok(0);
    }
    let unaligned = |e| damaged(format_args!("numbers cannot be read in place: {e}"));
    let wide: Vec<f32> = match from {
        FileDType::F32 => bytemuck::try_cast_slice(bytes).map_err(unaligned)?.to_vec(),
        FileDType::F16 => bytemuck::try_cast_slice::<u8, f16>(bytes).map_err(unaligned)?.to_f32_vec(),
        FileDType::BF16 => bytemuck::try_cast_slice::<u8, bf16>(bytes).map_err(unaligned)?.to_f32_vec(),
        other => return Err(damaged(format_args!("{other} is not converted to {to}"))),
    };
    let finite = wide.iter().filter(|v| v.is_finite()).count();
    let still_finite = match to {
        FileDType::F32 => {
            out.extend(bytemuck::cast_slice::<f32, u8>(&wide));
            finite
        }
        FileDType::F16 => {
            let mut narrow = vec![f16::ZERO; wide.len()];
            narrow.convert_from_f32_slice(&wide);
            out.extend(bytemuck::cast_slice::<f16, u8>(&narrow));
            narrow.iter().filter(|v| v.is_finite()).count()
        }
        FileDType::BF16 => {
            let mut narrow = vec![bf16::ZERO; wide.len()];
            narrow.convert_from_f32_slice(&wide);
            out.extend(bytemuck::cast_slice::<bf16, u8>(&narrow));
            narrow.iter().filter(|v| v.is_finite()).count()
        }
        other => return Err(damaged(format_args!("{from} is not converted to {other}"))),
    };
    Ok((finite - still_finite.min(finite)) as u64)
}

fn dtype(dtype: FileDType) -> Dtype {
    match dtype {
        FileDType::F64 => Dtype::F64,
        FileDType::F32 => Dtype::F32,
        FileDType::F16 => Dtype::F16,
        FileDType::BF16 => Dtype::BF16,
        FileDType::I64 => Dtype::I64,
        FileDType::I32 => Dtype::I32,
        FileDType::I16 => Dtype::I16,
        FileDType::I8 => Dtype::I8,
        FileDType::U64 => Dtype::U64,
        FileDType::U32 => Dtype::U32,
        FileDType::U16 => Dtype::U16,
        FileDType::U8 => Dtype::U8,
        FileDType::BOOL => Dtype::BOOL,
    }
}
