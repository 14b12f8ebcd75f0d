//! Stages: split at any layer, restarted on the same weights, fed with bad plans and bad weights,
//! with KV blocks moved between tiers.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test and its figures")]

#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiers.rs"]
mod tiers;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use stage::{Model, options, plan_tokens, run, score_next};
use std::sync::Arc;
use tandem::executor::program::Op;
use tandem::executor::{
    ExecutorError, Program, SpilledLayers, SpilledUnit, Stage, StageOptions, StagePart, handoff,
};
use tandem::memory::HugePages;
use tandem::step::{StepOutput, StepPlan, Tier};
use tandem::units::TokenId;
use tiers::{copy, moved, tiers};
use tiny_model::{Family, TinyModel, split_mix};

fn tiny(family: Family) -> Model {
    Model::from_bytes(&TinyModel::new(family).gguf().bytes())
}

fn tokens(count: usize) -> Vec<TokenId> {
    let mut seed = 3;
    (0..count).map(|_| TokenId((split_mix(&mut seed) % 256) as u32)).collect()
}

/// A plan that scores tokens `start .. end` of a sequence in blocks `0 ..`.
fn scored(tokens: &[TokenId], start: usize, end: usize) -> StepPlan {
    let mut plan = StepPlan::default();
    plan_tokens(&mut plan, (1, 0), tokens, start..end, score_next(tokens, 5));
    plan
}

#[test]
fn two_stages_split_anywhere_answer_like_one() {
    for family in Family::ALL {
        let model = tiny(family);
        let n_layers = model.spec.layers.len();
        let tokens = tokens(70);
        let plans = [scored(&tokens, 0, 40), scored(&tokens, 40, 41), scored(&tokens, 41, 70)];
        let mut whole = model.stage(&options(1, 128));
        let wanted: Vec<_> = plans.iter().map(|plan| run(&mut whole, plan).rows).collect();
        for cut in 0..=n_layers {
            let options = options(2, 128);
            let [mut first, mut last] = StagePart::split(n_layers, cut)
                .map(|part| model.stage(&StageOptions { part: Some(part), ..options.clone() }));
            let (to_last, from_first) =
                handoff(2, options.step_tokens_max, model.spec.embedding_dim);
            first.set_outlet(to_last);
            last.set_inlet(from_first);
            let got = std::thread::scope(|scope| {
                scope.spawn(|| plans.iter().for_each(|plan| drop(run(&mut first, plan))));
                plans.iter().map(|plan| run(&mut last, plan).rows).collect::<Vec<_>>()
            });
            assert!(got == wanted, "{family:?} cut before layer {cut}");
        }
    }
}

#[test]
fn three_stages_answer_like_one() {
    let model = TinyModel { layers: 4, ..TinyModel::new(Family::Qwen3) };
    let model = Model::from_bytes(&model.gguf().bytes());
    let (tokens, options) = (tokens(70), options(1, 128));
    let plans = [scored(&tokens, 0, 40), scored(&tokens, 40, 41), scored(&tokens, 41, 70)];
    let mut whole = model.stage(&options);
    let wanted: Vec<_> = plans.iter().map(|plan| run(&mut whole, plan).rows).collect();
    let parts = StagePart::cut(4, &[1, 3]);
    assert_eq!(
        parts.iter().map(|part| part.layers.clone()).collect::<Vec<_>>(),
        [0..1, 1..3, 3..4]
    );
    let stages = parts
        .into_iter()
        .map(|part| model.stage(&StageOptions { part: Some(part), ..options.clone() }));
    let [mut first, mut middle, mut last] = stages.collect::<Vec<_>>().try_into().ok().unwrap();
    let joined = || handoff(1, options.step_tokens_max, model.spec.embedding_dim);
    let ((to_middle, from_first), (to_last, from_middle)) = (joined(), joined());
    first.set_outlet(to_middle);
    middle.set_inlet(from_first);
    middle.set_outlet(to_last);
    last.set_inlet(from_middle);
    let got = std::thread::scope(|scope| {
        for stage in [&mut first, &mut middle] {
            scope.spawn(|| plans.iter().for_each(|plan| drop(run(stage, plan))));
        }
        plans.iter().map(|plan| run(&mut last, plan).rows).collect::<Vec<_>>()
    });
    assert!(got == wanted);
}

#[test]
fn a_neighbour_that_has_gone_is_an_error_and_not_a_hang() {
    let model = tiny(Family::Llama);
    let [first, _] = StagePart::split(2, 1);
    let mut first = model.stage(&StageOptions { part: Some(first), ..options(1, 64) });
    let (to_last, from_first) = handoff(1, 512, model.spec.embedding_dim);
    first.set_outlet(to_last);
    drop(from_first);
    let result = first.run(&scored(&tokens(4), 0, 4), &mut StepOutput::default());
    assert!(matches!(result, Err(ExecutorError::Handoff(_))), "{result:?}");
}

#[test]
fn a_restarted_stage_shares_the_weights_and_answers_the_same() {
    let model = tiny(Family::Qwen3);
    let (tokens, options) = (tokens(30), options(2, 64));
    let mut stage = model.stage(&options);
    let wanted = run(&mut stage, &scored(&tokens, 0, 30)).rows;
    let weights = stage.weights().clone();
    drop(stage);
    assert_eq!(Arc::strong_count(&weights), 1);
    let mut again = Stage::restart(weights, &options).unwrap();
    assert_eq!(run(&mut again, &scored(&tokens, 0, 30)).rows, wanted);
}

#[test]
fn a_panic_in_a_worker_is_an_error_and_the_stage_must_be_replaced() {
    let model = tiny(Family::Llama);
    let [_, last] = StagePart::split(2, 1);
    // Nobody gave the stage an inlet: its workers find out in the middle of the step.
    let options = StageOptions { part: Some(last), ..options(3, 64) };
    let mut stage = model.stage(&options);
    let plan = scored(&tokens(9), 0, 9);
    for _ in 0..2 {
        let result = stage.run(&plan, &mut StepOutput::default());
        assert!(matches!(result, Err(ExecutorError::Worker(_))), "{result:?}");
    }
    drop(Stage::restart(stage.weights().clone(), &options).unwrap());
}

#[test]
fn a_bad_plan_is_refused_and_the_stage_goes_on() {
    let model = tiny(Family::Llama);
    let tokens = tokens(30);
    let mut stage = model.stage(&options(2, 64));
    let wanted = run(&mut stage, &scored(&tokens, 0, 30)).rows;
    let mut bad = scored(&tokens, 0, 30);
    bad.tokens[3] = TokenId(1_000_000);
    let result = stage.run(&bad, &mut StepOutput::default());
    assert!(matches!(result, Err(ExecutorError::InvalidPlan { field: "tokens", .. })));
    let mut bad = scored(&tokens, 0, 30);
    // Other tiers are no stage's business.
    for from in [(Tier::Host, 0), (Tier::Disk, 0), (Tier::Device, 1000)] {
        bad.copies.clear();
        bad.copies.push(copy(from, (Tier::Device, 0)));
        let result = stage.run(&bad, &mut StepOutput::default());
        assert!(matches!(result, Err(ExecutorError::InvalidPlan { field: "copies", .. })));
    }
    assert_eq!(run(&mut stage, &scored(&tokens, 0, 30)).rows, wanted);
}

#[test]
fn a_sequence_swapped_out_and_back_elsewhere_goes_on_unchanged() {
    for family in Family::ALL {
        for away in [Tier::Host, Tier::Disk] {
            swap_in_the_middle(family, away);
        }
    }
}

fn swap_in_the_middle(family: Family, away: Tier) {
    let model = tiny(family);
    let tokens = tokens(60);
    let mut stage = model.stage(&options(2, 320));
    run(&mut stage, &scored(&tokens, 0, 50));
    let wanted = run(&mut stage, &scored(&tokens, 50, 60)).rows;
    run(&mut stage, &scored(&tokens, 0, 50));
    let folder = tempfile::TempDir::new().unwrap();
    let mut tiers = tiers(stage.kv(), folder.path());
    let mut other = StepPlan::default();
    plan_tokens(&mut other, (2, 8), &tokens, 0..50, score_next(&tokens, 5));
    let alone = run(&mut stage, &other).rows;
    let out = [((Tier::Device, 0), (away, 2)), ((Tier::Device, 1), (away, 0))];
    let back = [((away, 2), (Tier::Device, 4)), ((away, 0), (Tier::Device, 6))];
    // Steps of another sequence run while blocks move.
    std::thread::scope(|scope| {
        let copies = scope.spawn(|| {
            moved(&mut tiers, &out);
            moved(&mut tiers, &back);
        });
        while !copies.is_finished() {
            assert_eq!(run(&mut stage, &other).rows, alone);
        }
    });
    // Another sequence overwrites the blocks.
    run(&mut stage, &scored(&tokens[10..], 0, 50));
    let mut plan = StepPlan::default();
    plan.copies.push(copy((Tier::Device, 6), (Tier::Device, 5)));
    plan_tokens(&mut plan, (1, 4), &tokens, 50..60, score_next(&tokens, 5));
    assert_eq!(run(&mut stage, &plan).rows, wanted, "{family:?} {away:?}");
}

#[test]
fn a_row_that_is_not_finite_fails_its_sequence_and_no_other() {
    for family in [Family::Llama, Family::Mixtral] {
        poison_one_of_two(family);
    }
}

fn poison_one_of_two(family: Family) {
    let mut gguf = TinyModel::new(family).gguf();
    let embedding = gguf.tensors.iter_mut().find(|t| t.name == "token_embd.weight").unwrap();
    // The scale of the first block of token 7 becomes an f16 NaN. The output gets a tensor of its
    // own: tied, the logit of token 7 would be NaN in every row.
    let row_bytes = 256 / 32 * 34;
    embedding.data[7 * row_bytes..][..2].copy_from_slice(&0x7e00_u16.to_le_bytes());
    let mut output = TinyModel::new(family);
    output.output = tiny_model::Output::Own;
    let own = output.gguf().tensors.into_iter().find(|t| t.name == "output.weight").unwrap();
    gguf.tensors.push(own);
    let model = Model::from_bytes(&gguf.bytes());
    let mut stage = model.stage(&options(2, 256));
    let healthy = [TokenId(1), TokenId(2), TokenId(3)];
    let alone = run(&mut stage, &scored(&healthy, 0, 3)).rows;
    let mut poisoned = tokens(20);
    poisoned[10] = TokenId(7);
    let mut plan = StepPlan::default();
    plan_tokens(&mut plan, (1, 0), &healthy, 0..3, score_next(&healthy, 5));
    plan_tokens(&mut plan, (2, 1), &poisoned, 0..20, score_next(&poisoned, 5));
    let mut output = StepOutput::default();
    stage.run(&plan, &mut output).unwrap();
    assert!(output.failures.iter().all(|failure| failure.sequence.0 == 2));
    let failed: Vec<_> = output.failures.iter().map(|failure| failure.position).collect();
    assert!((11..20).all(|position| failed.contains(&position)), "{failed:?}");
    assert_eq!(output.rows[..2], alone);
    // Whoever gets the poisoned KV block next is not harmed by what is left in it.
    let mut plan = StepPlan::default();
    plan_tokens(&mut plan, (1, 1), &healthy, 0..3, score_next(&healthy, 5));
    assert_eq!(run(&mut stage, &plan).rows, alone);
}

#[test]
fn a_warmed_stage_answers_like_a_cold_one() {
    for family in Family::ALL {
        let model = tiny(family);
        let tokens = tokens(40);
        let plans = [scored(&tokens, 0, 33), scored(&tokens, 33, 40)];
        let answers = |stage: &mut Stage| plans.clone().map(|plan| run(stage, &plan).rows);
        let wanted = answers(&mut model.stage(&options(2, 64)));
        let mut warmed = model.stage(&options(2, 64));
        warmed.warm_up(HugePages::Advise).unwrap();
        assert!(answers(&mut warmed) == wanted, "{family:?}");
        let part = Some(StagePart::split(model.spec.layers.len(), 1)[1].clone());
        model
            .stage(&StageOptions { part, ..options(2, 64) })
            .warm_up(HugePages::SystemDefault)
            .unwrap();
    }
}

/// The spilled units of a program in its order, each with the ops between its marks.
fn spilled_units(program: &Program) -> Vec<(SpilledUnit, &[Op])> {
    let starts = program.ops.iter().enumerate().filter_map(|(at, op)| match op {
        Op::SpillStart { unit, .. } => Some((at, *unit)),
        _ => None,
    });
    let of = |(at, unit): (usize, SpilledUnit)| {
        let ops = &program.ops[at + 1..];
        let is_end = |op: &Op| matches!(op, Op::SpillEnd { unit: ended, .. } if *ended == unit);
        (unit, &ops[..ops.iter().position(is_end).unwrap()])
    };
    starts.map(of).collect()
}

/// What lies in host memory, and the units and layers of units that these make.
fn spillings() -> [(SpilledLayers, Vec<usize>); 4] {
    let layers = |feed_forward: &[usize], attention: &[usize]| SpilledLayers {
        feed_forward: feed_forward.to_vec(),
        attention: attention.to_vec(),
        ring_slots: 4,
    };
    [
        (layers(&[1, 3], &[]), vec![0, 1]),
        (layers(&[], &[2]), vec![0, 0]),
        (layers(&[0, 1, 2, 3], &[0, 3]), vec![0, 0, 0, 1, 2, 3, 3, 3]),
        (layers(&[1], &[0, 1]), vec![0, 0, 1, 1, 1]),
    ]
}

#[test]
fn spilled_units_are_between_marks_in_one_program_and_alone_in_the_other() {
    for (family, (spilled, layers)) in
        Family::ALL.into_iter().flat_map(|family| spillings().map(|spilled| (family, spilled)))
    {
        let name = format!("{family:?}, {spilled:?}");
        let model = TinyModel { layers: 4, ..TinyModel::new(family) };
        let spec = Model::from_bytes(&model.gguf().bytes()).spec;
        let whole = Program::lower(&spec, &StagePart::whole(4)).unwrap();
        let part = StagePart::spilling(4, spilled.clone());
        let [here, alone] =
            [&part, &part.spilled().unwrap()].map(|part| Program::lower(&spec, part).unwrap());
        let is_mark = |op: &&Op| matches!(op, Op::SpillStart { .. } | Op::SpillEnd { .. });
        let without: Vec<_> = here.ops.iter().filter(|op| !is_mark(op)).collect();
        assert_eq!(without, whole.ops.iter().collect::<Vec<_>>(), "{name}");
        let (ours, theirs) = (spilled_units(&here), spilled_units(&alone));
        let marks = |program: &Program| -> Vec<Op> {
            program.ops.iter().filter(is_mark).cloned().collect()
        };
        assert_eq!(marks(&here), marks(&alone), "{name}");
        let units: Vec<_> = layers.into_iter().enumerate().collect();
        let got: Vec<_> = ours.iter().map(|(unit, _)| (unit.index, unit.layer)).collect();
        assert_eq!(got, units, "{name}");
        let kinds = |ops: &[Op]| ops.iter().map(std::mem::discriminant).collect::<Vec<_>>();
        assert!(
            ours.iter().zip(&theirs).all(|((_, ours), (_, theirs))| {
                kinds(ours) == kinds(theirs) && !ours.is_empty()
            })
        );
        assert_eq!(alone.ops.len(), theirs.iter().map(|(_, ops)| ops.len() + 2).sum::<usize>());
        assert!(alone.kv_layers.is_empty() && alone.ropes.is_empty(), "{name}");
        // Each spilled matrix is the other program's, and a router is of both.
        let names: Vec<_> = here
            .matrices
            .iter()
            .filter(|entry| entry.spilled.is_some())
            .map(|entry| &entry.tensor.name)
            .collect();
        let networks = spilled.feed_forward.len();
        let routers = if family.has_experts() { networks } else { 0 };
        let matrices = 3 * networks + 4 * spilled.attention.len();
        assert_eq!((names.len(), alone.matrices.len()), (matrices, matrices + routers), "{name}");
        let has = |name: &&String| alone.matrices.iter().any(|entry| entry.tensor.name == **name);
        assert!(
            names.iter().all(has) && alone.matrices.iter().all(|entry| entry.spilled.is_none())
        );
    }
    assert!(StagePart::spilling(4, SpilledLayers::default()).spilled().is_none());
}

#[test]
fn what_several_stages_have_spilled_is_one_program_in_their_order() {
    let model = TinyModel { layers: 4, ..TinyModel::new(Family::Qwen3Moe) };
    let spec = Model::from_bytes(&model.gguf().bytes()).spec;
    let lower = |part: &StagePart| Program::lower(&spec, part).unwrap();
    let units = |part: &StagePart| -> Vec<[usize; 2]> {
        spilled_units(&lower(part)).iter().map(|(unit, _)| [unit.index, unit.layer]).collect()
    };
    for (spilled, _) in spillings() {
        let whole = StagePart::spilling(4, spilled.clone()).spilled().unwrap();
        for cut in 1..4 {
            let parts = StagePart::split(4, cut).map(|part| {
                let of = |all: &[usize]| {
                    all.iter().copied().filter(|layer| part.layers.contains(layer)).collect()
                };
                let feed_forward = of(&spilled.feed_forward);
                let attention = of(&spilled.attention);
                part.without(SpilledLayers { feed_forward, attention, ring_slots: 4 })
            });
            let together = StagePart::spilled_of(&parts).unwrap();
            assert_eq!(lower(&together).ops, lower(&whole).ops, "{spilled:?} cut before {cut}");
            // Each stage counts from 0; here its units come behind those of the stages before it.
            let [mut all, second] = parts.each_ref().map(units);
            let layers = all.last().map_or(0, |[_, layer]| layer + 1);
            let first = all.len();
            all.extend(second.iter().map(|[index, layer]| [index + first, layer + layers]));
            assert_eq!(units(&together), all, "{spilled:?} cut before {cut}");
        }
    }
    assert!(StagePart::spilled_of(&StagePart::split(4, 2)).is_none());
}

#[test]
fn a_program_of_spilled_units_has_the_widths_of_what_it_computes_alone() {
    let spec = tiny(Family::Llama).spec;
    let whole = Program::lower(&spec, &StagePart::whole(spec.layers.len())).unwrap().dims;
    let dims = |feed_forward: &[usize], attention: &[usize]| {
        let (feed_forward, attention) = (feed_forward.to_vec(), attention.to_vec());
        let spilled = SpilledLayers { feed_forward, attention, ring_slots: 4 };
        let part = StagePart::spilling(spec.layers.len(), spilled).spilled().unwrap();
        Program::lower(&spec, &part).unwrap().dims
    };
    let (networks, attention, both) = (dims(&[0], &[]), dims(&[], &[0]), dims(&[0], &[1]));
    assert_eq!((networks.heads, networks.attended, networks.hidden), (0, 0, whole.hidden));
    assert_eq!((attention.heads, attention.attended), (whole.heads, whole.attended));
    assert_eq!((attention.hidden, both.hidden, both.heads), (0, whole.hidden, whole.heads));
    assert_eq!([networks, attention, both].map(|dims| dims.vocab), [0; 3]);
}
