use super::{Layout, Record};
use crate::{Error, ErrorKind, Result, embedding::Precision};
use arrow_array::{ArrayRef, FixedSizeListArray, Float16Array, Float32Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use opt_backend::half::f16;
use parquet::{
    arrow::ArrowWriter, basic::Compression, file::properties::WriterProperties, schema::types::ColumnPath,
};
use std::{io::Write, sync::Arc};

/// Bytes of vectors that are held before they are written as a row group.
const GROUP: usize = 32 << 20;

/// Records on their way into a Parquet file.
pub(super) struct Writer<W: Write + Send> {
    writer: ArrowWriter<W>,
    schema: Arc<Schema>,
    item: Arc<Field>,
    width: usize,
    precision: Precision,
    /// Records of a row group.
    group: usize,
    ids: Vec<String>,
    texts: Vec<Option<String>>,
    metadata: Vec<Option<String>>,
    values: Vec<f32>,
}

impl<W: Write + Send> Writer<W> {
    pub(super) fn new(out: W, layout: &Layout) -> Result<Self> {
        let Layout { width, precision, .. } = *layout;
        let number = match precision {
            Precision::F32 => DataType::Float32,
            Precision::F16 => DataType::Float16,
        };
        let item = Arc::new(Field::new("element", number, false));
        let size = i32::try_from(width).map_err(|e| Error::because(ErrorKind::Option, "width", e))?;
        let schema = Arc::new(Schema::new(vec![
            Field::new("id", DataType::Utf8, false),
            Field::new("text", DataType::Utf8, true),
            Field::new("metadata", DataType::Utf8, true),
            Field::new("embedding", DataType::FixedSizeList(Arc::clone(&item), size), false),
        ]));
        // Numbers that hardly ever repeat: a dictionary of them, or compression, only takes time.
        let numbers = ColumnPath::from("embedding.list.element");
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_column_compression(numbers.clone(), Compression::UNCOMPRESSED)
            .set_column_dictionary_enabled(numbers, false)
            .build();
        let writer = ArrowWriter::try_new(out, Arc::clone(&schema), Some(properties)).map_err(failed)?;
        Ok(Self {
            writer,
            schema,
            item,
            width,
            precision,
            group: (GROUP / (4 * width.max(1))).max(1),
            ids: Vec::new(),
            texts: Vec::new(),
            metadata: Vec::new(),
            values: Vec::new(),
        })
    }

    pub(super) fn write(&mut self, record: &Record<'_>) -> Result<()> {
        self.ids.push(record.name());
        self.texts.push(record.text.map(str::to_owned));
        let json = record.metadata.map(serde_json::to_string).transpose();
        self.metadata.push(json.map_err(|e| Error::because(ErrorKind::Io, "JSON", e))?);
        self.values.extend(record.rows.iter());
        if self.ids.len() < self.group { Ok(()) } else { self.end_group() }
    }

    fn end_group(&mut self) -> Result<()> {
        let values = std::mem::take(&mut self.values);
        let numbers: ArrayRef = match self.precision {
            Precision::F32 => Arc::new(Float32Array::from(values)),
            Precision::F16 => {
                let halves: Vec<f16> = values.into_iter().map(f16::from_f32).collect();
                Arc::new(Float16Array::from(halves))
            }
        };
        let vectors = FixedSizeListArray::try_new(Arc::clone(&self.item), self.width as i32, numbers, None);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(std::mem::take(&mut self.ids))),
            Arc::new(StringArray::from(std::mem::take(&mut self.texts))),
            Arc::new(StringArray::from(std::mem::take(&mut self.metadata))),
            Arc::new(vectors.map_err(failed)?),
        ];
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(failed)?;
        self.writer.write(&batch).map_err(failed)?;
        self.writer.flush().map_err(failed)
    }

    pub(super) fn finish(mut self) -> Result<W> {
        if !self.ids.is_empty() {
            self.end_group()?;
        }
        self.writer.into_inner().map_err(failed)
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::because(ErrorKind::Io, "cannot write Parquet", error)
}
