//! Who computes the spilled feed-forward networks of a step: the CPU, or the GPU as their weights
//! stream by. Pure arithmetic on measured times.

use std::sync::Arc;

/// Seconds that one spilled network takes, at steps of some widths.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SpillCosts {
    /// Tokens, ascending, and seconds of a network on the CPU: while nothing streams, and beside a
    /// stream of weights, which reads the same memory.
    pub cpu: Vec<(usize, [f64; 2])>,
    /// Seconds that the weights of a network take to the GPU, alone and while the CPU computes.
    /// `None` where they can't stream.
    pub stream: Option<[f64; 2]>,
}

/// For each number of streamed networks, which of them the CPU computes.
pub(super) struct Shares(Vec<Arc<[bool]>>);

impl SpillCosts {
    /// Seconds of a network on the CPU; between widths, and beyond the last, along a line.
    fn cpu_seconds(&self, tokens: usize, is_beside: bool) -> f64 {
        let at = |index: usize| {
            let (tokens, seconds) = self.cpu[index];
            (tokens as f64, seconds[usize::from(is_beside)])
        };
        let above = self.cpu.iter().position(|(width, _)| *width >= tokens);
        let above = above.unwrap_or(self.cpu.len() - 1).max(1).min(self.cpu.len() - 1);
        let ((low, low_s), (high, high_s)) = (at(above.saturating_sub(1)), at(above));
        if high <= low {
            return high_s;
        }
        let slope = ((high_s - low_s) / (high - low)).max(0.0);
        (low_s + slope * (tokens as f64 - low)).max(0.0)
    }

    /// How many of `networks` are best streamed in a step of `tokens` tokens, of which the CPU can
    /// take `tokens_max`.
    pub fn streamed(&self, networks: usize, tokens: usize, tokens_max: usize) -> usize {
        let Some(stream) = self.stream else { return 0 };
        if tokens > tokens_max {
            return networks;
        }
        let seconds = |streamed: usize| {
            let here = (networks - streamed) as f64;
            match streamed {
                0 => here * self.cpu_seconds(tokens, false),
                _ if streamed == networks => streamed as f64 * stream[0],
                _ => {
                    let cpu = here * self.cpu_seconds(tokens, true);
                    cpu.max(streamed as f64 * stream[1])
                }
            }
        };
        // Of equals the fewest: less crosses the bus.
        (0..=networks).min_by(|a, b| seconds(*a).total_cmp(&seconds(*b))).unwrap_or(0)
    }
}

impl Shares {
    /// Those that the CPU computes lie as evenly as can be, and the first is among them if any is:
    /// meanwhile the first weights arrive.
    pub fn new(networks: usize) -> Self {
        let share = |streamed: usize| {
            let here = networks - streamed;
            (0..networks)
                .map(|index| {
                    let before = |index: usize| (index * here).div_ceil(networks);
                    before(index + 1) > before(index)
                })
                .collect()
        };
        Self((0..=networks).map(share).collect())
    }

    /// Which networks the CPU computes where `streamed` of them are streamed.
    pub fn of(&self, streamed: usize) -> &Arc<[bool]> {
        &self.0[streamed]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(stream: Option<[f64; 2]>) -> SpillCosts {
        SpillCosts {
            cpu: vec![(1, [1.0, 1.2]), (8, [1.0, 1.2]), (32, [4.0, 4.0]), (128, [16.0, 16.0])],
            stream,
        }
    }

    #[test]
    fn wider_steps_stream_more_until_all_is_streamed() {
        let costs = costs(Some([2.0, 2.5]));
        let streamed = [1, 8, 32, 64, 128, 256].map(|tokens| costs.streamed(20, tokens, 256));
        assert!(streamed.is_sorted(), "{streamed:?}");
        // 14 · 1.2 = 16.8 and 6 · 2.5 = 15: the best of all cuts of 20.
        assert_eq!(streamed[0], 6);
        assert_eq!(costs.streamed(20, 257, 256), 20);
    }

    #[test]
    fn nothing_streams_where_it_can_not_or_does_not_pay() {
        assert_eq!(costs(None).streamed(20, 1000, 1000), 0);
        assert_eq!(costs(Some([30.0, 40.0])).streamed(20, 1, 256), 0);
    }

    #[test]
    fn times_between_widths_lie_on_a_line() {
        let costs = costs(None);
        assert_eq!(costs.cpu_seconds(20, false), 2.5);
        assert_eq!(costs.cpu_seconds(256, false), 32.0);
        let single = SpillCosts { cpu: vec![(1, [3.0, 4.0])], stream: None };
        assert_eq!(single.cpu_seconds(7, true), 4.0);
    }

    #[test]
    fn shares_are_even_and_begin_on_the_cpu() {
        let shares = Shares::new(7);
        for streamed in 0..=7 {
            let here: Vec<usize> =
                shares.of(streamed).iter().map(|here| usize::from(*here)).collect();
            assert_eq!(here.iter().sum::<usize>(), 7 - streamed);
            assert!(streamed == 7 || here[0] == 1);
        }
        assert_eq!(shares.of(4)[..], [true, false, false, true, false, true, false]);
    }
}
