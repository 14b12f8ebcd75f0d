//! The rows of a plan for a GPU against what the executor allocates, where no GPU is needed to
//! know.

use super::gpu::{config, gpu, with};
use crate::tiny_model::{Family, Output, TinyModel};
use std::path::Path;
use tandem::executor::{Program, StagePart, buffer_dims};
use tandem::formats::Checkpoint;
use tandem::hardware::HardwareProfile;
use tandem::model::{ModelSpec, SyntheticModel};
use tandem::placement::{
    BufferDims, BufferSize, GRAPHS_MAX, KERNELS_BYTES, Placement, recorded_bytes,
};
use tandem::units::ByteSize;

/// The parts of a model that is cut before some layer, or of a whole one.
fn parts(layers: usize) -> Vec<StagePart> {
    let cuts = (1..layers).flat_map(|cut| StagePart::cut(layers, &[cut]));
    std::iter::once(StagePart::whole(layers)).chain(cuts).collect()
}

#[test]
fn a_plan_knows_the_buffers_of_a_program() {
    for family in Family::ALL {
        for output in [Output::Tied, Output::Own] {
            let bytes = TinyModel { output, ..TinyModel::new(family) }.gguf().bytes();
            let checkpoint = Checkpoint::from_bytes(Path::new("tiny.gguf"), &bytes).unwrap();
            let spec = ModelSpec::from_checkpoint(&checkpoint).unwrap();
            for part in parts(spec.layers.len()) {
                let planned = BufferDims::of(&spec, &part.layers);
                let program = buffer_dims(&Program::lower(&spec, &part).unwrap());
                // A part may have one of two rotations alone.
                assert!(program.angles <= planned.angles);
                assert_eq!(BufferDims { angles: planned.angles, ..program }, planned, "{part:?}");
                if part.layers.len() == spec.layers.len() {
                    assert_eq!(program, planned, "{family:?}");
                }
            }
        }
    }
}

#[test]
fn partial_sums_of_a_long_context_are_planned_as_they_are_allocated() {
    let spec = "llama-70b:q4_0".parse::<SyntheticModel>().unwrap().spec();
    let mut config = config("0");
    config.kv.cache_bytes = ByteSize(1 << 40);
    let hardware = HardwareProfile {
        memory_available_bytes: 64 << 30,
        ..with(vec![gpu(0, 400 << 30), gpu(1, 140 << 30)])
    };
    for index in ["0", "1"] {
        config.gpu.device = index.into();
        let placement = Placement::plan(&spec, &hardware, &config).unwrap();
        let (blocks, block_tokens) = (placement.device_blocks, placement.block_tokens);
        let tokens = placement.step_tokens_max;
        let size = BufferSize { tokens, narrow_max: 8, blocks, block_tokens };
        let bytes = BufferDims::of(&spec, &(0..80)).bytes(size);
        let stage = &placement.stages[0];
        assert_eq!(stage.activation_bytes, bytes.total() as u64);
        // 64 heads of 128 elements, their largest and their sum, for each 256 positions.
        let one = 64 * 130 * 4 * (blocks * block_tokens).div_ceil(256);
        assert_eq!(bytes.partials, one.max(64 << 20));
        assert_eq!(bytes.partials > 64 << 20, index == "0");
        let (taken, available) =
            (placement.device_bytes() + stage.margin_bytes, stage.memory_available_bytes);
        let block = placement.block_bytes() + (1 << 16);
        assert!(taken <= available && taken + block > available, "{taken} of {available}");
    }
}

#[test]
fn recorded_steps_get_what_is_left_and_never_cost_weights() {
    let spec = "llama-8b:q4_0".parse::<SyntheticModel>().unwrap().spec();
    let graphs = |free: u64| {
        let placement = Placement::plan(&spec, &with(vec![gpu(0, free)]), &config("0")).unwrap();
        (placement.stages[0].graph_bytes, placement.spill)
    };
    let (least, spill) = graphs(3 << 30);
    assert!(spill.is_some() && least >= KERNELS_BYTES + (24 << 20), "{least}");
    let (most, spill) = graphs(140 << 30);
    assert_eq!(spill, None);
    // All that are kept of this model.
    assert_eq!(most, KERNELS_BYTES + GRAPHS_MAX as u64 * recorded_bytes(12 * 32));
}
