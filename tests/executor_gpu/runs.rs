//! Some tokens of a sequence behind many, in a narrow step: they attend together on tensor cores.

use super::{HALVES, TOP, distance, on_gpu, random_tokens, step};
use crate::stage::{Model, options, plan_tokens, run, score_next};
use crate::tiny_model::{Family, TinyModel};
use tandem::executor::StageOptions;
use tandem::step::StepPlan;
use tandem::tensor::DType;

#[test]
fn tokens_behind_many_agree_with_the_cpu_beside_single_ones() {
    for family in [Family::Llama, Family::Qwen3, Family::Gemma3] {
        let model = TinyModel::new(family).dtype(DType::BF16);
        let model = Model::from_bytes(&model.gguf().bytes());
        let options = StageOptions { step_tokens_max: 1000, ..options(2, 4096) };
        let Some(mut gpu) = on_gpu(&model, &options) else { return };
        let mut cpu = model.stage(&options);
        let (mut seed, vocab) = (5, model.spec.vocab_size);
        let sequences = [1200, 1100].map(|length| random_tokens(&mut seed, length, vocab));
        // Of both sequences: a prompt in wide steps, then many tokens beside one, and in the end
        // many of each.
        let steps = [[0..500, 0..12], [500..980, 12..500], [980..1060, 500..1001]];
        let last = [[1060..1110, 1001..1002], [1110..1111, 1002..1023], [1111..1175, 1023..1060]];
        for ranges in steps.into_iter().chain(last) {
            let mut plan = StepPlan::default();
            for (id, (tokens, range)) in sequences.iter().zip(ranges.clone()).enumerate() {
                let next = score_next(tokens, TOP);
                plan_tokens(&mut plan, (id as u64, 64 * id as u32), tokens, range, next);
            }
            let (mean, most) = distance(&step(&mut gpu, &plan), &run(&mut cpu, &plan).rows);
            let what = format!("{family:?}, {ranges:?}: {mean:.6} nats apart, at most {most:.6}");
            println!("{what}");
            assert!(mean <= HALVES, "{what}, allowed {HALVES}");
        }
    }
}
