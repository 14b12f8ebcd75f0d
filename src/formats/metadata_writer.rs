//! Metadata that no GGUF file holds: key-value pairs that stand for other formats' fields, written
//! as GGUF would have them and read back as all metadata is. Errors name the field that a value is
//! from.

use super::hf_config::Fields;
use super::metadata::{Entry, Kind, Metadata, Origin};
use super::value::ValueType;
use super::{FormatError, MappedFile};
use std::path::Path;
use std::sync::Arc;

/// Collects pairs.
#[derive(Default)]
pub(super) struct MetadataWriter {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

impl MetadataWriter {
    /// A pair whose value was appended from `start` on.
    fn push(&mut self, key: &str, kind: Kind, start: usize, origin: (&Fields, &str)) {
        let data = start..self.bytes.len();
        let key_at = self.bytes.len();
        self.bytes.extend_from_slice(key.as_bytes());
        let (fields, field) = origin;
        let origin = Origin {
            file: fields.file().to_owned(),
            offset: fields.place(field) as u64,
            field: fields.full_name(field),
        };
        let key = key_at..self.bytes.len();
        self.entries.push(Entry { key, kind, data, origin: Some(Box::new(origin)) });
    }

    fn scalar(&mut self, key: &str, kind: ValueType, bytes: &[u8], origin: (&Fields, &str)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.push(key, Kind::Scalar(kind), start, origin);
    }

    /// An integer.
    pub fn u32(&mut self, key: &str, value: u32, origin: (&Fields, &str)) {
        self.scalar(key, ValueType::U32, &value.to_le_bytes(), origin);
    }

    /// A float.
    pub fn f32(&mut self, key: &str, value: f32, origin: (&Fields, &str)) {
        self.scalar(key, ValueType::F32, &value.to_le_bytes(), origin);
    }

    /// A truth value.
    pub fn bool(&mut self, key: &str, value: bool, origin: (&Fields, &str)) {
        self.scalar(key, ValueType::Bool, &[u8::from(value)], origin);
    }

    /// A text.
    pub fn text(&mut self, key: &str, value: &str, origin: (&Fields, &str)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(value.as_bytes());
        self.push(key, Kind::Text, start, origin);
    }

    /// An array of truth values.
    pub fn bools(&mut self, key: &str, values: &[bool], origin: (&Fields, &str)) {
        let start = self.bytes.len();
        self.bytes.extend(values.iter().map(|value| u8::from(*value)));
        let kind = Kind::Array { element: ValueType::Bool, len: values.len() };
        self.push(key, kind, start, origin);
    }

    /// An array of integers.
    pub fn u32s(&mut self, key: &str, values: &[u32], origin: (&Fields, &str)) {
        let start = self.bytes.len();
        self.bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let kind = Kind::Array { element: ValueType::U32, len: values.len() };
        self.push(key, kind, start, origin);
    }

    /// All pairs; `path` names what they stand for.
    ///
    /// # Errors
    /// A key stands twice.
    pub fn finish(self, path: &Path) -> Result<Metadata, FormatError> {
        let file = MappedFile::from_bytes(path, &self.bytes);
        Metadata::new(Arc::new(file), self.entries)
    }
}
