//! Owns one task per request: it prepares the prompt, submits one sequence per answer, turns
//! tokens into text events and, after a crash, knows all that is needed to go on. Must not know
//! sockets, nor how a step is planned. `Engine::generate` starts one.
//!
//! A turn of the task is *pull → compute → commit*. What it has pulled and what it has committed
//! lie outside of the part that may unwind, so a panic anywhere in a turn repeats the turn with the
//! same message: nothing is lost, nothing is said twice.

mod answer;
mod compute;
mod opening;
mod prompt_scores;
mod task;
mod turn;

pub(super) use answer::StreamMessage;
pub(super) use opening::start;
