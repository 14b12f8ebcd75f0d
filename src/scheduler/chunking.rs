//! How large a prefill chunk may be beside decoding streams. A chunk stretches the step that it
//! rides in, and with it every stream's inter-token time; this controller keeps the stretch within
//! a factor.
//!
//! ```text
//! decode(n)  = moving mean of steps that only decode n sequences (by power of two of n)
//! per_token  = moving mean of (step − decode(n)) / prefill tokens, of steps that did both
//! chunk      = (slowdown − 1) · decode(n) / per_token, at most twice the last one
//! ```
//! `per_token` follows the growing cost of attention by itself, since consecutive chunks of a
//! prompt lie close together.

/// Weight of the newest measurement in a moving mean.
const NEWEST: f64 = 0.3;
/// First chunk beside decoding streams, in minimal chunks, before anything was measured.
const FIRST_CHUNKS: usize = 4;

/// What a step consisted of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepMix {
    /// Sequences that decoded one token.
    pub decodes: usize,
    /// Tokens of prompts.
    pub prefill_tokens: usize,
}

/// Bounds of a chunk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChunkLimits {
    /// Factor by which a chunk may stretch a step.
    pub slowdown_max: f64,
    /// Tokens of the smallest chunk.
    pub tokens_min: usize,
    /// Tokens of a whole step.
    pub step_tokens_max: usize,
}

/// The controller. Pure: durations come in, chunk sizes go out.
#[derive(Clone, Debug)]
pub struct ChunkController {
    limits: ChunkLimits,
    /// Mean duration of decode-only steps in microseconds, by `ilog2` of their sequences.
    decode_us: [Option<f64>; 16],
    per_token_us: Option<f64>,
    last_chunk: usize,
}

impl ChunkController {
    /// A controller that has measured nothing yet.
    pub fn new(limits: ChunkLimits) -> Self {
        let last_chunk = limits.tokens_min * FIRST_CHUNKS;
        Self { limits, decode_us: [None; 16], per_token_us: None, last_chunk }
    }

    /// Prompt tokens that the next step may hold beside `decodes` decoding sequences.
    pub fn budget(&self, decodes: usize) -> usize {
        let room = self.limits.step_tokens_max.saturating_sub(decodes);
        if decodes == 0 {
            return room;
        }
        let wanted = match (self.decode_estimate(decodes), self.per_token_us) {
            (Some(decode_us), Some(per_token_us)) => {
                let extra_us = (self.limits.slowdown_max - 1.0) * decode_us;
                ((extra_us / per_token_us) as usize).min(self.last_chunk * 2)
            }
            _ => self.limits.tokens_min * FIRST_CHUNKS,
        };
        wanted.max(self.limits.tokens_min).min(room)
    }

    /// Learns from a step that took `duration_us`.
    pub fn learn(&mut self, mix: StepMix, duration_us: u64) {
        let duration_us = duration_us as f64;
        match mix {
            StepMix { decodes: 0, .. } => {}
            StepMix { decodes, prefill_tokens: 0 } => {
                let mean = &mut self.decode_us[bucket(decodes)];
                *mean = Some(moved(*mean, duration_us));
            }
            StepMix { decodes, prefill_tokens } => {
                self.last_chunk = prefill_tokens.max(self.limits.tokens_min);
                if let Some(decode_us) = self.decode_estimate(decodes) {
                    // A step is never free: a hundredth of its time bounds the next chunk's growth.
                    let extra_us = (duration_us - decode_us).max(duration_us / 100.0).max(1e-3);
                    let per_token_us = extra_us / prefill_tokens as f64;
                    self.per_token_us = Some(moved(self.per_token_us, per_token_us));
                }
            }
        }
    }

    /// Time of a step that only decodes so many sequences: measured, or of the nearest count.
    fn decode_estimate(&self, decodes: usize) -> Option<f64> {
        let wanted = bucket(decodes);
        let measured = self.decode_us.iter().enumerate();
        let known = measured.filter_map(|(at, mean)| mean.map(|mean| (at, mean)));
        known.min_by_key(|(at, _)| at.abs_diff(wanted)).map(|(_, mean)| mean)
    }
}

fn bucket(decodes: usize) -> usize {
    (decodes.max(1).ilog2() as usize).min(15)
}

fn moved(mean: Option<f64>, newest: f64) -> f64 {
    mean.map_or(newest, |mean| mean + NEWEST * (newest - mean))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: ChunkLimits =
        ChunkLimits { slowdown_max: 2.0, tokens_min: 4, step_tokens_max: 512 };

    /// A machine whose prefill tokens cost `token_us` plus attention that grows with position.
    fn step_us(mix: StepMix, position: usize) -> u64 {
        let attention = mix.prefill_tokens as f64 * position as f64 * 0.1;
        (7_000.0 + 200.0 * mix.decodes as f64 + 900.0 * mix.prefill_tokens as f64 + attention)
            as u64
    }

    #[test]
    fn a_long_prompt_stays_within_the_stretch_all_the_way() {
        let mut controller = ChunkController::new(LIMITS);
        let alone = StepMix { decodes: 3, prefill_tokens: 0 };
        let undisturbed_us = step_us(alone, 0);
        for _ in 0..5 {
            controller.learn(alone, undisturbed_us);
        }
        let (mut position, mut steps) = (0, 0);
        while position < 8_000 {
            let mix = StepMix { decodes: 3, prefill_tokens: controller.budget(3) };
            let duration_us = step_us(mix, position);
            if steps > 0 {
                let stretch = duration_us as f64 / undisturbed_us as f64;
                assert!(stretch < 2.6, "step {steps} at {position}: {stretch}");
            }
            controller.learn(mix, duration_us);
            position += mix.prefill_tokens;
            steps += 1;
        }
        assert!(steps < 8_000 / 4, "the chunk grew beyond its minimum");
    }

    #[test]
    fn without_streams_a_chunk_fills_the_step() {
        assert_eq!(ChunkController::new(LIMITS).budget(0), 512);
    }

    #[test]
    fn a_chunk_is_never_below_its_minimum() {
        let mut controller = ChunkController::new(LIMITS);
        controller.learn(StepMix { decodes: 1, prefill_tokens: 0 }, 1_000);
        for _ in 0..20 {
            controller.learn(StepMix { decodes: 1, prefill_tokens: 4 }, 1_000_000);
        }
        assert_eq!(controller.budget(1), 4);
    }
}
