//! The step path allocates nothing: counted over all threads of this process, so this file holds
//! one test only.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test and its figures")]

#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use stage::{Model, options, plan_tokens};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tandem::request::SamplingParams;
use tandem::step::{LogitsTask, StepOutput, StepPlan};
use tandem::units::TokenId;
use tiny_model::{Family, TinyModel};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counting.
struct Counting;

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: our caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: our caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn steps_allocate_nothing_once_warm() {
    for family in [Family::Gemma3, Family::Qwen3Moe] {
        let made = allocations_of_warm_steps(family);
        assert_eq!(made, 0, "allocations in warm steps of {family:?}");
    }
}

fn allocations_of_warm_steps(family: Family) -> usize {
    let model = Model::from_bytes(&TinyModel::new(family).gguf().bytes());
    let mut stage = model.stage(&options(2, 512));
    let tokens: Vec<_> = (0..200).map(TokenId).collect();
    let params = Arc::new(SamplingParams::greedy());
    let sample =
        |_| Some(LogitsTask::Sample { params: params.clone(), history: 0..0, prompt_tokens: 0 });
    let mut plans = Vec::new();
    for start in [0, 50, 100, 101, 102, 150] {
        let mut plan = StepPlan::default();
        let end = if start < 100 { start + 50 } else { start + 1 };
        plan_tokens(&mut plan, (1, 0), &tokens, start..end, sample);
        plan_tokens(&mut plan, (2, 8), &tokens, start..end, sample);
        plans.push(plan);
    }
    let mut output = StepOutput::default();
    for plan in &plans {
        stage.run(plan, &mut output).unwrap();
    }
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for plan in &plans {
        stage.run(plan, &mut output).unwrap();
    }
    ALLOCATIONS.load(Ordering::Relaxed) - before
}
