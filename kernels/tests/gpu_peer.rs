//! Rows that cross from one GPU's stream to another's: between two streams of one GPU, and between
//! two GPUs where there are two (`TANDEM_REQUIRE_GPUS=2` makes it a failure that there is one).

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod gpu;

use gpu::{gpu, on_gpu, said_by_child};
use std::time::{Duration, Instant};
use tandem_cpu_kernels::DType;
use tandem_kernels::{DeviceMatrix, EmbedRows, Gpu, GpuError, PeerCopies, driver};

const ELEMENTS: usize = 3 << 10;
/// Seconds of arithmetic that a hung GPU is played with.
const BUSY: f64 = 3.0;

/// Twice the first GPU, and the first two.
fn pairs() -> Vec<[Gpu; 2]> {
    if gpu().is_none() {
        return Vec::new();
    }
    let count = driver().and_then(|driver| driver.device_count()).expect("a driver");
    let required = std::env::var("TANDEM_REQUIRE_GPUS").ok().and_then(|count| count.parse().ok());
    assert!(count >= required.unwrap_or(0), "{count} GPUs, {required:?} are required");
    if count < 2 {
        println!("skipped: two GPUs");
    }
    // Each pair has a fate of its own.
    let pair = |second| {
        let first = gpu().expect("it was there");
        let second = first.open_beside(second).expect("a GPU");
        [first, second]
    };
    (0..count.min(2)).map(pair).collect()
}

#[test]
fn rows_arrive_in_their_order_both_ways() {
    for pair in pairs() {
        for copies in [PeerCopies::Allowed, PeerCopies::Off] {
            for [from, to] in [[&pair[0], &pair[1]], [&pair[1], &pair[0]]] {
                let bytes = ELEMENTS * size_of::<f32>();
                let (rows, place) = (from.alloc(bytes), to.alloc(bytes));
                let (rows, place) = (rows.expect("memory"), place.expect("memory"));
                let kept: Vec<_> = (0..20).map(|_| to.alloc(bytes).expect("memory")).collect();
                let mut lane = from.lane_to(to, bytes, copies).expect("a lane");
                let is_one = from.ordinal() == to.ordinal();
                assert!(!(is_one && lane.is_by_host()), "inside a GPU");
                assert!(is_one || copies == PeerCopies::Allowed || lane.is_by_host());
                println!("{copies:?}: by the host {}", lane.is_by_host());
                for (round, kept) in kept.iter().enumerate() {
                    let numbers = [round as f32 + 0.5; ELEMENTS];
                    from.upload(&numbers, rows.span()).expect("a copy");
                    // Fewer rows each time.
                    let bytes = bytes - 64 * round;
                    let (rows, place) = (rows.span().part(0, bytes), place.span().part(0, bytes));
                    // SAFETY: both live, and are used on these two streams alone.
                    unsafe { lane.send((from, rows), (to, place)).expect("a copy") };
                    to.copy(place, kept.span().part(0, bytes)).expect("a copy");
                    lane.used(to).expect("a mark");
                }
                for (round, kept) in kept.iter().enumerate() {
                    let mut numbers = [0.0f32; ELEMENTS];
                    to.download(kept.span(), &mut numbers).expect("a copy");
                    let sent = ELEMENTS - 16 * round;
                    assert!(numbers[..sent].iter().all(|number| *number == round as f32 + 0.5));
                    assert!(numbers[sent..].iter().all(|number| *number == 0.0));
                }
            }
        }
    }
}

#[test]
fn a_gpu_that_another_waits_for_is_the_one_that_hangs() {
    for [first, second] in pairs() {
        let shape = first.roof_matrices();
        let sums = first.alloc(shape.blocks * shape.rows * 4).expect("memory");
        let place = second.alloc(sums.bytes()).expect("memory");
        let per_round = (shape.rows * shape.columns * shape.depth * shape.blocks) as f64;
        let rounds = (BUSY * first.macs_per_second().expect("a roof") / per_round) as usize;
        let lane = first.lane_to(&second, sums.bytes(), PeerCopies::Allowed);
        let mut lane = lane.expect("a lane");
        second.synchronize().expect("a wait");
        first.limit_waits(Duration::from_millis(100));
        first.multiply_rounds(rounds, sums.span()).expect("a launch");
        let started = Instant::now();
        // SAFETY: both live until they are forgotten, and are used on these two streams alone.
        unsafe { lane.send((&first, sums.span()), (&second, place.span())).expect("a copy") };
        let hung = GpuError::Hung { ordinal: 0, wait_max_ms: 100 };
        assert_eq!(first.synchronize(), Err(hung.clone()));
        // Nothing from here on waits for either.
        assert_eq!(second.synchronize(), Err(hung.clone()));
        assert_eq!(second.alloc(16).map(|_| ()), Err(hung));
        drop((lane, sums, place, first, second));
        let waited = started.elapsed();
        assert!(waited < Duration::from_secs_f64(BUSY / 2.0), "{waited:?}");
        // What another pair on the same GPU would wait for.
        std::thread::sleep(Duration::from_secs_f64(BUSY));
    }
}

const CHILD: &str = "child_reads_a_row_that_is_not_there_and_sends_it";
const IN_CHILD: &str = "TANDEM_TEST_LOSES_ITS_GPUS";

/// The child of the test below; on its own it does nothing.
#[test]
fn child_reads_a_row_that_is_not_there_and_sends_it() {
    if std::env::var_os(IN_CHILD).is_none() {
        return;
    }
    let [first, second] = pairs().pop().expect("the parent has a GPU");
    let (rows, cols) = (4, 256);
    let table = DeviceMatrix::empty(&first, DType::F32, (rows, cols)).expect("memory");
    let (wild, out) = (on_gpu(&first, &[4_000_000_000u32]), first.alloc(cols * 4).expect("memory"));
    let place = second.alloc(cols * 4).expect("memory");
    let lane = first.lane_to(&second, cols * 4, PeerCopies::Allowed);
    let mut lane = lane.expect("a lane");
    let (rows, out_span) = (Some(wild.span()), out.span());
    let pass = EmbedRows { table: &table, rows, tokens: 1, scale: 1.0, out: out_span };
    first.embed_rows(&pass).expect("a launch");
    // SAFETY: both live until they are forgotten, and are used on these two streams alone.
    let sent = unsafe { lane.send((&first, out.span()), (&second, place.span())) };
    let lost = sent.and_then(|()| first.synchronize()).expect_err("memory that nobody has");
    assert!(matches!(&lost, GpuError::Lost { ordinal: 0, .. }), "{lost}");
    assert_eq!(second.synchronize(), Err(lost.clone()));
    drop((lane, table, wild, out, place));
    drop((first, second));
    println!("answer: {lost}");
}

#[test]
fn a_lost_gpu_is_named_and_the_one_that_waits_for_it_does_not_crash() {
    if gpu().is_none() {
        return;
    }
    let said = said_by_child(CHILD, IN_CHILD);
    assert!(said.contains("answer: GPU 0 is lost"), "{said}");
}
