//! Measures a machine: what its memory, its processors, its GPUs and the links between them reach,
//! alone and beside each other. Takes a few seconds; [`super::probe_cache`] keeps the result.

use super::gpu::Gpus;
use super::measured::{BesideReads, CopyRates, GpuRates, MacRate, Measured, ReadRate};
use super::roofs::{self, Team, read_passes};
use super::topology::CpuId;
use super::{gpu_products, overlap, product_rates, row_rates};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};
use tandem_cpu_kernels::Kernels;
use tandem_kernels::{CopyLanes, CopyWay, Gpu, GpuError, driver};

/// Passes over host memory for each number of threads, the writing one included; the best counts.
const READ_PASSES: usize = 4;
/// Passes of all workers while copies run; their mean counts, since the two disturb each other.
const SHARED_PASSES: usize = 16;
/// Measures of a copy; the best counts.
const COPY_MEASURES: usize = 4;
/// Copies of all pinned memory that are measured at once.
const COPY_ROUNDS: usize = 4;
/// Starts and waits that are measured, after some that are not.
const CROSSINGS: usize = 200;
const CROSSINGS_BEFORE: usize = 20;

/// What is measured, and with how much.
pub struct Probe<'a> {
    /// All compute workers.
    pub team: Team,
    /// The processors of so many of them: of each NUMA node its part.
    pub cpus_of: &'a dyn Fn(usize) -> Vec<CpuId>,
    /// Their kernels.
    pub kernels: &'static Kernels,
    /// Host memory of the kind that weights lie in; far larger than the caches.
    pub memory: &'a mut [u64],
    /// Bytes of pinned memory, and as much of a GPU's, for each way.
    pub copy_bytes: usize,
}

impl Probe<'_> {
    /// Measures everything. What can't be measured becomes a note.
    pub fn measure(mut self, gpus: &Gpus) -> Measured {
        let started = Instant::now();
        let mut measured = Measured { reads: self.reads(), ..Measured::default() };
        measured.cpu = MacRate {
            numbers: self.kernels.mac_numbers().to_owned(),
            per_second: roofs::macs_per_second(&self.team, self.kernels),
        };
        measured.products = product_rates::of_workers(&self.team, self.kernels);
        measured.unhidden = overlap::unhidden(&self.team, self.kernels, self.memory);
        measured.rows = row_rates::of_workers(&self.team, self.kernels);
        measured.meeting_us = roofs::meeting_us(&self.team);
        measured.wake_us = roofs::wake_us();
        for gpu in &gpus.devices {
            match self.gpu(gpu.ordinal) {
                Ok(rates) => measured.gpus.push(rates),
                Err(error) => {
                    measured.notes.push(format!("GPU {} was not measured: {error}", gpu.ordinal));
                }
            }
        }
        let refused =
            gpus.closed.iter().filter_map(|gpu| Some((gpu.ordinal, gpu.refusal.as_ref()?)));
        measured.notes.extend(
            refused.map(|(ordinal, reason)| format!("GPU {ordinal} was not measured: {reason}")),
        );
        measured.seconds = started.elapsed().as_secs_f64();
        measured
    }

    /// Reads by 1, 2, 4, … and all workers.
    fn reads(&mut self) -> Vec<ReadRate> {
        let all = self.team.threads.max(1);
        let powers = std::iter::successors(Some(1), |threads| Some(2 * threads));
        let mut rates = Vec::new();
        for threads in powers.take_while(|threads| *threads < all).chain([all]) {
            let cpus = (self.cpus_of)(threads);
            let team = Team { threads, cpus };
            let times = read_passes(&team, self.kernels, self.memory, (READ_PASSES, &|_| ()));
            let best = times.into_iter().min().unwrap_or_default();
            rates.push(ReadRate { threads, bytes_per_second: self.rate(best) });
        }
        rates
    }

    /// Bytes per second where all memory takes so long.
    fn rate(&self, pass: Duration) -> f64 {
        size_of_val(self.memory) as f64 / pass.as_secs_f64().max(1e-9)
    }

    fn gpu(&mut self, ordinal: usize) -> Result<GpuRates, GpuError> {
        let gpu = Gpu::open(&driver()?, ordinal)?;
        let roofs = roofs::of_open(&gpu)?;
        let products = gpu_products::of_gpu(&gpu)?;
        let crossing_us = crossing_us(&gpu)?;
        let mut lanes = gpu.copy_lanes(self.copy_bytes)?;
        let (to_gpu, from_gpu) = best(|| lanes.pinned_both_ways(COPY_ROUNDS))?;
        Ok(GpuRates {
            ordinal,
            read_bytes_per_second: roofs.read_bytes_per_second,
            macs: MacRate { numbers: roofs.numbers.to_owned(), per_second: roofs.macs_per_second },
            products,
            pinned: one_way(|way| lanes.pinned(way, COPY_ROUNDS))?,
            both_ways: CopyRates { to_gpu, from_gpu },
            pageable: pageable(&mut lanes, self.copy_bytes)?,
            beside_reads: self.beside_reads(&mut lanes)?,
            crossing_us,
        })
    }

    /// Copies on this thread while the team reads.
    fn beside_reads(&mut self, lanes: &mut CopyLanes<'_>) -> Result<BesideReads, GpuError> {
        const READING: u8 = 1;
        const DONE: u8 = 2;
        let state = AtomicU8::new(0);
        let (team, kernels, bytes) = (&self.team, self.kernels, size_of_val(self.memory) as f64);
        let memory = &mut *self.memory;
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                // The first pass writes.
                let begins = |pass| state.store(u8::from(pass > 0), Ordering::SeqCst);
                let times = read_passes(team, kernels, memory, (SHARED_PASSES, &begins));
                state.store(DONE, Ordering::SeqCst);
                times
            });
            let mut copies = Vec::new();
            let mut copied = Ok(0.0);
            while copied.is_ok() && state.load(Ordering::SeqCst) != DONE {
                let before = state.load(Ordering::SeqCst);
                copied = lanes.pinned(CopyWay::ToGpu, 1);
                let is_beside = before == READING && state.load(Ordering::SeqCst) == READING;
                copies.extend(copied.iter().copied().filter(|_| is_beside));
            }
            let times = match reader.join() {
                Ok(times) => times,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            let last = copied?;
            let seconds: f64 = times.iter().map(Duration::as_secs_f64).sum();
            let mean = |rates: &[f64]| rates.iter().sum::<f64>() / rates.len() as f64;
            Ok(BesideReads {
                to_gpu: if copies.is_empty() { last } else { mean(&copies) },
                reads: bytes * times.len() as f64 / seconds.max(1e-9),
            })
        })
    }
}

/// Each way alone, the best of several measures.
fn one_way(
    mut measure: impl FnMut(CopyWay) -> Result<f64, GpuError>,
) -> Result<CopyRates, GpuError> {
    let mut of = |way| best(|| Ok((measure(way)?, 0.0))).map(|(rate, _)| rate);
    Ok(CopyRates { to_gpu: of(CopyWay::ToGpu)?, from_gpu: of(CopyWay::FromGpu)? })
}

/// The measure with the largest sum.
fn best(mut measure: impl FnMut() -> Result<(f64, f64), GpuError>) -> Result<(f64, f64), GpuError> {
    let mut best = (0.0, 0.0);
    for _ in 0..COPY_MEASURES {
        let rates = measure()?;
        if rates.0 + rates.1 > best.0 + best.1 {
            best = rates;
        }
    }
    Ok(best)
}

fn pageable(lanes: &mut CopyLanes<'_>, bytes: usize) -> Result<CopyRates, GpuError> {
    // Written, so that its pages exist.
    let mut host = vec![1; bytes];
    one_way(|way| lanes.pageable(way, &mut host))
}

/// The middle of many starts of a kernel with nearly nothing to do, each waited for.
fn crossing_us(gpu: &Gpu) -> Result<f64, GpuError> {
    let (few, found) = (gpu.alloc(16)?, gpu.alloc(gpu.found_bytes())?);
    let mut times = Vec::with_capacity(CROSSINGS);
    for crossing in 0..CROSSINGS_BEFORE + CROSSINGS {
        let started = Instant::now();
        gpu.read_words(few.span(), found.span())?;
        gpu.synchronize()?;
        if crossing >= CROSSINGS_BEFORE {
            times.push(started.elapsed());
        }
    }
    times.sort();
    Ok(times[CROSSINGS / 2].as_secs_f64() * 1e6)
}
