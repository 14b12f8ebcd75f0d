//! Text work of the tokenizer threads.

use crate::request::{AddSpecial, ChatMessage, ParseSpecial};
use crate::units::TokenId;

/// A chat as the model's template renders it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderedChat {
    /// The prompt.
    pub text: String,
    /// What was not done exactly as asked, in words.
    pub warnings: Vec<String>,
}

#[allow(dead_code, reason = "the tokenizer threads come with the next commit")]
pub(super) enum TextWork {
    Encode { text: String, add_special: AddSpecial, parse_special: ParseSpecial },
    Decode { tokens: Vec<TokenId> },
    Render { messages: Vec<ChatMessage> },
}

#[derive(Default)]
pub(super) struct TextDone {
    pub(super) tokens: Vec<TokenId>,
    pub(super) text: String,
    pub(super) warnings: Vec<String>,
}
