//! The bounded lanes between client tasks and threads. They belong to [`super::shared::Shared`]
//! and outlive the threads at their ends: what waits in a lane when its reader dies is read by the
//! reader's successor.

use super::flow::Flow;
use super::stream::StreamMessage;
use super::text::{TextDone, TextJob, TextWork};
use crate::request::RequestError;
use crate::scheduler::NewSequence;
use crate::units::SequenceId;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// Commands that one sequence can have in the lane at a time: its submission, one resume, one
/// abort.
const COMMANDS_PER_SEQUENCE: usize = 3;

/// A sequence on its way to the scheduler, with the lane on which it answers.
pub(super) struct Submission {
    pub(super) sequence: NewSequence,
    pub(super) lane: mpsc::Sender<StreamMessage>,
    pub(super) flow: Arc<Flow>,
}

/// What stream tasks ask of the engine loop.
pub(super) enum Command {
    Submit(Box<Submission>),
    Abort(SequenceId),
    /// The sequence's lane has been read; it may run again.
    Resume(SequenceId),
}

/// Stream tasks to engine loop. Every sequence holds a credit, and the lane has room for all
/// commands of all credits, twice: it fills only when requests come and go faster than steps.
pub(super) struct CommandLane {
    sender: Sender<Command>,
    pub(super) receiver: Receiver<Command>,
}

impl CommandLane {
    pub(super) fn new(sequences_max: usize) -> Self {
        let (sender, receiver) = bounded(2 * COMMANDS_PER_SEQUENCE * sequences_max);
        Self { sender, receiver }
    }

    /// Sends a command; gives it back when there is no room.
    pub(super) fn try_send(&self, command: Command) -> Result<(), Command> {
        self.sender.try_send(command).map_err(TrySendError::into_inner)
    }
}

/// Anyone to the tokenizer threads.
pub(super) struct TextLane {
    sender: Sender<TextJob>,
    pub(super) receiver: Receiver<TextJob>,
}

impl TextLane {
    /// What a client that finds the lane full is told to wait.
    const RETRY_AFTER_MS: u64 = 250;

    pub(super) fn new(jobs_max: usize) -> Self {
        let (sender, receiver) = bounded(jobs_max);
        Self { sender, receiver }
    }

    /// Queues some work and waits for its result.
    pub(super) async fn submit(
        &self,
        work: TextWork,
        queued_us: u64,
    ) -> Result<TextDone, RequestError> {
        let (reply, answer) = oneshot::channel();
        self.sender.try_send(TextJob { work, queued_us, reply }).map_err(|_| {
            RequestError::Overloaded {
                queue_depth: self.sender.len(),
                retry_after_ms: Self::RETRY_AFTER_MS,
            }
        })?;
        // The job is answered even if its work panics; it is dropped only when the engine ends.
        answer.await.unwrap_or(Err(RequestError::ShuttingDown))
    }
}
