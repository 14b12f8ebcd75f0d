//! How many drafted tokens a step is worth. A token more makes a step longer, by next to nothing
//! where weights are read from memory for it anyway and by much where arithmetic is short; that is
//! measured, never assumed.
//!
//! ```text
//! time(w)   = moving mean of the steps of w tokens that had no prompt, else between those of the
//!             nearest widths; wider than any so far is thought to be free, once
//! tokens(j) = sequences + Σ chance of the j likeliest drafted tokens
//! j         = the one with most tokens(j) / time(sequences + j); 0 unless that gains GAIN_MIN
//! ```

/// Tokens of the widest step that has drafts: with more sequences there is little left to gain.
pub const WIDTH_MAX: usize = 32;

/// Weight of the newest duration in a moving mean.
const NEWEST: f64 = 0.25;
/// A duration beyond these factors of what was expected counts as them: somebody else had the
/// machine.
const OUTLIER: std::ops::RangeInclusive<f64> = 0.5..=1.5;
/// How much of its excess over narrower steps a wide one's time loses with each of these: one that
/// was measured at a bad moment is tried again some hundred steps later.
const FORGIVEN: f64 = 1.0 / 1024.0;
/// Least gain for which a draft is run: less drowns in what is not known well.
const GAIN_MIN: f64 = 1.03;

/// What steps without prompts took, by their tokens.
#[derive(Clone, Debug, Default)]
pub struct StepTimes {
    /// Microseconds; entry `w - 1` of steps of `w` tokens.
    us: [Option<f64>; WIDTH_MAX],
}

impl StepTimes {
    /// A step of so many tokens, none of a prompt, took `duration_us`.
    pub fn learn(&mut self, width: usize, duration_us: u64) {
        let Some(index) = width.checked_sub(1).filter(|index| *index < WIDTH_MAX) else { return };
        let newest = (duration_us as f64).max(1.0);
        let near = |us: f64| newest.clamp(OUTLIER.start() * us, OUTLIER.end() * us);
        let mean = match (self.us[index], self.predict(width)) {
            (Some(mean), _) => mean + NEWEST * (near(mean) - mean),
            // The first of its width may have met a cold cache or a kernel that was never run.
            (None, Some(predicted)) => near(predicted),
            (None, None) => newest,
        };
        self.us[index] = Some(mean);
        for wider in self.us[index + 1..].iter_mut().flatten() {
            *wider -= FORGIVEN * (*wider - mean).max(0.0);
        }
    }

    /// What a step of so many tokens is expected to take, in microseconds; nothing is known before
    /// the first step.
    pub fn predict(&self, width: usize) -> Option<f64> {
        let index = width.clamp(1, WIDTH_MAX) - 1;
        if let Some(us) = self.us[index] {
            return Some(us);
        }
        let known = |index: usize| self.us[index].map(|us| (index as f64, us));
        let narrower = (0..index).rev().find_map(known);
        let wider = (index + 1..WIDTH_MAX).find_map(known);
        match (narrower, wider) {
            (Some((low, low_us)), Some((high, high_us))) => {
                let part = (index as f64 - low) / (high - low);
                Some(low_us + part * (high_us - low_us))
            }
            (Some((_, us)), None) | (None, Some((_, us))) => Some(us),
            (None, None) => None,
        }
    }
}

/// Chooses the drafts of a step. Allocates when it is made, never after.
#[derive(Clone, Debug)]
pub struct DraftLengths {
    times: StepTimes,
    /// Chance and sequence of every drafted token that could be in the step.
    offers: Vec<(f64, usize)>,
}

impl DraftLengths {
    /// For drafts of up to `draft_max` tokens.
    pub fn new(draft_max: usize) -> Self {
        Self { times: StepTimes::default(), offers: Vec::with_capacity(WIDTH_MAX * draft_max) }
    }

    /// What steps took, to be added to.
    pub fn times_mut(&mut self) -> &mut StepTimes {
        &mut self.times
    }

    /// Begins a choice.
    pub fn clear(&mut self) {
        self.offers.clear();
    }

    /// Offers a sequence's draft: the chance of each of its tokens and all before it. `sequence` is
    /// a number below [`WIDTH_MAX`] that [`DraftLengths::choose`] speaks of.
    pub fn offer(&mut self, sequence: usize, chances: impl Iterator<Item = f64>) {
        self.offers.extend(chances.map(|chance| (chance, sequence)));
    }

    /// For a step in which `decodes` sequences have a token each: the sequence of every drafted
    /// token that is to be in it, so as often as its draft is long. The step gets no wider than
    /// `width_max`.
    pub fn choose(&mut self, decodes: usize, width_max: usize) -> impl Iterator<Item = usize> {
        // A token is never likelier than one before it, which therefore comes first.
        self.offers.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        self.offers.truncate(width_max.saturating_sub(decodes));
        let (mut chosen, mut best) = (0, 0.0);
        if let Some(plain_us) = self.times.predict(decodes) {
            best = GAIN_MIN * decodes as f64 / plain_us;
        } else {
            self.offers.clear();
        }
        let mut tokens = decodes as f64;
        for (index, (chance, _)) in self.offers.iter().enumerate() {
            tokens += chance;
            let us = self.times.predict(decodes + index + 1).unwrap_or(f64::INFINITY);
            if tokens / us > best {
                (chosen, best) = (index + 1, tokens / us);
            }
        }
        self.offers[..chosen].iter().map(|(_, sequence)| *sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths of the drafts of some sequences, where the token after `i` right ones has the chance
    /// that is given, and steps take `us` by their width.
    fn lengths(chances: &[f64], decodes: usize, us: impl Fn(usize) -> u64) -> Vec<usize> {
        let mut chooser = DraftLengths::new(7);
        for width in (0..20).flat_map(|_| 1..=WIDTH_MAX) {
            chooser.times_mut().learn(width, us(width));
        }
        chooser.clear();
        for (sequence, chance) in chances.iter().enumerate() {
            chooser.offer(sequence, (1..=7).map(|index| chance.powi(index)));
        }
        let mut lengths = vec![0; chances.len()];
        chooser.choose(decodes, WIDTH_MAX).for_each(|sequence| lengths[sequence] += 1);
        lengths
    }

    #[test]
    fn a_sure_draft_is_long_and_an_unlikely_one_is_none() {
        // Five per cent for each token.
        let us = |width: usize| 9_500 + 500 * width as u64;
        assert_eq!(lengths(&[0.95], 1, us), [7]);
        assert!((1..4).contains(&lengths(&[0.4], 1, us)[0]));
        assert_eq!(lengths(&[0.05], 1, us), [0]);
        assert_eq!(lengths(&[0.95, 0.05], 2, us)[1], 0);
    }

    #[test]
    fn no_draft_where_a_token_costs_what_it_gives() {
        let us = |width: usize| 1_000 * width as u64;
        assert_eq!(lengths(&[0.99], 1, us), [0]);
        // Eight columns are free, the ninth is as dear as all of them.
        let us = |width: usize| 10_000 * width.div_ceil(8) as u64;
        assert_eq!(lengths(&[0.99], 4, us), [4]);
        assert_eq!(lengths(&[0.99], 8, us), [0]);
    }

    #[test]
    fn nothing_is_run_before_a_plain_step_was_measured() {
        let mut chooser = DraftLengths::new(7);
        chooser.offer(0, [0.9, 0.8].into_iter());
        assert_eq!(chooser.choose(1, WIDTH_MAX).count(), 0);
        chooser.times_mut().learn(1, 10_000);
        chooser.offer(0, [0.9, 0.8].into_iter());
        assert_eq!(chooser.choose(1, WIDTH_MAX).count(), 2, "wider is thought to be free");
        chooser.clear();
        chooser.offer(0, [0.9, 0.8].into_iter());
        assert_eq!(chooser.choose(1, 2).count(), 1, "no wider than is allowed");
        assert_eq!(chooser.choose(WIDTH_MAX + 5, WIDTH_MAX).count(), 0);
    }

    #[test]
    fn times_between_known_widths_are_between_theirs() {
        let mut times = StepTimes::default();
        assert_eq!(times.predict(3), None);
        times.learn(0, 1);
        times.learn(WIDTH_MAX + 1, 1);
        assert_eq!(times.predict(3), None);
        times.learn(2, 1_000);
        (0..30).for_each(|_| times.learn(6, 2_000));
        times.us[5] = times.us[5].map(f64::round);
        assert_eq!(times.predict(1), Some(1_000.0));
        assert_eq!(times.predict(4), Some(1_500.0));
        assert_eq!(times.predict(7), times.predict(6));
        times.learn(4, 1_100);
        assert_eq!(times.predict(4), Some(1_100.0));
    }

    #[test]
    fn a_bad_moment_is_forgiven() {
        let mut times = StepTimes::default();
        times.learn(1, 1_000);
        times.learn(8, 50_000);
        assert_eq!(times.predict(8), Some(1_500.0), "nor does a first one");
        (0..30).for_each(|_| times.learn(8, 50_000));
        (0..1_000).for_each(|_| times.learn(1, 1_000));
        let after = times.predict(8).unwrap();
        assert!((10_000.0..30_000.0).contains(&after), "{after}");
        times.learn(1, 1_000_000);
        assert!(times.predict(1).unwrap() < 1_200.0, "one outlier says little");
    }
}
