//! Who may queue, and what those who may not are told.

use crate::rig::{Rig, batch, device, options, prompt, sequence};
use tandem::request::{FinishReason, RequestError};
use tandem::scheduler::SchedulerOptions;

#[test]
fn a_full_queue_refuses_and_says_when_to_come_back() {
    let mut rig = Rig::new(SchedulerOptions { queue_max: 2, ..options() });
    rig.add(sequence(1, prompt(1, 10), 5));
    rig.add(sequence(2, prompt(2, 10), 5));
    let Err(RequestError::Overloaded { queue_depth, retry_after_ms }) =
        rig.try_add(sequence(3, prompt(3, 10), 5))
    else {
        panic!("the queue is bounded")
    };
    assert_eq!(queue_depth, 2);
    assert!((50..=30_000).contains(&retry_after_ms), "{retry_after_ms}");
}

#[test]
fn time_without_work_does_not_count_as_slowness() {
    let mut rig = Rig::new(SchedulerOptions { queue_max: 1, ..options() });
    for id in 1..20 {
        rig.add(sequence(id, prompt(1, 10), 1));
        rig.until(10, |rig| rig.ended.contains_key(&id));
    }
    rig.now_us += 3_600_000_000;
    for id in 20..22 {
        rig.add(sequence(id, prompt(1, 10), 1));
        rig.until(10, |rig| rig.ended.contains_key(&id));
    }
    rig.add(sequence(30, prompt(1, 10), 1));
    let refused = rig.try_add(sequence(31, prompt(1, 10), 1)).unwrap_err();
    let RequestError::Overloaded { retry_after_ms, .. } = refused else { panic!("{refused}") };
    assert!(retry_after_ms < 1_000, "ends come every 2 ms; told to wait {retry_after_ms} ms");
}

#[test]
fn one_that_comes_back_after_a_crash_is_never_overloaded() {
    let mut rig = Rig::new(SchedulerOptions { queue_max: 1, ..options() });
    rig.add(sequence(1, prompt(1, 10), 5));
    let mut back = sequence(2, prompt(2, 10), 5);
    back.crashes = 1;
    rig.add(back);
    let mut emitted = sequence(3, prompt(3, 10), 5);
    emitted.prompt_tokens = 9;
    rig.add(emitted);
}

#[test]
fn a_prompt_that_leaves_no_room_in_the_context_is_refused() {
    let mut rig = Rig::new(SchedulerOptions { context_tokens: 100, ..options() });
    let refused = rig.try_add(sequence(1, prompt(1, 100), 1)).unwrap_err();
    assert_eq!(refused, RequestError::ContextExceeded { prompt_tokens: 100, context_tokens: 100 });
    rig.add(sequence(2, prompt(1, 99), 1));
    let mut scored = sequence(3, prompt(1, 100), 0);
    scored.prompt_logprobs = Some(0);
    rig.add(scored);
}

#[test]
fn an_empty_prompt_is_refused() {
    let refused = Rig::new(options()).try_add(sequence(1, Vec::new(), 1)).unwrap_err();
    assert!(matches!(refused, RequestError::InvalidParams { .. }), "{refused}");
}

#[test]
fn what_can_never_fit_is_refused_at_once() {
    let mut rig = Rig::new(SchedulerOptions { blocks: device(4), ..options() });
    rig.add(sequence(1, prompt(1, 40), 24));
    let refused = rig.try_add(sequence(2, prompt(2, 40), 25)).unwrap_err();
    let RequestError::InsufficientMemory { need, free, .. } = refused else { panic!("{refused}") };
    assert_eq!((need, free), (5_000, 4_000), "bytes");
}

#[test]
fn one_that_is_there_already_starts_over() {
    let mut rig = Rig::new(options());
    rig.add(sequence(1, prompt(1, 50), 10));
    rig.step();
    rig.add(sequence(1, prompt(2, 50), 10));
    rig.scheduler.check_invariants();
    rig.said.clear();
    rig.until(20, |rig| rig.ended.contains_key(&1));
    rig.assert_whole(1, &prompt(2, 50), 10);
}

#[test]
fn an_answer_without_a_bound_ends_at_the_context() {
    let mut rig = Rig::new(SchedulerOptions { context_tokens: 100, ..options() });
    let tokens = prompt(1, 60);
    rig.add(sequence(1, tokens.clone(), usize::MAX));
    rig.until(100, |rig| rig.ended.contains_key(&1));
    rig.assert_whole(1, &tokens, 40);
}

#[test]
fn one_that_comes_back_complete_says_nothing_more() {
    let mut rig = Rig::new(SchedulerOptions { context_tokens: 100, ..options() });
    let mut at_context = sequence(1, prompt(1, 100), 500);
    at_context.prompt_tokens = 50;
    rig.add(at_context);
    let mut at_max_tokens = sequence(2, prompt(2, 30), 10);
    at_max_tokens.prompt_tokens = 20;
    rig.add(at_max_tokens);
    rig.until(20, |rig| rig.ended.len() == 2);
    assert_eq!((rig.said(1), rig.said(2)), (0, 0), "its tokens were all there");
    assert_eq!(rig.ended[&1], Ok(FinishReason::Length));
}

#[test]
fn the_queue_position_counts_those_that_go_before() {
    let mut rig = Rig::new(options());
    assert_eq!(rig.try_add(batch(1, prompt(1, 10), 5)), Ok(0));
    assert_eq!(rig.try_add(sequence(2, prompt(2, 10), 5)), Ok(0));
    assert_eq!(rig.try_add(sequence(3, prompt(3, 10), 5)), Ok(1));
    assert_eq!(rig.try_add(batch(4, prompt(4, 10), 5)), Ok(3));
}
