//! All that the server knows of an engine. `actors::Engine` implements it; so does any scripted
//! engine that a test needs.

use crate::request::{AddSpecial, Event, ParseSpecial, Request, RequestError};
use crate::units::TokenId;
use futures_core::Stream;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::time::Duration;

/// Where the service is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServiceState {
    /// The model is being loaded; requests are refused as `not_ready`.
    Loading,
    /// Requests are served.
    Ready,
    /// Running requests may end, new ones are refused as `shutting_down`.
    Draining,
    /// The engine is gone.
    Stopped,
}

/// One look at an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineReport {
    /// Where it is in its life.
    pub state: ServiceState,
    /// Steps computed since its start: what the watchdog watches.
    pub steps: u64,
    /// Whether there is work that a step could do now; paused sequences are none.
    pub has_work: bool,
    /// The engine's own words on itself.
    pub details: Value,
}

/// A request's events. Dropping it cancels the request.
pub trait EventStream: Stream<Item = Event> + Send + Unpin {
    /// Asks for the end; the terminal event still comes.
    fn cancel(&self);
}

/// The engine's side of the server.
pub trait EngineHandle: Send + Sync + 'static {
    /// Submits a request; refusals come as the only event.
    fn generate(&self, request: Request) -> Box<dyn EventStream>;

    /// Encodes a text.
    fn tokenize(
        &self,
        text: String,
        add_special: AddSpecial,
        parse_special: ParseSpecial,
    ) -> BoxFuture<'_, Result<Vec<TokenId>, RequestError>>;

    /// Decodes tokens.
    fn detokenize(&self, tokens: Vec<TokenId>) -> BoxFuture<'_, Result<String, RequestError>>;

    /// The models served, each an object with at least `name`; none while loading.
    fn models(&self) -> Vec<Value>;

    /// What lies where; `None` while loading.
    fn plan(&self) -> Option<Value>;

    /// State and progress.
    fn report(&self) -> EngineReport;

    /// All figures.
    fn stats(&self) -> Value;

    /// Resolves when a token can be generated, or with the reason why that will never be.
    fn ready(&self) -> BoxFuture<'_, Result<(), String>>;

    /// Resolves when the engine is gone for good, with the reason.
    fn ended(&self) -> BoxFuture<'_, String>;

    /// Refuses new requests, lets running ones end for at most `drain`, ends the rest. A second
    /// call with a shorter time shortens the wait.
    fn shutdown(&self, drain: Duration) -> BoxFuture<'_, ()>;
}
