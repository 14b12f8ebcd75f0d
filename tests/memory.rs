//! The ledger's books and the host buffers.

#[path = "memory/nodes.rs"]
mod nodes;

use proptest::prelude::*;
use std::sync::Barrier;
use tandem::memory::{
    ALIGNMENT, AlignedBytes, ArenaError, DisjointChunks, HostArena, HugePages, Ledger, LedgerError,
    PurposeBytes,
};

#[test]
fn reservations_that_do_not_fit_are_refused_with_numbers() {
    let ledger = Ledger::new(1, 1 << 20);
    let weights = ledger.reserve("weights", 1 << 19).expect("half fits");
    let refusal = ledger.reserve("kv", (1 << 19) + 1).expect_err("more than half does not");
    let wanted = LedgerError::DoesNotFit {
        ordinal: 1,
        purpose: "kv",
        need_bytes: (1 << 19) + 1,
        free_bytes: 1 << 19,
        capacity_bytes: 1 << 20,
    };
    assert_eq!(refusal, wanted);
    let said = "kv on GPU 1: 512.00 KiB are needed, and 512.00 KiB of the 1.00 MiB that may be \
                used are free";
    assert_eq!(refusal.to_string(), said);
    assert_eq!(ledger.free_bytes(), 1 << 19, "a refusal promises nothing");
    drop(weights);
    assert_eq!(ledger.free_bytes(), 1 << 20);
    assert!(ledger.reserve("all", u64::MAX).is_err());
}

#[test]
fn reserved_bytes_become_committed_and_go_back_when_dropped() {
    let ledger = Ledger::new(0, 1000);
    let weights = ledger.reserve("weights", 600).expect("fits").commit();
    let kv = ledger.reserve("kv", 300).expect("fits");
    let report = ledger.report();
    let bytes = |reserved_bytes, committed_bytes| PurposeBytes { reserved_bytes, committed_bytes };
    assert_eq!(report.purposes["weights"], bytes(0, 600));
    assert_eq!(report.purposes["kv"], bytes(300, 0));
    assert_eq!((report.free_bytes, report.peak_bytes), (100, 900));
    drop(kv);
    assert_eq!(weights.bytes(), 600);
    drop(weights);
    let report = ledger.report();
    assert!(report.purposes.is_empty());
    assert_eq!((report.free_bytes, report.peak_bytes), (1000, 900));
}

proptest! {
    #[test]
    fn free_and_used_always_make_the_whole(
        steps in prop::collection::vec((0u64..400, 0usize..3, any::<prop::sample::Index>()), 1..80),
    ) {
        let ledger = Ledger::new(0, 1000);
        let (mut reserved, mut committed) = (Vec::new(), Vec::new());
        for (bytes, action, index) in steps {
            match action {
                0 => reserved.extend(ledger.reserve("any", bytes)),
                1 if !reserved.is_empty() => {
                    committed.push(reserved.swap_remove(index.index(reserved.len())).commit());
                }
                _ if !committed.is_empty() => {
                    drop(committed.swap_remove(index.index(committed.len())));
                }
                _ => {}
            }
            let report = ledger.report();
            let purpose = report.purposes.get("any").copied().unwrap_or_default();
            let promised: u64 = reserved.iter().map(|entry| entry.bytes()).sum();
            let taken: u64 = committed.iter().map(|entry| entry.bytes()).sum();
            prop_assert_eq!((purpose.reserved_bytes, purpose.committed_bytes), (promised, taken));
            prop_assert_eq!(report.free_bytes, 1000 - promised - taken);
            prop_assert!(report.peak_bytes <= 1000 && report.peak_bytes >= promised + taken);
        }
    }

    #[test]
    fn ranges_of_an_arena_are_aligned_and_apart(
        sizes in prop::collection::vec(0usize..5000, 1..30),
    ) {
        let bytes = HostArena::bytes_for(sizes.iter().copied());
        let buffer = AlignedBytes::zeroed(bytes, HugePages::SystemDefault).expect("a buffer");
        let mut arena = HostArena::new(buffer);
        let mut ranges = Vec::new();
        for (value, size) in sizes.iter().enumerate() {
            let range = arena.allot(*size).expect("bytes_for counted it");
            prop_assert_eq!(range.offsets().start % ALIGNMENT, 0);
            arena.bytes_mut(&range).fill(value as u8 + 1);
            ranges.push(range);
        }
        for (value, (size, range)) in sizes.iter().zip(&ranges).enumerate() {
            prop_assert_eq!(arena.bytes(range).len(), *size);
            prop_assert!(arena.bytes(range).iter().all(|byte| *byte == value as u8 + 1));
        }
        let is_full = matches!(arena.allot(1 + ALIGNMENT), Err(ArenaError::Full { .. }));
        prop_assert!(is_full);
    }
}

#[test]
fn threads_never_promise_more_than_there_is() {
    let ledger = Ledger::new(0, 64);
    let barrier = Barrier::new(8);
    let granted: usize = std::thread::scope(|scope| {
        let take = || {
            barrier.wait();
            let held: Vec<_> = (0..32).filter_map(|_| ledger.reserve("x", 1).ok()).collect();
            barrier.wait();
            held.len()
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(take)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
    });
    assert_eq!(granted, 64);
    assert_eq!(ledger.free_bytes(), 64);
}

#[test]
fn buffers_are_aligned_and_zeroed() {
    for huge_pages in [HugePages::Advise, HugePages::SystemDefault] {
        for len in [0, 1, 63, 4096, 4097, (2 << 20) - 1, 2 << 20, (5 << 20) + 3] {
            let mut bytes = AlignedBytes::zeroed(len, huge_pages).expect("a buffer");
            assert_eq!(bytes.len(), len);
            let alignment = if len >= 2 << 20 { 2 << 20 } else { ALIGNMENT };
            assert_eq!(bytes.as_ptr() as usize % alignment, 0, "{len} bytes");
            assert!(bytes.iter().all(|byte| *byte == 0));
            bytes.fill(0xa5);
            assert!(bytes.iter().all(|byte| *byte == 0xa5));
        }
    }
}

#[test]
fn impossible_buffers_are_an_error_and_not_an_abort() {
    for len in [usize::MAX, isize::MAX as usize, 1 << 60] {
        let error = AlignedBytes::zeroed(len, HugePages::Advise).expect_err("too much");
        assert!(matches!(error, ArenaError::Allocation { bytes, .. } if bytes == len), "{error}");
    }
}

#[test]
fn chunks_are_filled_in_parallel_each_by_one_thread() {
    let mut bytes = AlignedBytes::zeroed((3 << 20) + 77, HugePages::Advise).expect("a buffer");
    let chunks = DisjointChunks::new(&mut bytes, 4096);
    let count = chunks.count();
    assert_eq!(count, ((3 << 20) + 77usize).div_ceil(4096));
    assert!(chunks.claim(count).is_none());
    let filled: usize = std::thread::scope(|scope| {
        let fill = || {
            let mut filled = 0;
            while let Some((index, chunk)) = chunks.claim_next() {
                assert!(chunks.claim(index).is_none(), "claimed twice");
                chunk.fill(index as u8);
                filled += 1;
            }
            filled
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(fill)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
    });
    assert_eq!(filled, count);
    for (index, chunk) in bytes.chunks(4096).enumerate() {
        assert!(chunk.iter().all(|byte| *byte == index as u8), "chunk {index}");
    }
}
