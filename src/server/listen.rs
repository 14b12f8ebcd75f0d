//! Accepts connections, checks who connects, and brings the whole server to its end.

use super::EngineHandle;
use super::admission::Permit;
use super::connection;
use super::notify;
use super::options::{ServerOptions, Stop};
use super::protocol::{ErrorObject, error_line};
use super::service::Service;
use super::shutdown::{Ending, until_over};
use super::unix::{Endpoint, EndpointError};
use crate::request::ErrorKind;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Pause after an `accept` that failed, such as for want of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// How much longer than their flush time connections may take to end.
const CLOSING_MARGIN: Duration = Duration::from_secs(1);

/// Serves an engine on a socket until told to stop, until a client asks for it, or until the engine
/// is gone. When this returns every connection is closed and the socket is removed.
///
/// # Errors
/// The socket cannot be used.
pub async fn serve(
    endpoint: Endpoint,
    engine: Arc<dyn EngineHandle>,
    options: ServerOptions,
    stop: Stop,
) -> Result<Ending, EndpointError> {
    let listener = endpoint.tokio_listener()?;
    tracing::info!(socket = %endpoint.path().display(), "listening");
    let service = Arc::new(Service::new(engine, options, stop.clone()));
    let connections = TaskTracker::new();
    let gone = CancellationToken::new();
    // Whatever way this future ends, its connections end with it.
    let _gone = gone.clone().drop_guard();
    let ending = tokio::select! {
        ending = until_over(&service, &stop) => ending,
        never = accept_all(&service, &listener, &connections, &gone) => match never {},
        never = watch(&service) => match never {},
    };
    service.closing.cancel();
    connections.close();
    let patience = service.flush_time() + CLOSING_MARGIN;
    if tokio::time::timeout(patience, connections.wait()).await.is_err() {
        gone.cancel();
        // Cancelled tasks end as soon as they are polled.
        connections.wait().await;
    }
    Ok(ending)
}

async fn watch(service: &Service) -> std::convert::Infallible {
    notify::run(service).await;
    std::future::pending().await
}

async fn accept_all(
    service: &Arc<Service>,
    listener: &UnixListener,
    connections: &TaskTracker,
    gone: &CancellationToken,
) -> std::convert::Infallible {
    loop {
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        match admit(service, &socket) {
            Ok(permit) => {
                let (service, gone) = (Arc::clone(service), gone.child_token());
                connections.spawn(async move {
                    connection::serve(service, socket, gone).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection was refused");
                service.admission.count_error();
                // A fresh socket has room for one line; a client that is gone needs none.
                let _ = socket.try_write(&error_line(None, &error));
            }
        }
    }
}

fn admit(service: &Service, socket: &UnixStream) -> Result<Permit, ErrorObject> {
    let owner = service.options.owner_uid;
    if let Err(error) = check_peer(socket.peer_cred().map(|peer| peer.uid()), owner) {
        service.admission.refuse_connection();
        return Err(error);
    }
    service.admission.connection(&service.options.limits)
}

/// The same user or root, by `SO_PEERCRED`.
fn check_peer(peer: io::Result<u32>, owner: u32) -> Result<(), ErrorObject> {
    let refuse = |who: String| {
        let message = format!("{who} may not connect; user {owner} and root may");
        ErrorObject::new(ErrorKind::Permission, message).with("allowed_uid", owner)
    };
    match peer {
        Ok(0) => Ok(()),
        Ok(uid) if uid == owner => Ok(()),
        Ok(uid) => Err(refuse(format!("user {uid}")).with("got_uid", uid)),
        Err(error) => Err(refuse(format!("a user who is not known ({error})"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_and_root_may_connect_and_nobody_else() {
        assert!(check_peer(Ok(1000), 1000).is_ok());
        assert!(check_peer(Ok(0), 1000).is_ok());
        let error = check_peer(Ok(1001), 1000).unwrap_err();
        assert_eq!(error.kind(), "permission");
        assert!(check_peer(Err(io::Error::other("no")), 1000).is_err());
    }
}
