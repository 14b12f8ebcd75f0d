//! Why a vocabulary is unusable or a text can't be encoded.

use crate::formats::FormatError;
use crate::request::RequestError;

/// What is wrong with a vocabulary, or with a text for a vocabulary.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TokenizerError {
    /// A metadata value of the wrong type, or a missing one.
    #[error(transparent)]
    File(#[from] FormatError),
    /// A value that makes no tokenizer.
    #[error("the vocabulary is unusable: {field}: {message}")]
    Invalid {
        /// The metadata key, with an index where it is an array's.
        field: String,
        /// What came and what is wanted.
        message: String,
    },
    /// A name that this version does not know.
    #[error("{field} is {got:?}; known: {}", known.join(", "))]
    Unknown {
        /// The metadata key.
        field: &'static str,
        /// What came.
        got: String,
        /// What would do.
        known: Vec<&'static str>,
    },
    /// The text holds a byte for which the vocabulary has no token.
    #[error(
        "the text has the byte {byte:#04x} at offset {offset}, for which the model's vocabulary \
         has no token; leave it out"
    )]
    Unencodable {
        /// The byte.
        byte: u8,
        /// Where in the text, in bytes, counted from the start of its run of plain text.
        offset: usize,
    },
}

impl TokenizerError {
    pub(super) fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), message: message.into() }
    }
}

impl From<TokenizerError> for RequestError {
    fn from(error: TokenizerError) -> Self {
        let message = error.to_string();
        match error {
            TokenizerError::File(FormatError { field, .. }) => {
                Self::TokenizerInvalid { field, message }
            }
            TokenizerError::Invalid { field, message } => Self::TokenizerInvalid { field, message },
            TokenizerError::Unknown { field, .. } => {
                Self::TokenizerInvalid { field: field.to_owned(), message }
            }
            TokenizerError::Unencodable { byte, offset } => Self::InvalidParams {
                field: "prompt".to_owned(),
                got: format!("the byte {byte:#04x} at offset {offset}"),
                allowed: "characters that the model's vocabulary can spell".to_owned(),
            },
        }
    }
}
