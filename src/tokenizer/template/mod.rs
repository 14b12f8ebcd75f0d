//! Owns chat templates: messages in, the text that the model was trained on out. It must not know
//! requests, and reads no file: a template can load nothing. The tokenizer actor renders with it.
//!
//! Templates come out of model files and are programs of strangers: every render has fuel (which
//! pays for instructions and for bytes), a bound on its output and a thread stack of its own.

mod calendar;
mod charges;
mod environment;
mod guard;
mod lexer;
mod prices;
mod python_json;

pub use guard::MessageSpan;

use super::Tokenizer;
use crate::formats::{FormatError, Metadata};
use crate::request::{ChatMessage, RequestError};
use minijinja::{Environment, Value};
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

/// Why a chat can't be rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("chat template, line {line}, column {column}: {message}")]
pub struct TemplateError {
    /// Line of the template, from 1; 0 if it isn't known.
    pub line: usize,
    /// Column of that line in characters, from 1; 0 if it isn't known.
    pub column: usize,
    /// What is wrong, in the engine's or the template's own words.
    pub message: String,
}

impl From<TemplateError> for RequestError {
    fn from(error: TemplateError) -> Self {
        let TemplateError { line, column, message } = error;
        Self::TemplateError { line, column, message }
    }
}

impl From<FormatError> for TemplateError {
    fn from(error: FormatError) -> Self {
        Self::without_place(error.to_string())
    }
}

impl TemplateError {
    fn without_place(message: impl Into<String>) -> Self {
        Self { line: 0, column: 0, message: message.into() }
    }
}

/// Bounds of a render, and its clock.
#[derive(Clone, Debug)]
pub struct TemplateConfig {
    /// Work allowed: about an instruction or 64 bytes each. The messages' bytes are allowed for on
    /// top.
    pub fuel: u64,
    /// Most bytes of the rendered text, on top of 4 times the messages'.
    pub output_bytes_max: usize,
    /// Most bytes of the template itself.
    pub source_bytes_max: usize,
    /// Seconds since 1970, UTC, for templates that print the date.
    pub clock: fn() -> u64,
}

impl Default for TemplateConfig {
    fn default() -> Self {
        Self { fuel: 500_000, output_bytes_max: 1 << 20, source_bytes_max: 1 << 20, clock: now }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Whether the text ends with the opening of the assistant's answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// It does: the model answers.
    #[default]
    Add,
    /// It ends with the last message.
    Omit,
}

/// A rendered chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// What the model is to see; special tokens are spelled out in it.
    pub text: String,
    /// Where messages, not the template, spell a special token: [`Tokenizer::encode_chat`] leaves
    /// these as text. Ascending, in bytes.
    pub message_spans: Vec<MessageSpan>,
    /// What was not done as the model's makers say, in words.
    pub warnings: Vec<String>,
}

/// ChatML, for models without a template whose vocabulary has its markers.
const CHATML: &str = "\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}";

/// Names before texts, for models without a template and without ChatML's markers.
const PLAIN: &str = "\
{%- for message in messages -%}
{{- (message.role | capitalize) + ': ' + message.content + '\n\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}";

/// Messages up to which the fuel grows with their square.
const MESSAGES_SUMMED_MAX: usize = 1000;

/// Stack of a render: deep values are dropped by recursion, and fuel pays for some 10^5 levels.
const STACK_BYTES: usize = 256 << 20;

/// The chat template of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    config: TemplateConfig,
    guard: guard::Guard,
    /// `bos_token` and its kin, by the names that templates use.
    names: Vec<(&'static str, String)>,
    warnings: Vec<String>,
}

impl ChatTemplate {
    /// The template of a checkpoint (`tokenizer.chat_template`). A model without one gets ChatML if
    /// its vocabulary has `<|im_start|>` and `<|im_end|>`, else `User: …`, `Assistant: …`; every
    /// render then warns.
    ///
    /// # Errors
    /// [`TemplateError`] if the template is no text, too long, or not in Jinja's language.
    pub fn from_metadata(
        metadata: &Metadata,
        tokenizer: &Tokenizer,
        config: TemplateConfig,
    ) -> Result<Self, TemplateError> {
        match metadata.str_opt("tokenizer.chat_template")? {
            Some(source) => Self::new(source, tokenizer, config),
            None => Self::fallback(tokenizer, config),
        }
    }

    /// The template for models without one.
    ///
    /// # Errors
    /// None in practice: the fallbacks are in Jinja's language.
    pub fn fallback(tokenizer: &Tokenizer, config: TemplateConfig) -> Result<Self, TemplateError> {
        let has = |name| tokenizer.special_named(name).is_some();
        let chatml = has("<|im_start|>") && has("<|im_end|>");
        let source = if chatml { CHATML } else { PLAIN };
        let mut template = Self::new(source, tokenizer, config)?;
        let form = if chatml { "ChatML" } else { "\"User: …\" and \"Assistant: …\" lines" };
        template.warnings.push(format!(
            "the model has no chat template; messages are written as {form}, which it may not have \
             been trained on"
        ));
        Ok(template)
    }

    /// A template by its text.
    ///
    /// # Errors
    /// [`TemplateError`] if it is too long, or not in Jinja's language.
    pub fn new(
        source: &str,
        tokenizer: &Tokenizer,
        config: TemplateConfig,
    ) -> Result<Self, TemplateError> {
        if source.len() > config.source_bytes_max {
            let (bytes, most) = (source.len(), config.source_bytes_max);
            let message = format!("the template has {bytes} bytes; at most {most}");
            return Err(TemplateError::without_place(message));
        }
        let environment = on_own_stack(|| environment::compile(source, config.clock))?;
        let name = |id| tokenizer.token_text(id);
        let names = [
            ("bos_token", tokenizer.bos()),
            ("eos_token", tokenizer.eos()),
            ("unk_token", tokenizer.roles.unknown),
            ("pad_token", tokenizer.roles.padding),
        ];
        let names = names.into_iter().map(|(key, id)| (key, id.map_or_else(String::new, name)));
        Ok(Self {
            environment,
            config,
            guard: guard::Guard::new(tokenizer),
            names: names.collect(),
            warnings: Vec::new(),
        })
    }

    /// What every render warns of.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Renders a chat.
    ///
    /// # Errors
    /// [`TemplateError`] if the template refuses the messages (with its own words), goes on for too
    /// long, or writes too much.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        prompt: GenerationPrompt,
    ) -> Result<Rendered, TemplateError> {
        let guarded = self.guard.mark(messages)?;
        let bytes: usize = guarded.messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let mut environment = self.environment.clone();
        // A template looks at a message's bytes a few times: at 64 bytes per fuel, 16 times. Some
        // gather the messages in a list, one sum each.
        let sums = messages.len().min(MESSAGES_SUMMED_MAX).pow(2);
        environment.set_fuel(Some(self.config.fuel + (bytes / 4 + sums) as u64));
        let limit = self.config.output_bytes_max + 4 * bytes;
        let context = self.context(&guarded.messages, prompt);
        let marked = on_own_stack(|| write(&environment, context, limit))?;
        let (text, message_spans) = guarded.unmark(&marked);
        Ok(Rendered { text, message_spans, warnings: self.warnings.clone() })
    }

    fn context(&self, messages: &[ChatMessage], prompt: GenerationPrompt) -> Value {
        let message = |message: &ChatMessage| {
            Value::from_pairs([
                ("role", Value::from(message.role.as_str())),
                ("content", Value::from(message.content.as_str())),
            ])
        };
        let names = self.names.iter().map(|(key, text)| (*key, Value::from(text.as_str())));
        let fixed = [
            ("messages", messages.iter().map(message).collect::<Vec<_>>().into()),
            ("add_generation_prompt", Value::from(prompt == GenerationPrompt::Add)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        Value::from_pairs(names.chain(fixed))
    }
}

/// Runs on a thread with a deep stack and waits for it.
fn on_own_stack<T: Send>(
    work: impl FnOnce() -> Result<T, TemplateError> + Send,
) -> Result<T, TemplateError> {
    let failed = |message: &str| TemplateError::without_place(message);
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("chat-template".to_owned())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|error| failed(&format!("no thread to render on: {error}")))?;
        thread.join().unwrap_or_else(|_| Err(failed("the template engine failed on it")))
    })
}

/// Takes text up to a bound.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + part.len() > self.limit {
            let message = format!("the text grows beyond {} bytes", self.limit);
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
        }
        self.bytes.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write(
    environment: &Environment<'_>,
    context: Value,
    limit: usize,
) -> Result<String, TemplateError> {
    let mut output = Bounded { bytes: Vec::new(), limit };
    let template = environment.get_template(environment::NAME).map_err(environment::place)?;
    // Dropped here, on this thread's stack: it holds the template's values.
    drop(template.render_captured_to(context, &mut output).map_err(environment::place)?);
    String::from_utf8(output.bytes).map_err(|error| TemplateError::without_place(error.to_string()))
}
