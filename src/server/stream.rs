//! One `generate` or `chat` request: pulls the engine's events, keeps the stream's strict order and
//! tells the client, at the client's pace.

use super::EventStream;
use super::live::Live;
use super::outbox::{Gone, Outbox};
use super::protocol::{Delivery, ErrorObject, WireEvent, error_line, event_line, result_line};
use super::service::Service;
use super::whole::Whole;
use crate::request::{DoneEvent, Event, FinishReason, Request, RequestError};
use futures_util::{FutureExt, StreamExt};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

/// How long a stream of an engine that is over may stay without its terminal event.
const CLOSING_GRACE: Duration = Duration::from_millis(100);

/// How far a stream is. It only goes forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Nothing was said: a failure is the request's error.
    Opening,
    /// `accepted` was said: a failure is an event from now on.
    Working,
    /// Text was said: no more progress.
    Speaking,
    /// The terminal event was said.
    Over,
}

/// One request on its way from the engine to the client.
pub(super) struct StreamTask {
    service: Arc<Service>,
    outbox: Outbox,
    live: Option<Live>,
    events: Box<dyn EventStream>,
    /// What is collected when the answer is wanted whole.
    whole: Option<Whole>,
    /// Fields of the request that were ignored.
    warnings: Vec<String>,
    deadline: Option<Duration>,
    stage: Stage,
    seq: u64,
    /// The engine knows that the client wants no more.
    is_cancelled: bool,
}

impl StreamTask {
    /// Submits the request.
    pub(super) fn start(
        service: &Arc<Service>,
        outbox: Outbox,
        live: Live,
        (request, delivery): (Request, Delivery),
        warnings: Vec<String>,
    ) -> Self {
        let deadline = request.deadline;
        Self {
            service: Arc::clone(service),
            outbox,
            live: Some(live),
            events: service.engine.generate(request),
            whole: (delivery == Delivery::Whole).then(Whole::default),
            warnings,
            deadline,
            stage: Stage::Opening,
            seq: 0,
            is_cancelled: false,
        }
    }

    /// Runs to the end. Whatever happens inside, the client gets exactly one end.
    pub(super) async fn run(mut self) {
        let outcome = AssertUnwindSafe(self.pump()).catch_unwind().await;
        if outcome.is_err() && self.stage < Stage::Over {
            let message = "the stream's task failed; the request may be sent again".to_owned();
            // A connection that is gone needs no answer.
            let _ = self.fail(RequestError::Internal { message }.into()).await;
        }
    }

    async fn pump(&mut self) -> Result<(), Gone> {
        while self.stage < Stage::Over {
            let event = self.next().await;
            self.tell(event).await?;
        }
        Ok(())
    }

    async fn next(&mut self) -> Event {
        let broken =
            |message: &str| Event::Failed(RequestError::Internal { message: message.to_owned() });
        loop {
            let Some(live) = &self.live else { return broken("a stream without a request") };
            tokio::select! {
                biased;
                () = live.cancelled.cancelled(), if !self.is_cancelled => {
                    self.is_cancelled = true;
                    self.events.cancel();
                }
                event = self.events.next() => {
                    return event.unwrap_or_else(|| broken("the engine's stream had no end"));
                }
                () = closed_for_long(&self.service) => {
                    return Event::Failed(RequestError::ShuttingDown);
                }
            }
        }
    }

    async fn tell(&mut self, event: Event) -> Result<(), Gone> {
        match (&event, self.stage) {
            (Event::Failed(error), _) => return self.fail(error.clone().into()).await,
            (Event::Done(done), Stage::Opening) => {
                let error = self.ended_before_it_began(done);
                return self.fail(error.into()).await;
            }
            (Event::Accepted { .. }, Stage::Opening) => self.stage = Stage::Working,
            (_, Stage::Opening) => {
                let message = "the engine's stream did not begin with its acceptance".to_owned();
                return self.fail(RequestError::Internal { message }.into()).await;
            }
            // A request that is computed again after a crash is no news to the client.
            (Event::Accepted { .. }, _) | (Event::Progress { .. }, Stage::Speaking) => {
                return Ok(());
            }
            (Event::Delta(_), _) => self.stage = Stage::Speaking,
            _ => {}
        }
        if self.whole.is_some() { self.collect(event).await } else { self.pass_on(event).await }
    }

    /// The error of a request that ended while it was still waiting to be accepted.
    fn ended_before_it_began(&self, done: &DoneEvent) -> RequestError {
        match done.finish_reasons.first() {
            Some(FinishReason::Cancelled) => RequestError::Cancelled { by: "client".to_owned() },
            Some(FinishReason::Deadline) => {
                let deadline = self.deadline.unwrap_or_default();
                RequestError::DeadlineExceeded { deadline_ms: deadline.as_millis() as u64 }
            }
            other => RequestError::Internal { message: format!("ended as {other:?} at once") },
        }
    }

    async fn pass_on(&mut self, event: Event) -> Result<(), Gone> {
        self.say(&WireEvent::from_engine(event, &self.warnings)).await
    }

    async fn collect(&mut self, event: Event) -> Result<(), Gone> {
        let Some(whole) = &mut self.whole else { return Ok(()) };
        let Some(done) = whole.add(event) else { return Ok(()) };
        let result = std::mem::take(whole).finish(done, &self.warnings);
        let (Some(live), slot) = (self.live.take(), self.outbox.stream.reserve().await?) else {
            return Ok(());
        };
        self.stage = Stage::Over;
        let line = result_line(&live.id, &result, &[]);
        // The id is free before the client can know that it is.
        drop(live);
        slot.send(line);
        Ok(())
    }

    /// Ends the request with an error: as an event if its stream has begun, else as its answer.
    async fn fail(&mut self, error: ErrorObject) -> Result<(), Gone> {
        self.service.admission.count_error();
        if self.stage > Stage::Opening && self.whole.is_none() {
            return self.say(&WireEvent::Error { error }).await;
        }
        self.stage = Stage::Over;
        let slot = self.outbox.control.reserve().await?;
        if let Some(live) = self.live.take() {
            let line = error_line(Some(&live.id), &error);
            drop(live);
            slot.send(line);
        }
        Ok(())
    }

    /// Sends an event when the client has read enough of the earlier ones. Until then nothing more
    /// is pulled from the engine, whose window fills up and pauses the request.
    async fn say(&mut self, event: &WireEvent) -> Result<(), Gone> {
        let Some(live) = &self.live else { return Ok(()) };
        let line = event_line(&live.id, self.seq, event);
        self.seq += 1;
        let slot = loop {
            tokio::select! {
                biased;
                slot = self.outbox.stream.reserve() => break slot?,
                () = live.cancelled.cancelled(), if !self.is_cancelled => {
                    self.is_cancelled = true;
                    self.events.cancel();
                }
            }
        };
        if event.is_terminal() {
            self.stage = Stage::Over;
            self.live = None;
        }
        slot.send(line);
        Ok(())
    }
}

async fn closed_for_long(service: &Service) {
    service.closing.cancelled().await;
    tokio::time::sleep(CLOSING_GRACE).await;
}
