//! The real engine behind the server's seam.

use super::engine_handle::{EngineHandle, EngineReport, EventStream, ServiceState};
use crate::actors::{Engine, EngineState, Generation};
use crate::request::{AddSpecial, ParseSpecial, Request, RequestError};
use crate::units::TokenId;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::Value;
use std::time::Duration;

impl EventStream for Generation {
    fn cancel(&self) {
        Generation::cancel(self);
    }
}

/// Plain data as JSON; all of it serialises.
fn json(value: impl serde::Serialize) -> Value {
    serde_json::to_value(value).unwrap_or_default()
}

impl EngineHandle for Engine {
    fn generate(&self, request: Request) -> Box<dyn EventStream> {
        Box::new(Engine::generate(self, request))
    }

    fn tokenize(
        &self,
        text: String,
        add_special: AddSpecial,
        parse_special: ParseSpecial,
    ) -> BoxFuture<'_, Result<Vec<TokenId>, RequestError>> {
        Engine::tokenize(self, text, add_special, parse_special).boxed()
    }

    fn detokenize(&self, tokens: Vec<TokenId>) -> BoxFuture<'_, Result<String, RequestError>> {
        Engine::detokenize(self, tokens).boxed()
    }

    fn models(&self) -> Vec<Value> {
        self.model_info().map(json).into_iter().collect()
    }

    fn plan(&self) -> Option<Value> {
        let placement = Engine::plan(self)?;
        let explain = json(placement.explain());
        let mut plan = json(placement);
        if let Value::Object(fields) = &mut plan {
            fields.insert("explain".to_owned(), explain);
        }
        Some(plan)
    }

    fn report(&self) -> EngineReport {
        let stats = Engine::stats(self);
        let state = match stats.status.state {
            EngineState::Loading => ServiceState::Loading,
            EngineState::Ready => ServiceState::Ready,
            EngineState::Draining => ServiceState::Draining,
            EngineState::Stopped | EngineState::Dead => ServiceState::Stopped,
        };
        let sequences = stats.sequences;
        EngineReport {
            state,
            steps: stats.metrics.steps,
            has_work: sequences.running + sequences.waiting > sequences.paused,
            details: json(stats.status),
        }
    }

    fn stats(&self) -> Value {
        json(Engine::stats(self))
    }

    fn ready(&self) -> BoxFuture<'_, Result<(), String>> {
        Engine::ready(self).map(|ready| ready.map_err(|error| error.to_string())).boxed()
    }

    fn ended(&self) -> BoxFuture<'_, String> {
        Engine::ended(self).map(|error| error.to_string()).boxed()
    }

    fn shutdown(&self, drain: Duration) -> BoxFuture<'_, ()> {
        Engine::shutdown(self, drain).boxed()
    }
}
