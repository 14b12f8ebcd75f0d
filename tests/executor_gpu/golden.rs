//! Golden answers of real models on a GPU: a prompt at once and then token by token, so that
//! products of one token and of many both have their part, and all at once.

use super::answers::{Golden, Steps};
use super::spilled::{SHARES, layers, spilling};
use super::stage::options;
use super::{on_gpu, step, with};
use tandem::tensor::KvDType;

/// `allowed` is how far off the answers may be, as a multiple of llama.cpp's distance.
fn check(file: &str, dtype: KvDType, allowed: f64) {
    let Some((golden, model)) = Golden::read(file) else { return };
    for steps in [Steps::Single, Steps::Whole] {
        let Some(mut stage) = on_gpu(&model, &with(dtype, options(2, 512))) else { return };
        let name = format!("{file} {dtype} {steps:?} on a GPU");
        golden.check(&name, (steps, allowed), |plan| step(&mut stage, plan));
    }
}

#[test]
fn smollm2_is_as_near_to_exact_as_its_peer() {
    check("smollm2-135m.json", KvDType::F16, 1.0);
    check("smollm2-135m.json", KvDType::Q8_0, 1.0);
}

#[test]
fn gemma3_is_as_near_to_exact_as_its_peer() {
    check("gemma-3-270m.json", KvDType::F16, 1.0);
}

#[test]
fn qwen2_half_a_billion_is_as_near_to_exact_as_its_peer() {
    check("qwen2.5-coder-0.5b.json", KvDType::F16, 1.0);
}

/// The same with weights of some layers in host memory.
#[test]
fn smollm2_spilled_before_every_layer_is_as_near_to_exact_as_its_peer() {
    let Some((golden, model)) = Golden::read("smollm2-135m.json") else { return };
    let n_layers = model.spec.layers.len();
    let check = |networks: usize, attention: usize, streamed: u8, steps: Steps| {
        let spilled = layers(
            &(0..networks).collect::<Vec<_>>(),
            &(n_layers - attention..n_layers).collect::<Vec<_>>(),
        );
        let mut stage = on_gpu(&model, &spilling(&model, spilled, streamed))?;
        let name = format!("{networks} networks, {attention} attentions, {streamed} %, {steps:?}");
        golden.check(&name, (steps, 1.0), |plan| step(&mut stage, plan));
        Some(())
    };
    for streamed in SHARES {
        for (networks, attention) in [(n_layers, 0), (n_layers, n_layers)] {
            for steps in [Steps::Single, Steps::Whole] {
                if check(networks, attention, streamed, steps).is_none() {
                    return;
                }
            }
        }
    }
    for count in 1..n_layers {
        check(count, 0, 50, Steps::Whole);
        check(n_layers, count, 50, Steps::Whole);
    }
}
