//! One task per request.

use super::Generation;
use super::engine::Anchor;
use super::window::Window;
use crate::request::{Event, Request, RequestError};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

pub(super) fn start(anchor: &Arc<Anchor>, _request: Request) -> Generation {
    let shared = &anchor.shared;
    let window = Window::new(shared.config.stream.window_bytes.0 as usize);
    window.push(Event::Failed(shared.refusal().unwrap_or(RequestError::ShuttingDown)));
    Generation { window, cancelled: CancellationToken::new(), _engine: Arc::clone(anchor) }
}
