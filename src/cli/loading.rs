//! How far the loading of a model is: a bar where somebody watches, else a line every few seconds,
//! for a log. A load that is over at once says nothing.

use super::output::{Output, ProgressUnit};
use indicatif::ProgressBar;
use std::time::{Duration, Instant};
use tandem::units::ByteSize;

/// Nothing is shown of a load that is shorter.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two lines of a log.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Shows one load.
#[derive(Debug)]
pub struct LoadMeter {
    output: Output,
    started: Instant,
    bar: Option<ProgressBar>,
    next_line: Duration,
}

impl LoadMeter {
    /// A load that starts now.
    pub fn start(output: Output) -> Self {
        Self { output, started: Instant::now(), bar: None, next_line: PATIENCE }
    }

    /// Shows that `done_bytes` of `total_bytes` are ready.
    pub fn show(&mut self, done_bytes: u64, total_bytes: u64) {
        let elapsed = self.started.elapsed();
        if elapsed < PATIENCE {
            return;
        }
        if self.output.shows_bars() {
            let output = self.output;
            let bar = self.bar.get_or_insert_with(|| {
                output.progress("loading", ProgressUnit::Bytes).with_elapsed(elapsed)
            });
            bar.set_length(total_bytes);
            bar.set_position(done_bytes);
        } else if elapsed >= self.next_line && done_bytes < total_bytes {
            self.next_line = elapsed + LINE_INTERVAL;
            // Nobody is left to be told that standard error is closed.
            let _ = self.output.notice(&line(done_bytes, total_bytes, elapsed));
        }
        if done_bytes >= total_bytes {
            self.finish();
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for LoadMeter {
    fn drop(&mut self) {
        self.finish();
    }
}

fn line(done_bytes: u64, total_bytes: u64, elapsed: Duration) -> String {
    let percent = 100 * done_bytes / total_bytes.max(1);
    let rate = done_bytes as f64 / elapsed.as_secs_f64();
    let [done, total, rate] = [done_bytes, total_bytes, rate as u64].map(ByteSize);
    format!("loading: {percent} %, {done} of {total}, {rate}/s")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_share_the_bytes_and_their_rate() {
        let said = line(3 << 29, 3 << 30, Duration::from_secs(3));
        assert_eq!(said, "loading: 50 %, 1.50 GiB of 3.00 GiB, 512.00 MiB/s");
        assert!(line(0, 0, PATIENCE).starts_with("loading: 0 %"));
    }
}
