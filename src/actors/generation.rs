//! A request's stream as its reader sees it.

use super::engine::Anchor;
use super::window::Window;
use crate::request::{DoneEvent, Event, RequestError};
use futures_core::Stream;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio_util::sync::CancellationToken;

/// One request's events: `Accepted`, `Progress`*, `Delta`*, exactly one terminal event, then
/// `None`. Dropping it cancels the request and frees what it holds. It keeps its engine alive.
#[derive(Debug)]
#[must_use = "dropping a Generation cancels its request"]
pub struct Generation {
    pub(super) window: Arc<Window>,
    pub(super) cancelled: CancellationToken,
    pub(super) _engine: Arc<Anchor>,
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The texts of the `n` answers.
    pub texts: Vec<String>,
    /// Why they ended and what they cost.
    pub done: DoneEvent,
}

impl Generation {
    /// Asks for the end. The stream still brings its terminal event: `Done` with
    /// [`crate::request::FinishReason::Cancelled`] for the answers that had not ended.
    pub fn cancel(&self) {
        self.cancelled.cancel();
    }

    /// A handle that cancels like [`Generation::cancel`] while the stream is being read elsewhere.
    pub fn canceller(&self) -> Canceller {
        Canceller { cancelled: self.cancelled.clone() }
    }

    /// The next event; `None` after the terminal one. Works on any executor.
    pub async fn next(&mut self) -> Option<Event> {
        poll_fn(|context| self.window.poll_next(context)).await
    }

    /// Reads to the end and puts the texts together.
    ///
    /// # Errors
    /// The error that ended the stream.
    pub async fn collect(mut self) -> Result<Answer, RequestError> {
        let mut texts = vec![String::new()];
        while let Some(event) = self.next().await {
            match event {
                Event::Delta(delta) => {
                    if texts.len() <= delta.index {
                        texts.resize(delta.index + 1, String::new());
                    }
                    texts[delta.index].push_str(&delta.text);
                }
                Event::Done(done) => {
                    texts.resize(done.finish_reasons.len().max(texts.len()), String::new());
                    return Ok(Answer { texts, done });
                }
                Event::Failed(error) => return Err(error),
                Event::Accepted { .. } | Event::Progress { .. } | Event::PromptLogprobs(_) => {}
            }
        }
        Err(RequestError::ShuttingDown)
    }

    /// Reads to the end and gives the first answer's text.
    ///
    /// # Errors
    /// The error that ended the stream.
    pub async fn collect_text(self) -> Result<String, RequestError> {
        let answer = self.collect().await?;
        Ok(answer.texts.into_iter().next().unwrap_or_default())
    }
}

impl Stream for Generation {
    type Item = Event;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.window.poll_next(context)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.cancelled.cancel();
    }
}

/// Cancels one request from anywhere.
#[derive(Clone, Debug)]
pub struct Canceller {
    cancelled: CancellationToken,
}

impl Canceller {
    /// Asks for the end, as [`Generation::cancel`] does.
    pub fn cancel(&self) {
        self.cancelled.cancel();
    }
}
