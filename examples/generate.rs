//! Streams one answer: `cargo run --release --example generate -- MODEL.gguf "Once upon a time"`.

#![allow(clippy::print_stdout, reason = "an example talks to its reader")]

use std::io::Write;
use tandem::actors::Engine;
use tandem::request::{Event, Request};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().ok_or("usage: generate MODEL.gguf [PROMPT]")?;
    let prompt = arguments.next().unwrap_or_else(|| "Once upon a time".into());

    let engine = Engine::builder().model(model).build().await?;
    print!("{prompt}");
    let mut answer = engine.generate(Request::text(prompt).max_tokens(64));
    while let Some(event) = answer.next().await {
        match event {
            Event::Delta(delta) => print!("{}", delta.text),
            Event::Done(done) => {
                let rate = done.usage.completion_tokens as f64 / done.timings.decode_ms * 1000.0;
                println!("\n[{} tokens, {rate:.1}/s]", done.usage.completion_tokens);
            }
            Event::Failed(error) => return Err(error.into()),
            Event::Accepted { .. } | Event::Progress { .. } | Event::PromptLogprobs(_) => {}
        }
        std::io::stdout().flush()?;
    }
    Ok(())
}
