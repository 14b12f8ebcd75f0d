//! The engine as a library user and the server see it: submit requests, ask for figures, stop.

use super::builder::EngineBuilder;
use super::shared::{Life, Shared};
use super::text::{RenderedChat, TextWork};
use super::{EngineError, Generation, ModelInfo, StatsSnapshot, Status, StepOps, stream};
use crate::placement::Placement;
use crate::request::{AddSpecial, ChatMessage, ParseSpecial, Request, RequestError};
use crate::telemetry::StepTrace;
use crate::units::TokenId;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

/// A running model: its threads, its memory and its actors. Cheap to clone; when the last clone
/// and the last [`Generation`] are dropped, the engine stops and frees everything.
///
/// Its futures run on any executor; the engine brings its own threads.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use tandem::actors::Engine;
/// use tandem::request::{Event, Request};
///
/// let engine = Engine::builder().model("model.gguf").build().await?;
/// let mut answer = engine.generate(Request::text("The capital of France is").max_tokens(16));
/// while let Some(event) = answer.next().await {
///     if let Event::Delta(delta) = event {
///         eprint!("{}", delta.text);
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Engine {
    anchor: Arc<Anchor>,
}

/// Held by every clone of an engine and every live generation; the last one to go stops the
/// engine.
pub(super) struct Anchor {
    pub(super) shared: Arc<Shared>,
}

impl std::fmt::Debug for Anchor {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Engine").field("status", &self.shared.status()).finish()
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        self.shared.drain(Duration::ZERO);
    }
}

impl Engine {
    /// An engine in the making.
    pub fn builder() -> EngineBuilder {
        EngineBuilder::default()
    }

    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { anchor: Arc::new(Anchor { shared }) }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.anchor.shared
    }

    /// Waits until the model is loaded.
    ///
    /// # Errors
    /// Why it could not be loaded, or that the engine was shut down meanwhile.
    pub async fn ready(&self) -> Result<(), EngineError> {
        let mut life = self.shared().life.subscribe();
        let reached = life.wait_for(|life| *life != Life::Loading).await;
        match reached.map(|life| life.clone()) {
            Ok(Life::Ready) => Ok(()),
            Ok(Life::Dead(error)) => Err(error),
            _ => Err(EngineError::Stopped),
        }
    }

    /// Submits a request. Everything that can go wrong with it, a full queue included, comes as
    /// the stream's terminal event.
    pub fn generate(&self, request: Request) -> Generation {
        stream::start(&self.anchor, request)
    }

    /// Encodes a text.
    ///
    /// # Errors
    /// A tokenizer that refuses, a full queue, an engine that is not ready.
    pub async fn tokenize(
        &self,
        text: impl Into<String>,
        add_special: AddSpecial,
        parse_special: ParseSpecial,
    ) -> Result<Vec<TokenId>, RequestError> {
        let work = TextWork::Encode { text: text.into(), add_special, parse_special };
        Ok(self.shared().work_on_text(work).await?.tokens)
    }

    /// Decodes tokens. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// A token outside the vocabulary, a full queue, an engine that is not ready.
    pub async fn detokenize(&self, tokens: Vec<TokenId>) -> Result<String, RequestError> {
        Ok(self.shared().work_on_text(TextWork::Decode { tokens }).await?.text)
    }

    /// Renders a chat through the model's template, ready for the answer.
    ///
    /// # Errors
    /// A template that fails, a full queue, an engine that is not ready.
    pub async fn apply_template(
        &self,
        messages: Vec<ChatMessage>,
    ) -> Result<RenderedChat, RequestError> {
        let done = self.shared().work_on_text(TextWork::Render { messages }).await?;
        Ok(RenderedChat { text: done.text, warnings: done.warnings })
    }

    /// The model; `None` while it is being loaded.
    pub fn model_info(&self) -> Option<ModelInfo> {
        self.shared().loaded.get().map(|loaded| loaded.info.clone())
    }

    /// What lies where, in bytes; `None` while the model is being loaded.
    pub fn plan(&self) -> Option<Placement> {
        self.shared().loaded.get().map(|loaded| loaded.placement.clone())
    }

    /// State, restarts, uptime.
    pub fn status(&self) -> Status {
        self.shared().status()
    }

    /// Resolves when the engine is dead or stopped, with the reason. A process that serves it
    /// should then end, and not with zero if the engine is dead.
    pub async fn ended(&self) -> EngineError {
        let mut life = self.shared().life.subscribe();
        let ended = life.wait_for(|life| matches!(life, Life::Dead(_) | Life::Stopped)).await;
        match ended.as_deref() {
            Ok(Life::Dead(error)) => error.clone(),
            _ => EngineError::Stopped,
        }
    }

    /// All figures.
    pub fn stats(&self) -> StatsSnapshot {
        self.shared().stats()
    }

    /// The last steps as a Trace Event Format document, for Chrome's or Perfetto's viewer.
    pub fn chrome_trace(&self) -> Value {
        self.shared().traces.chrome_trace()
    }

    /// The last steps with their phases, oldest first.
    pub fn step_traces(&self) -> Vec<StepTrace> {
        self.shared().traces.steps()
    }

    /// Counts how long each op of the steps takes that begin from now on. A GPU's steps are slower
    /// then, since they are launched op by op.
    pub fn start_op_times(&self) {
        self.shared().op_clock.start();
    }

    /// Ends the counting; what was counted since [`Engine::start_op_times`], by ascending tokens of
    /// a step. Of several GPUs no ops are told.
    pub fn take_op_times(&self) -> Vec<StepOps> {
        self.shared().op_clock.take()
    }

    /// Refuses new requests, lets running ones end for at most `drain`, ends the rest as
    /// `shutting_down`, and returns when every thread of the engine is gone. A second call with a
    /// shorter time shortens the wait.
    pub async fn shutdown(&self, drain: Duration) {
        self.shared().drain(drain);
        let mut gone = self.shared().gone.subscribe();
        // The sender lives in `shared`, which this call keeps alive.
        let _ = gone.wait_for(|gone| *gone).await;
        self.shared().join_root();
    }
}
