//! The one shape of "the model file is bad", for every layer that finds it out.

use crate::request::RequestError;
use std::path::{Path, PathBuf};

/// What is wrong with a model file, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {field} at byte {offset}: {message}", file.display())]
pub struct FormatError {
    /// The file; of a split checkpoint, the part.
    pub file: PathBuf,
    /// Where in the file the offending field starts, in bytes.
    pub offset: u64,
    /// What stands there: a header field, a metadata key, or `tensor NAME: …`.
    pub field: String,
    /// What came, what is wanted, what to do.
    pub message: String,
}

impl FormatError {
    /// An error about a place in a file.
    pub fn new(
        file: &Path,
        offset: u64,
        field: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self { file: file.to_owned(), offset, field: field.into(), message: message.into() }
    }
}

impl From<FormatError> for RequestError {
    fn from(error: FormatError) -> Self {
        let FormatError { file, offset, field, message } = error;
        Self::ModelInvalid { file, offset, field, message }
    }
}
