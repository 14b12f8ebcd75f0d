//! The client's reading side: every line finds the request that waits for it.

use super::ClientError;
use crate::server::protocol::{ErrorObject, Hello, WireEvent};
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{mpsc, oneshot};

/// Who waits for a line.
#[derive(Debug)]
pub(super) enum Pending {
    Call(oneshot::Sender<Result<Value, ClientError>>),
    Stream(mpsc::Sender<Result<WireEvent, ClientError>>),
}

#[derive(Debug, Default)]
struct State {
    waiting: HashMap<i64, Pending>,
    /// Why nothing will come any more.
    gone: Option<String>,
}

/// Who waits for which id.
#[derive(Debug, Default)]
pub(super) struct Routes {
    state: Mutex<State>,
}

/// Forgets a route when dropped, unless it is kept.
pub(super) struct Route<'a> {
    routes: &'a Routes,
    id: Option<i64>,
}

impl Route<'_> {
    pub(super) fn keep(mut self) {
        self.id = None;
    }
}

impl Drop for Route<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.routes.remove(id);
        }
    }
}

impl Routes {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, id: i64, pending: Pending) -> Result<Route<'_>, ClientError> {
        let mut state = self.lock();
        if let Some(reason) = &state.gone {
            return Err(ClientError::Gone { reason: reason.clone() });
        }
        state.waiting.insert(id, pending);
        Ok(Route { routes: self, id: Some(id) })
    }

    pub(super) fn remove(&self, id: i64) {
        self.lock().waiting.remove(&id);
    }

    pub(super) fn gone(&self) -> ClientError {
        let reason = self.lock().gone.clone();
        ClientError::Gone { reason: reason.unwrap_or_else(|| "closed".to_owned()) }
    }

    /// Ends everything that waits.
    pub(super) fn close(&self, reason: String) {
        let mut state = self.lock();
        state.gone = Some(reason.clone());
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        for pending in waiting.into_values() {
            let error = ClientError::Gone { reason: reason.clone() };
            match pending {
                // A receiver that is gone, or full of events that it has yet to read, learns of
                // the end when its channel closes.
                Pending::Call(answer) => drop(answer.send(Err(error))),
                Pending::Stream(events) => drop(events.try_send(Err(error))),
            }
        }
    }

    fn stream(&self, id: i64) -> Option<mpsc::Sender<Result<WireEvent, ClientError>>> {
        match self.lock().waiting.get(&id)? {
            Pending::Stream(events) => Some(events.clone()),
            Pending::Call(_) => None,
        }
    }

    async fn answer(&self, id: i64, outcome: Result<Value, ErrorObject>) {
        let is_stream = self.stream(id).is_some();
        if is_stream && outcome.is_ok() {
            // A subscription was accepted; its events follow.
            return;
        }
        let pending = self.lock().waiting.remove(&id);
        match (pending, outcome) {
            (Some(Pending::Call(answer)), outcome) => {
                drop(answer.send(outcome.map_err(ClientError::from)));
            }
            (Some(Pending::Stream(events)), Err(error)) => {
                drop(events.send(Err(error.into())).await);
            }
            _ => {}
        }
    }

    async fn event(&self, id: i64, event: WireEvent) {
        let Some(events) = self.stream(id) else { return };
        if event.is_terminal() {
            self.remove(id);
        }
        // Nobody reads a stream that was dropped.
        drop(events.send(Ok(event)).await);
    }
}

/// Any line of the server.
#[derive(Deserialize)]
struct Message {
    hello: Option<Hello>,
    id: Option<Value>,
    result: Option<Value>,
    error: Option<ErrorObject>,
    params: Option<EventParams>,
}

#[derive(Deserialize)]
struct EventParams {
    id: Value,
    #[serde(flatten)]
    event: WireEvent,
}

type Lines = BufReader<OwnedReadHalf>;

async fn read_message(lines: &mut Lines, line: &mut Vec<u8>) -> Result<Message, ClientError> {
    line.clear();
    let read = lines.read_until(b'\n', line).await;
    let bytes = read.map_err(|error| ClientError::Gone { reason: error.to_string() })?;
    if bytes == 0 {
        return Err(ClientError::Gone { reason: "the service closed it".to_owned() });
    }
    serde_json::from_slice(line).map_err(|error| ClientError::Protocol { got: error.to_string() })
}

/// The server speaks first: with its hello, or with the reason why it will not talk.
pub(super) async fn read_hello(lines: &mut Lines) -> Result<Hello, ClientError> {
    let message = read_message(lines, &mut Vec::new()).await?;
    match (message.hello, message.error) {
        (Some(hello), _) => Ok(hello),
        (None, Some(error)) => Err(error.into()),
        (None, None) => Err(ClientError::Protocol { got: "no hello".to_owned() }),
    }
}

/// Reads to the end of the connection.
pub(super) async fn route_lines(mut lines: Lines, routes: Arc<Routes>) {
    let mut line = Vec::new();
    let reason = loop {
        match read_message(&mut lines, &mut line).await {
            Ok(message) => {
                if let Some(reason) = route(&routes, message).await {
                    break reason;
                }
            }
            Err(ClientError::Gone { reason }) => break reason,
            Err(error) => break error.to_string(),
        }
    };
    routes.close(reason);
}

/// Hands a message on; the reason if it ends the connection.
async fn route(routes: &Routes, message: Message) -> Option<String> {
    if let Some(params) = message.params {
        routes.event(params.id.as_i64()?, params.event).await;
        return None;
    }
    match (message.id.as_ref().and_then(Value::as_i64), message.result, message.error) {
        (Some(id), Some(result), _) => routes.answer(id, Ok(result)).await,
        (Some(id), None, Some(error)) => routes.answer(id, Err(error)).await,
        // An error without an id is about the connection as a whole.
        (None, None, Some(error)) if message.id.is_none() => return Some(error.to_string()),
        _ => {}
    }
    None
}
