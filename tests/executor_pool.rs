//! The worker pool: shares, barriers, panics, and the end of its threads.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test and its figures")]

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tandem::executor::{CpuPool, PoolOptions, Worker};
use tandem::placement::NodeTeams;

fn pool(threads: usize) -> CpuPool {
    pool_that_spins(threads, 20)
}

fn pool_that_spins(threads: usize, spin_us: u64) -> CpuPool {
    CpuPool::new(&PoolOptions { threads, cores: Vec::new(), nodes: Default::default(), spin_us })
        .unwrap()
}

/// Workers that count themselves together, in one group, in several, in one that is not full.
const SIZES: [usize; 9] = [1, 2, 3, 4, 5, 16, 17, 33, 48];

#[test]
fn shares_cover_all_items_once_and_are_cut_at_units() {
    for threads in 1..=7 {
        let mut pool = pool(threads);
        for (items, unit) in [(0, 16), (1, 16), (576, 16), (577, 32), (15, 1), (100, 64)] {
            let shares = Mutex::new(vec![0..0; threads]);
            pool.run(&|worker| {
                shares.lock().unwrap()[worker.index] = worker.share(items, unit);
            })
            .unwrap();
            let mut next = 0;
            for share in shares.into_inner().unwrap() {
                assert_eq!(share.start, next);
                assert!(share.start % unit == 0 || share.start == items);
                next = share.end;
            }
            assert_eq!(next, items, "{threads} threads, {items} items by {unit}");
        }
    }
}

#[test]
fn every_item_is_dealt_to_one_worker() {
    for threads in 1..=5 {
        let mut pool = pool(threads);
        // One after the other, without barriers: a worker may be loops ahead of another.
        let loops = [(0, 16, 1), (1, 16, 4), (576, 16, 2), (577, 32, 1), (15, 1, 3), (4099, 1, 1)];
        let taken = loops.map(|(items, ..)| (0..items).map(|_| AtomicUsize::new(0)).collect());
        let taken: &[Vec<AtomicUsize>; 6] = &taken;
        for round in 1..=20 {
            pool.run(&|worker| {
                for ((items, unit, grain), taken) in loops.into_iter().zip(taken) {
                    for piece in worker.deal(items, unit, grain) {
                        assert!(piece.start.is_multiple_of(unit) && !piece.is_empty());
                        assert!(piece.end.is_multiple_of(unit) || piece.end == items);
                        for item in piece {
                            taken[item].fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            })
            .unwrap();
            let all = taken.iter().flatten();
            assert!(all.clone().all(|taken| taken.load(Ordering::Relaxed) == round));
        }
    }
}

#[test]
fn others_take_what_a_slow_worker_leaves() {
    let mut pool = pool(3);
    let (waiting, by_slow) = (AtomicUsize::new(0), AtomicUsize::new(0));
    pool.run(&|worker| {
        let pieces = worker.deal(300, 1, 1);
        while worker.index != 1 && by_slow.load(Ordering::Relaxed) == 0 {
            std::hint::spin_loop();
        }
        for piece in pieces {
            if worker.index == 1 {
                by_slow.fetch_add(piece.len(), Ordering::Relaxed);
                // Its first piece lasts until the others have nothing left to do.
                while waiting.load(Ordering::Acquire) < 2 {
                    std::hint::spin_loop();
                }
            }
        }
        waiting.fetch_add(1, Ordering::Release);
        worker.meet();
    })
    .unwrap();
    assert!(by_slow.into_inner() < 100);
}

#[test]
fn a_given_cut_decides_where_shares_begin() {
    let mut pool = pool(1);
    let pieces = Mutex::new(Vec::new());
    pool.run(&|worker| {
        pieces.lock().unwrap().extend(worker.deal_from(2, |worker| [0, 7][worker]));
    })
    .unwrap();
    assert_eq!(pieces.into_inner().unwrap(), [0..2, 2..4, 4..6, 6..7]);
}

#[test]
fn rows_of_the_own_node_are_taken_before_those_of_others() {
    let nodes = NodeTeams::of_workers(&[0, 0, 0, 1, 1]);
    let mut pool = CpuPool::new(&PoolOptions {
        threads: 5,
        cores: Vec::new(),
        nodes: nodes.clone(),
        spin_us: 20,
    });
    let pool = pool.as_mut().unwrap();
    assert_eq!(pool.nodes(), &nodes);
    for (rows, grain) in [(3200, 1), (3200, 7), (70, 1), (31, 1), (0, 1)] {
        for alone in 0..5 {
            let (taken, done) = (Mutex::new(Vec::new()), AtomicUsize::new(0));
            pool.run(&|worker| {
                let mut pieces = worker.deal_rows(rows, 32, grain);
                if worker.index == alone {
                    taken.lock().unwrap().extend(pieces);
                    done.store(1, Ordering::Release);
                } else {
                    while done.load(Ordering::Acquire) == 0 {
                        std::hint::spin_loop();
                    }
                    assert_eq!(pieces.next(), None);
                }
            })
            .unwrap();
            let taken = taken.into_inner().unwrap();
            let near = nodes.rows(nodes.team_of(alone), rows);
            let is_near = |piece: &Range<usize>| near.start <= piece.start && piece.end <= near.end;
            let (first, then) = taken.split_at(taken.iter().take_while(|p| is_near(p)).count());
            assert_eq!(first.iter().map(Range::len).sum::<usize>(), near.len());
            assert!(then.iter().all(|piece| !is_near(piece)));
            assert_eq!(taken.iter().map(Range::len).sum::<usize>(), rows);
        }
    }
}

#[test]
fn rows_of_several_nodes_are_dealt_once_whoever_is_slow() {
    for sizes in [[1, 1, 1], [3, 1, 2], [1, 4, 1]] {
        let of = |(node, size): (usize, &usize)| vec![node as u32; *size];
        let nodes: Vec<u32> = sizes.iter().enumerate().flat_map(of).collect();
        let (threads, nodes) = (nodes.len(), NodeTeams::of_workers(&nodes));
        let options = PoolOptions { threads, cores: Vec::new(), nodes, spin_us: 20 };
        let mut pool = CpuPool::new(&options).unwrap();
        let taken: Vec<_> = (0..4099).map(|_| AtomicUsize::new(0)).collect();
        for round in 1..=20 {
            pool.run(&|worker| {
                for (rows, unit) in [(4099, 16), (40, 32), (4099, 32)] {
                    for piece in worker.deal_rows(rows, unit, 1) {
                        assert!(piece.start.is_multiple_of(unit));
                        for row in piece {
                            taken[row].fetch_add(1, Ordering::Relaxed);
                        }
                        if worker.index == round % threads {
                            std::thread::yield_now();
                        }
                    }
                }
            })
            .unwrap();
        }
        let times = |row: usize| taken[row].load(Ordering::Relaxed);
        assert!((0..40).all(|row| times(row) == 60) && (40..4099).all(|row| times(row) == 40));
    }
}

#[test]
fn nobody_passes_a_barrier_before_all_have_come() {
    // Without spinning every wait is a sleep, and a wake-up that gets lost is a hang.
    for (threads, spin_us) in SIZES.into_iter().flat_map(|size| [(size, 0), (size, 20)]) {
        let mut pool = pool_that_spins(threads, spin_us);
        let (rounds, phases) = (4, 160 / threads);
        let arrived = AtomicUsize::new(0);
        for round in 0..rounds {
            pool.run(&|worker| {
                for phase in 0..phases {
                    arrived.fetch_add(1, Ordering::Relaxed);
                    worker.meet();
                    let seen = arrived.load(Ordering::Relaxed);
                    let wanted = (round * phases + phase + 1) * threads;
                    assert!(seen >= wanted, "{threads} threads, phase {phase}: {seen}");
                    worker.meet();
                }
            })
            .unwrap();
        }
        assert_eq!(arrived.into_inner(), rounds * phases * threads);
    }
}

#[test]
fn what_a_worker_wrote_is_seen_by_all_after_the_barrier() {
    for threads in SIZES {
        let mut pool = pool(threads);
        let written: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
        pool.run(&|worker| {
            for phase in 1..=160 / threads {
                written[worker.index].store(phase, Ordering::Relaxed);
                worker.meet();
                let all = written.iter().all(|value| value.load(Ordering::Relaxed) == phase);
                assert!(all, "{threads} threads, phase {phase}");
                worker.meet();
            }
        })
        .unwrap();
        // The caller sees it after the job without a barrier.
        pool.run(&|worker| written[worker.index].store(777, Ordering::Relaxed)).unwrap();
        assert!(written.into_iter().all(|value| value.into_inner() == 777));
    }
}

#[test]
fn jobs_without_a_barrier_follow_each_other() {
    for (threads, spin_us) in SIZES.into_iter().flat_map(|size| [(size, 0), (size, 20)]) {
        let mut pool = pool_that_spins(threads, spin_us);
        let ran = AtomicUsize::new(0);
        for job in 1..=400 / threads {
            pool.run(&|_| {
                ran.fetch_add(1, Ordering::Relaxed);
            })
            .unwrap();
            assert_eq!(ran.load(Ordering::Relaxed), job * threads, "{threads} threads");
        }
    }
}

#[test]
fn a_panic_in_any_worker_is_an_error_of_run_and_never_a_hang() {
    for threads in SIZES {
        for guilty in (0..threads).step_by(threads.div_ceil(4)) {
            let mut pool = pool(threads);
            for _ in 0..5 {
                let panic = pool
                    .run(&|worker| {
                        worker.meet();
                        assert!(worker.index != guilty, "worker {guilty} is guilty");
                        worker.meet();
                        worker.meet();
                    })
                    .unwrap_err();
                assert_eq!(panic.worker, guilty);
                assert_eq!(panic.message, format!("worker {guilty} is guilty"));
                pool.run(&|worker| worker.meet()).unwrap();
            }
        }
    }
}

#[test]
fn a_core_that_does_not_exist_is_reported_and_not_fatal() {
    let options = PoolOptions {
        threads: 2,
        cores: vec![1023, 100_000],
        nodes: Default::default(),
        spin_us: 0,
    };
    let mut pool = CpuPool::new(&options).unwrap();
    pool.run(&|worker| worker.meet()).unwrap();
    assert_eq!(pool.pin_failures(), vec![0, 1]);
}

/// Letter of the state and clock ticks of processor time of one of this process's threads.
fn state_and_ticks(thread: i32) -> (char, u64) {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
    // The name before may hold anything but this: `1 (a name) S …`, user and system time are the
    // 14th and 15th field.
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks = |field: usize| fields[field].parse::<u64>().unwrap();
    (fields[0].chars().next().unwrap(), ticks(11) + ticks(12))
}

#[test]
fn idle_workers_take_no_processor_time() {
    let mut pool = pool_that_spins(3, 50);
    let threads = Mutex::new(Vec::new());
    let job = |worker: &Worker<'_>| {
        if worker.index > 0 {
            let thread = rustix::thread::gettid().as_raw_nonzero().get();
            threads.lock().unwrap().push(thread);
        }
        worker.meet();
    };
    pool.run(&job).unwrap();
    let threads = threads.into_inner().unwrap();
    assert_eq!(threads.len(), 2);
    let deadline = Instant::now() + Duration::from_secs(60);
    while threads.iter().any(|thread| state_and_ticks(*thread).0 != 'S') {
        assert!(Instant::now() < deadline, "workers do not park");
        std::thread::yield_now();
    }
    let ticks = || threads.iter().map(|thread| state_and_ticks(*thread).1).sum::<u64>();
    let before = ticks();
    std::thread::sleep(Duration::from_millis(300));
    let taken = ticks() - before;
    // Spinning, they would have taken up to 30 each.
    assert!(taken <= 1, "{taken} clock ticks");
    // They are still there.
    pool.run(&|worker| worker.meet()).unwrap();
}

#[test]
fn dropping_the_pool_joins_its_threads() {
    let alive = Arc::new(());
    let mut pool = pool(3);
    let inside = alive.clone();
    pool.run(&move |_| {
        let _held = inside.clone();
    })
    .unwrap();
    drop(pool);
    assert_eq!(Arc::strong_count(&alive), 1);
}
