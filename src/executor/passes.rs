//! How often the workers of a step meet. An op whose output others read ends with a barrier; work
//! that every worker does again for itself needs none. Pure arithmetic: which of the two is
//! cheaper.

/// Elements of the residual stream whose norm (added, normalised, rounded to 8 bits twice: about
/// 0.45 ns each) takes as long as one more worker at a barrier.
const ELEMENTS_PER_WORKER: usize = 2 << 10;

/// Tokens of the longest tile that is rotated by the workers that attend to it: beyond it a
/// sequence is a prompt, and the copies would need much memory.
pub(super) const ROTATED_TOKENS_MAX: usize = 16;

/// Which barriers of a step are saved. No choice changes a bit of any result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StepPasses {
    /// Those whose waiting takes longer than the work that saves them.
    #[default]
    ByCost,
    /// None: every op shares out its work and ends with a barrier.
    OnePerOp,
    /// All that can be saved, whatever it costs.
    Fewest,
}

impl StepPasses {
    /// Tokens of the widest step in which every worker normalises all rows for itself.
    ///
    /// With n tokens on w workers a worker then does n rows instead of n/w:
    /// `n − ⌈n/w⌉ = ⌊n·(w−1)/w⌋` more, and these must cost no more than a barrier.
    pub(super) fn own_rows_max(
        self,
        workers: usize,
        embedding_dim: usize,
        tokens_max: usize,
    ) -> usize {
        match self {
            StepPasses::OnePerOp => 0,
            StepPasses::Fewest => tokens_max,
            StepPasses::ByCost if workers < 2 => 0,
            StepPasses::ByCost => {
                let rows = workers * ELEMENTS_PER_WORKER / embedding_dim.max(1);
                (((rows + 1) * workers).div_ceil(workers - 1) - 1).min(tokens_max)
            }
        }
    }

    /// Tokens of the longest tile whose heads are rotated by the workers that attend to it.
    pub(super) fn rotated_tokens_max(self, workers: usize, query_tile: usize) -> usize {
        match self {
            StepPasses::OnePerOp => 0,
            StepPasses::ByCost if workers < 2 => 0,
            StepPasses::ByCost | StepPasses::Fewest => query_tile.min(ROTATED_TOKENS_MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_repeated_while_that_costs_less_than_a_barrier() {
        for workers in 2..70 {
            for embedding_dim in [256, 576, 2048, 4096, 8192, 16_384] {
                let most = StepPasses::ByCost.own_rows_max(workers, embedding_dim, 10_000);
                let repeated = |tokens: usize| (tokens - tokens.div_ceil(workers)) * embedding_dim;
                let name = format!("{workers} workers, {embedding_dim}: {most}");
                assert!(repeated(most) <= workers * ELEMENTS_PER_WORKER, "{name}");
                assert!(repeated(most + 1) > workers * ELEMENTS_PER_WORKER, "{name}");
                assert!(most >= 1, "{name}");
            }
        }
    }

    #[test]
    fn one_worker_meets_nobody() {
        assert_eq!(StepPasses::ByCost.own_rows_max(1, 576, 512), 0);
        assert_eq!(StepPasses::ByCost.rotated_tokens_max(1, 16), 0);
    }

    #[test]
    fn both_extremes_can_be_asked_for() {
        assert_eq!(StepPasses::OnePerOp.own_rows_max(2, 576, 512), 0);
        assert_eq!(StepPasses::OnePerOp.rotated_tokens_max(2, 64), 0);
        assert_eq!(StepPasses::Fewest.own_rows_max(1, 16_384, 512), 512);
        assert_eq!(StepPasses::Fewest.rotated_tokens_max(1, 64), ROTATED_TOKENS_MAX);
    }
}
