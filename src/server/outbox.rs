//! The way out of a connection: control replies overtake stream data, and a client that does not
//! read stops its own streams and nobody else's.

use super::protocol::Line;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::mpsc::{self, Receiver, Sender, error::SendError};
use tokio_util::sync::CancellationToken;

/// Control replies that wait for the socket; then the connection's reader waits too.
const CONTROL_LINES_MAX: usize = 64;
/// Stream lines that wait for the socket; then the streams wait, and behind them the engine.
const STREAM_LINES_MAX: usize = 16;
/// Lines are written together up to so many bytes: few system calls, and a control reply waits for
/// no more than this.
const BATCH_BYTES: usize = 16 * 1024;

/// Both queues of a connection's writer. The writer ends when all clones are gone.
#[derive(Clone, Debug)]
pub(super) struct Outbox {
    /// For answers that must not wait behind streams.
    pub(super) control: Sender<Line>,
    /// For events and whole results.
    pub(super) stream: Sender<Line>,
}

/// The connection is gone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gone;

impl From<SendError<Line>> for Gone {
    fn from(_: SendError<Line>) -> Self {
        Self
    }
}

impl From<SendError<()>> for Gone {
    fn from(_: SendError<()>) -> Self {
        Self
    }
}

/// The queues and the writer that empties them. The writer cancels `gone` if the socket fails.
pub(super) fn open(
    socket: OwnedWriteHalf,
    gone: CancellationToken,
) -> (Outbox, impl Future<Output = ()> + Send + 'static) {
    let (control, control_lines) = mpsc::channel(CONTROL_LINES_MAX);
    let (stream, stream_lines) = mpsc::channel(STREAM_LINES_MAX);
    let writer = async move {
        let writing = write(socket, control_lines, stream_lines);
        if !matches!(gone.run_until_cancelled(writing).await, Some(Ok(()))) {
            gone.cancel();
        }
    };
    (Outbox { control, stream }, writer)
}

async fn write(
    mut socket: OwnedWriteHalf,
    mut control: Receiver<Line>,
    mut stream: Receiver<Line>,
) -> std::io::Result<()> {
    loop {
        let mut batch = tokio::select! {
            biased;
            Some(line) = control.recv() => line,
            Some(line) = stream.recv() => line,
            else => return socket.shutdown().await,
        };
        for queue in [&mut control, &mut stream] {
            while batch.len() < BATCH_BYTES {
                let Ok(line) = queue.try_recv() else { break };
                batch.extend_from_slice(&line);
            }
        }
        socket.write_all(&batch).await?;
    }
}
