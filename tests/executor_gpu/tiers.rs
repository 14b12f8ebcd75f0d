//! Blocks of a GPU's stage on their way to other tiers and back, while steps run and while none
//! does.

use super::stage::{Model, options, plan_tokens, score_next};
use super::tiers::{copy, hold_random_orders, moved, perform, tiers};
use super::tiny_model::{Family, TinyModel};
use super::{TOP, bits, on_gpu, random_tokens, step, with};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tandem::executor::{GpuStage, TierOptions};
use tandem::step::{CopyOutcome, StepPlan, Tier};
use tandem::tensor::KvDType;
use tandem::units::TokenId;
use tempfile::TempDir;

#[test]
fn random_orders_move_what_a_naive_model_says() {
    for (family, dtype) in [(Family::Llama, KvDType::Q8_0), (Family::Gemma3, KvDType::F16)] {
        let model = Model::from_bytes(&TinyModel::new(family).gguf().bytes());
        let Some(gpu) = on_gpu(&model, &with(dtype, options(1, 320))) else { return };
        for seed in 0..8 {
            let folder = TempDir::new().unwrap();
            let sizes = TierOptions {
                host_blocks: 1 + seed as usize,
                disk_blocks: 8 - seed as usize,
                disk_folder: folder.path().to_owned(),
            };
            let bytes = hold_random_orders(&gpu.kv(), &sizes, seed).bytes();
            assert_eq!((bytes.host_pinned, bytes.host_pageable), (bytes.host, 0));
        }
    }
}

#[test]
fn blocks_keep_their_keys_and_values_through_all_tiers() {
    let model = Model::from_bytes(&TinyModel::new(Family::Qwen3).gguf().bytes());
    for dtype in KvDType::ALL {
        keeps_its_blocks(&model, dtype);
    }
}

fn keeps_its_blocks(model: &Model, dtype: KvDType) {
    let Some(mut gpu) = on_gpu(model, &with(dtype, options(1, 512))) else { return };
    let folder = TempDir::new().unwrap();
    let mut tiers = tiers(gpu.kv(), folder.path());
    let tokens = random_tokens(&mut 9, 50, model.spec.vocab_size);
    let mut whole = StepPlan::default();
    plan_tokens(&mut whole, (0, 0), &tokens, 0..50, score_next(&tokens, TOP));
    let wanted = bits(&step(&mut gpu, &whole));
    let mut first = StepPlan::default();
    // Nobody waits for this step.
    plan_tokens(&mut first, (1, 4), &tokens, 0..33, |_| None);
    step(&mut gpu, &first);
    // Blocks 4 and 5 go down, and come back as 8 and 9, one of them by a detour inside the step.
    moved(
        &mut tiers,
        &[
            ((Tier::Device, 4), (Tier::Host, 0)),
            ((Tier::Device, 5), (Tier::Disk, 1)),
            ((Tier::Host, 0), (Tier::Host, 2)),
            ((Tier::Host, 2), (Tier::Device, 10)),
            ((Tier::Disk, 1), (Tier::Device, 9)),
        ],
    );
    let mut second = StepPlan::default();
    second.copies.push(copy((Tier::Device, 10), (Tier::Device, 8)));
    plan_tokens(&mut second, (1, 8), &tokens, 33..50, score_next(&tokens, TOP));
    assert_eq!(bits(&step(&mut gpu, &second)), wanted[33..], "{dtype}");
}

/// One sequence's tokens, a few at a time, so that steps are recorded.
fn decode(gpu: &mut GpuStage, tokens: &[TokenId], first_block: u32) -> Vec<super::Bits> {
    let mut rows = Vec::new();
    for start in (0..tokens.len()).step_by(4) {
        let mut plan = StepPlan::default();
        let range = start..tokens.len().min(start + 4);
        plan_tokens(&mut plan, (1, first_block), tokens, range, score_next(tokens, TOP));
        rows.extend(bits(&step(gpu, &plan)));
    }
    rows
}

#[test]
fn steps_and_copies_of_other_blocks_run_side_by_side() {
    let model = Model::from_bytes(&TinyModel::new(Family::Llama).gguf().bytes());
    let Some(mut gpu) = on_gpu(&model, &options(1, 1024)) else { return };
    let folder = TempDir::new().unwrap();
    let mut tiers = tiers(gpu.kv(), folder.path());
    let tokens = random_tokens(&mut 2, 200, model.spec.vocab_size);
    let wanted = decode(&mut gpu, &tokens, 0);
    let moving = random_tokens(&mut 3, 60, model.spec.vocab_size);
    let moving_wanted = decode(&mut gpu, &moving, 10);
    let is_over = Arc::new(AtomicBool::new(false));
    let rounds = std::thread::scope(|scope| {
        let copies = scope.spawn(|| {
            let mut rounds = 0;
            while !is_over.load(Ordering::Relaxed) {
                let place = [10, 12][rounds % 2];
                let other = 22 - place;
                let away = [Tier::Host, Tier::Disk][rounds / 2 % 2];
                let out = [0, 1].map(|block| ((Tier::Device, place + block), (away, block)));
                let back = [0, 1].map(|block| ((away, block), (Tier::Device, other + block)));
                moved(&mut tiers, &out);
                moved(&mut tiers, &back);
                rounds += 1;
            }
            rounds
        });
        for _ in 0..20 {
            assert_eq!(decode(&mut gpu, &tokens, 0), wanted);
        }
        is_over.store(true, Ordering::Relaxed);
        copies.join().unwrap()
    });
    println!("{rounds} rounds of copies beside 1000 steps");
    assert!(rounds > 1);
    let place = [10, 12][rounds % 2];
    let mut last = StepPlan::default();
    plan_tokens(&mut last, (1, place), &moving, 56..60, score_next(&moving, TOP));
    assert_eq!(bits(&step(&mut gpu, &last)), moving_wanted[56..]);
}

#[test]
fn copies_of_a_gpu_that_hangs_fail_and_those_behind_it_still_work() {
    let model = Model::from_bytes(&TinyModel::new(Family::Llama).gguf().bytes());
    let Some(gpu) = on_gpu(&model, &options(1, 512)) else { return };
    let folder = TempDir::new().unwrap();
    let mut tiers = tiers(gpu.kv(), folder.path());
    moved(&mut tiers, &[((Tier::Device, 0), (Tier::Host, 0)), ((Tier::Host, 0), (Tier::Disk, 0))]);
    gpu.weights().limit_waits(Duration::ZERO);
    // No copy takes no time at all, but one may be done before anybody looks.
    let order = [copy((Tier::Device, 0), (Tier::Host, 1))];
    let mut outcomes = (0..1000).map(|_| perform(&mut tiers, &order)[0]);
    assert!(outcomes.any(|outcome| outcome == CopyOutcome::Failed));
    let orders = [
        copy((Tier::Host, 0), (Tier::Device, 1)),
        copy((Tier::Disk, 0), (Tier::Host, 2)),
        copy((Tier::Host, 2), (Tier::Host, 3)),
    ];
    let wanted = [CopyOutcome::Failed, CopyOutcome::Done, CopyOutcome::Done];
    assert_eq!(perform(&mut tiers, &orders), wanted);
    // What was registered with a lost GPU stays so; other tests must not get its addresses.
    std::mem::forget(tiers);
}
