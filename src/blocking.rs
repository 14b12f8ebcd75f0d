//! The library for programs that are not asynchronous: the same engine, waiting on the calling
//! thread. It works inside a tokio runtime as well: the engine has its own threads, so waiting
//! here cannot starve it, it only occupies the calling thread.

use crate::actors::{
    Answer, Canceller, EngineBuilder, EngineError, ModelInfo, RenderedChat, StatsSnapshot, Status,
};
use crate::request::{AddSpecial, ChatMessage, Event, ParseSpecial, Request, RequestError};
use crate::units::TokenId;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future on this thread. Unlike a runtime's `block_on` it asks for no runtime and
/// refuses none.
fn wait<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

/// A running model, see [`crate::actors::Engine`].
///
/// ```no_run
/// # fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use tandem::{actors, blocking::Engine, request::Request};
///
/// let engine = Engine::build(actors::Engine::builder().model("model.gguf"))?;
/// let text = engine.generate(Request::text("One, two,").max_tokens(8)).collect_text()?;
/// # let _ = text;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Engine {
    engine: crate::actors::Engine,
}

impl From<crate::actors::Engine> for Engine {
    fn from(engine: crate::actors::Engine) -> Self {
        Self { engine }
    }
}

impl Engine {
    /// Loads the model and returns the engine when it can generate.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn build(builder: EngineBuilder) -> Result<Self, EngineError> {
        Ok(Self { engine: wait(builder.build())? })
    }

    /// Submits a request; see [`crate::actors::Engine::generate`].
    pub fn generate(&self, request: Request) -> Generation {
        Generation { generation: self.engine.generate(request) }
    }

    /// Encodes a text.
    ///
    /// # Errors
    /// As [`crate::actors::Engine::tokenize`].
    pub fn tokenize(
        &self,
        text: impl Into<String>,
        add_special: AddSpecial,
        parse_special: ParseSpecial,
    ) -> Result<Vec<TokenId>, RequestError> {
        wait(self.engine.tokenize(text, add_special, parse_special))
    }

    /// Decodes tokens.
    ///
    /// # Errors
    /// As [`crate::actors::Engine::detokenize`].
    pub fn detokenize(&self, tokens: Vec<TokenId>) -> Result<String, RequestError> {
        wait(self.engine.detokenize(tokens))
    }

    /// Renders a chat through the model's template.
    ///
    /// # Errors
    /// As [`crate::actors::Engine::apply_template`].
    pub fn apply_template(&self, messages: Vec<ChatMessage>) -> Result<RenderedChat, RequestError> {
        wait(self.engine.apply_template(messages))
    }

    /// The model; `None` while it is being loaded.
    pub fn model_info(&self) -> Option<ModelInfo> {
        self.engine.model_info()
    }

    /// State, restarts, uptime.
    pub fn status(&self) -> Status {
        self.engine.status()
    }

    /// All figures.
    pub fn stats(&self) -> StatsSnapshot {
        self.engine.stats()
    }

    /// Stops; see [`crate::actors::Engine::shutdown`].
    pub fn shutdown(&self, drain: Duration) {
        wait(self.engine.shutdown(drain));
    }
}

/// One request's events as an iterator; see [`crate::actors::Generation`]. Dropping it cancels.
#[derive(Debug)]
#[must_use = "dropping a Generation cancels its request"]
pub struct Generation {
    generation: crate::actors::Generation,
}

impl Generation {
    /// Asks for the end; the terminal event still comes.
    pub fn cancel(&self) {
        self.generation.cancel();
    }

    /// A handle that cancels from another thread.
    pub fn canceller(&self) -> Canceller {
        self.generation.canceller()
    }

    /// Reads to the end and puts the texts together.
    ///
    /// # Errors
    /// The error that ended the stream.
    pub fn collect_answer(self) -> Result<Answer, RequestError> {
        wait(self.generation.collect())
    }

    /// Reads to the end and gives the first answer's text.
    ///
    /// # Errors
    /// The error that ended the stream.
    pub fn collect_text(self) -> Result<String, RequestError> {
        wait(self.generation.collect_text())
    }
}

impl Iterator for Generation {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        wait(self.generation.next())
    }
}
