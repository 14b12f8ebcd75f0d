//! Keys and values in other types than f16.

use super::stage::{Model, options, plan_tokens, run, score_next};
use super::tiny_model::{Family, TinyModel};
use super::{EXACT, TOP, agree, distance, on_gpu, random_tokens, step, with};
use tandem::step::{RowOutput, StepPlan};
use tandem::tensor::{DType, KvDType};
use tandem::units::TokenId;

/// Models with float weights, so that little but keys and values is rounded.
fn float_models() -> impl Iterator<Item = Model> {
    let families = Family::ALL.into_iter().filter(|family| !family.has_experts());
    families
        .map(|family| Model::from_bytes(&TinyModel::new(family).dtype(DType::F32).gguf().bytes()))
}

#[test]
fn keys_and_values_in_8_bits_agree_with_the_cpu() {
    for model in float_models() {
        agree(&model, KvDType::Q8_0, EXACT);
    }
}

/// A sequence in narrow steps and one that attends on tensor cores.
fn plans(tokens: &[TokenId]) -> Vec<StepPlan> {
    let ranges = [0..30, 30..31, 31..32, 32..40, 40..tokens.len()];
    let plan = |range| {
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (1, 0), tokens, range, score_next(tokens, TOP));
        plan
    };
    ranges.map(plan).into()
}

/// Relative rounding of bf16 and e4m3, at most, over that of q8_0, of a group's largest element:
/// 2^-8 and 2^-4 over 1 / 254.
const OVER_EIGHT_BITS: [(KvDType, f64); 2] = [(KvDType::Bf16, 1.0), (KvDType::Fp8E4m3, 16.0)];

#[test]
fn types_that_only_a_gpu_keeps_are_as_near_to_f16_as_they_round() {
    for model in float_models() {
        let options = options(2, 512);
        let tokens = random_tokens(&mut 13, 300, model.spec.vocab_size);
        let on_cpu = |dtype| -> Vec<RowOutput> {
            let mut stage = model.stage(&with(dtype, options.clone()));
            plans(&tokens).iter().flat_map(|plan| run(&mut stage, plan).rows).collect()
        };
        let on_gpu = |dtype| -> Option<Vec<RowOutput>> {
            let mut stage = on_gpu(&model, &with(dtype, options.clone()))?;
            Some(plans(&tokens).iter().flat_map(|plan| step(&mut stage, plan)).collect())
        };
        let (sixteen, eight) = (on_cpu(KvDType::F16), on_cpu(KvDType::Q8_0));
        let (Some(same), Some(near)) = (on_gpu(KvDType::F16), on_gpu(KvDType::Q8_0)) else {
            return;
        };
        let name = &model.spec.name;
        // What the wide step's products and attention round to f16 themselves.
        let (kernels, rounding) = (distance(&same, &sixteen).0, distance(&eight, &sixteen).0);
        let (apart, _) = distance(&near, &eight);
        println!("{name}: nats apart: f16 {kernels:.6}, q8_0 {apart:.6}, rounding {rounding:.6}");
        // What is 2^-11 off before it is rounded to steps of 1 / 127 falls elsewhere in up to an
        // eighth of cases, and means grow with the root of that.
        assert!(apart <= kernels + rounding / 2.0, "{name}: q8_0 is {apart} nats apart");
        for (dtype, over) in OVER_EIGHT_BITS {
            let rows = on_gpu(dtype).unwrap();
            let ((off, _), (used, _)) = (distance(&rows, &sixteen), distance(&rows, &same));
            let allowed = kernels + over * rounding;
            println!("{name}: {dtype} {off:.6} nats from f16, allowed {allowed:.6}");
            assert!(off <= allowed && used > 0.0, "{name}: {dtype} is {off} off, {used} used");
        }
    }
}
