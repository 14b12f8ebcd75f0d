//! Keeps what users write text: a special token that a message spells is marked before rendering,
//! so that afterwards it can be told from the template's own.
//!
//! The mark is one of Unicode's noncharacters, put before the token's spelling; templates move
//! texts around whole, so the mark comes out where the spelling does. A noncharacter that the
//! messages already have is not taken.

use super::TemplateError;
use crate::request::ChatMessage;
use crate::tokenizer::Tokenizer;
use aho_corasick::AhoCorasick;
use std::ops::Range;

/// Bytes of the rendered text in which a message spells a special token.
pub type MessageSpan = Range<usize>;

/// Noncharacters of the basic plane: never exchanged between programs, says Unicode.
const MARKS: std::ops::RangeInclusive<char> = '\u{FDD0}'..='\u{FDEF}';

/// Finds the spellings of tokens that steer the model.
#[derive(Clone, Debug)]
pub(super) struct Guard {
    steering: AhoCorasick,
}

/// Messages with marks.
pub(super) struct Guarded<'a> {
    pub messages: Vec<ChatMessage>,
    mark: char,
    guard: &'a Guard,
}

impl Guard {
    pub(super) fn new(tokenizer: &Tokenizer) -> Self {
        Self { steering: tokenizer.special.steering().clone() }
    }

    /// Marks every spelling of a steering token in the messages.
    pub(super) fn mark(&self, messages: &[ChatMessage]) -> Result<Guarded<'_>, TemplateError> {
        let taken = |mark: &char| {
            messages.iter().any(|m| m.role.contains(*mark) || m.content.contains(*mark))
        };
        let Some(mark) = MARKS.clone().find(|mark| !taken(mark)) else {
            let message = "the messages use all of Unicode's noncharacters U+FDD0 to U+FDEF";
            return Err(TemplateError::without_place(message));
        };
        let messages = messages.iter().map(|message| ChatMessage {
            role: self.mark_text(&message.role, mark),
            content: self.mark_text(&message.content, mark),
        });
        Ok(Guarded { messages: messages.collect(), mark, guard: self })
    }

    fn mark_text(&self, text: &str, mark: char) -> String {
        let mut marked = String::with_capacity(text.len());
        let mut done = 0;
        for found in self.steering.find_iter(text) {
            marked.push_str(&text[done..found.start()]);
            marked.push(mark);
            marked.push_str(&text[found.range()]);
            done = found.end();
        }
        marked.push_str(&text[done..]);
        marked
    }
}

impl Guarded<'_> {
    /// The rendered text without marks, and the spans that followed one.
    pub(super) fn unmark(&self, marked: &str) -> (String, Vec<MessageSpan>) {
        let mut text = String::with_capacity(marked.len());
        let mut spans = Vec::new();
        for (at, part) in marked.split(self.mark).enumerate() {
            let found = self.guard.steering.find(part).filter(|found| at > 0 && found.start() == 0);
            if let Some(found) = found {
                spans.push(text.len()..text.len() + found.end());
            }
            text.push_str(part);
        }
        (text, spans)
    }
}
