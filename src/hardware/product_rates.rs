//! What the matmul kernels of each block type reach on this machine's workers.

use super::measured::{ProductRates, TOKENS_MEASURED};
use super::roofs::{Team, in_step};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tandem_cpu_kernels::{DType, Kernels, TrialProduct};

/// Weights of each worker: they stay in its caches, so memory is no limit.
pub(super) const WEIGHT_BYTES: usize = 512 << 10;
/// How often all types are measured, one after the other, since other guests of a machine take from
/// it for a while. The middle rate of the rounds counts: it is what a model will meet, while the
/// fastest is what it would have alone.
const ROUNDS: usize = 3;
/// Bursts of products of one width in each round, of which the mean counts, and how long each
/// lasts: past the wait for the last thread.
const BURSTS: usize = 2;
const BURST: Duration = Duration::from_millis(4);

/// Multiply-accumulates per second of all workers together, for each type.
pub(super) fn of_workers(team: &Team, kernels: &'static Kernels) -> Vec<ProductRates> {
    let mut rounds = [(); ROUNDS].map(|()| DType::ALL.map(|dtype| of_type(team, kernels, dtype)));
    let of = |(at, dtype): (usize, DType)| {
        let mut macs_per_second = [0.0; TOKENS_MEASURED.len()];
        for (width, rate) in macs_per_second.iter_mut().enumerate() {
            rounds.sort_by(|a, b| a[at][width].total_cmp(&b[at][width]));
            *rate = rounds[ROUNDS / 2][at][width];
        }
        ProductRates { dtype: dtype.to_string(), macs_per_second }
    };
    DType::ALL.into_iter().enumerate().map(of).collect()
}

fn of_type(team: &Team, kernels: &'static Kernels, dtype: DType) -> [f64; TOKENS_MEASURED.len()] {
    let most = TOKENS_MEASURED[TOKENS_MEASURED.len() - 1];
    // Made by the thread that multiplies them, so that they lie near.
    let products: Vec<_> = (0..team.threads.max(1)).map(|_| Mutex::new(None)).collect();
    let rates = Mutex::new([[0.0; BURSTS]; TOKENS_MEASURED.len()]);
    in_step(team, 1 + TOKENS_MEASURED.len() * BURSTS, |thread, pass| {
        let mut mine = products[thread].lock().unwrap_or_else(PoisonError::into_inner);
        let product =
            mine.get_or_insert_with(|| TrialProduct::new(kernels, dtype, WEIGHT_BYTES, most));
        let Some(pass) = pass.checked_sub(1) else { return };
        let (width, burst) = (pass / BURSTS, pass % BURSTS);
        let (started, mut macs) = (Instant::now(), 0);
        while macs == 0 || started.elapsed() < BURST {
            macs += product.multiply(TOKENS_MEASURED[width]);
        }
        let rate = macs as f64 / started.elapsed().as_secs_f64().max(1e-9);
        rates.lock().unwrap_or_else(PoisonError::into_inner)[width][burst] += rate;
    });
    let rates = rates.into_inner().unwrap_or_else(PoisonError::into_inner);
    rates.map(|bursts| bursts.into_iter().sum::<f64>() / BURSTS as f64)
}
