//! Who computes the spilled units of a step, layer by layer: the CPU, or the GPU as their weights
//! stream by. Pure arithmetic on measured times.

use super::WIDTH_BORDERS;
use crate::placement::SharedTimes;
use std::sync::Arc;

/// Seconds that the spilled units of a layer take at steps of some width, in the mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct WidthCosts {
    pub tokens: usize,
    /// On the CPU while nothing streams.
    pub cpu: f64,
    /// On the CPU beside a stream of weights, which reads the same memory.
    pub cpu_beside: f64,
    /// Its weights on their way to the GPU while the CPU computes.
    pub stream_beside: f64,
}

/// What spilled units cost.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct SpillCosts {
    /// By ascending width; at least one.
    pub widths: Vec<WidthCosts>,
    /// Seconds of the weights of a layer on their way to the GPU while the CPU rests. `None`
    /// where they can't stream.
    pub stream: Option<f64>,
    /// Layers whose weights the ring holds.
    pub ring_layers: f64,
}

/// For each number of streamed layers, which of them the CPU computes.
pub(super) struct Shares(Vec<Arc<[bool]>>);

/// Steps of a class of widths are shared alike, so that a token's bits do not depend on how many
/// others are in a step of its class: the width for which the shares of a class are best.
fn class_tokens(tokens: usize) -> usize {
    const OF_CLASS: [usize; WIDTH_BORDERS.len() + 1] = [4, 24, 96, 256];
    OF_CLASS[WIDTH_BORDERS.iter().filter(|border| tokens > **border).count()]
}

impl SpillCosts {
    /// Costs at a width; between those that are known, and beyond the last, along a line.
    fn at(&self, tokens: usize) -> WidthCosts {
        let last = self.widths.len() - 1;
        let above = self.widths.iter().position(|known| known.tokens >= tokens).unwrap_or(last);
        let above = above.clamp(1.min(last), last);
        let (low, high) = (self.widths[above.saturating_sub(1)], self.widths[above]);
        if high.tokens <= low.tokens {
            return high;
        }
        let part = (tokens as f64 - low.tokens as f64) / (high.tokens - low.tokens) as f64;
        let between = |low: f64, high: f64| (low + part * (high - low)).max(0.0);
        WidthCosts {
            tokens,
            cpu: between(low.cpu, high.cpu.max(low.cpu)),
            cpu_beside: between(low.cpu_beside, high.cpu_beside.max(low.cpu_beside)),
            stream_beside: between(low.stream_beside, high.stream_beside),
        }
    }

    /// The same as placement's arithmetic has them.
    fn times(&self, tokens: usize) -> SharedTimes {
        let WidthCosts { cpu, cpu_beside, stream_beside, .. } = self.at(tokens);
        let stream = self.stream.unwrap_or(f64::INFINITY);
        let ahead = self.ring_layers;
        SharedTimes { cpu, cpu_beside, stream, stream_beside, ahead }
    }

    /// How many of `layers` are best streamed in a step of `tokens` tokens, of which the CPU can
    /// take `tokens_max`.
    pub fn streamed(&self, layers: usize, tokens: usize, tokens_max: usize) -> usize {
        if self.stream.is_none() {
            return 0;
        }
        if tokens > tokens_max {
            return layers;
        }
        let times = self.times(class_tokens(tokens));
        let seconds = |streamed: usize| times.seconds((layers - streamed) as f64, streamed as f64);
        // Of equals the fewest: less crosses the bus.
        (0..=layers).min_by(|a, b| seconds(*a).total_cmp(&seconds(*b))).unwrap_or(0)
    }
}

impl Shares {
    /// Those that the CPU computes lie as evenly as can be, and the first is among them if any is:
    /// meanwhile the first weights arrive.
    pub fn new(layers: usize) -> Self {
        let share = |streamed: usize| {
            let here = layers - streamed;
            (0..layers)
                .map(|index| {
                    let before = |index: usize| (index * here).div_ceil(layers);
                    before(index + 1) > before(index)
                })
                .collect()
        };
        Self((0..=layers).map(share).collect())
    }

    /// Which layers the CPU computes where `streamed` of them are streamed.
    pub fn of(&self, streamed: usize) -> &Arc<[bool]> {
        &self.0[streamed]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn width(tokens: usize, cpu: f64, cpu_beside: f64) -> WidthCosts {
        WidthCosts { tokens, cpu, cpu_beside, stream_beside: 2.5 }
    }

    fn costs(stream: Option<f64>) -> SpillCosts {
        let widths = vec![
            width(1, 1.0, 1.2),
            width(8, 1.0, 1.2),
            width(32, 4.0, 4.0),
            width(128, 16.0, 16.0),
        ];
        SpillCosts { widths, stream, ring_layers: 4.0 / 3.0 }
    }

    #[test]
    fn wider_steps_stream_more_until_all_is_streamed() {
        let costs = costs(Some(2.0));
        let streamed = [1, 8, 9, 32, 33, 128, 129, 256];
        let streamed = streamed.map(|tokens| costs.streamed(20, tokens, 256));
        assert!(streamed.is_sorted(), "{streamed:?}");
        let classes = streamed.as_chunks::<2>().0;
        assert!(classes.iter().all(|[least, most]| least == most), "{streamed:?}");
        // 6 take 15.0 on their way, in which the CPU does 12.5 of the other 14.
        assert_eq!(streamed[0], 6);
        assert_eq!(costs.streamed(20, 257, 256), 20);
    }

    #[test]
    fn whoever_ends_first_lets_the_other_be_alone() {
        let costs = costs(Some(2.0));
        let at = costs.times(1);
        assert_eq!(at.seconds(20.0, 0.0), 20.0);
        assert_eq!(at.seconds(0.0, 20.0), 40.0);
        assert!((at.seconds(14.0, 6.0) - 16.5).abs() < 1e-9);
        assert!((at.seconds(5.0, 6.0) - (6.0 + 3.6 * 2.0)).abs() < 1e-9);
    }

    #[test]
    fn a_stream_whose_ring_is_full_waits_for_the_cpu() {
        // Half a Llama of 8B beside an H200, in milliseconds.
        let width = |tokens, [cpu, cpu_beside, stream_beside]: [f64; 3]| WidthCosts {
            tokens,
            cpu,
            cpu_beside,
            stream_beside,
        };
        let widths = vec![
            width(8, [1.14, 1.16, 2.11]),
            width(32, [1.87, 2.05, 2.36]),
            width(64, [6.72, 6.84, 2.08]),
            width(128, [10.4, 11.0, 2.02]),
        ];
        let costs = SpillCosts { widths, stream: Some(1.86), ring_layers: 4.0 / 3.0 };
        // While the CPU is at one layer for 8.6, no more than the ring holds can arrive.
        let beside = 4.0 / 3.0;
        let whole = costs.times(96).seconds(2.0, 16.0);
        assert!((whole - (2.0 * 8.6 + (16.0 - 2.0 * beside) * 1.86)).abs() < 1.0, "{whole}");
        assert_eq!([33, 128, 129, 256].map(|tokens| costs.streamed(18, tokens, 256)), [18; 4]);
        let narrow = [8, 32].map(|tokens| costs.streamed(18, tokens, 256));
        assert!(narrow.iter().all(|streamed| (5..=9).contains(streamed)), "{narrow:?}");
    }

    #[test]
    fn nothing_streams_where_it_can_not_or_does_not_pay() {
        assert_eq!(costs(None).streamed(20, 1000, 1000), 0);
        let mut slow = costs(Some(30.0));
        slow.widths.iter_mut().for_each(|width| width.stream_beside = 40.0);
        assert_eq!(slow.streamed(20, 1, 256), 0);
    }

    #[test]
    fn times_between_widths_lie_on_a_line() {
        let costs = costs(None);
        assert_eq!([costs.at(20).cpu, costs.at(256).cpu, costs.at(1).cpu], [2.5, 32.0, 1.0]);
        let single = SpillCosts { widths: vec![width(1, 3.0, 4.0)], ..SpillCosts::default() };
        assert_eq!(single.at(7).cpu_beside, 4.0);
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
        assert_eq!(shares.of(4)[..], [true, false, true, false, true, false, false]);
    }
}
