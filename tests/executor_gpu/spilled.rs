//! Models whose feed-forward networks lie in host memory, some of them or all: computed by the CPU,
//! by the GPU as their weights stream by, and by both.

use super::stage::{Model, options, plan_tokens, score_next};
use super::tiny_model::{Family, TinyModel};
use super::{TOP, bits, near_reference_with, on_gpu, random_tokens, step};
use tandem::executor::{StageOptions, StagePart};
use tandem::step::StepPlan;
use tandem::tensor::DType;

/// Percent of the spilled networks that stream.
const SHARES: [u8; 3] = [0, 50, 100];

/// Options of a stage that has spilled the networks of some layers.
fn spilling(model: &Model, layers: &[usize], streamed: u8) -> StageOptions {
    let part = StagePart::spilling(model.spec.layers.len(), layers);
    StageOptions { part: Some(part), spill_streamed: Some(streamed), ..options(2, 512) }
}

#[test]
fn spilled_models_of_every_family_stay_near_the_reference() {
    for family in Family::ALL {
        for streamed in SHARES {
            let model = TinyModel { layers: 4, ..TinyModel::new(family).dtype(DType::Q4_0) };
            let model = if family.has_experts() { model.with_all_experts() } else { model };
            let model = Model::from_bytes(&model.gguf().bytes());
            for layers in [&[0, 1, 2, 3][..], &[1, 3]] {
                let name = format!("{family:?}, {layers:?} spilled, {streamed} % streamed");
                near_reference_with(&model, &spilling(&model, layers, streamed), &name);
            }
        }
    }
}

#[test]
fn spilled_weights_of_every_type_stay_near_the_reference() {
    for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
        let model = TinyModel { layers: 3, ..TinyModel::new(Family::Llama).dtype(dtype) };
        let model = Model::from_bytes(&model.gguf().bytes());
        let name = format!("{dtype} spilled");
        near_reference_with(&model, &spilling(&model, &[0, 1, 2], 50), &name);
    }
}

#[test]
fn a_streamed_network_gives_the_bits_of_a_resident_one() {
    for dtype in [DType::Q4_0, DType::Q4_K, DType::Q6_K, DType::Q8_0] {
        let model = TinyModel { layers: 5, ..TinyModel::new(Family::Llama).dtype(dtype) };
        let model = Model::from_bytes(&model.gguf().bytes());
        let Some(mut resident) = on_gpu(&model, &options(2, 512)) else { return };
        let mut streamed = on_gpu(&model, &spilling(&model, &[0, 1, 2, 3, 4], 100)).unwrap();
        let tokens = random_tokens(&mut 8, 400, model.spec.vocab_size);
        // Steps of one shape are launched, recorded, and replayed.
        let singles = (300..330).map(|start| start..start + 1);
        let last = std::iter::once(330..400);
        for range in [0..200, 200..210, 210..300].into_iter().chain(singles).chain(last) {
            let mut plan = StepPlan::default();
            plan_tokens(&mut plan, (0, 0), &tokens, range.clone(), score_next(&tokens, TOP));
            let wanted = bits(&step(&mut resident, &plan));
            assert_eq!(bits(&step(&mut streamed, &plan)), wanted, "{dtype}: {range:?}");
        }
    }
}

#[test]
fn weights_are_held_once() {
    let model = TinyModel { layers: 4, ..TinyModel::new(Family::Llama).dtype(DType::Q4_0) };
    let model = Model::from_bytes(&model.gguf().bytes());
    let Some(resident) = on_gpu(&model, &options(1, 512)) else { return };
    let spilled = on_gpu(&model, &spilling(&model, &[0, 2], 0)).unwrap();
    let (all, rest) = (resident.weights().bytes(), spilled.weights().bytes());
    let host = spilled.weights().spilled_bytes();
    assert_eq!(resident.weights().spilled_bytes(), 0);
    assert!(rest < all && rest + host < all + all / 10, "{rest} and {host} of {all}");
}
