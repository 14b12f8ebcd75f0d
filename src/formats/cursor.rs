//! Reads little-endian fields off a file's bytes; every read is bounded by what remains.

use super::{FormatError, MappedFile};
use std::fmt;
use std::ops::Range;

/// What is being read, for errors; made into text only when something is wrong.
#[derive(Clone, Copy, Debug)]
pub(super) enum Field<'a> {
    /// A field of the header.
    Header(&'static str),
    /// The key of the metadata entry with this index.
    Key(u64),
    /// The value of a metadata key.
    Value(&'a str),
    /// The name of the tensor with this index.
    TensorName(u64),
    /// A property of a named tensor.
    Tensor(&'a str, &'static str),
}

impl fmt::Display for Field<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(name) => formatter.write_str(name),
            Self::Key(index) => write!(formatter, "metadata[{index}].key"),
            Self::Value(key) => formatter.write_str(key),
            Self::TensorName(index) => write!(formatter, "tensors[{index}].name"),
            Self::Tensor(name, property) => write!(formatter, "tensor {name}: {property}"),
        }
    }
}

/// A position in a file's bytes that only moves forward.
pub(super) struct Cursor<'a> {
    file: &'a MappedFile,
    at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(file: &'a MappedFile) -> Self {
        Self { file, at: 0 }
    }

    pub fn file(&self) -> &'a MappedFile {
        self.file
    }

    pub fn at(&self) -> usize {
        self.at
    }

    pub fn remaining(&self) -> u64 {
        (self.file.bytes().len() - self.at) as u64
    }

    /// An error at `offset`.
    pub fn refuse(
        &self,
        offset: usize,
        field: Field<'_>,
        message: impl Into<String>,
    ) -> FormatError {
        FormatError::new(self.file.path(), offset as u64, field.to_string(), message)
    }

    /// The next `bytes` bytes as a range of the file.
    pub fn skip(&mut self, bytes: u64, field: Field<'_>) -> Result<Range<usize>, FormatError> {
        let remaining = self.remaining();
        if bytes > remaining {
            let message = format!(
                "the file ends too early: {bytes} bytes are wanted and {remaining} remain; \
                 is the download complete?"
            );
            return Err(self.refuse(self.at, field, message));
        }
        let start = self.at;
        self.at += bytes as usize;
        Ok(start..self.at)
    }

    fn array<const N: usize>(&mut self, field: Field<'_>) -> Result<[u8; N], FormatError> {
        let range = self.skip(N as u64, field)?;
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.file.bytes()[range]);
        Ok(bytes)
    }

    pub fn u32(&mut self, field: Field<'_>) -> Result<u32, FormatError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, field: Field<'_>) -> Result<u64, FormatError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// A length and that many bytes, as the range of the bytes. The offset of an error is the
    /// length's.
    pub fn counted(&mut self, field: Field<'_>) -> Result<Range<usize>, FormatError> {
        let start = self.at;
        let bytes = self.u64(field)?;
        let remaining = self.remaining();
        if bytes > remaining {
            let message = format!("a length of {bytes} bytes, but only {remaining} remain");
            return Err(self.refuse(start, field, message));
        }
        self.skip(bytes, field)
    }

    /// A counted text of at most `bytes_max` bytes.
    pub fn name(&mut self, bytes_max: usize, field: Field<'_>) -> Result<&'a str, FormatError> {
        let start = self.at;
        let range = self.counted(field)?;
        if range.is_empty() || range.len() > bytes_max {
            let message = format!("{} bytes long; allowed: 1 to {bytes_max}", range.len());
            return Err(self.refuse(start, field, message));
        }
        std::str::from_utf8(&self.file.bytes()[range])
            .map_err(|_| self.refuse(start, field, "is no UTF-8"))
    }
}
