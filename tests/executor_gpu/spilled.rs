//! Models of which weights lie in host memory, some of them or all: computed by the CPU, by the GPU
//! as their weights stream by, and by both.

use super::stage::{Model, options, plan_tokens, score_next};
use super::tiny_model::{Family, TinyModel};
use super::{EXACT, HALVES, TOP};
use super::{bits, distance, exact, load, on_gpu, random_tokens, stays_near, step};
use std::cell::LazyCell;
use std::sync::Arc;
use tandem::executor::{GpuStage, SpilledLayers, StageOptions, StagePart};
use tandem::step::StepPlan;
use tandem::tensor::DType;
use tandem_cpu_kernels::Isa;

/// Percent of the layers with spilled weights that stream.
pub const SHARES: [u8; 3] = [0, 50, 100];

/// Networks of some layers, and the attention of some.
pub fn layers(feed_forward: &[usize], attention: &[usize]) -> SpilledLayers {
    let (feed_forward, attention) = (feed_forward.to_vec(), attention.to_vec());
    SpilledLayers { feed_forward, attention, ring_slots: 4 }
}

/// Options of a stage that has spilled them.
pub fn spilling(model: &Model, spilled: SpilledLayers, streamed: u8) -> StageOptions {
    let part = StagePart::spilling(model.spec.layers.len(), spilled);
    StageOptions { part: Some(part), spill_streamed: Some(streamed), ..options(2, 512) }
}

#[test]
fn spilled_models_of_every_family_stay_near_the_reference() {
    let all = [0, 1, 2, 3];
    for family in Family::ALL {
        let model = TinyModel { layers: 4, ..TinyModel::new(family).dtype(DType::Q4_0) };
        let model = if family.has_experts() { model.with_all_experts() } else { model };
        let model = Model::from_bytes(&model.gguf().bytes());
        let exact = LazyCell::new(|| exact(&model));
        for spilled in [layers(&[1, 3], &[]), layers(&all, &[2]), layers(&all, &all)] {
            let first = on_gpu(&model, &spilling(&model, spilled.clone(), 0));
            let Some(weights) = first.map(|stage| Arc::clone(stage.weights())) else { return };
            for streamed in SHARES {
                let options = spilling(&model, spilled.clone(), streamed);
                let mut stage = GpuStage::start(Arc::clone(&weights), &options).unwrap();
                let name = format!("{family:?}, {spilled:?}, {streamed} % streamed");
                stays_near(&mut stage, &exact, &name);
            }
        }
    }
}

#[test]
fn spilled_weights_of_every_type_stay_near_the_reference() {
    for dtype in DType::ALL {
        let model = TinyModel { layers: 3, ..TinyModel::new(Family::Llama).dtype(dtype) };
        let model = Model::from_bytes(&model.gguf().bytes());
        let exact = LazyCell::new(|| exact(&model));
        for attention in [&[][..], &[0, 1, 2]] {
            let spilled = layers(&[0, 1, 2], attention);
            let name = format!("{dtype}, {spilled:?}");
            let Some(mut gpu) = on_gpu(&model, &spilling(&model, spilled, 50)) else { return };
            stays_near(&mut gpu, &exact, &name);
        }
    }
}

#[test]
fn floats_are_computed_alike_on_both_sides() {
    for (family, dtype) in [
        (Family::Qwen2, DType::F32),
        (Family::Gemma3, DType::F16),
        (Family::Qwen3, DType::BF16),
        (Family::Llama, DType::E4M3_128),
        (Family::Qwen3Moe, DType::BF16),
        (Family::Mixtral, DType::E4M3_32),
    ] {
        let model = TinyModel::new(family).dtype(dtype);
        let model = if family.has_experts() { model.with_all_experts() } else { model };
        let model = Model::from_bytes(&TinyModel { layers: 4, ..model }.gguf().bytes());
        let tokens = random_tokens(&mut 8, 230, model.spec.vocab_size);
        let spilled = layers(&[0, 1, 2, 3], &[1, 3]);
        let Some(mut stage) = on_gpu(&model, &spilling(&model, spilled.clone(), 0)) else { return };
        let weights = Arc::clone(stage.weights());
        let shares = SHARES.map(|streamed| {
            if streamed > 0 {
                let options = spilling(&model, spilled.clone(), streamed);
                stage = GpuStage::start(Arc::clone(&weights), &options).unwrap();
            }
            let rows = [0..30, 30..31, 31..39, 39..100, 100..220].map(|range| {
                let mut plan = StepPlan::default();
                plan_tokens(&mut plan, (0, 0), &tokens, range, score_next(&tokens, TOP));
                step(&mut stage, &plan)
            });
            rows.concat()
        });
        let bound = if dtype.block_elements() == 1 { EXACT } else { HALVES };
        for (share, rows) in SHARES.iter().zip(&shares) {
            let (mean, most) = distance(rows, &shares[0]);
            println!("{family:?} {dtype}, {share} %: {mean:.6} nats apart, at most {most:.6}");
            assert!(mean <= bound, "{family:?} {dtype}, {share} %: {mean}, allowed {bound}");
        }
    }
}

#[test]
fn what_streams_gives_the_bits_of_what_is_resident() {
    let all = [0, 1, 2, 3, 4];
    for dtype in [DType::Q4_0, DType::Q4_K, DType::Q6_K, DType::Q8_0] {
        let model = TinyModel { layers: 5, ..TinyModel::new(Family::Llama).dtype(dtype) };
        same_bits(&model, &layers(&all, &[]));
        same_bits(&model, &layers(&all, &all));
    }
    // Biases, norms of heads, and rows whose second part of 8 bits is multiplied as well.
    for family in [Family::Qwen2, Family::Qwen3, Family::Gemma3] {
        let model = TinyModel { layers: 5, ..TinyModel::new(family).dtype(DType::Q4_0) };
        same_bits(&model, &layers(&[0, 2], &[3, 4]));
    }
}

#[test]
fn floats_that_stream_give_the_bits_of_resident_ones() {
    let all = [0, 1, 2, 3, 4];
    for dtype in DType::ALL.into_iter().filter(|dtype| !dtype.is_quantized()) {
        let model = TinyModel { layers: 5, ..TinyModel::new(Family::Qwen2).dtype(dtype) };
        same_bits(&model, &layers(&all, &[0, 2, 3]));
    }
    for (family, dtype) in [(Family::Qwen3Moe, DType::BF16), (Family::Mixtral, DType::E4M3_128)] {
        let model = TinyModel { layers: 5, ..TinyModel::new(family).dtype(dtype) };
        same_bits(&model, &layers(&all, &[1]));
    }
}

#[test]
fn rows_that_the_cpu_does_not_interleave_stream_as_well() {
    for dtype in [DType::Q4_0, DType::Q5_K, DType::INT4_32] {
        let model = TinyModel { layers: 4, ..TinyModel::new(Family::Llama).dtype(dtype) };
        let model = Model::from_bytes(&model.gguf().bytes());
        let spilling = spilling(&model, layers(&[0, 1, 2, 3], &[0, 1, 2, 3]), 50);
        let options = StageOptions { isa: Some(Isa::Scalar), ..spilling };
        let Some(mut gpu) = on_gpu(&model, &options) else { return };
        stays_near(&mut gpu, &exact(&model), &format!("{dtype} row by row"));
    }
}

#[test]
fn weights_that_can_not_stream_are_the_cpus_in_steps_of_any_width() {
    let all = [0, 1, 2, 3];
    for (family, dtype, attention) in [
        (Family::Llama, DType::Q4_0, &all[..]),
        (Family::Gemma3, DType::Q6_K, &[1, 2]),
        (Family::Qwen3Moe, DType::Q8_0, &[]),
        (Family::Qwen2, DType::BF16, &all),
    ] {
        let model = TinyModel { layers: 4, ..TinyModel::new(family).dtype(dtype) };
        let model = if family.has_experts() { model.with_all_experts() } else { model };
        let model = Model::from_bytes(&model.gguf().bytes());
        let options = StageOptions {
            kv: options(2, 2048).kv,
            step_tokens_max: 1024,
            ..spilling(&model, layers(&all, attention), 100)
        };
        let Some(mut weights) = load(&model, &options) else { return };
        weights.forgo_streams();
        let mut stage = GpuStage::start(Arc::new(weights), &options).unwrap();
        let name = format!("{family:?} {dtype}");
        stays_near(&mut stage, &exact(&model), &name);
        // Rows of two prompts cross at once, those of both together in pieces.
        let prompts = [(0, 250), (16, 256), (32, 177)];
        let prompts = prompts.map(|(block, length)| {
            (block, random_tokens(&mut u64::from(block + 1), length, model.spec.vocab_size))
        });
        let mut together = StepPlan::default();
        let alone = prompts.each_ref().map(|(block, tokens)| {
            let mut plan = StepPlan::default();
            for plan in [&mut plan, &mut together] {
                let sequence = (u64::from(*block), *block);
                plan_tokens(plan, sequence, tokens, 0..tokens.len(), score_next(tokens, TOP));
            }
            bits(&step(&mut stage, &plan))
        });
        assert_eq!(bits(&step(&mut stage, &together)), alone.concat(), "{name}");
    }
}

fn same_bits(model: &TinyModel, spilled: &SpilledLayers) {
    let name = format!("{:?} {}: {spilled:?}", model.family, model.dtype);
    let model = Model::from_bytes(&model.gguf().bytes());
    let Some(mut resident) = on_gpu(&model, &options(2, 512)) else { return };
    let mut streamed = on_gpu(&model, &spilling(&model, spilled.clone(), 100)).unwrap();
    let tokens = random_tokens(&mut 8, 400, model.spec.vocab_size);
    // Steps of one shape are launched, recorded, and replayed.
    let singles = (300..330).map(|start| start..start + 1);
    let last = std::iter::once(330..400);
    for range in [0..200, 200..210, 210..300].into_iter().chain(singles).chain(last) {
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (0, 0), &tokens, range.clone(), score_next(&tokens, TOP));
        let wanted = bits(&step(&mut resident, &plan));
        assert_eq!(bits(&step(&mut streamed, &plan)), wanted, "{name}: {range:?}");
    }
}

#[test]
fn weights_are_held_once() {
    let model = TinyModel { layers: 4, ..TinyModel::new(Family::Llama).dtype(DType::Q4_0) };
    let model = Model::from_bytes(&model.gguf().bytes());
    let Some(resident) = on_gpu(&model, &options(1, 512)) else { return };
    let held = [layers(&[0, 2], &[]), layers(&[0, 1, 2, 3], &[0, 1, 2, 3])].map(|spilled| {
        let spilled = on_gpu(&model, &spilling(&model, spilled, 0)).unwrap();
        let (all, rest) = (resident.weights().bytes(), spilled.weights().bytes());
        let host = spilled.weights().spilled_bytes();
        assert_eq!(resident.weights().spilled_bytes(), 0);
        assert!(rest < all && rest + host < all + all / 10, "{rest} and {host} of {all}");
        rest
    });
    assert!(held[1] < held[0], "{held:?}");
}
