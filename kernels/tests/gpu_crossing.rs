//! Rows that cross between a GPU and threads of the CPU inside a step.

#![allow(clippy::print_stdout, reason = "tests say what they skip, and what they measure")]

mod gpu;

use gpu::{Random, from_gpu, gpu};
use std::thread;
use std::time::{Duration, Instant};
use tandem_kernels::{Crossing, CrossingHost, Gpu, GpuError, Span, event_number};

/// Bases of steps one after the other: they wrap around, also inside a step.
const BASES: [u32; 6] = [0, 1024, 0x7000_0000, 0xe000_0000, 0xffff_fffd, 16];

/// A thread of the CPU that doubles the rows of some events.
fn double_rows(host: CrossingHost<'_>, (base, events): (u32, usize), elements: usize) {
    for number in (0..events).map(|index| event_number(base, index)) {
        while !host.has_reached(number) {
            std::hint::spin_loop();
        }
        let ((rows, handed), (out, room)) = (host.rows_in(), host.rows_out());
        assert!(elements <= room.min(handed));
        // SAFETY: the GPU has handed over as many elements and waits for as many.
        unsafe {
            for at in 0..elements {
                out.add(at).write(2.0 * rows.add(at).read());
            }
        }
        host.done(number);
    }
}

/// Starts what doubles `x` once per event.
fn start_crossings(
    gpu: &Gpu,
    crossing: &Crossing,
    (x, y): (Span<'_>, Span<'_>),
    (base, elements, events): (Span<'_>, usize, usize),
) -> Result<(), GpuError> {
    for index in 0..events {
        gpu.hand_over(crossing, x, elements, (base, index))?;
        gpu.take_back(crossing, y, elements, (base, index))?;
        gpu.copy(y, x)?;
    }
    Ok(())
}

#[test]
fn rows_cross_to_a_thread_and_back_in_every_step() {
    let Some(gpu) = gpu() else { return };
    let (cols, events) = (520, 5);
    let mut random = Random(2);
    let base = gpu.alloc(16).expect("memory");
    for rows in [1, 3, 32] {
        let elements = rows * cols;
        // More to the CPU than back.
        let crossing = gpu.crossing([64 * cols, 32 * cols]).expect("memory");
        assert!(crossing.bytes() >= 3 * 32 * cols * 4);
        let x = gpu.alloc(4 * elements).expect("memory");
        let y = gpu.alloc(4 * elements).expect("memory");
        let start = || {
            start_crossings(&gpu, &crossing, (x.span(), y.span()), (base.span(), elements, events))
        };
        let mut graph = None;
        for step_base in BASES {
            let values = random.floats(elements);
            gpu.upload(&values, x.span()).expect("an upload");
            gpu.upload(&[step_base], base.span()).expect("an upload");
            thread::scope(|scope| {
                scope.spawn(|| double_rows(crossing.host(), (step_base, events), elements));
                match &graph {
                    None => start().expect("launches"),
                    // SAFETY: all that was recorded is still there.
                    Some(graph) => unsafe { gpu.replay(graph).expect("a launch") },
                }
                gpu.synchronize().expect("a step");
            });
            let wanted: Vec<f32> = values.iter().map(|value| 32.0 * value).collect();
            let same = from_gpu(&gpu, &x, elements) == wanted;
            assert!(same, "{rows} rows, base {step_base}");
            let record = || gpu.record(start).expect("a record").expect("a graph");
            graph = graph.or_else(|| Some(record()));
        }
    }
}

#[test]
fn a_release_ends_the_waits_of_a_step() {
    let Some(gpu) = gpu() else { return };
    let elements = 2 * 64;
    let crossing = gpu.crossing([elements; 2]).expect("memory");
    let (base, x) = (gpu.alloc(16).expect("memory"), gpu.alloc(4 * elements).expect("memory"));
    let take = |crossing: &Crossing| {
        gpu.hand_over(crossing, x.span(), elements, (base.span(), 0)).expect("a launch");
        gpu.take_back(crossing, x.span(), elements, (base.span(), 0)).expect("a launch");
    };
    let pause = Duration::from_millis(30);
    gpu.upload(&[0u32], base.span()).expect("an upload");
    let started = Instant::now();
    thread::scope(|scope| {
        let host = crossing.host();
        scope.spawn(move || {
            thread::sleep(pause);
            host.release();
        });
        take(&crossing);
        gpu.synchronize().expect("a wait that ends");
    });
    assert!(started.elapsed() >= pause, "it waited for the release");
}

/// Microseconds of each event of a replayed step, where a thread of the CPU answers at once.
fn us_per_event(
    gpu: &Gpu,
    host: CrossingHost<'_>,
    start: impl Fn(Span<'_>) -> Result<(), GpuError>,
) -> f64 {
    let base = gpu.alloc(16).expect("memory");
    let graph = gpu.record(|| start(base.span())).expect("a record").expect("a graph");
    let marks = [gpu.mark().expect("a mark"), gpu.mark().expect("a mark")];
    let us = [0, 1024, 2048].map(|step_base: u32| {
        gpu.upload(&[step_base], base.span()).expect("an upload");
        thread::scope(|scope| {
            scope.spawn(|| double_rows(host, (step_base, MEASURED), 0));
            gpu.mark_again(&marks[0]).expect("a mark");
            // SAFETY: all that was recorded is still there.
            unsafe { gpu.replay(&graph).expect("a launch") };
            gpu.mark_again(&marks[1]).expect("a mark");
            gpu.synchronize().expect("a step");
        });
        marks[0].us_until(&marks[1]).expect("a time") / MEASURED as f64
    });
    us.into_iter().fold(f64::INFINITY, f64::min)
}

/// Events of a step that is measured.
const MEASURED: usize = 200;

/// How long it takes to hand rows over, and to take them back from a thread that copies nothing.
#[test]
fn crossings_are_measured() {
    let Some(gpu) = gpu() else { return };
    let cols = 4096;
    for rows in [1, 2, 4, 8, 16, 32] {
        let elements = rows * cols;
        let x = gpu.alloc(4 * elements).expect("memory");
        let us = [false, true].map(|both| {
            let crossing = gpu.crossing([elements; 2]).expect("memory");
            us_per_event(&gpu, crossing.host(), |base| {
                (0..MEASURED).try_for_each(|index| {
                    gpu.hand_over(&crossing, x.span(), elements, (base, index))?;
                    if both {
                        gpu.take_back(&crossing, x.span(), elements, (base, index))
                    } else {
                        Ok(())
                    }
                })
            })
        });
        println!("{rows} rows of {cols}: {:.2} us to the CPU, {:.2} us and back", us[0], us[1]);
    }
}
