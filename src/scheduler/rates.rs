//! Whether a block comes back sooner from a lower tier, or by computing its tokens again.
//!
//! ```text
//! compute a block = block_tokens / prompt tokens per second
//! bring it up     = block_bytes / bytes per second of its tier
//! swap it         = 2 · bring it up: it goes down first
//! ```
//! Rates are given (measured or predicted where the machine was probed, else [`TierRates`]'s
//! default) and refined by what the scheduler's own steps and copies took, each within a factor of
//! [`TRUST`] of what was given: somebody else may have had the machine. A tier that does not pay is
//! measured no more, so its rate drifts back to what was given.

use crate::step::Tier;

/// How far a measurement may lie from what was known before, as a factor.
const TRUST: f64 = 4.0;
/// Weight of the newest measurement in a moving mean.
const NEWEST: f64 = 0.2;
/// How much of the way back to what was given a rate drifts per prompt step.
const DRIFT: f64 = 0.01;
/// Copies of fewer bytes say more of the thread that performs them than of the tier.
const COPIED_BYTES_MIN: u64 = 1 << 20;
/// Steps of fewer prompt tokens say more of the weights than of the tokens.
const PROMPT_TOKENS_MIN: usize = 64;

/// What a machine reaches, per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TierRates {
    /// Bytes between device and host tier, either way.
    pub host_bytes: f64,
    /// Bytes between device or host tier and disk tier, either way.
    pub disk_bytes: f64,
    /// Tokens of a prompt that are computed alone.
    pub prompt_tokens: f64,
}

impl Default for TierRates {
    /// Of a machine that nobody has measured: a copy by one thread, a plain SSD, and a small model
    /// on a few cores. All err for the copies, as long as nothing was measured: they leave the
    /// compute units to others.
    fn default() -> Self {
        Self { host_bytes: 4e9, disk_bytes: 0.5e9, prompt_tokens: 500.0 }
    }
}

/// The decision. Pure: durations come in, answers go out.
#[derive(Clone, Debug)]
pub(super) struct SwapCosts {
    given: TierRates,
    now: TierRates,
    block_bytes: f64,
    block_tokens: f64,
}

impl SwapCosts {
    pub fn new(given: TierRates, block_bytes: u64, block_tokens: usize) -> Self {
        let (block_bytes, block_tokens) = (block_bytes as f64, block_tokens as f64);
        Self { given, now: given, block_bytes, block_tokens }
    }

    /// Whether blocks are brought up from a tier sooner than they are computed.
    pub fn brings_up(&self, tier: Tier) -> bool {
        self.copy_seconds(tier) <= self.block_tokens / self.now.prompt_tokens
    }

    /// Whether blocks go down to a tier and come back sooner than they are computed.
    pub fn swaps(&self, tier: Tier) -> bool {
        2.0 * self.copy_seconds(tier) <= self.block_tokens / self.now.prompt_tokens
    }

    fn copy_seconds(&self, tier: Tier) -> f64 {
        match tier {
            Tier::Device => 0.0,
            Tier::Host => self.block_bytes / self.now.host_bytes,
            Tier::Disk => self.block_bytes / self.now.disk_bytes,
        }
    }

    /// So many blocks were copied between a tier and a higher one.
    pub fn learn_copies(&mut self, lower: Tier, blocks: usize, duration_us: u64) {
        let bytes = blocks as f64 * self.block_bytes;
        if bytes < COPIED_BYTES_MIN as f64 {
            return;
        }
        let rate = bytes / seconds(duration_us);
        match lower {
            Tier::Device => {}
            Tier::Host => {
                self.now.host_bytes = moved(self.now.host_bytes, self.given.host_bytes, rate)
            }
            Tier::Disk => {
                self.now.disk_bytes = moved(self.now.disk_bytes, self.given.disk_bytes, rate)
            }
        }
    }

    /// A step computed so many prompt tokens and nothing else.
    pub fn learn_prompt(&mut self, tokens: usize, duration_us: u64) {
        if tokens < PROMPT_TOKENS_MIN {
            return;
        }
        let rate = tokens as f64 / seconds(duration_us);
        self.now.prompt_tokens = moved(self.now.prompt_tokens, self.given.prompt_tokens, rate);
        self.now.host_bytes += DRIFT * (self.given.host_bytes - self.now.host_bytes);
        self.now.disk_bytes += DRIFT * (self.given.disk_bytes - self.now.disk_bytes);
    }
}

fn seconds(us: u64) -> f64 {
    us.max(1) as f64 / 1e6
}

/// A moving mean after one more measurement, which counts near what is `known`.
fn moved(mean: f64, known: f64, newest: f64) -> f64 {
    mean + NEWEST * (newest.clamp(known / TRUST, known * TRUST) - mean)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of 4 MiB and 32 tokens: 1 ms from a host tier of 4 GiB/s, 8 ms from a disk.
    fn costs(prompt_tokens: f64) -> SwapCosts {
        let (host_bytes, disk_bytes) = ((4_u64 << 30) as f64, (1_u64 << 29) as f64);
        SwapCosts::new(TierRates { host_bytes, disk_bytes, prompt_tokens }, 4 << 20, 32)
    }

    #[test]
    fn a_block_is_computed_where_that_is_sooner_than_a_copy() {
        // 32 tokens take 100, 10, 1.5 and 0.5 ms.
        let answers = [320.0, 3_200.0, 21_333.0, 64_000.0].map(|prompt_tokens| {
            let costs = costs(prompt_tokens);
            [Tier::Host, Tier::Disk].map(|tier| (costs.brings_up(tier), costs.swaps(tier)))
        });
        assert_eq!(answers[0], [(true, true), (true, true)]);
        assert_eq!(answers[1], [(true, true), (true, false)], "16 ms both ways");
        assert_eq!(answers[2], [(true, false), (false, false)]);
        assert_eq!(answers[3], [(false, false), (false, false)]);
    }

    #[test]
    fn a_slow_tier_is_found_out_and_forgiven() {
        let mut costs = costs(10_000.0);
        assert!(costs.swaps(Tier::Host));
        for _ in 0..20 {
            costs.learn_copies(Tier::Host, 8, 8_000 * 100);
        }
        assert!(!costs.swaps(Tier::Host), "a quarter of what was given is the least");
        for _ in 0..500 {
            costs.learn_prompt(320, 32_000);
        }
        assert!(costs.swaps(Tier::Host));
    }

    #[test]
    fn crumbs_say_nothing() {
        let mut costs = costs(10_000.0);
        costs.learn_prompt(63, 1);
        costs.learn_copies(Tier::Disk, 0, 1_000_000);
        assert_eq!(costs.now, costs.given);
    }

    #[test]
    fn a_fast_machine_computes_again() {
        let mut costs = costs(10_000.0);
        costs.learn_prompt(512, 1);
        assert!(costs.swaps(Tier::Host), "one step says little");
        for _ in 0..20 {
            costs.learn_prompt(512, 512 * 20);
        }
        assert!(!costs.swaps(Tier::Host), "50,000 tokens/s: 0.6 ms");
    }
}
