//! What the matmul kernels of each block type reach on this machine's workers.

use super::measured::{ProductRates, TOKENS_MEASURED};
use super::roofs::{Team, in_step};
use std::sync::{Mutex, PoisonError};
use tandem_cpu_kernels::{DType, Kernels, TrialProduct};

/// Weights of each worker: they stay in its caches, so memory is no limit.
const WEIGHT_BYTES: usize = 512 << 10;
/// Products of one width; the fastest counts.
const REPEATS: usize = 3;

/// Multiply-accumulates per second of all workers together, for each type.
pub(super) fn of_workers(team: &Team, kernels: &'static Kernels) -> Vec<ProductRates> {
    DType::ALL.into_iter().map(|dtype| of_type(team, kernels, dtype)).collect()
}

fn of_type(team: &Team, kernels: &'static Kernels, dtype: DType) -> ProductRates {
    let threads = team.threads.max(1);
    let most = TOKENS_MEASURED[TOKENS_MEASURED.len() - 1];
    // Made by the thread that multiplies them, so that they lie near.
    let products: Vec<_> = (0..threads).map(|_| Mutex::new(None)).collect();
    let macs = Mutex::new([0; TOKENS_MEASURED.len()]);
    let times = in_step(team, 1 + TOKENS_MEASURED.len() * REPEATS, |thread, pass| {
        let mut mine = products[thread].lock().unwrap_or_else(PoisonError::into_inner);
        let product =
            mine.get_or_insert_with(|| TrialProduct::new(kernels, dtype, WEIGHT_BYTES, most));
        let Some(width) = pass.checked_sub(1).map(|pass| pass / REPEATS) else { return };
        let done = product.multiply(TOKENS_MEASURED[width]);
        macs.lock().unwrap_or_else(PoisonError::into_inner)[width] = done;
    });
    let macs = macs.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut rates = ProductRates { dtype: dtype.to_string(), ..ProductRates::default() };
    for ((rate, macs), times) in
        rates.macs_per_second.iter_mut().zip(macs).zip(times[1..].chunks(REPEATS))
    {
        let best = times.iter().min().copied().unwrap_or_default();
        *rate = threads as f64 * macs as f64 / best.as_secs_f64().max(1e-9);
    }
    rates
}
