//! A client that speaks raw bytes: bytes in, lines out, everything with a deadline.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Longer than any answer takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// One connection.
pub struct RawClient {
    socket: UnixStream,
    unread: Vec<u8>,
}

impl RawClient {
    /// Connects and reads nothing.
    pub fn connect_silently(path: &Path) -> Self {
        let socket = UnixStream::connect(path).expect("a listening socket");
        socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
        socket.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        Self { socket, unread: Vec::new() }
    }

    /// Connects and reads the hello.
    pub fn connect(path: &Path) -> Self {
        let mut client = Self::connect_silently(path);
        let hello = client.json();
        assert_eq!(hello["hello"]["protocol"]["major"], 1, "{hello}");
        client
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.socket.write_all(bytes.as_ref()).expect("a server that reads");
    }

    /// Sends bytes and says whether the server took them all.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.socket.write_all(bytes.as_ref()).is_ok()
    }

    /// Sends a value as a line.
    pub fn say(&mut self, message: &Value) {
        self.send(format!("{message}\n"));
    }

    /// Sends a request.
    pub fn ask(&mut self, id: impl Into<Value>, method: &str, params: Value) {
        self.say(&json!({"id": id.into(), "method": method, "params": params}));
    }

    /// The next line; `None` at the end of the connection.
    pub fn line(&mut self) -> Option<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line = self.unread.drain(..=end).collect::<Vec<u8>>();
                return Some(String::from_utf8(line).expect("UTF-8").trim_end().to_owned());
            }
            let mut chunk = [0; 65_536];
            match self.socket.read(&mut chunk) {
                Ok(0) => {
                    assert!(self.unread.is_empty(), "a cut line: {:?}", self.unread);
                    return None;
                }
                Ok(bytes) => self.unread.extend_from_slice(&chunk[..bytes]),
                // The server closed with bytes of ours unread.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Err(error)
                    if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) =>
                {
                    assert!(Instant::now() < deadline, "no line within {PATIENCE:?}");
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The next line as JSON.
    pub fn json(&mut self) -> Value {
        let line = self.line().expect("a line and not the end");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    /// The answer to request `id`, skipping events.
    pub fn answer(&mut self, id: impl Into<Value>) -> Value {
        let id = id.into();
        loop {
            let message = self.json();
            if message.get("method").is_none() && message["id"] == id {
                return message;
            }
        }
    }

    /// The error that a request is answered with.
    pub fn error(&mut self, id: impl Into<Value>) -> Value {
        let answer = self.answer(id);
        assert!(answer.get("result").is_none(), "{answer}");
        answer["error"].clone()
    }

    /// The result that a request is answered with.
    pub fn result(&mut self, id: impl Into<Value>) -> Value {
        let answer = self.answer(id);
        assert!(answer.get("error").is_none(), "{answer}");
        answer["result"].clone()
    }

    /// The next event's params.
    pub fn event(&mut self) -> Value {
        let message = self.json();
        assert_eq!(message["method"], "event", "{message}");
        message["params"].clone()
    }

    /// All events of a stream up to its terminal one, which nothing else may interrupt.
    pub fn events(&mut self) -> Vec<Value> {
        let mut events = Vec::new();
        loop {
            events.push(self.event());
            let kind = &events[events.len() - 1]["type"];
            if kind == "done" || kind == "error" {
                return events;
            }
        }
    }

    /// Holds the connection to be alive.
    pub fn ping(&mut self) {
        self.ask("still there?", "ping", json!({}));
        assert_eq!(self.result("still there?")["pong"], true);
    }

    /// Says that nothing more will be said.
    pub fn half_close(&self) {
        self.socket.shutdown(Shutdown::Write).expect("an open socket");
    }

    /// Holds the server to have closed the connection, perhaps inside a line.
    pub fn expect_cut(&mut self) {
        let mut chunk = [0; 65_536];
        let deadline = Instant::now() + PATIENCE;
        while !matches!(self.socket.read(&mut chunk), Ok(0)) {
            assert!(Instant::now() < deadline, "still open after {PATIENCE:?}");
        }
    }

    /// Holds the server to have closed the connection, after whatever lines.
    pub fn expect_end(&mut self) {
        while self.line().is_some() {}
    }
}
