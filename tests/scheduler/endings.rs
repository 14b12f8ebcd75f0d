//! How a stream ends: deadlines, aborts, failures of numbers, crashes of the executor.

use crate::rig::{Rig, options, prompt, sequence};
use tandem::request::{FinishReason, RequestError};
use tandem::step::{RowFailure, StepOutput};
use tandem::units::{SequenceId, TokenId};

#[test]
fn a_deadline_ends_an_answer_as_it_is() {
    let mut rig = Rig::new(options());
    let mut new = sequence(1, prompt(1, 10), 400);
    new.deadline_us = Some(20_000);
    rig.add(new);
    rig.until(100, |rig| rig.ended.contains_key(&1));
    assert_eq!(rig.ended[&1], Ok(FinishReason::Deadline));
    assert!(rig.said(1) > 5 && rig.now_us < 25_000);
}

#[test]
fn a_deadline_ends_sequences_that_wait_or_are_paused_too() {
    let mut rig = Rig::new(options());
    for id in 1..3 {
        let mut new = sequence(id, prompt(id as u32, 10), 400);
        new.deadline_us = Some(5_000);
        rig.add(new);
        if id == 1 {
            rig.step();
        }
        rig.scheduler.pause(SequenceId(id));
    }
    rig.now_us = 5_000;
    rig.plan_only();
    assert!(rig.plan.is_empty());
    assert_eq!(rig.ended.len(), 2);
    assert_eq!(rig.scheduler.stats().device.used, 0);
}

#[test]
fn a_first_token_that_comes_too_late_is_a_failure_and_an_early_one_is_not() {
    let mut rig = Rig::new(options());
    for (id, tokens) in [(1, 10), (2, 400)] {
        let mut new = sequence(id, prompt(id as u32, tokens), 30);
        new.ttft_deadline_us = Some(8_000);
        rig.add(new);
    }
    rig.until(100, |rig| rig.ended.len() == 2);
    assert_eq!(rig.ended[&1], Ok(FinishReason::Length));
    assert_eq!(rig.ended[&2], Err(RequestError::DeadlineExceeded { deadline_ms: 8 }));
}

#[test]
fn an_end_token_is_not_part_of_the_answer() {
    let mut rig = Rig::new(options());
    let tokens = prompt(1, 10);
    let expected = crate::machine::continuation(&tokens, 30);
    let end = expected[7];
    let before = expected.iter().position(|token| *token == end).unwrap();
    let mut new = sequence(1, tokens, 30);
    new.end_tokens = [end].into();
    rig.add(new);
    rig.until(40, |rig| rig.ended.contains_key(&1));
    assert_eq!(rig.ended[&1], Ok(FinishReason::Stop));
    assert_eq!(rig.said.remove(&1).unwrap_or_default(), expected[..before].to_vec());
}

#[test]
fn an_abort_in_the_middle_of_a_step_leaves_nothing_behind() {
    let mut rig = Rig::new(options());
    rig.add(sequence(1, prompt(1, 50), 10));
    rig.add(sequence(2, prompt(2, 50), 10));
    rig.plan_only();
    rig.scheduler.abort(SequenceId(1));
    rig.scheduler.check_invariants();
    rig.machine.run(&rig.plan, &mut rig.output);
    rig.apply();
    rig.until(20, |rig| rig.ended.contains_key(&2));
    rig.assert_whole(2, &prompt(2, 50), 10);
    assert_eq!(rig.said(1), 0);
    assert_eq!(rig.scheduler.stats().device.used, 0);
}

#[test]
fn numbers_that_are_not_finite_fail_one_sequence_only() {
    let mut rig = Rig::new(options());
    rig.add(sequence(1, prompt(1, 10), 5));
    rig.add(sequence(2, prompt(2, 10), 5));
    rig.plan_only();
    rig.machine.run(&rig.plan, &mut rig.output);
    rig.output.rows.retain(|row| row.sequence != SequenceId(1));
    rig.output.failures.push(RowFailure { sequence: SequenceId(1), position: 10 });
    rig.apply();
    assert_eq!(rig.ended[&1], Err(RequestError::NumericError { position: 10 }));
    rig.until(10, |rig| rig.ended.contains_key(&2));
    rig.assert_whole(2, &prompt(2, 10), 5);
}

#[test]
fn a_crash_is_a_pause_and_the_second_one_is_poison() {
    let mut rig = Rig::new(options());
    let tokens = prompt(1, 50);
    rig.add(sequence(1, tokens.clone(), 10));
    rig.add(sequence(2, prompt(2, 50), 10));
    rig.until(10, |rig| rig.said(1) == 3);
    rig.scheduler.pause(SequenceId(2));
    for crash in 0..2 {
        rig.plan_only();
        rig.machine.lose();
        rig.scheduler.executor_lost(rig.now_us, &mut rig.events);
        rig.scheduler.check_invariants();
        if crash == 0 {
            rig.until(10, |rig| rig.said(1) == 5);
        }
    }
    rig.output = StepOutput::default();
    rig.scheduler.resume(SequenceId(2));
    rig.until(40, |rig| rig.ended.len() == 2);
    assert_eq!(rig.ended[&1], Err(RequestError::PoisonRequest { crashes: 2 }));
    let said: &[TokenId] = &rig.said[&1];
    assert!(crate::machine::continuation(&tokens, 10).starts_with(said));
    rig.assert_whole(2, &prompt(2, 50), 10);
}

#[test]
fn a_step_that_no_executor_took_blames_nobody() {
    let mut rig = Rig::new(options());
    rig.add(sequence(1, prompt(1, 50), 10));
    for _ in 0..5 {
        rig.plan_only();
        rig.scheduler.step_not_run();
        rig.machine.lose();
        rig.scheduler.executor_lost(rig.now_us, &mut rig.events);
    }
    rig.until(20, |rig| rig.ended.contains_key(&1));
    rig.assert_whole(1, &prompt(1, 50), 10);
}

#[test]
fn a_crash_between_steps_blames_nobody() {
    let mut rig = Rig::new(options());
    rig.add(sequence(1, prompt(1, 50), 10));
    for _ in 0..5 {
        rig.step();
        rig.machine.lose();
        rig.scheduler.executor_lost(rig.now_us, &mut rig.events);
    }
    rig.until(20, |rig| rig.ended.contains_key(&1));
    rig.assert_whole(1, &prompt(1, 50), 10);
}
