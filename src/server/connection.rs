//! One client: reads its lines until it has said everything, is gone, or the server ends.

use super::dispatch::{Dispatcher, Next};
use super::hangup::hung_up;
use super::live::LiveTable;
use super::outbox::{self, Gone};
use super::protocol::{
    ErrorObject, FrameBuffer, FrameTooLarge, Inbound, Refused, hello_line, read_line,
};
use super::service::Service;
use std::io::ErrorKind;
use std::sync::Arc;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Room for one read. Taken only when there is something to read.
const READ_BYTES: usize = 64 * 1024;
/// Lines from this length on are parsed on a thread that may block.
const LONG_LINE_BYTES: usize = 64 * 1024;

/// Why a connection reads no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// The client has said everything (or is gone: that shows next).
    Input,
    /// The client broke a rule that ends its connection.
    Refused,
    /// The server ends.
    Server,
}

struct Connection {
    dispatcher: Dispatcher,
    socket: OwnedReadHalf,
    buffer: FrameBuffer,
}

/// Serves one client to the end. `gone` ends it at once.
pub(super) async fn serve(service: Arc<Service>, socket: UnixStream, gone: CancellationToken) {
    let (socket, writing) = socket.into_split();
    let (outbox, writer) = outbox::open(writing, gone.clone());
    let writer = tokio::spawn(writer);
    // The queue is empty and the writer is alive, so this does not wait.
    let _ = outbox.control.send(hello_line(&service.hello())).await;
    let buffer = FrameBuffer::new(service.options.limits.frame_bytes_max);
    let live = Arc::<LiveTable>::default();
    let tasks = TaskTracker::new();
    let dispatcher = Dispatcher { service, outbox, live, tasks, gone: gone.clone() };
    let mut connection = Connection { dispatcher, socket, buffer };
    let ended = gone.run_until_cancelled(connection.read()).await;
    if let Some(Ok(ended)) = ended {
        connection.finish(ended, writer).await;
    }
    gone.cancel();
}

impl Connection {
    async fn read(&mut self) -> Result<Ended, Gone> {
        let closing = self.dispatcher.service.closing.clone();
        loop {
            if self.handle_lines().await? == Next::Close {
                return Ok(Ended::Refused);
            }
            self.buffer.release();
            tokio::select! {
                biased;
                () = closing.cancelled() => return Ok(Ended::Server),
                ready = self.socket.readable() => ready.map_err(|_| Gone)?,
            }
            match self.socket.try_read_buf(self.buffer.space(READ_BYTES)) {
                Ok(0) => return self.end_of_input().await,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return Err(Gone),
            }
        }
    }

    /// Answers all whole lines at hand.
    async fn handle_lines(&mut self) -> Result<Next, Gone> {
        loop {
            let line = match self.buffer.next_frame() {
                Ok(Some(line)) => line,
                Ok(None) => return Ok(Next::Line),
                Err(FrameTooLarge { limit }) => {
                    let error = ErrorObject::frame_too_large(limit);
                    self.dispatcher.refuse(None, &error).await?;
                    return Ok(Next::Close);
                }
            };
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let read = parse(&self.dispatcher.service, line).await;
            if self.dispatcher.handle(read).await? == Next::Close {
                return Ok(Next::Close);
            }
        }
    }

    async fn end_of_input(&mut self) -> Result<Ended, Gone> {
        let rest = self.buffer.partial_bytes();
        if rest > 0 {
            let message = format!("the input ended inside a line, after {rest} bytes of it");
            self.dispatcher.refuse(None, &ErrorObject::parse_error(message)).await?;
        }
        Ok(Ended::Input)
    }

    /// Waits until running requests have ended and everything is written; not for ever.
    async fn finish(self, ended: Ended, writer: tokio::task::JoinHandle<()>) {
        let Dispatcher { service, outbox, live, tasks, gone } = self.dispatcher;
        if ended == Ended::Refused {
            live.cancel_all();
        }
        tasks.close();
        let written = async {
            tasks.wait().await;
            drop(outbox);
            // A writer that panicked has nothing left to write either.
            let _ = writer.await;
        };
        let late = async {
            if ended == Ended::Input {
                service.closing.cancelled().await;
            }
            tokio::time::sleep(service.flush_time()).await;
        };
        tokio::select! {
            () = written => {}
            () = late => {}
            () = gone.cancelled() => {}
            Ok(()) = hung_up(self.socket.as_ref()) => {}
        }
    }
}

async fn parse(service: &Service, line: &[u8]) -> Result<Inbound, Refused> {
    let limits = service.json_limits();
    if line.len() < LONG_LINE_BYTES {
        return read_line(line, limits);
    }
    let line = line.to_vec();
    let read = tokio::task::spawn_blocking(move || read_line(&line, limits)).await;
    read.unwrap_or_else(|error| Err(ErrorObject::parse_error(error.to_string()).into()))
}
