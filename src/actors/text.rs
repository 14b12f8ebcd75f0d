//! Text work of the tokenizer threads: encode, decode, render, and all that a request's prompt
//! needs. Each piece of work is a function of the loaded model and can be done again.

use super::load::Loaded;
use crate::request::{AddSpecial, ChatMessage, Input, ParseSpecial, RequestError, SamplingParams};
use crate::tokenizer::GenerationPrompt;
use crate::units::TokenId;
use tokio::sync::oneshot;

/// A chat as the model's template renders it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderedChat {
    /// The prompt.
    pub text: String,
    /// What was not done exactly as asked, in words.
    pub warnings: Vec<String>,
}

/// What is to be done.
pub(super) enum TextWork {
    Encode { text: String, add_special: AddSpecial, parse_special: ParseSpecial },
    Decode { tokens: Vec<TokenId> },
    Render { messages: Vec<ChatMessage> },
    Prepare(Preparation),
}

/// A request's input and the texts among its parameters.
pub(super) struct Preparation {
    pub(super) input: Input,
    pub(super) add_special: AddSpecial,
    pub(super) parse_special: ParseSpecial,
    /// With the texts that break a DRY repeat.
    pub(super) sampling: SamplingParams,
}

/// What came of it; what the work does not give stays empty.
#[derive(Debug, Default)]
pub(super) struct TextDone {
    pub(super) tokens: Vec<TokenId>,
    pub(super) text: String,
    pub(super) warnings: Vec<String>,
    pub(super) dry_breaker_tokens: Vec<TokenId>,
}

/// Work with the way back to whoever asked.
pub(super) struct TextJob {
    pub(super) work: TextWork,
    pub(super) queued_us: u64,
    pub(super) reply: oneshot::Sender<Result<TextDone, RequestError>>,
}

impl TextWork {
    pub(super) fn run(&self, loaded: &Loaded) -> Result<TextDone, RequestError> {
        match self {
            Self::Encode { text, add_special, parse_special } => {
                let tokens = loaded.tokenizer.encode(text, *add_special, *parse_special)?;
                Ok(TextDone { tokens, ..TextDone::default() })
            }
            Self::Decode { tokens } => {
                loaded.check_tokens("tokens", tokens)?;
                let text = loaded.tokenizer.decode(tokens);
                Ok(TextDone { text, ..TextDone::default() })
            }
            Self::Render { messages } => render(loaded, messages),
            Self::Prepare(preparation) => preparation.run(loaded),
        }
    }
}

impl Preparation {
    fn run(&self, loaded: &Loaded) -> Result<TextDone, RequestError> {
        let mut done = match &self.input {
            Input::Tokens(tokens) => {
                loaded.check_tokens("prompt_tokens", tokens)?;
                TextDone { tokens: tokens.clone(), ..TextDone::default() }
            }
            Input::Text(text) => {
                let tokens = loaded.tokenizer.encode(text, self.add_special, self.parse_special)?;
                TextDone { tokens, ..TextDone::default() }
            }
            Input::Chat(messages) => encode_chat(loaded, messages)?,
        };
        if done.tokens.is_empty() {
            return Err(RequestError::InvalidParams {
                field: "prompt".into(),
                got: "no token".into(),
                allowed: "at least one token".into(),
            });
        }
        let mut sampling = self.sampling.clone();
        loaded.tokenizer.resolve_dry_breakers(&mut sampling)?;
        done.dry_breaker_tokens = sampling.dry_breaker_tokens;
        Ok(done)
    }
}

fn render(loaded: &Loaded, messages: &[ChatMessage]) -> Result<TextDone, RequestError> {
    let rendered = loaded.template.render(messages, GenerationPrompt::Add)?;
    Ok(TextDone { text: rendered.text, warnings: rendered.warnings, ..TextDone::default() })
}

/// The template's special tokens are tokens, those that the messages spell stay text.
fn encode_chat(loaded: &Loaded, messages: &[ChatMessage]) -> Result<TextDone, RequestError> {
    let rendered = loaded.template.render(messages, GenerationPrompt::Add)?;
    let tokens = loaded.tokenizer.encode_chat(&rendered)?;
    Ok(TextDone { tokens, warnings: rendered.warnings, ..TextDone::default() })
}
