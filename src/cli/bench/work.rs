//! What a test has to do at least: bytes to be read and multiply-accumulates. Against the measured
//! roofs that says how much of the machine a test used.

use super::arguments::Test;
use tandem::model::{ExpertsSpec, LayerSpec, ModelSpec};
use tandem::tensor::KvDType;

/// What one run of a test needs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Weights once per step, and the keys and values that attention sees.
    pub read_bytes: f64,
    /// Of the matrices that are multiplied with; attention's own products are left out.
    pub macs: f64,
}

/// What a model costs per step and per token.
#[derive(Clone, Copy, Debug)]
pub struct Costs<'a> {
    spec: &'a ModelSpec,
    kv_dtype: KvDType,
    /// Elements of the layers' matrices that a token is multiplied with.
    layer_elements: f64,
    /// Elements of the output matrix.
    output_elements: f64,
    /// Bytes of the layers' matrices, without experts.
    layer_bytes: f64,
    /// Bytes of all experts.
    expert_bytes: f64,
    /// What part of the experts a token goes through.
    expert_share: f64,
    /// Bytes of the output matrix.
    output_bytes: f64,
}

impl<'a> Costs<'a> {
    /// `bytes_per_token` are the bytes of all matrices that are multiplied with, as they lie in
    /// memory.
    pub fn new(spec: &'a ModelSpec, bytes_per_token: usize, kv_dtype: KvDType) -> Self {
        let mut layer_elements = 0.0;
        for layer in &spec.layers {
            layer.for_each_tensor(&mut |tensor| {
                if tensor.rows > 1 {
                    layer_elements += (tensor.rows * tensor.cols) as f64;
                }
            });
        }
        layer_elements -= (spec.parameters() - spec.active_parameters()) as f64;
        let output_bytes = spec.output.bytes() as f64;
        let active_bytes = spec.active_expert_bytes() as f64;
        let share = |experts: &ExpertsSpec| experts.n_used as f64 / experts.n_experts as f64;
        Self {
            spec,
            kv_dtype,
            layer_elements,
            output_elements: (spec.output.rows * spec.output.cols) as f64,
            layer_bytes: bytes_per_token as f64 - output_bytes - active_bytes,
            expert_bytes: spec.expert_bytes() as f64,
            expert_share: spec.experts().next().map_or(1.0, share),
            output_bytes,
        }
    }

    /// What a test needs when steps have up to `step_tokens_max` tokens.
    pub fn of(&self, test: &Test, step_tokens_max: usize) -> Work {
        let mut work = Work::default();
        let prompt_tokens = test.streams * test.prompt;
        // Every step of a prompt reads the layers; the output only where a prompt ends.
        let full_steps = prompt_tokens / step_tokens_max;
        work.read_bytes += full_steps as f64 * self.step_bytes(step_tokens_max);
        work.read_bytes += self.step_bytes(prompt_tokens % step_tokens_max);
        let ends =
            (1..=test.streams).map(|stream| (stream * test.prompt).div_ceil(step_tokens_max));
        let mut ends: Vec<usize> = ends.filter(|_| test.prompt > 0).collect();
        ends.dedup();
        work.read_bytes += ends.len() as f64 * self.output_bytes;
        work.read_bytes += self.prompt_kv_bytes(test, step_tokens_max);
        for step in 0..test.generated {
            let seen = test.depth + test.prompt + step + 1;
            work.read_bytes += self.step_bytes(test.streams) + self.output_bytes;
            work.read_bytes += test.streams as f64 * self.kv_bytes(seen, 1);
        }
        let sampled = test.streams * (test.generated + usize::from(test.prompt > 0));
        work.macs = test.tokens() as f64 * self.layer_elements;
        work.macs += sampled as f64 * self.output_elements;
        work
    }

    /// Bytes of the layers' matrices that a step reads: of the experts those that at least one of
    /// its tokens goes through, if each is as likely as any other.
    fn step_bytes(&self, tokens: usize) -> f64 {
        if tokens == 0 {
            return 0.0;
        }
        let idle = (1.0 - self.expert_share).powi(tokens as i32);
        self.layer_bytes + self.expert_bytes * (1.0 - idle)
    }

    fn prompt_kv_bytes(&self, test: &Test, step_tokens_max: usize) -> f64 {
        let (mut bytes, mut room) = (0.0, step_tokens_max);
        for _ in 0..test.streams {
            let mut done = 0;
            while done < test.prompt {
                let tokens = room.min(test.prompt - done);
                done += tokens;
                bytes += self.kv_bytes(test.depth + done, tokens);
                room = if room == tokens { step_tokens_max } else { room - tokens };
            }
        }
        bytes
    }

    /// Bytes of keys and values that `tokens` consecutive tokens, the last of which sees `seen`,
    /// read in all layers when each is read once.
    fn kv_bytes(&self, seen: usize, tokens: usize) -> f64 {
        let layer = |layer: &LayerSpec| {
            let attention = &layer.attention;
            let window = attention.window.map_or(seen, |window| window + tokens - 1);
            let head_bytes = self.kv_dtype.head_bytes(attention.head_dim);
            2 * attention.n_kv_heads * head_bytes * seen.min(window)
        };
        self.spec.layers.iter().map(layer).sum::<usize>() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem::model::SyntheticModel;

    fn test(prompt: usize, generated: usize, depth: usize, streams: usize) -> Test {
        Test { prompt, generated, depth, streams }
    }

    #[test]
    fn a_step_reads_the_weights_once_whatever_its_width() {
        let spec = "tiny:pure-q8_0".parse::<SyntheticModel>().unwrap().spec();
        let weights = 1_000_000;
        let costs = Costs::new(&spec, weights, KvDType::F16);
        let kv = spec.kv_bytes_per_token(KvDType::F16) as f64;
        let one = costs.of(&test(0, 1, 9, 1), 64);
        assert_eq!(one.read_bytes, weights as f64 + 10.0 * kv);
        let eight = costs.of(&test(0, 1, 9, 8), 64);
        assert_eq!(eight.read_bytes, weights as f64 + 80.0 * kv);
        assert_eq!(eight.macs, 8.0 * one.macs);
        let output = (spec.output.rows * spec.output.cols) as f64;
        // Two layers of query 256, key and value 128, output 256, three times 512, by 256 each.
        assert_eq!(one.macs - output, f64::from(2 * 256 * (256 + 2 * 128 + 256 + 3 * 512)));
    }

    #[test]
    fn a_step_reads_the_experts_that_its_tokens_go_through() {
        let spec = "tiny-qwen3moe:pure-q8_0".parse::<SyntheticModel>().unwrap().spec();
        let costs = Costs::new(&spec, 10_000_000, KvDType::F16);
        let kv = spec.kv_bytes_per_token(KvDType::F16) as f64;
        let one = costs.of(&test(0, 1, 0, 1), 64);
        assert!((one.read_bytes - 10_000_000.0 - kv).abs() < 1.0, "{one:?}");
        let experts = spec.expert_bytes() as f64;
        // Three of eight, then what two tokens leave idle: (5/8)².
        let two = costs.of(&test(0, 1, 0, 2), 64);
        let more = experts * (3.0 / 8.0 - (1.0 - 25.0 / 64.0));
        assert!((two.read_bytes - one.read_bytes - kv + more).abs() < 1.0, "{two:?}");
        assert_eq!(two.macs, 2.0 * one.macs);
        let output = (spec.output.rows * spec.output.cols) as f64;
        // Query 512, key and value 256, output 512, a router for 8, three experts of 3 · 256.
        let layer = 256 * (512 + 2 * 256 + 512 + 8 + 3 * 3 * 256);
        assert_eq!(one.macs - output, f64::from(2 * layer));
    }

    #[test]
    fn a_prompt_reads_the_weights_once_per_chunk_and_the_output_where_it_ends() {
        let spec = "tiny:pure-q8_0".parse::<SyntheticModel>().unwrap().spec();
        let costs = Costs::new(&spec, 1_000_000, KvDType::F16);
        let kv = spec.kv_bytes_per_token(KvDType::F16) as f64;
        let (layers, output) = (costs.layer_bytes, costs.output_bytes);
        let chunked = costs.of(&test(100, 0, 0, 1), 64);
        assert_eq!(chunked.read_bytes, 2.0 * layers + output + (64.0 + 100.0) * kv);
        // Prompts of 100 in steps of 64 end in the second, fourth and fifth step.
        let three = costs.of(&test(100, 0, 0, 3), 64);
        let seen = (64 + 100) + (28 + 92 + 100) + (56 + 100);
        assert_eq!(three.read_bytes, 5.0 * layers + 3.0 * output + f64::from(seen) * kv);
    }
}
