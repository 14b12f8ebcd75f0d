//! What a set of threads or a GPU can do at most, measured: bytes read from memory per second, and
//! multiply-accumulates per second. Each function keeps the best of several passes and leaves
//! nothing behind; those of threads start their own and pin them.

use super::affinity::pin_current_thread;
use super::topology::CpuId;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tandem_cpu_kernels::Kernels;
use tandem_kernels::{Gpu, GpuError, driver};

/// Passes over the memory; the best counts, since others only ever take away.
const READ_PASSES: usize = 16;
/// Bursts of arithmetic, and how long each lasts: past the clock's ramp, short of a time slice.
const MAC_BURSTS: usize = 12;
const MAC_BURST: Duration = Duration::from_millis(20);
/// Rounds between two looks at the clock: some tens of microseconds.
const MAC_ROUNDS: usize = 1 << 10;

/// Which threads are measured, as compute workers are described.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Team {
    /// At least 1.
    pub threads: usize,
    /// Processor of each thread; threads without an entry are not pinned. A processor that the
    /// system refuses is no error: the thread then runs where it may.
    pub cpus: Vec<CpuId>,
}

/// Bytes per second that the team reads from `memory` together, each thread its own part in order.
/// The part is written first, by its reader, so that its pages exist and lie near.
///
/// The memory must be far larger than the caches, or their speed is what comes out. Pages should be
/// of the kind that the real data has: huge ones read faster.
pub fn read_bytes_per_second(team: &Team, kernels: &Kernels, memory: &mut [u64]) -> f64 {
    let bytes = size_of_val(memory) as f64;
    let passes = read_passes(team, kernels, memory, (READ_PASSES, &|_| ()));
    let best = passes.iter().min().copied().unwrap_or_default();
    bytes / best.as_secs_f64().max(1e-9)
}

/// How long each of `passes` passes over the memory takes, one of them the first, which writes and
/// is left out. `begins` is told of each, by one thread.
pub(super) fn read_passes(
    team: &Team,
    kernels: &Kernels,
    memory: &mut [u64],
    (passes, begins): (usize, &(dyn Fn(usize) + Sync)),
) -> Vec<Duration> {
    let share = memory.len().div_ceil(team.threads.max(1)).max(1);
    let parts: Vec<_> = memory.chunks_mut(share).map(Mutex::new).collect();
    let mut times = in_step(team, passes, |thread, pass| {
        if thread == 0 {
            begins(pass);
        }
        let Some(part) = parts.get(thread) else { return };
        let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
        if pass == 0 {
            part.iter_mut().enumerate().for_each(|(at, word)| *word = at as u64);
        } else {
            std::hint::black_box(kernels.read_words(&part));
        }
    });
    times.remove(0);
    times
}

/// Multiply-accumulates per second of the team together, in registers, with the instructions and
/// the numbers of `kernels` ([`Kernels::mac_numbers`]). One multiply-accumulate is two operations.
pub fn macs_per_second(team: &Team, kernels: &Kernels) -> f64 {
    let rates = Mutex::new(vec![0.0; MAC_BURSTS]);
    in_step(team, MAC_BURSTS, |_, burst| {
        let (started, mut macs) = (Instant::now(), 0);
        while started.elapsed() < MAC_BURST {
            macs += kernels.macs(MAC_ROUNDS);
        }
        let rate = macs as f64 / started.elapsed().as_secs_f64();
        rates.lock().unwrap_or_else(PoisonError::into_inner)[burst] += rate;
    });
    let rates = rates.into_inner().unwrap_or_else(PoisonError::into_inner);
    rates.into_iter().fold(0.0, f64::max)
}

/// Meetings of a pass, and passes; the best counts.
const MEETINGS: usize = 200;
const MEETING_PASSES: usize = 8;
/// Looks at the others between two offers of the processor to them: there may be fewer processors
/// than threads.
const LOOKS: usize = 1 << 12;
/// Wake-ups that are measured.
const WAKES: usize = 200;
/// How long a thread sleeps before it is woken: longer than it would look around first.
const SLEEP: Duration = Duration::from_micros(300);

/// Microseconds in which the team meets, all of it spinning, with nothing done in between.
pub(super) fn meeting_us(team: &Team) -> f64 {
    let (threads, arrived) = (team.threads.max(1), AtomicUsize::new(0));
    let times = in_step(team, MEETING_PASSES, |_, pass| {
        for meeting in 1..=MEETINGS {
            // The count only grows: whoever comes late sees at least as many as were there.
            let all = (pass * MEETINGS + meeting) * threads;
            arrived.fetch_add(1, Ordering::AcqRel);
            let mut looks = 0_usize;
            while arrived.load(Ordering::Acquire) < all {
                looks += 1;
                if looks.is_multiple_of(LOOKS) {
                    std::thread::yield_now();
                }
                std::hint::spin_loop();
            }
        }
    });
    let best = times.into_iter().min().unwrap_or_default();
    best.as_secs_f64() * 1e6 / MEETINGS as f64
}

/// Microseconds from the word to a thread that sleeps until it runs.
pub(super) fn wake_us() -> f64 {
    let (sender, receiver) = crossbeam_channel::bounded::<Instant>(1);
    let sleeper = move || receiver.iter().map(|sent| sent.elapsed()).collect::<Vec<_>>();
    let mut times = std::thread::scope(|scope| {
        let sleeper = scope.spawn(sleeper);
        for _ in 0..WAKES {
            std::thread::sleep(SLEEP);
            // It lives until the sender is gone.
            let _ = sender.send(Instant::now());
        }
        drop(sender);
        sleeper.join().unwrap_or_default()
    });
    times.sort();
    times.get(times.len() / 2).map_or(0.0, |time| time.as_secs_f64() * 1e6)
}

/// Memory of a GPU that is read, if twice as much is free: far more than its caches hold.
const GPU_READ_BYTES: usize = 4 << 30;

/// What a GPU can do at most.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuRoofs {
    /// Bytes per second that its multiprocessors read from its memory.
    pub read_bytes_per_second: f64,
    /// Multiply-accumulates per second of its tensor cores.
    pub macs_per_second: f64,
    /// Of which numbers, and with which instructions.
    pub numbers: &'static str,
}

/// Measures a GPU, which is opened for it.
///
/// # Errors
/// There is no such GPU, or what the driver refuses.
pub fn of_gpu(ordinal: usize) -> Result<GpuRoofs, GpuError> {
    of_open(&Gpu::open(&driver()?, ordinal)?)
}

/// The same of a GPU that is open.
pub(super) fn of_open(gpu: &Gpu) -> Result<GpuRoofs, GpuError> {
    let (free, _) = gpu.memory()?;
    // Arithmetic first: it brings the clocks of an idle GPU up.
    let macs_per_second = gpu.macs_per_second()?;
    let read_bytes_per_second = gpu.read_bytes_per_second(GPU_READ_BYTES.min(free / 2))?;
    Ok(GpuRoofs { read_bytes_per_second, macs_per_second, numbers: gpu.mac_numbers() })
}

/// Calls `work(thread, pass)` on every thread for each pass. Passes start together; returns how
/// long the slowest thread took for each.
pub(super) fn in_step(
    team: &Team,
    passes: usize,
    work: impl Fn(usize, usize) + Sync,
) -> Vec<Duration> {
    let threads = team.threads.max(1);
    let (barrier, work) = (Barrier::new(threads), &work);
    let life = |thread: usize| {
        if let Some(cpu) = team.cpus.get(thread) {
            // Unpinned is slower, not wrong.
            let _ = pin_current_thread(*cpu);
        }
        let pass = |pass| {
            barrier.wait();
            let started = Instant::now();
            work(thread, pass);
            barrier.wait();
            started.elapsed()
        };
        (0..passes).map(pass).collect::<Vec<_>>()
    };
    std::thread::scope(|scope| {
        let life = &life;
        let handles: Vec<_> =
            (0..threads).map(|thread| scope.spawn(move || life(thread))).collect();
        let times = handles.into_iter().map(|handle| match handle.join() {
            Ok(times) => times,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        times
            .reduce(|a, b| a.into_iter().zip(b).map(|(a, b)| a.max(b)).collect())
            .unwrap_or_default()
    })
}
