//! The scheduler's promises, one by one: who is admitted, who goes first, who yields, what is
//! computed once, what lower tiers do, how a stream ends. The seeded simulation is
//! `tests/scheduler_simulation.rs`.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "scheduler/admission.rs"]
mod admission;
#[path = "scheduler/drafts.rs"]
mod drafts;
#[path = "scheduler/endings.rs"]
mod endings;
#[path = "scheduler/latency.rs"]
mod latency;
#[path = "scheduler/machine.rs"]
mod machine;
#[path = "scheduler/prefixes.rs"]
mod prefixes;
#[path = "scheduler/priorities.rs"]
mod priorities;
#[path = "scheduler/rig.rs"]
mod rig;
#[path = "scheduler/tiers.rs"]
mod tiers;
