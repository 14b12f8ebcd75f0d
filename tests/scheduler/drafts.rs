//! Drafts: who gets them, what becomes of them, and that nobody pays for them.

use crate::machine::continuation;
use crate::rig::{BLOCK_TOKENS, Rig, device, options, prompt, sequence};
use std::sync::Arc;
use tandem::request::{FinishReason, RequestError, SamplingParams};
use tandem::scheduler::{NewSequence, SchedulerOptions};
use tandem::speculative::{Lookup, SpeculationOptions};
use tandem::step::{LogitsTask, RowFailure};
use tandem::units::{SequenceId, TokenId};

const DRAFT_MAX: usize = 6;

fn speculating(blocks: usize) -> SchedulerOptions {
    let lookup = Lookup { ngram_min: 1, ngram_max: 4 };
    let speculation = SpeculationOptions { lookup, draft_max: DRAFT_MAX, width_borders: &[] };
    SchedulerOptions { speculation: Some(speculation), blocks: device(blocks), ..options() }
}

/// A prompt in which most of what the sequence may say stands already: many drafts are right.
fn foretold(tokens: usize) -> Vec<TokenId> {
    let start = prompt(1, 20);
    let said = continuation(&start, tokens);
    [start, said].concat()
}

/// Steps until a sequence has a draft in the plan; the step is not run.
fn until_drafted(rig: &mut Rig, id: u64) {
    for _ in 0..200 {
        rig.plan_only();
        if rig.planned(id) > 1 && rig.said(id) > 0 {
            return;
        }
        rig.machine.run(&rig.plan, &mut rig.output);
        rig.now_us += rig.output.duration_us;
        rig.apply();
    }
    panic!("{id} never had a draft");
}

/// Runs the step that was planned.
fn run(rig: &mut Rig) {
    rig.machine.run(&rig.plan, &mut rig.output);
    rig.now_us += rig.output.duration_us;
    rig.apply();
}

#[test]
fn drafted_tokens_save_steps_and_change_no_token() {
    let tokens = foretold(100);
    let [steps, plain] = [speculating(64), options()].map(|options| {
        let mut rig = Rig::new(options);
        rig.add(sequence(1, tokens.clone(), 150));
        let steps = rig.until(400, |rig| rig.ended.contains_key(&1));
        rig.assert_whole(1, &tokens, 150);
        let stats = rig.scheduler.stats();
        let (drafted, accepted) = rig.drafted.get(&1).copied().unwrap_or_default();
        assert_eq!(
            (stats.draft_tokens, stats.draft_tokens_accepted),
            (drafted as u64, accepted as u64)
        );
        (steps, accepted)
    });
    assert_eq!(plain.1, 0);
    assert!(steps.1 > 30, "{steps:?}");
    assert_eq!(steps.0, plain.0 - steps.1, "each accepted token is a step less");
}

#[test]
fn a_draft_never_goes_beyond_the_answers_end() {
    for max_tokens in 1..30 {
        let mut rig = Rig::new(speculating(64));
        let tokens = foretold(60);
        rig.add(sequence(1, tokens.clone(), max_tokens));
        while !rig.ended.contains_key(&1) {
            rig.plan_only();
            let last = rig.plan.logits.iter().map(|row| row.position).max();
            assert!(last.is_none_or(|last| last < tokens.len() + max_tokens), "{last:?}");
            run(&mut rig);
        }
        rig.assert_whole(1, &tokens, max_tokens);
    }
    let mut rig = Rig::new(SchedulerOptions { context_tokens: 100, ..speculating(64) });
    rig.add(sequence(1, foretold(60), 1_000));
    rig.until(100, |rig| rig.ended.contains_key(&1));
    rig.assert_whole(1, &foretold(60), 20);
}

#[test]
fn an_end_token_in_the_middle_of_a_draft_ends_the_answer_there() {
    let tokens = foretold(100);
    let expected = continuation(&tokens, 150);
    let mut ends: Vec<TokenId> = expected.clone();
    ends.sort_unstable();
    ends.dedup();
    for end in ends {
        let mut rig = Rig::new(speculating(64));
        let end_tokens = Arc::from([end].as_slice());
        rig.add(NewSequence { end_tokens, ..sequence(1, tokens.clone(), 150) });
        rig.until(200, |rig| rig.ended.contains_key(&1));
        assert_eq!(rig.ended[&1], Ok(FinishReason::Stop));
        let at = expected.iter().position(|token| *token == end).unwrap();
        assert_eq!(rig.said.get(&1).map_or(&[][..], Vec::as_slice), &expected[..at]);
    }
}

#[test]
fn rows_see_the_drafted_tokens_before_them_as_history() {
    let mut rig = Rig::new(speculating(64));
    let sampling = SamplingParams { frequency_penalty: 0.5, ..SamplingParams::greedy() };
    let tokens = foretold(60);
    rig.add(NewSequence { sampling: Arc::new(sampling), ..sequence(1, tokens.clone(), 50) });
    until_drafted(&mut rig, 1);
    let known = [tokens.clone(), rig.said[&1].clone()].concat();
    let planned = rig.plan.sequences[0].tokens.clone();
    let all = [known.clone(), rig.plan.tokens[planned.start + 1..planned.end].to_vec()].concat();
    assert_eq!(rig.plan.logits.len(), planned.len());
    for (index, row) in rig.plan.logits.iter().enumerate() {
        let LogitsTask::Sample { history, prompt_tokens, .. } = &row.task else { panic!() };
        assert_eq!((row.row, row.position), (planned.start + index, known.len() + index));
        assert_eq!(rig.plan.history[history.clone()], all[..row.position]);
        assert_eq!(*prompt_tokens, tokens.len());
    }
}

#[test]
fn a_row_that_fails_behind_a_wrong_token_fails_nobody() {
    let fail = |wrong_before: bool| {
        let mut rig = Rig::new(speculating(64));
        rig.add(sequence(1, foretold(60), 50));
        loop {
            until_drafted(&mut rig, 1);
            rig.machine.run(&rig.plan, &mut rig.output);
            if rig.output.rows[0].token.id == rig.plan.tokens[1] {
                break;
            }
            rig.apply();
        }
        let rows = &mut rig.output.rows;
        if wrong_before {
            rows[0].token.id = TokenId(1 - rows[0].token.id.0.min(1));
        }
        let failed = rows.remove(1);
        let failure = RowFailure { sequence: failed.sequence, position: failed.position };
        rig.output.failures.push(failure);
        let said = rig.said(1);
        rig.apply();
        assert_eq!(rig.said(1), said + 1, "the token before it is said");
        (rig.ended.get(&1).cloned(), failed.position)
    };
    assert_eq!(fail(true).0, None);
    let (ended, position) = fail(false);
    assert_eq!(ended, Some(Err(RequestError::NumericError { position })));
}

#[test]
fn the_first_row_of_a_run_fails_the_sequence() {
    let mut rig = Rig::new(speculating(64));
    rig.add(sequence(1, foretold(60), 50));
    until_drafted(&mut rig, 1);
    rig.machine.run(&rig.plan, &mut rig.output);
    let failed = rig.output.rows.remove(0);
    let failure = RowFailure { sequence: failed.sequence, position: failed.position };
    rig.output.failures.push(failure);
    let said = rig.said(1);
    rig.apply();
    let position = failed.position;
    assert_eq!(rig.ended[&1], Err(RequestError::NumericError { position }));
    assert_eq!(rig.said(1), said);
}

#[test]
fn nobody_yields_to_a_draft() {
    // Two sequences of three blocks each at their end, and not one block more.
    let tokens = foretold(20);
    let [speculated, plain] = [6, 7].map(|blocks| {
        let mut rig = Rig::new(speculating(blocks));
        for id in 1..=2 {
            rig.add(sequence(id, tokens.clone(), 3 * BLOCK_TOKENS - tokens.len()));
        }
        rig.until(300, |rig| rig.ended.len() == 2);
        (1..=2).for_each(|id| rig.assert_whole(id, &tokens, 3 * BLOCK_TOKENS - tokens.len()));
        rig.scheduler.stats().preemptions
    });
    assert_eq!((speculated, plain), (0, 0));
}

#[test]
fn blocks_that_only_a_draft_was_for_are_given_back() {
    let mut rig = Rig::new(speculating(64));
    rig.add(sequence(1, foretold(60), 100));
    while !rig.ended.contains_key(&1) {
        rig.step();
        let tokens = 80 + rig.said(1);
        let used = rig.scheduler.stats().device.used;
        let ended = rig.ended.contains_key(&1);
        assert!(ended || used <= tokens.div_ceil(BLOCK_TOKENS), "{used} for {tokens}");
    }
}

#[test]
fn only_accepted_tokens_are_found_again() {
    let mut rig = Rig::new(speculating(64));
    let tokens = foretold(60);
    rig.add(sequence(1, tokens.clone(), 100));
    rig.until(300, |rig| rig.ended.contains_key(&1));
    let more = [tokens, rig.said[&1].clone()].concat();
    rig.add(sequence(2, more.clone(), 40));
    rig.until(300, |rig| rig.ended.contains_key(&2));
    rig.assert_whole(2, &more, 40);
    let found = rig.scheduler.stats().prefix_hit_tokens as usize;
    assert!(found >= more.len() - 2 * BLOCK_TOKENS, "{found} of {}", more.len());
}

#[test]
fn a_step_with_prompts_has_no_drafts_and_classes_of_widths_are_kept() {
    let mut options = speculating(256);
    if let Some(speculation) = &mut options.speculation {
        speculation.width_borders = &[4, 8];
    }
    let mut rig = Rig::new(options);
    for id in 0..12 {
        rig.add(sequence(id, foretold(60), 60));
    }
    let (mut drafted, mut prompts) = (0, 0);
    while !rig.scheduler.is_empty() {
        rig.plan_only();
        let decoding = |id: SequenceId| rig.said(id.0) > 0;
        let of_prompts = rig.plan.sequences.iter().filter(|planned| !decoding(planned.id)).count();
        let others = rig.plan.sequences.len() - of_prompts;
        let width: usize = rig.plan.tokens.len();
        if of_prompts == 0 && width > others {
            drafted += 1;
            let border = [4, 8, 32].into_iter().find(|border| others <= *border);
            assert!(border.is_some_and(|border| width <= border), "{others} became {width}");
        } else if of_prompts > 0 {
            prompts += 1;
            let rows = rig.plan.logits.len();
            assert!(rows <= rig.plan.sequences.len(), "{rows} rows beside prompts");
        }
        run(&mut rig);
    }
    assert!(drafted > 10 && prompts > 5, "{drafted} {prompts}");
}

#[test]
fn a_lost_executor_loses_no_token_of_a_draft() {
    let tokens = foretold(60);
    let mut rig = Rig::new(speculating(64));
    rig.add(sequence(1, tokens.clone(), 80));
    until_drafted(&mut rig, 1);
    rig.machine.lose();
    rig.scheduler.executor_lost(rig.now_us, &mut rig.events);
    rig.scheduler.check_invariants();
    rig.until(300, |rig| rig.ended.contains_key(&1));
    rig.assert_whole(1, &tokens, 80);
}
