//! Golden answers of real models on a GPU: a prompt at once and then token by token, so that
//! products of one token and of many both have their part, and all at once.

use super::answers::{Golden, Steps};
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
