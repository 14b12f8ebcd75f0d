//! The end of a server: waits for a reason, then lets running requests end for a bounded time.

use super::notify;
use super::options::Stop;
use super::service::Service;
use std::time::Duration;

/// How much longer than the drain time an engine may take to be gone.
const ENGINE_GRACE: Duration = Duration::from_secs(5);

/// Why a server ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was told to, by its process or by a client, and its engine has shut down.
    Drained,
    /// It was told to, and did not wait any longer for its engine.
    EngineLate,
    /// Its engine is gone; the process should not exit with zero.
    EngineGone {
        /// The engine's reason.
        reason: String,
    },
}

/// Resolves when the engine's work is over.
pub(super) async fn until_over(service: &Service, stop: &Stop) -> Ending {
    let mut asked = service.shutdown_asked.subscribe();
    let drain = tokio::select! {
        biased;
        () = stop.now.cancelled() => Duration::ZERO,
        () = stop.drain.cancelled() => service.options.drain,
        Ok(drain) = asked.wait_for(Option::is_some) => drain.unwrap_or_default(),
        reason = service.engine.ended() => {
            tracing::error!(reason, "the engine is gone");
            return Ending::EngineGone { reason };
        }
    };
    service.admission.drain();
    notify::stopping(service);
    tracing::info!(drain_ms = drain.as_millis() as u64, "draining");
    drain_engine(service, stop, drain).await
}

async fn drain_engine(service: &Service, stop: &Stop, mut drain: Duration) -> Ending {
    let mut asked = service.shutdown_asked.subscribe();
    loop {
        tokio::select! {
            biased;
            () = service.engine.shutdown(drain) => return Ending::Drained,
            () = stop.now.cancelled(), if !drain.is_zero() => drain = Duration::ZERO,
            Ok(shorter) = asked.wait_for(|asked| asked.is_some_and(|asked| asked < drain)) => {
                drain = shorter.unwrap_or_default();
            }
            () = tokio::time::sleep(drain + ENGINE_GRACE) => {
                tracing::error!("the engine did not shut down in time");
                return Ending::EngineLate;
            }
        }
    }
}
