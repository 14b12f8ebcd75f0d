//! What the terms of a CPU's prediction are made of.

use super::gpu::config;
use super::predict::{assert_near, h200, measured, predicted};
use tandem::hardware::{HardwareProfile, Measured, ProductRates, RowRates};
use tandem::placement::Prediction;

#[test]
fn all_that_was_measured_of_the_cpu_takes_its_time() {
    let config = config("off");
    let step = |change: &dyn Fn(&mut Measured)| {
        let mut rates = measured("int8", 8.27e12 / 2.0);
        change(&mut rates);
        let hardware = HardwareProfile { measured: Some(rates), ..h200() };
        predicted("llama-1b:q4_0", (&hardware, &config), 16, 512).1.decode[1].step
    };
    let plain = step(&|_| ());
    assert_eq!((plain.meetings, plain.norms), (0.0, 0.0));
    let products = [ProductRates { dtype: "Q4_0".into(), macs_per_second: [1e12; 4] }].to_vec();
    assert!(step(&|rates| rates.products = products.clone()).meetings > 0.0);
    let rows = RowRates { norm: 1e9, gate: 2e9, logits: 4e9 };
    let with_rows = step(&|rates| rates.rows = rows);
    // 16 workers, 16 layers, two norms.
    let norms = (16 * 16 * 2 * 8 * 2048) as f64 / 1e9;
    assert!((with_rows.norms / norms - 1.0).abs() < 1e-9, "{with_rows:?}");
    let more = (16 * 8 * 8192) as f64 / 2e9 + (8 * 128_256) as f64 / 4e9;
    assert!(((with_rows.products - plain.products) / more - 1.0).abs() < 1e-9, "{with_rows:?}");
    assert!(step(&|rates| rates.unhidden = [1.0; 4]).products > plain.products);
}

/// Where memory is no limit, a step takes what its products take, each at the rate of its type.
#[test]
fn products_take_what_was_measured_of_their_types() {
    let mut rates = measured("int8", 1e18);
    rates.reads.iter_mut().for_each(|read| read.bytes_per_second = 1e18);
    let speed = |dtype: &str, macs_per_second: f64, threads: usize| {
        let macs_per_second = [1.0, 4.0, 8.0, 8.0].map(|times| times * macs_per_second);
        let products = vec![ProductRates { dtype: dtype.into(), macs_per_second }];
        let rates = Measured { products, ..rates.clone() };
        let hardware = HardwareProfile { measured: Some(rates), ..h200() };
        let config = config("off");
        predicted("llama-8b:q8_0", (&hardware, &config), threads, 16).1
    };
    let products = |prediction: Prediction| -> Vec<f64> {
        prediction.decode.iter().map(|at| at.streams as f64 / at.step.products).collect()
    };
    let [slow, fast] = [1e11, 2e11].map(|rate| products(speed("Q8_0", rate, 16)));
    assert_near(&fast, &slow.iter().map(|speed| 2.0 * speed).collect::<Vec<_>>(), &[0.1; 3]);
    // Four times the rate with eight tokens, and again twice that with 32.
    let [one, eight, many] = slow[..] else { panic!("{slow:?}") };
    assert_near(&[eight, many], &[4.0 * one, 8.0 * one], &[0.1; 2]);
    let half = slow.iter().map(|speed| speed / 2.0).collect::<Vec<_>>();
    assert_near(&products(speed("Q8_0", 1e11, 8)), &half, &[0.1; 3]);
    // What was not measured is as fast as the arithmetic lets it be.
    assert_eq!(speed("Q4_0", 1e11, 16).decode, speed("Q4_0", 2e11, 16).decode);
}
