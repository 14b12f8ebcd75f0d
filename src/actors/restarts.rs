//! How often a child may die: a bound on restarts within a sliding window, as plain arithmetic.

use std::collections::VecDeque;

/// The latest restarts of one child.
#[derive(Debug)]
pub(super) struct RestartWindow {
    at_ms: VecDeque<u64>,
    restarts_max: usize,
    window_ms: u64,
}

/// What to do with a child that died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Restart,
    /// It was restarted so often within the window, and now it died again.
    GiveUp {
        restarts: u32,
    },
}

impl RestartWindow {
    pub(super) fn new(restarts_max: u32, window_ms: u64) -> Self {
        Self { at_ms: VecDeque::new(), restarts_max: restarts_max as usize, window_ms }
    }

    /// Judges a death at `now_ms` and counts the restart that follows.
    pub(super) fn death(&mut self, now_ms: u64) -> Verdict {
        while self.at_ms.front().is_some_and(|at| now_ms.saturating_sub(*at) >= self.window_ms) {
            self.at_ms.pop_front();
        }
        if self.at_ms.len() >= self.restarts_max {
            return Verdict::GiveUp { restarts: self.at_ms.len() as u32 };
        }
        self.at_ms.push_back(now_ms);
        Verdict::Restart
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fourth_death_within_the_window_is_too_many() {
        let mut window = RestartWindow::new(3, 60_000);
        for at in [0, 10, 20] {
            assert_eq!(window.death(at), Verdict::Restart);
        }
        assert_eq!(window.death(59_999), Verdict::GiveUp { restarts: 3 });
    }

    #[test]
    fn old_restarts_are_forgotten() {
        let mut window = RestartWindow::new(1, 1000);
        for at in [0, 1000, 2000] {
            assert_eq!(window.death(at), Verdict::Restart);
        }
        assert_eq!(window.death(2500), Verdict::GiveUp { restarts: 1 });
    }

    #[test]
    fn no_restarts_allowed_gives_up_at_once() {
        assert_eq!(RestartWindow::new(0, 1000).death(5), Verdict::GiveUp { restarts: 0 });
    }
}
