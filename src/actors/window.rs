//! The unread events of one request: a queue with a bound in bytes between its stream task and
//! its reader. A full window makes the stream task wait, and nobody else.

use crate::request::Event;
use std::collections::VecDeque;
use std::mem::size_of;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use tokio::sync::Notify;

#[derive(Debug, Default)]
struct State {
    unread: VecDeque<(Event, usize)>,
    unread_bytes: usize,
    /// The terminal event is in.
    ended: bool,
    reader: Option<Waker>,
}

/// Shared by the stream task, which pushes, and the [`super::Generation`], which pulls.
#[derive(Debug)]
pub(super) struct Window {
    state: Mutex<State>,
    room: Notify,
    bytes_max: usize,
}

impl Window {
    pub(super) fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), room: Notify::new(), bytes_max })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event. It always fits: the writer asks [`Window::is_full`] first and overshoots by
    /// one message's events at most. Events after the terminal one are dropped.
    pub(super) fn push(&self, event: Event) {
        let mut state = self.lock();
        if state.ended {
            return;
        }
        let bytes = event_bytes(&event);
        state.ended = event.is_terminal();
        state.unread_bytes += bytes;
        state.unread.push_back((event, bytes));
        let reader = state.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Whether the terminal event was pushed.
    pub(super) fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// Whether the writer has to wait for the reader.
    pub(super) fn is_full(&self) -> bool {
        self.lock().unread_bytes >= self.bytes_max
    }

    /// Waits until half of the window is read.
    pub(super) async fn room(&self) {
        while self.lock().unread_bytes > self.bytes_max / 2 {
            self.room.notified().await;
        }
    }

    /// The next event; `None` after the terminal one.
    pub(super) fn poll_next(&self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let mut state = self.lock();
        let Some((event, bytes)) = state.unread.pop_front() else {
            if state.ended {
                return Poll::Ready(None);
            }
            state.reader = Some(context.waker().clone());
            return Poll::Pending;
        };
        state.unread_bytes -= bytes;
        let has_room = state.unread_bytes <= self.bytes_max / 2;
        drop(state);
        if has_room {
            self.room.notify_one();
        }
        Poll::Ready(Some(event))
    }
}

/// What an event takes in memory, about what it takes on the wire.
fn event_bytes(event: &Event) -> usize {
    let heap = match event {
        Event::PromptLogprobs(tokens) => tokens.iter().map(token_bytes).sum(),
        Event::Delta(delta) => {
            let tokens = delta.tokens.iter().flatten().map(token_bytes).sum::<usize>();
            delta.text.len() + delta.token_ids.len() * size_of::<u32>() + tokens
        }
        Event::Accepted { .. } | Event::Progress { .. } | Event::Done(_) | Event::Failed(_) => 0,
    };
    size_of::<Event>() + heap
}

fn token_bytes(token: &crate::request::TokenText) -> usize {
    let top: usize = token.top.iter().map(|(_, text)| text.len() + 32).sum();
    token.text.len() + 56 + top
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{Delta, RequestError};
    use std::task::Waker;

    fn delta(bytes: usize) -> Event {
        let text = "x".repeat(bytes);
        Event::Delta(Delta { index: 0, text, token_ids: Vec::new(), tokens: None })
    }

    #[test]
    fn a_window_is_full_by_bytes_and_has_room_again_at_half() {
        let window = Window::new(4096);
        window.push(delta(3000));
        assert!(!window.is_full());
        window.push(delta(3000));
        assert!(window.is_full());
        let mut context = Context::from_waker(Waker::noop());
        assert!(window.poll_next(&mut context).is_ready());
        assert!(window.poll_next(&mut context).is_ready());
        assert!(window.poll_next(&mut context).is_pending());
        assert!(!window.is_full());
    }

    #[test]
    fn nothing_follows_the_terminal_event() {
        let window = Window::new(4096);
        window.push(Event::Failed(RequestError::ShuttingDown));
        window.push(delta(1));
        let mut context = Context::from_waker(Waker::noop());
        assert!(matches!(window.poll_next(&mut context), Poll::Ready(Some(Event::Failed(_)))));
        assert!(matches!(window.poll_next(&mut context), Poll::Ready(None)));
    }
}
