//! What is computed once: cached prefixes, equal prompts that come together, scored prompts.

use crate::rig::{Rig, device, options, prompt, sequence};
use tandem::scheduler::SchedulerOptions;
use tandem::step::LogitsTask;
use tandem::units::SequenceId;

#[test]
fn a_second_equal_prompt_computes_only_what_is_not_cached() {
    let mut rig = Rig::new(options());
    let tokens = prompt(1, 40);
    rig.add(sequence(1, tokens.clone(), 3));
    rig.until(10, |rig| rig.ended.contains_key(&1));
    rig.add(sequence(2, tokens.clone(), 3));
    assert_eq!(rig.step(), 40 - 32);
    rig.until(10, |rig| rig.ended.contains_key(&2));
    rig.assert_whole(2, &tokens, 3);
    assert_eq!(rig.scheduler.stats().prefix_hit_tokens, 32);
}

#[test]
fn a_prompt_that_is_cached_to_its_last_token_is_computed_from_its_last_block() {
    let mut rig = Rig::new(options());
    let tokens = prompt(1, 48);
    rig.add(sequence(1, tokens.clone(), 3));
    rig.until(10, |rig| rig.ended.contains_key(&1));
    rig.add(sequence(2, tokens.clone(), 3));
    assert_eq!(rig.step(), 16, "logits need at least the last token");
    rig.until(10, |rig| rig.ended.contains_key(&2));
    rig.assert_whole(2, &tokens, 3);
}

#[test]
fn equal_prompts_that_come_together_are_computed_once() {
    let mut rig = Rig::new(SchedulerOptions { blocks: device(200), ..options() });
    let tokens = prompt(1, 200);
    for id in 1..9 {
        rig.add(sequence(id, tokens.clone(), 1));
    }
    let mut computed = 0;
    while rig.ended.len() < 8 {
        computed += rig.step();
    }
    assert_eq!(computed, 200 + 7 * 8, "seven compute only the last, partial block");
    for id in 1..9 {
        rig.assert_whole(id, &tokens, 1);
    }
}

#[test]
fn nobody_waits_for_a_prefix_that_a_paused_sequence_would_compute() {
    let mut rig = Rig::new(options());
    let tokens = prompt(1, 200);
    rig.add(sequence(1, tokens.clone(), 1));
    rig.step();
    rig.scheduler.pause(SequenceId(1));
    rig.add(sequence(2, tokens.clone(), 1));
    rig.until(10, |rig| rig.ended.contains_key(&2));
    rig.assert_whole(2, &tokens, 1);
}

#[test]
fn preempted_sequence_keeps_its_prefix() {
    let mut rig = Rig::new(SchedulerOptions { blocks: device(10), ..options() });
    let (old, young) = (prompt(1, 40), prompt(2, 60));
    rig.add(sequence(1, old.clone(), 100));
    rig.add(sequence(2, young.clone(), 40));
    rig.until(200, |rig| rig.scheduler.stats().preemptions > 0);
    let hits = rig.scheduler.stats().device.cached;
    assert!(hits > 0, "its blocks stay findable until others need them");
    rig.until(400, |rig| rig.ended.len() == 2);
    rig.assert_whole(1, &old, 100);
    rig.assert_whole(2, &young, 40);
}

#[test]
fn without_the_cache_nothing_is_shared_and_nothing_waits() {
    let mut rig = Rig::new(SchedulerOptions { prefix_key: None, ..options() });
    let tokens = prompt(1, 40);
    rig.add(sequence(1, tokens.clone(), 3));
    rig.add(sequence(2, tokens.clone(), 3));
    rig.until(10, |rig| rig.ended.len() == 2);
    let stats = rig.scheduler.stats();
    assert_eq!((stats.prefix_hit_tokens, stats.device.cached), (0, 0));
    rig.assert_whole(2, &tokens, 3);
}

#[test]
fn scored_prompts_skip_the_cache_and_score_every_token_once() {
    let mut rig = Rig::new(options());
    let tokens = prompt(1, 40);
    rig.add(sequence(1, tokens.clone(), 3));
    rig.until(10, |rig| rig.ended.contains_key(&1));
    for (id, max_tokens) in [(2, 0), (3, 3)] {
        let mut scored = sequence(id, tokens.clone(), max_tokens);
        scored.prompt_logprobs = Some(2);
        rig.add(scored);
        rig.until(20, |rig| rig.ended.contains_key(&id));
        let all: Vec<usize> = (1..40).collect();
        assert_eq!(rig.scored[&id], all);
        assert_eq!(rig.said(id), max_tokens);
    }
}

#[test]
fn scored_prompts_together_stay_within_the_rows_of_a_step() {
    let mut rig = Rig::new(options());
    for id in 1..5 {
        let mut scored = sequence(id, prompt(id as u32, 40), 2);
        scored.prompt_logprobs = Some(2);
        rig.add(scored);
    }
    while rig.ended.len() < 4 {
        rig.step();
        let scores = rig.plan.logits.iter();
        let scores = scores.filter(|row| matches!(row.task, LogitsTask::Score { .. })).count();
        assert!(scores <= 8, "{scores} rows of scores in one step");
    }
}
