//! Tells a client that is gone from one that has only said all it wants to say (`SHUT_WR`).

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdStream;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Resolves when the other end is closed in both directions. Watches a duplicate of the descriptor,
/// so that it takes no readiness away from whoever writes.
///
/// # Errors
/// The system has no file descriptor left.
pub(super) async fn hung_up(socket: impl AsFd) -> io::Result<()> {
    let duplicate = StdStream::from(socket.as_fd().try_clone_to_owned()?);
    let watched = UnixStream::from_std(duplicate)?;
    // Linux reports EPOLLHUP for a stream socket that is shut in both directions.
    while !watched.ready(Interest::WRITABLE).await?.is_write_closed() {
        // Forgets this readiness, so that the next wait is for a change.
        let forget = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
        let _ = watched.try_io(Interest::WRITABLE, forget);
    }
    Ok(())
}
