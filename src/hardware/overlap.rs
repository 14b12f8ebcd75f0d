//! How far reading weights and multiplying them hide each other.

use super::measured::TOKENS_MEASURED;
use super::product_rates::WEIGHT_BYTES;
use super::roofs::{Team, in_step};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tandem_cpu_kernels::{DType, Kernels, TrialProduct};

/// Whose weights are multiplied: a type that reading and multiplying take about as long for, where
/// a few tokens share a step.
const DTYPE: DType = DType::Q4_K;
/// Rounds of all that is measured, of which the middle one counts, and how long each part lasts.
const ROUNDS: usize = 5;
const BURST: Duration = Duration::from_millis(4);

/// What is done with a piece of weights.
#[derive(Clone, Copy)]
enum Part {
    /// It is read from memory.
    Read,
    /// As many weights are multiplied that are in the caches.
    Multiply,
    /// It is read and multiplied.
    Both,
}
const PARTS: [Part; 3] = [Part::Read, Part::Multiply, Part::Both];

/// A worker's weights: those in its caches, and its part of the memory.
struct Worker<'m> {
    product: TrialProduct,
    memory: &'m mut [u8],
    /// The piece of the memory that is next.
    next: usize,
}

/// The part of the shorter of both that comes on top of the longer, by [`TOKENS_MEASURED`]: 0 where
/// it is hidden, 1 where they follow each other. `memory` is far larger than the caches.
pub(super) fn unhidden(
    team: &Team,
    kernels: &'static Kernels,
    memory: &mut [u64],
) -> [f64; TOKENS_MEASURED.len()] {
    let (most, threads) = (TOKENS_MEASURED[TOKENS_MEASURED.len() - 1], team.threads.max(1));
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(memory);
    let share = (bytes.len() / threads / WEIGHT_BYTES).max(1) * WEIGHT_BYTES;
    let parts: Vec<_> = bytes.chunks_mut(share).map(|part| Mutex::new(Some(part))).collect();
    let workers: Vec<_> = (0..threads).map(|_| Mutex::new(None)).collect();
    let times = Mutex::new([[[0.0; PARTS.len()]; ROUNDS]; TOKENS_MEASURED.len()]);
    in_step(team, 1 + ROUNDS * TOKENS_MEASURED.len() * PARTS.len(), |thread, pass| {
        let mut worker = workers[thread].lock().unwrap_or_else(PoisonError::into_inner);
        let worker = worker.get_or_insert_with(|| {
            let part = parts.get(thread).map(|part| part.lock());
            let part = part.and_then(|part| part.unwrap_or_else(PoisonError::into_inner).take());
            let product = TrialProduct::new(kernels, DTYPE, WEIGHT_BYTES, most);
            Worker::new(product, part.unwrap_or_default())
        });
        let Some(pass) = pass.checked_sub(1) else { return };
        let (turn, part) = (pass / PARTS.len(), pass % PARTS.len());
        let (round, width) = (turn / TOKENS_MEASURED.len(), turn % TOKENS_MEASURED.len());
        let seconds = worker.seconds_per_piece(kernels, PARTS[part], TOKENS_MEASURED[width]);
        let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
        times[width][round][part] += seconds;
    });
    times.into_inner().unwrap_or_else(PoisonError::into_inner).map(middle_share)
}

/// Of the times of reading, multiplying and both.
fn middle_share(rounds: [[f64; PARTS.len()]; ROUNDS]) -> f64 {
    let mut shares = rounds.map(|[read, multiply, both]| {
        let (longer, shorter) = (read.max(multiply), read.min(multiply));
        ((both - longer) / shorter.max(1e-12)).clamp(0.0, 1.0)
    });
    shares.sort_by(f64::total_cmp);
    shares[ROUNDS / 2]
}

impl<'m> Worker<'m> {
    fn new(product: TrialProduct, memory: &'m mut [u8]) -> Self {
        let weights = product.weights();
        memory.chunks_exact_mut(weights.len()).for_each(|piece| piece.copy_from_slice(weights));
        Self { product, memory, next: 0 }
    }

    /// The mean of those that fill a burst.
    fn seconds_per_piece(&mut self, kernels: &Kernels, part: Part, tokens: usize) -> f64 {
        let bytes = self.product.weights().len();
        let (started, mut pieces) = (Instant::now(), 0);
        while pieces == 0 || started.elapsed() < BURST {
            let next = if (self.next + 1) * bytes > self.memory.len() { 0 } else { self.next };
            let Some(piece) = self.memory.get(next * bytes..(next + 1) * bytes) else { return 0.0 };
            match part {
                Part::Read => {
                    std::hint::black_box(kernels.read_words(bytemuck::cast_slice(piece)));
                }
                Part::Multiply => {
                    self.product.multiply(tokens);
                }
                Part::Both => {
                    self.product.multiply_piece(piece, tokens);
                }
            }
            if !matches!(part, Part::Multiply) {
                self.next = next + 1;
            }
            pieces += 1;
        }
        started.elapsed().as_secs_f64() / f64::from(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_hidden_is_a_part_of_the_shorter() {
        let hidden = [[2.0, 5.0, 5.0]; ROUNDS];
        let in_turn = [[2.0, 5.0, 7.0]; ROUNDS];
        let mut half = [[4.0, 3.0, 5.5]; ROUNDS];
        half[1] = [4.0, 3.0, 90.0];
        assert_eq!([hidden, in_turn, half].map(middle_share), [0.0, 1.0, 0.5]);
    }
}
