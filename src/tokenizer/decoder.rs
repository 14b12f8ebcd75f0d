//! Text from tokens as they come, without ever splitting a character.

use super::Tokenizer;
use crate::units::TokenId;
use std::sync::Arc;

/// Decodes one answer token by token. All pushes and the finish, one after the other, are exactly
/// what decoding all the tokens at once gives: bytes that can still become a character are held
/// back, bytes that can't become U+FFFD as `String::from_utf8_lossy` has it.
#[derive(Clone)]
pub struct IncrementalDecoder {
    tokenizer: Arc<Tokenizer>,
    /// The start of a character, at most 3 bytes.
    pending: Vec<u8>,
    /// A leading space is the tokenizer's own and is still to be taken away.
    strip_space: bool,
}

impl IncrementalDecoder {
    /// For tokens that continue a text, as generated ones continue the prompt: equals
    /// [`Tokenizer::decode_continuation`].
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, pending: Vec::new(), strip_space: false }
    }

    /// For tokens that begin a text: equals [`Tokenizer::decode`].
    pub fn at_text_start(tokenizer: Arc<Tokenizer>) -> Self {
        let strip_space = tokenizer.space_prefix;
        Self { tokenizer, pending: Vec::new(), strip_space }
    }

    /// Takes the next token and gives the text that is complete now, often none.
    pub fn push(&mut self, id: TokenId) -> String {
        let mut bytes = self.tokenizer.text_bytes(id);
        if self.strip_space && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.strip_space = false;
        }
        self.pending.extend_from_slice(bytes);
        take_complete(&mut self.pending)
    }

    /// The end: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }

    /// Whether bytes of an unfinished character are held back.
    pub fn is_mid_character(&self) -> bool {
        !self.pending.is_empty()
    }
}

/// Removes everything but an unfinished character from the front and decodes it.
fn take_complete(pending: &mut Vec<u8>) -> String {
    let mut complete = 0;
    let text = loop {
        match std::str::from_utf8(&pending[complete..]) {
            Ok(_) => break pending.len(),
            Err(error) => match error.error_len() {
                Some(bytes) => complete += error.valid_up_to() + bytes,
                None => break complete + error.valid_up_to(),
            },
        }
    };
    let decoded = String::from_utf8_lossy(&pending[..text]).into_owned();
    pending.drain(..text);
    decoded
}
