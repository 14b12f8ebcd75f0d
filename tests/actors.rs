//! The actor tree on stages without a model: flow control, endings, limits, several answers.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "actors/answers.rs"]
mod answers;
#[path = "actors/endings.rs"]
mod endings;
#[path = "actors/flow.rs"]
mod flow;
#[path = "actors/gpu_faults.rs"]
mod gpu_faults;
#[path = "actors/rig.rs"]
mod rig;
