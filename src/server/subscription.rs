//! `stats.subscribe`: the server's and the engine's figures at an interval, until the client has
//! enough. A client that does not read gets fewer reports, not older ones.

use super::live::Live;
use super::outbox::{Gone, Outbox};
use super::protocol::{Line, WireEvent, event_line};
use super::service::Service;
use crate::request::RequestError;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::MissedTickBehavior;

/// Answers, then reports until the request is cancelled, the server ends or the connection is
/// gone.
pub(super) async fn run(
    service: Arc<Service>,
    outbox: Outbox,
    live: Live,
    (answer, interval): (Line, Duration),
) {
    // In this order even if the reader of the connection is slower than this task.
    if outbox.control.send(answer).await.is_ok() {
        // A connection that is gone needs no more reports.
        let _ = report(&service, &outbox, live, interval).await;
    }
}

async fn report(
    service: &Service,
    outbox: &Outbox,
    live: Live,
    interval: Duration,
) -> Result<(), Gone> {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seq = 0;
    let end = loop {
        let slot = tokio::select! {
            biased;
            () = live.cancelled.cancelled() => {
                break RequestError::Cancelled { by: "client".to_owned() };
            }
            () = service.closing.cancelled() => break RequestError::ShuttingDown,
            slot = async { ticks.tick().await; outbox.stream.reserve().await } => slot?,
        };
        // Only now, so that a report is as new as the client's reading allows.
        let stats = serde_json::to_value(service.stats()).unwrap_or_default();
        slot.send(event_line(&live.id, seq, &WireEvent::Stats { stats }));
        seq += 1;
    };
    let slot = outbox.stream.reserve().await?;
    let line = event_line(&live.id, seq, &WireEvent::Error { error: end.into() });
    drop(live);
    slot.send(line);
    Ok(())
}
