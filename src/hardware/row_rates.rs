//! What the workers reach in work on rows beside products.

use super::measured::RowRates;
use super::roofs::{Team, in_step};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tandem_cpu_kernels::{Kernels, TrialRows};

/// Bursts of each kind, in turn, and how long each lasts; the middle one counts.
const BURSTS: usize = 5;
const BURST: Duration = Duration::from_millis(4);
const KINDS: usize = 3;

/// Elements per second of all workers together.
pub(super) fn of_workers(team: &Team, kernels: &'static Kernels) -> RowRates {
    let rows: Vec<_> = (0..team.threads.max(1)).map(|_| Mutex::new(None)).collect();
    let rates = Mutex::new([[0.0; BURSTS]; KINDS]);
    in_step(team, 1 + KINDS * BURSTS, |thread, pass| {
        let mut rows = rows[thread].lock().unwrap_or_else(PoisonError::into_inner);
        let rows = rows.get_or_insert_with(|| TrialRows::new(kernels));
        let Some(pass) = pass.checked_sub(1) else { return };
        let (burst, kind) = (pass / KINDS, pass % KINDS);
        let (started, mut elements) = (Instant::now(), 0);
        while elements == 0 || started.elapsed() < BURST {
            elements += match kind {
                0 => rows.norm(),
                1 => rows.gate(),
                _ => rows.measure_logits(),
            };
        }
        let rate = elements as f64 / started.elapsed().as_secs_f64().max(1e-9);
        rates.lock().unwrap_or_else(PoisonError::into_inner)[kind][burst] += rate;
    });
    let rates = rates.into_inner().unwrap_or_else(PoisonError::into_inner);
    let [norm, gate, logits] = rates.map(|mut bursts| {
        bursts.sort_by(f64::total_cmp);
        bursts[BURSTS / 2]
    });
    RowRates { norm, gate, logits }
}
