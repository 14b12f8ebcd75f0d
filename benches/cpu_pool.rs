//! What it costs to bring workers together: nanoseconds of a barrier, of an empty job while the
//! workers spin and of one that has to wake them, and of a barrier beside a neighbour that wants a
//! core for itself.
//!
//! `cargo bench --bench cpu_pool -- [threads …]`. The roof is a cache line's way from one core to
//! another, measured in the same run: a barrier can't do without one. Between two workers that only
//! meet it takes no more, since who ends a meeting has the line and comes to the next at once.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark prints and may stop")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tandem::executor::{CpuPool, PoolOptions};
use tandem::hardware::{CpuId, Topology, choose_cpus, pin_current_thread};

/// Passes are short, so that some of them lie within one time slice on a busy machine; the best
/// counts, since others only ever take away.
const PASSES: usize = 200;
const BARRIERS: usize = 200;
const LATE_BARRIERS: usize = 2000;
const JOBS: usize = 50;
const WAKES: usize = 20;
const SPIN_US: u64 = 50;
/// Long enough that all workers have parked.
const PAUSE: Duration = Duration::from_millis(1);

fn main() {
    let arguments = std::env::args().skip(1).filter_map(|argument| argument.parse().ok());
    let mut counts: Vec<usize> = arguments.collect();
    let cpus = choose_cpus(&Topology::detect(), usize::MAX);
    if counts.is_empty() {
        let doubled = std::iter::successors(Some(1), |count| Some(count * 2));
        counts.extend(doubled.take_while(|count| *count < 2 * cpus.len()));
        counts.extend([cpus.len(), 2 * cpus.len()]);
        counts.sort_unstable();
        counts.dedup();
    }
    let roof = on_a_new_thread(|| one_way_ns(&cpus));
    println!("{} processors, a line's way between two: {roof:.0} ns", cpus.len());
    println!("| threads | pinned | barrier ns | ways | late ns | job ns | waking ns | beside ns |");
    println!("|---|---|---|---|---|---|---|---|");
    for threads in counts {
        on_a_new_thread(|| line(threads, &cpus, roof));
    }
}

/// The pool pins its caller, and later threads inherit its mask.
fn on_a_new_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap())
}

fn line(threads: usize, cpus: &[CpuId], roof: f64) {
    let pinned = threads <= cpus.len();
    let cores = cpus.iter().take(threads).filter(|_| pinned).map(|cpu| cpu.0 as usize);
    let options = PoolOptions {
        threads,
        cores: cores.collect(),
        nodes: Default::default(),
        spin_us: SPIN_US,
    };
    let busy = on_a_new_thread(|| beside_a_neighbour(&options, cpus[0]));
    let mut pool = CpuPool::new(&options).unwrap();
    let (barrier, late) = (barrier_ns(&mut pool), late_ns(&mut pool));
    let job = best((0..PASSES).map(|_| {
        let started = Instant::now();
        (0..JOBS).for_each(|_| pool.run(&|_| {}).unwrap());
        nanoseconds(started) / JOBS as f64
    }));
    let wake = median((0..WAKES).map(|_| {
        std::thread::sleep(PAUSE);
        let started = Instant::now();
        pool.run(&|_| {}).unwrap();
        nanoseconds(started)
    }));
    let ways = barrier / roof;
    println!(
        "| {threads} | {pinned} | {barrier:.0} | {ways:.2} | {late:.0} | {job:.0} | {wake:.0} | \
         {busy:.0} |"
    );
}

fn barrier_ns(pool: &mut CpuPool) -> f64 {
    best((0..PASSES).map(|_| {
        let started = Instant::now();
        pool.run(&|worker| (0..BARRIERS).for_each(|_| worker.meet())).unwrap();
        nanoseconds(started) / BARRIERS as f64
    }))
}

/// From the last worker's coming to the last one's leaving, when workers come up to 2 µs apart, as
/// they do at the end of a loop. Two looks at the clock are in it.
fn late_ns(pool: &mut CpuPool) -> f64 {
    let epoch = Instant::now();
    let now = || epoch.elapsed().as_nanos() as u64;
    let threads = pool.threads();
    let times: Vec<[AtomicU64; 2]> =
        (0..LATE_BARRIERS * threads).map(|_| Default::default()).collect();
    pool.run(&|worker| {
        let mut noise = worker.index as u64 + 1;
        for barrier in times.chunks(threads) {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let until = now() + (noise >> 33) % 2000;
            while now() < until {}
            barrier[worker.index][0].store(now(), Ordering::Relaxed);
            worker.meet();
            barrier[worker.index][1].store(now(), Ordering::Relaxed);
        }
    })
    .unwrap();
    let last = |barrier: &[[AtomicU64; 2]], which: usize| {
        barrier.iter().map(|times| times[which].load(Ordering::Relaxed)).max().unwrap()
    };
    median(times.chunks(threads).map(|barrier| (last(barrier, 1) - last(barrier, 0)) as f64))
}

/// A barrier while another thread computes without end on one of the pool's cores: the mean, since
/// what hurts are the few that last a time slice.
fn beside_a_neighbour(options: &PoolOptions, cpu: CpuId) -> f64 {
    let (stop, mut pool) = (AtomicBool::new(false), CpuPool::new(options).unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pin_current_thread(cpu).ok();
            while !stop.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let started = Instant::now();
        let mut barriers = 0;
        while started.elapsed() < Duration::from_millis(500) {
            pool.run(&|worker| (0..BARRIERS).for_each(|_| worker.meet())).unwrap();
            barriers += BARRIERS;
        }
        stop.store(true, Ordering::Relaxed);
        nanoseconds(started) / barriers as f64
    })
}

/// A cache line's way from one core to another, half of a round trip; not a number with fewer than
/// two processors.
fn one_way_ns(cpus: &[CpuId]) -> f64 {
    const TRIPS: u64 = 1000;
    let &[here, there, ..] = cpus else { return f64::NAN };
    let word = AtomicU64::new(0);
    let bounce = |parity: u64| {
        for trip in (parity..2 * TRIPS).step_by(2) {
            while word.load(Ordering::Acquire) != trip {}
            word.store(trip + 1, Ordering::Release);
        }
    };
    pin_current_thread(here).ok();
    best((0..PASSES).map(|_| {
        word.store(0, Ordering::Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                pin_current_thread(there).ok();
                bounce(1);
            });
            let started = Instant::now();
            bounce(0);
            nanoseconds(started) / (2 * TRIPS) as f64
        })
    }))
}

fn nanoseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e9
}

fn best(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::INFINITY, f64::min)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
