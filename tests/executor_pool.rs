//! The worker pool: shares, barriers, panics, and the end of its threads.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test and its figures")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tandem::executor::{CpuPool, PoolOptions};

fn pool(threads: usize) -> CpuPool {
    CpuPool::new(&PoolOptions { threads, cores: Vec::new(), spin_us: 20 }).unwrap()
}

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
fn nobody_passes_a_barrier_before_all_have_come() {
    let mut pool = pool(4);
    let arrived = AtomicUsize::new(0);
    for round in 0..50 {
        pool.run(&|worker| {
            for phase in 0..40 {
                arrived.fetch_add(1, Ordering::Relaxed);
                worker.meet();
                let seen = arrived.load(Ordering::Relaxed);
                assert!(seen >= (round * 40 + phase + 1) * 4, "phase {phase}: {seen}");
                worker.meet();
            }
        })
        .unwrap();
    }
    assert_eq!(arrived.into_inner(), 50 * 40 * 4);
}

#[test]
fn a_panic_in_any_worker_is_an_error_of_run_and_never_a_hang() {
    for threads in 1..=4 {
        for guilty in 0..threads {
            let mut pool = pool(threads);
            for _ in 0..20 {
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
    let options = PoolOptions { threads: 2, cores: vec![1023, 100_000], spin_us: 0 };
    let mut pool = CpuPool::new(&options).unwrap();
    pool.run(&|worker| worker.meet()).unwrap();
    assert_eq!(pool.pin_failures(), vec![0, 1]);
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
