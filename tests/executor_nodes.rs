//! Weights and workers divided over NUMA nodes: the same bits as of one node. The nodes are made up
//! where this machine has fewer; the system then refuses them, and memory lies where it may.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test, and one that is skipped")]

#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use stage::{Model, options, plan_tokens, run, score_next};
use std::sync::Arc;
use tandem::executor::{
    CpuPool, PoolOptions, Stage, StageOptions, StagePart, WeightSource, Weights, WeightsRequest,
};
use tandem::memory::HugePages;
use tandem::placement::NodeTeams;
use tandem::step::{StepOutput, StepPlan};
use tandem::tensor::DType;
use tandem::units::TokenId;
use tiny_model::{Family, TinyModel, split_mix};

/// Plans of a wide step, of one token, and of some; of a prompt that starts again.
fn plans() -> Vec<StepPlan> {
    let mut seed = 3;
    let tokens: Vec<_> = (0..90).map(|_| TokenId((split_mix(&mut seed) % 256) as u32)).collect();
    let plan = |range: std::ops::Range<usize>| {
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (1, 0), &tokens, range, score_next(&tokens, 5));
        plan
    };
    vec![plan(0..70), plan(70..71), plan(71..76), plan(76..90)]
}

fn answers(stage: &mut Stage) -> Vec<StepOutput> {
    let mut outputs: Vec<_> = plans().iter().map(|plan| run(stage, plan)).collect();
    outputs.iter_mut().for_each(|output| output.duration_us = 0);
    outputs
}

fn on(nodes: &[u32]) -> StageOptions {
    let mut options = options(nodes.len(), 128);
    options.pool.nodes = NodeTeams::of_workers(nodes);
    options
}

/// Workers by node: even, uneven, one each, more nodes than rows are cut for.
const MACHINES: [&[u32]; 5] = [&[0, 1], &[0, 0, 0, 1], &[1, 0, 0], &[0, 1, 2, 3], &[2, 5, 7, 8, 9]];

#[test]
fn answers_have_the_same_bits_on_any_nodes() {
    for family in Family::ALL {
        for dtype in [DType::Q8_0, DType::Q4_K, DType::F16] {
            let model = Model::from_bytes(&TinyModel::new(family).dtype(dtype).gguf().bytes());
            let wanted = answers(&mut model.stage(&options(2, 128)));
            for nodes in MACHINES {
                let mut stage = model.stage(&on(nodes));
                assert!(answers(&mut stage) == wanted, "{family:?} {dtype} on {nodes:?}");
            }
            let mut unpinned = options(3, 128);
            unpinned.pool.nodes = NodeTeams::in_turn(vec![0, 1]);
            assert!(answers(&mut model.stage(&unpinned)) == wanted, "{family:?} {dtype} in turn");
        }
    }
}

#[test]
fn weights_of_some_nodes_serve_any_workers() {
    for family in [Family::Qwen2, Family::Mixtral] {
        let model = Model::from_bytes(&TinyModel::new(family).gguf().bytes());
        let wanted = answers(&mut model.stage(&options(1, 128)));
        let divided = model.stage(&on(&[0, 0, 1])).weights().clone();
        let whole = model.stage(&options(2, 128)).weights().clone();
        for (weights, name) in [(divided, "divided"), (whole, "whole")] {
            for nodes in [&[0][..], &[0, 0, 0], &[0, 1], &[0, 1, 1, 2], &[3, 4, 5, 6, 7]] {
                let mut stage = Stage::restart(Arc::clone(&weights), &on(nodes)).unwrap();
                assert!(answers(&mut stage) == wanted, "{family:?}, {name} on {nodes:?}");
            }
        }
    }
}

#[test]
fn random_weights_are_the_same_on_any_nodes() {
    let model = Model::from_bytes(&TinyModel::new(Family::Qwen3Moe).gguf().bytes());
    let random = |nodes: &[u32]| {
        let StageOptions { pool, .. } = on(nodes);
        let request = WeightsRequest {
            source: WeightSource::Random { seed: 5 },
            spec: Arc::clone(&model.spec),
            part: StagePart::whole(model.spec.layers.len()),
            isa: options(1, 1).isa,
            huge_pages: HugePages::Advise,
        };
        let mut loaders = CpuPool::new(&pool).unwrap();
        let weights = Weights::load(&request, &mut loaders, &mut |_| {}).unwrap();
        answers(&mut Stage::restart(weights.into(), &on(nodes)).unwrap())
    };
    let wanted = random(&[0]);
    assert!([&[0, 1][..], &[0, 1, 1, 4]].iter().all(|nodes| random(nodes) == wanted));
}

#[test]
fn progress_ends_with_all_bytes_and_weights_are_held_once() {
    let model = Model::from_bytes(&TinyModel::new(Family::Llama).gguf().bytes());
    let load = |options: &StageOptions| {
        let mut reports = Vec::new();
        let (checkpoint, spec) = (model.checkpoint.clone(), model.spec.clone());
        let stage = Stage::load(checkpoint, spec, options, &mut |progress| {
            reports.push(progress);
        });
        (stage.unwrap().weights().bytes(), reports)
    };
    let (whole, _) = load(&options(2, 64));
    let (divided, reports) = load(&on(&[0, 1]));
    assert!(reports.is_sorted_by_key(|progress| progress.done_bytes), "{reports:?}");
    let last = reports.last().unwrap();
    assert_eq!(last.done_bytes, last.total_bytes);
    // What lies between the regions of two nodes is never touched.
    assert!(divided < whole + (4 << 20) && divided >= whole, "{divided} of {whole}");
}

#[test]
fn teams_that_do_not_fit_the_workers_are_one() {
    let options = PoolOptions {
        threads: 3,
        cores: Vec::new(),
        nodes: NodeTeams::of_workers(&[0, 1]),
        spin_us: 0,
    };
    assert_eq!(CpuPool::new(&options).unwrap().nodes(), &NodeTeams::default());
}
