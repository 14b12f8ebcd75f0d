//! A small typed client of the protocol: one connection, several requests at once. The command line
//! and tests use it.

mod reader;

use super::protocol::{ErrorObject, GenerationResult, Hello, PROTOCOL_MAJOR, RequestId, WireEvent};
use reader::{Pending, Routes};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::task::JoinHandle;

/// Unread events of one stream. A stream that is not read stops the whole connection there.
const EVENTS_MAX: usize = 64;

/// Why a client got no answer.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "fields are the facts that the message spells out")]
pub enum ClientError {
    #[error("{}: no service answers: {source}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("the service speaks protocol {got}, this client speaks {PROTOCOL_MAJOR}")]
    Version { got: u32 },
    #[error("the service said what the protocol does not know: {got}")]
    Protocol { got: String },
    #[error("the connection is gone: {reason}")]
    Gone { reason: String },
    #[error(transparent)]
    Refused(#[from] ErrorObject),
}

impl ClientError {
    /// Whether there is no service at all: no socket, or nobody behind it.
    pub fn is_no_service(&self) -> bool {
        let none = [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused];
        matches!(self, Self::Connect { source, .. } if none.contains(&source.kind()))
    }

    /// The service's own error, if it answered with one.
    pub fn refusal(&self) -> Option<&ErrorObject> {
        if let Self::Refused(error) = self { Some(error) } else { None }
    }
}

/// A connection to a service. Dropping it ends all of its requests.
#[derive(Debug)]
pub struct Client {
    hello: Hello,
    writing: Arc<Mutex<OwnedWriteHalf>>,
    routes: Arc<Routes>,
    next_id: AtomicI64,
    reader: JoinHandle<()>,
}

/// The events of one request, in order; the terminal one is the last.
#[derive(Debug)]
pub struct EventReader {
    id: i64,
    events: mpsc::Receiver<Result<WireEvent, ClientError>>,
    writing: Arc<Mutex<OwnedWriteHalf>>,
    routes: Arc<Routes>,
}

impl Client {
    /// Connects and reads the hello.
    ///
    /// # Errors
    /// Nobody answers, another protocol, or the server's refusal.
    pub async fn connect(path: &Path) -> Result<Self, ClientError> {
        let socket = UnixStream::connect(path)
            .await
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let (reading, writing) = socket.into_split();
        let mut lines = BufReader::new(reading);
        let hello = reader::read_hello(&mut lines).await?;
        if hello.protocol.major != PROTOCOL_MAJOR {
            return Err(ClientError::Version { got: hello.protocol.major });
        }
        let routes = Arc::<Routes>::default();
        let reader = tokio::spawn(reader::route_lines(lines, Arc::clone(&routes)));
        let writing = Arc::new(Mutex::new(writing));
        Ok(Self { hello, writing, routes, next_id: AtomicI64::new(1), reader })
    }

    /// What the server said of itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Waits until the server has closed the connection.
    pub async fn closed(&mut self) {
        // A reader that panicked reads no more either.
        let _ = (&mut self.reader).await;
    }

    /// Calls a method that has one result.
    ///
    /// # Errors
    /// The server's refusal, or a connection that is gone.
    pub async fn call<R: DeserializeOwned>(
        &self,
        method: &str,
        params: Value,
    ) -> Result<R, ClientError> {
        let (answer, waiting) = oneshot::channel();
        let id = self.next_id.fetch_add(1, Relaxed);
        let _route = self.routes.add(id, Pending::Call(answer))?;
        send(&self.writing, id, method, params).await?;
        let result = waiting.await.unwrap_or_else(|_| Err(self.routes.gone()))?;
        let shown = result.to_string();
        serde_json::from_value(result).map_err(|error| ClientError::Protocol {
            got: format!("{error} in {}", shown.chars().take(200).collect::<String>()),
        })
    }

    /// Calls `generate` or `chat` for a whole answer, or another method with such a result.
    ///
    /// # Errors
    /// The server's refusal, or a connection that is gone.
    pub async fn whole(
        &self,
        method: &str,
        mut params: Value,
    ) -> Result<GenerationResult, ClientError> {
        if let Value::Object(fields) = &mut params {
            fields.insert("stream".to_owned(), Value::Bool(false));
        }
        self.call(method, params).await
    }

    /// Calls a method that has events: `generate`, `chat`, `stats.subscribe`. A request that is
    /// refused gives its error as the first and only item.
    ///
    /// # Errors
    /// A connection that is gone.
    pub async fn stream(&self, method: &str, params: Value) -> Result<EventReader, ClientError> {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let id = self.next_id.fetch_add(1, Relaxed);
        let route = self.routes.add(id, Pending::Stream(sender))?;
        send(&self.writing, id, method, params).await?;
        route.keep();
        let (writing, routes) = (Arc::clone(&self.writing), Arc::clone(&self.routes));
        Ok(EventReader { id, events, writing, routes })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.reader.abort();
        self.routes.close("the client was dropped".to_owned());
    }
}

impl EventReader {
    /// The next event; `None` after the last.
    ///
    /// # Errors
    /// The server's refusal of the request, or a connection that is gone.
    pub async fn next(&mut self) -> Option<Result<WireEvent, ClientError>> {
        self.events.recv().await
    }

    /// Asks for the end and does not wait for the answer: the terminal event still comes.
    ///
    /// # Errors
    /// A connection that is gone.
    pub async fn cancel(&self) -> Result<(), ClientError> {
        // An id of its own kind, so that its answer finds no route and is dropped.
        let id = RequestId::Text(format!("cancel {}", self.id));
        let line = json!({"id": id, "method": "cancel", "params": {"id": self.id}});
        write(&self.writing, line).await
    }
}

impl Drop for EventReader {
    fn drop(&mut self) {
        self.routes.remove(self.id);
    }
}

async fn send(
    writing: &Mutex<OwnedWriteHalf>,
    id: i64,
    method: &str,
    params: Value,
) -> Result<(), ClientError> {
    write(writing, json!({"id": id, "method": method, "params": params})).await
}

async fn write(writing: &Mutex<OwnedWriteHalf>, message: Value) -> Result<(), ClientError> {
    let line = format!("{message}\n");
    let mut writing = writing.lock().await;
    let written = writing.write_all(line.as_bytes()).await;
    written.map_err(|error| ClientError::Gone { reason: error.to_string() })
}
