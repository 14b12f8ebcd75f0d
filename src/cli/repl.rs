//! The chat's prompt, without a terminal or a model in it: what a typed line means, and the
//! conversation that grows from it. `chat.rs` reads the lines and streams the answers.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use tandem::request::ChatMessage;
use tandem::server::protocol::{Catalogue, ChatParams, Method};

/// What `/help` prints.
pub const HELP: &str = "\
/help               this page
/reset              forget the conversation (the system message stays)
/save FILE          write the conversation and settings as JSON
/load FILE          read them back
/set NAME VALUE     change a sampling setting (null: the default); /set alone lists them
/stats              what the last answer took
/quit               leave (or Ctrl-D)
\"\"\" opens and closes a message of several lines; a \\ at a line's end continues it.
Ctrl-C stops the answer that is being written.";

/// What a finished input asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send this to the model.
    Say(String),
    /// Print [`HELP`].
    Help,
    /// Forget the conversation.
    Reset,
    /// Write it to a file.
    Save(PathBuf),
    /// Read it from a file.
    Load(PathBuf),
    /// List the sampling settings.
    ShowSettings,
    /// Change one.
    Set(String, serde_json::Value),
    /// Print the last answer's figures.
    Stats,
    /// Leave.
    Quit,
    /// Nothing was typed.
    Nothing,
    /// A command that is none, with what is wrong.
    Mistake(String),
}

/// Collects typed lines until they make one message.
#[derive(Clone, Debug, Default)]
pub struct LineCollector {
    lines: Vec<String>,
    quoted: bool,
}

impl LineCollector {
    /// Whether more lines are needed.
    pub fn is_open(&self) -> bool {
        self.quoted || !self.lines.is_empty()
    }

    /// Drops what was collected.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Takes one line; gives the whole message when it is complete.
    pub fn push(&mut self, line: &str) -> Option<String> {
        if self.quoted {
            match line.trim_end().strip_suffix("\"\"\"") {
                Some(last) => {
                    self.quoted = false;
                    if !last.is_empty() {
                        self.lines.push(last.to_owned());
                    }
                    return Some(std::mem::take(&mut self.lines).join("\n"));
                }
                None => self.lines.push(line.to_owned()),
            }
            return None;
        }
        if self.lines.is_empty()
            && let Some(first) = line.trim_start().strip_prefix("\"\"\"")
        {
            if let Some(whole) = first.trim_end().strip_suffix("\"\"\"") {
                return Some(whole.to_owned());
            }
            self.quoted = true;
            if !first.is_empty() {
                self.lines.push(first.to_owned());
            }
            return None;
        }
        match line.strip_suffix('\\') {
            Some(start) => {
                self.lines.push(start.to_owned());
                None
            }
            None => {
                self.lines.push(line.to_owned());
                Some(std::mem::take(&mut self.lines).join("\n"))
            }
        }
    }
}

/// What a complete message asks for.
pub fn interpret(message: &str) -> Action {
    let trimmed = message.trim();
    if trimmed.is_empty() {
        return Action::Nothing;
    }
    let Some(command) = trimmed.strip_prefix('/') else { return Action::Say(message.to_owned()) };
    let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    let rest = rest.trim();
    match (name, rest) {
        ("help" | "?", "") => Action::Help,
        ("reset", "") => Action::Reset,
        ("stats", "") => Action::Stats,
        ("quit" | "exit" | "bye", "") => Action::Quit,
        ("set", "") => Action::ShowSettings,
        ("save" | "load", "") => Action::Mistake(format!("/{name} needs a file name")),
        ("save", file) => Action::Save(PathBuf::from(file)),
        ("load", file) => Action::Load(PathBuf::from(file)),
        ("set", setting) => match setting.split_once(char::is_whitespace) {
            Some((key, value)) => Action::Set(key.to_owned(), literal(value.trim())),
            None => Action::Mistake(format!("/set {setting} needs a value")),
        },
        _ => Action::Mistake(format!("/{name} is no command, or takes no argument; see /help")),
    }
}

/// A number, a boolean or JSON where the text is one, else the text itself.
fn literal(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|_| serde_json::Value::String(text.to_owned()))
}

/// Parameters that the conversation itself decides: it streams one answer to its messages.
const FIXED: [&str; 4] = ["messages", "n", "session", "stream"];

/// A conversation with its settings, as `/save` writes it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conversation {
    /// All messages, the system message first if there is one.
    pub messages: Vec<ChatMessage>,
    /// Sampling parameters in the protocol's words.
    pub settings: serde_json::Map<String, serde_json::Value>,
}

impl Conversation {
    /// Forgets all but the system message.
    pub fn reset(&mut self) {
        self.messages.retain(|message| message.role == "system");
    }

    /// Refuses settings that the service would refuse or ignore, before they spoil every message,
    /// and those that a conversation can't have.
    ///
    /// # Errors
    /// What is wrong, for the person who typed it.
    pub fn check(settings: &serde_json::Map<String, serde_json::Value>) -> Result<(), String> {
        if let Some(name) = FIXED.iter().find(|name| settings.contains_key(**name)) {
            return Err(format!("{name} is no setting of a conversation"));
        }
        let mut params = settings.clone();
        params.insert("messages".into(), serde_json::json!([{ "role": "user", "content": "" }]));
        let mut warnings = Vec::new();
        let read = Catalogue::default().read::<ChatParams>(Method::Chat, params, &mut warnings);
        read.and_then(ChatParams::into_request).map_err(|error| error.message)?;
        warnings.into_iter().next().map_or(Ok(()), Err)
    }

    /// Adds one message.
    pub fn push(&mut self, role: &str, content: impl Into<String>) {
        self.messages.push(ChatMessage { role: role.to_owned(), content: content.into() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_and_continued_lines_make_one_message() {
        let mut lines = LineCollector::default();
        assert_eq!(lines.push("\"\"\"first"), None);
        assert!(lines.is_open());
        assert_eq!(lines.push("  /second"), None);
        assert_eq!(lines.push("third\"\"\""), Some("first\n  /second\nthird".into()));
        assert_eq!(lines.push("one \\"), None);
        assert_eq!(lines.push("two"), Some("one \ntwo".into()));
        assert_eq!(lines.push("\"\"\"whole\"\"\""), Some("whole".into()));
        assert!(!lines.is_open());
    }

    #[test]
    fn commands_are_told_from_text() {
        assert_eq!(interpret("  "), Action::Nothing);
        assert_eq!(interpret("say /help"), Action::Say("say /help".into()));
        assert_eq!(interpret("/set top_k 40"), Action::Set("top_k".into(), 40.into()));
        assert_eq!(interpret("/save a b.json"), Action::Save("a b.json".into()));
        assert!(matches!(interpret("/save"), Action::Mistake(_)));
        assert!(matches!(interpret("/nonsense"), Action::Mistake(_)));
    }

    #[test]
    fn settings_are_checked_when_they_are_made() {
        let check = |settings: serde_json::Value| {
            Conversation::check(settings.as_object().expect("an object"))
        };
        assert_eq!(check(serde_json::json!({ "top_k": 40, "seed": null })), Ok(()));
        for (settings, part) in [
            (serde_json::json!({ "stream": false }), "stream"),
            (serde_json::json!({ "n": 2 }), "n is no setting"),
            (serde_json::json!({ "tempreture": 0 }), "tempreture"),
            (serde_json::json!({ "temperature": -5 }), "0 to 100"),
            (serde_json::json!({ "max_tokens": 0 }), "at least 1"),
        ] {
            let message = check(settings).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn reset_keeps_the_system_message() {
        let mut conversation = Conversation::default();
        conversation.push("system", "Be brief.");
        conversation.push("user", "Hello");
        conversation.reset();
        assert_eq!(conversation.messages.len(), 1);
    }
}
