//! The interpreter against the specification of its program: plain loops over f32.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test and its figures")]

#[path = "support/reference.rs"]
mod reference;
#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use reference::{Reference, distance_from};
use stage::{Model, options, plan_tokens, run, score_next};
use std::collections::HashSet;
use tandem::executor::program::Op;
use tandem::executor::{Program, StagePart};
use tandem::step::StepPlan;
use tandem::tensor::DType;
use tandem::units::TokenId;
use tiny_model::{Family, TinyModel, split_mix};

/// Mean and largest absolute difference of log-probabilities, over the most likely tokens.
fn distance(model: &Model) -> (f64, f64) {
    let mut seed = 11;
    let vocab = model.spec.vocab_size as u64;
    // Longer than the window of the sliding layers, and than one KV block.
    let tokens: Vec<_> = (0..45).map(|_| TokenId((split_mix(&mut seed) % vocab) as u32)).collect();
    let mut stage = model.stage(&options(2, 128));
    let mut plan = StepPlan::default();
    plan_tokens(&mut plan, (1, 0), &tokens, 0..tokens.len(), score_next(&tokens, 20));
    let rows = run(&mut stage, &plan).rows;

    let part = StagePart::whole(model.spec.layers.len());
    let program = Program::lower(&model.spec, &part).unwrap();
    distance_from(&Reference::new(&model.checkpoint, &program).logits(&tokens), &rows)
}

/// A tiny model; Gemma's global layers turn more slowly than its local ones, as in real files.
fn tiny(model: &TinyModel) -> Model {
    let mut gguf = model.gguf();
    if model.family == Family::Gemma3 {
        gguf.f32(&model.key("rope.freq_base"), 1e6);
    }
    Model::from_bytes(&gguf.bytes())
}

/// A quantised model with experts uses all of them: activations rounded to 8 bits may swap two
/// that are nearly as good, which is no error but a large difference.
fn decided(model: TinyModel) -> TinyModel {
    if model.dtype.is_quantized() { model.with_all_experts() } else { model }
}

#[test]
fn float_models_of_every_family_agree_with_the_reference() {
    for family in Family::ALL {
        let (mean, largest) = distance(&tiny(&TinyModel::new(family).dtype(DType::F32)));
        println!("{family:?} F32: {mean:.6} mean, {largest:.6} largest");
        // Sums are in another order, so a key or value may be rounded to the f16 beside.
        assert!(mean < 1e-3 && largest < 1e-2, "{family:?}: {mean} mean, {largest} largest");
    }
}

/// Widths that are no multiple of any vector, group or pair of threads.
#[test]
fn models_of_odd_widths_agree_with_the_reference() {
    for family in Family::ALL {
        for (dtype, [embedding_dim, n_heads, n_kv_heads, head_dim, n_ff]) in [
            (DType::F32, [99, 3, 1, 6, 71]),
            (DType::F16, [33, 5, 5, 2, 1]),
            (DType::BF16, [1, 6, 2, 10, 97]),
            (DType::Q8_0, [96, 16, 2, 10, 32]),
            (DType::Q8_0, [64, 2, 1, 16, 40]),
            (DType::Q4_0, [32, 1, 1, 32, 416]),
        ] {
            let shape = TinyModel {
                embedding_dim,
                n_heads,
                n_kv_heads,
                head_dim,
                n_ff,
                ..TinyModel::new(family).dtype(dtype)
            };
            let (mean, largest) = distance(&tiny(&decided(shape)));
            println!("{family:?} {dtype}: {mean:.6} mean, {largest:.6} largest");
            assert!(mean < 0.03 && largest < 0.3, "{family:?} {dtype}: {mean} {largest}");
        }
    }
}

#[test]
fn quantised_models_of_every_type_stay_near_the_reference() {
    for family in Family::ALL {
        for dtype in DType::ALL {
            let model = decided(TinyModel::new(family).dtype(dtype));
            let (mean, largest) = distance(&tiny(&model));
            println!("{family:?} {dtype}: {mean:.6} mean, {largest:.6} largest");
            // Weights are the same; activations are rounded to 8 bits, a half of 1/127 of each
            // group's largest, those of the logits too.
            assert!(mean < 0.04 && largest < 0.3, "{family:?} {dtype}: {mean} {largest}");
        }
    }
}

#[test]
fn the_program_of_a_layer_has_eight_ops_or_nine_and_every_family_its_own() {
    let mut seen = HashSet::new();
    for family in Family::ALL {
        let model = tiny(&TinyModel::new(family));
        let n_layers = model.spec.layers.len();
        let program = Program::lower(&model.spec, &StagePart::whole(n_layers)).unwrap();
        let ops = if family.has_experts() { 9 } else { 8 };
        assert_eq!(program.ops.len(), ops * n_layers + 3, "{family:?}");
        assert_eq!(program.kv_layers.len(), n_layers);
        let features = format!(
            "{} {} {} {}",
            program.ops.iter().any(|op| matches!(op, Op::Route { .. })),
            program.ops.iter().any(|op| matches!(op, Op::Attend { window: Some(_), .. })),
            program.ops.iter().any(|op| matches!(op, Op::Rotate { query_norm: Some(_), .. })),
            program.ops.iter().any(|op| match op {
                Op::Project { parts, .. } => parts.iter().any(|part| part.bias.is_some()),
                _ => false,
            }),
        );
        assert!(seen.insert(features.clone()), "{family:?} has nothing of its own: {features}");
        let ropes = if family == Family::Gemma3 { 2 } else { 1 };
        assert_eq!(program.ropes.len(), ropes, "{family:?}");
    }
}
