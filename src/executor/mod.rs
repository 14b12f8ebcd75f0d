//! Owns the doing: it lowers a model to a flat program of ops and runs steps of it on its worker
//! threads, from token ids to sampled tokens. It must not know requests' lives, queues or clocks:
//! a [`crate::step::StepPlan`] says all. Called by the executor actor, one [`Stage`] per thread.

mod cpu_pool;

pub use cpu_pool::{CpuPool, PoolOptions, Worker, WorkerPanic};
