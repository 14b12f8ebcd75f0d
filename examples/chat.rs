//! A conversation without async code: `cargo run --release --example chat -- MODEL.gguf`. Each line
//! is a message; an empty line or the end of input ends the chat.

#![allow(clippy::print_stdout, reason = "an example talks to its reader")]

use std::io::{BufRead, Write};
use tandem::request::{ChatMessage, Event, Request};
use tandem::{actors, blocking};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = std::env::args().nth(1).ok_or("usage: chat MODEL.gguf")?;
    let engine = blocking::Engine::build(actors::Engine::builder().model(model))?;
    let mut messages = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let content = line?;
        if content.is_empty() {
            break;
        }
        messages.push(ChatMessage { role: "user".into(), content });
        let mut answer = String::new();
        for event in engine.generate(Request::chat(messages.clone()).max_tokens(256)) {
            match event {
                Event::Delta(delta) => {
                    print!("{}", delta.text);
                    std::io::stdout().flush()?;
                    answer.push_str(&delta.text);
                }
                Event::Failed(error) => return Err(error.into()),
                _ => {}
            }
        }
        println!();
        messages.push(ChatMessage { role: "assistant".into(), content: answer });
    }
    Ok(())
}
