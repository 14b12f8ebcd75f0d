//! A tokenizer actor answers for one thread that does text work: encode, decode, render. The
//! threads share one bounded lane. A job that panics is tried once more and then refused as
//! `poison_request`; it does not cost the thread its life, so that no text can bring the engine
//! down.

use super::FaultPoint;
use super::shared::Shared;
use super::text::{TextDone, TextJob};
use super::threads::{StopOnDrop, StopSignal, panic_message, stop_signal};
use crate::request::RequestError;
use crossbeam_channel::select_biased;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// What a tokenizer actor hears.
#[derive(Debug)]
pub(super) enum TokenizerMessage {
    /// Its thread died.
    ThreadDied(String),
}

fn work(shared: &Shared, job: &TextJob) -> Result<TextDone, RequestError> {
    let loaded = shared.loaded.get().ok_or(RequestError::ShuttingDown)?;
    shared.faults.pass(FaultPoint::TokenizerBeforeWork);
    let done = job.work.run(loaded);
    shared.faults.pass(FaultPoint::TokenizerAfterWork);
    done
}

/// Does a job, again after a panic, up to the limit of crashes per request.
fn work_until_done(shared: &Shared, job: &TextJob) -> Result<TextDone, RequestError> {
    let crashes_max = shared.config.supervision.crashes_per_request_max.max(1);
    for crash in 1..=crashes_max {
        match catch_unwind(AssertUnwindSafe(|| work(shared, job))) {
            Ok(done) => return done,
            Err(payload) => {
                let reason = panic_message(payload);
                tracing::warn!(%reason, crash, "text work panicked");
            }
        }
    }
    Err(RequestError::PoisonRequest { crashes: crashes_max })
}

fn run_tokenizer(shared: &Shared, stop: &StopSignal) -> Result<(), String> {
    loop {
        shared.faults.pass(FaultPoint::TokenizerIdle);
        let job = select_biased! {
            recv(stop) -> _ => return Ok(()),
            recv(shared.texts.receiver) -> job => job.map_err(|_| "the text lane is gone")?,
        };
        if job.reply.is_closed() {
            // Whoever asked has gone.
            continue;
        }
        let done = work_until_done(shared, &job);
        shared.metrics.encode_time.record(shared.now_us().saturating_sub(job.queued_us));
        // Whoever asked may have gone meanwhile.
        let _ = job.reply.send(done);
    }
}

/// The actor; the argument's number names its thread.
pub(super) struct Tokenizer;

impl Actor for Tokenizer {
    type Msg = TokenizerMessage;
    type State = StopOnDrop;
    type Arguments = (Arc<Shared>, usize);

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        (shared, number): Self::Arguments,
    ) -> Result<StopOnDrop, ActorProcessingErr> {
        let (guard, stop) = stop_signal();
        let died = move |reason| {
            // The actor may be gone already; then its thread's death is nobody's news.
            let _ = myself.cast(TokenizerMessage::ThreadDied(reason));
        };
        let (name, body_shared) = (format!("tandem-text-{number}"), Arc::clone(&shared));
        tokio::task::block_in_place(|| {
            shared.threads.start(&name, died, move || run_tokenizer(&body_shared, &stop))
        })?;
        Ok(guard)
    }

    async fn handle(
        &self,
        _myself: ActorRef<Self::Msg>,
        TokenizerMessage::ThreadDied(reason): Self::Msg,
        _state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        Err(reason.into())
    }
}
