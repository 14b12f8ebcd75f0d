//! `tandem chat`: a conversation at the terminal, or one question with `--prompt`. Lines come from
//! rustyline, which keeps a history file; what they mean is `repl.rs`.

use super::answer::{self, Answer};
use super::arguments::{Command, SamplingArguments};
use super::connection::{Connection, Place};
use super::failure::{Exit, INTERRUPTED};
use super::generate::text_or_stdin;
use super::output::Output;
use super::repl::{Action, Conversation, HELP, LineCollector, interpret};
use super::sampling_params;
use anyhow::{Context, Result};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::{Map, Value, json};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use tandem::server::protocol::{Catalogue, ChatParams, Method};

/// How to talk.
#[derive(Clone, Debug)]
pub struct ChatOptions {
    /// One question instead of a conversation.
    pub prompt: Option<String>,
    /// System message.
    pub system: Option<String>,
    /// Sampling flags.
    pub sampling: SamplingArguments,
    /// Where typed lines are remembered.
    pub history: Option<PathBuf>,
}

impl ChatOptions {
    /// Takes its part of a parsed command.
    pub fn from_command(command: &Command, history: Option<PathBuf>) -> Option<Self> {
        let Command::Chat { prompt, system, sampling, .. } = command else { return None };
        Some(Self {
            prompt: prompt.clone(),
            system: system.clone(),
            sampling: sampling.clone(),
            history,
        })
    }
}

struct Chat {
    connection: Connection,
    conversation: Conversation,
    last: Option<Answer>,
    output: Output,
}

/// Runs the conversation.
///
/// # Errors
/// The service or the engine can't be reached, or refuses the one question.
pub async fn run(options: ChatOptions, place: Place, output: Output) -> Result<()> {
    let interactive = options.prompt.is_none() && std::io::stdin().is_terminal();
    let question = match interactive {
        true => None,
        false => Some(text_or_stdin(options.prompt, "prompt")?),
    };
    let mut conversation =
        Conversation { messages: Vec::new(), settings: sampling_params::params(&options.sampling) };
    if let Some(system) = options.system {
        conversation.push("system", system);
    }
    let connection = Connection::open(place, output).await?;
    let mut chat = Chat { connection, conversation, last: None, output };
    match question {
        Some(question) => chat.ask_once(question).await?,
        None => chat.converse(options.history.as_deref()).await?,
    }
    chat.connection.close().await
}

impl Chat {
    async fn ask_once(&mut self, question: String) -> Result<()> {
        self.say(question).await?;
        if self.last.as_ref().is_some_and(|answer| answer.interrupted) {
            return Err(Exit { code: INTERRUPTED, message: "interrupted".into() }.into());
        }
        Ok(())
    }

    async fn say(&mut self, text: String) -> Result<()> {
        self.conversation.push("user", text);
        let mut params = self.conversation.settings.clone();
        params.insert("messages".into(), json!(self.conversation.messages));
        let params = Value::Object(params);
        match answer::stream(&mut self.connection, "chat", params, self.output).await {
            Ok(answer) => {
                self.conversation.push("assistant", answer.text.clone());
                self.last = Some(answer);
                Ok(())
            }
            Err(error) => {
                self.conversation.messages.pop();
                Err(error)
            }
        }
    }

    async fn converse(&mut self, history: Option<&Path>) -> Result<()> {
        let mut editor = DefaultEditor::new().context("the terminal")?;
        if let Some(file) = history {
            // A first run has no history, and a broken one is not worth failing for.
            let _ = editor.load_history(file);
        }
        self.output.notice("/help lists the commands, Ctrl-D leaves")?;
        let mut lines = LineCollector::default();
        loop {
            let prompt = if lines.is_open() { "… " } else { "> " };
            let read = tokio::task::block_in_place(|| editor.readline(prompt));
            let message = match read {
                Ok(line) => lines.push(&line),
                Err(ReadlineError::Interrupted) => {
                    lines.clear();
                    None
                }
                Err(ReadlineError::Eof) => break,
                Err(error) => return Err(error).context("the terminal"),
            };
            let Some(message) = message else { continue };
            let _ = editor.add_history_entry(&message);
            match self.act(interpret(&message)).await {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => self.output.notice(&format!("error: {error:#}"))?,
            }
        }
        if let Some(file) = history {
            if let Some(folder) = file.parent() {
                std::fs::create_dir_all(folder).context("the history's folder")?;
            }
            editor.save_history(file).context("the history file")?;
        }
        Ok(())
    }

    /// Does what a message asks for; true to leave.
    async fn act(&mut self, action: Action) -> Result<bool> {
        match action {
            Action::Quit => return Ok(true),
            Action::Nothing => {}
            Action::Say(text) => self.say(text).await?,
            Action::Help => self.output.line(HELP)?,
            Action::Reset => self.conversation.reset(),
            Action::Mistake(message) => self.output.notice(&message)?,
            Action::ShowSettings => {
                for (name, value) in &self.conversation.settings {
                    self.output.line(&format!("{name} {value}"))?;
                }
            }
            Action::Set(name, value) => match refusal(&name, &value) {
                Some(message) => self.output.notice(&message)?,
                None => drop(self.conversation.settings.insert(name, value)),
            },
            Action::Stats => match &self.last {
                Some(answer) => self.output.line(&answer::figures(&answer.done))?,
                None => self.output.notice("nothing was answered yet")?,
            },
            Action::Save(file) => {
                let text = serde_json::to_string_pretty(&self.conversation)?;
                std::fs::write(&file, text).with_context(|| file.display().to_string())?;
            }
            Action::Load(file) => {
                let text =
                    std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
                let loaded = serde_json::from_str(&text);
                self.conversation = loaded.with_context(|| file.display().to_string())?;
            }
        }
        Ok(false)
    }
}

/// Why a sampling setting can't be what it is set to, checked as the service will.
fn refusal(name: &str, value: &Value) -> Option<String> {
    if matches!(name, "messages" | "stream") {
        return Some(format!("{name} is the chat's own"));
    }
    let mut params = Map::new();
    params.insert("messages".to_owned(), json!([{ "role": "user", "content": "" }]));
    params.insert(name.to_owned(), value.clone());
    let mut warnings = Vec::new();
    let checked = Catalogue::default().read::<ChatParams>(Method::Chat, params, &mut warnings);
    match (checked, warnings.is_empty()) {
        (Err(error), _) => Some(error.message),
        (Ok(_), false) => Some(format!("{name} is no setting; docs/protocol.md lists them")),
        (Ok(_), true) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_refused_when_they_are_made() {
        assert_eq!(refusal("top_k", &json!(40)), None);
        assert!(refusal("nonsense", &json!(3)).is_some_and(|why| why.contains("nonsense")));
        assert!(refusal("temperature", &json!(-1)).is_some_and(|why| why.contains("0 to 100")));
        assert!(refusal("messages", &json!([])).is_some());
    }
}
