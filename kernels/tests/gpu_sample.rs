//! Measures, draws and lists of rows of logits on the GPU against f64.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod gpu;

use gpu::{Random, from_gpu, gpu, on_gpu};
use tandem_kernels::{Asked, Gpu, ListBounds, RowAnswer, RowDraws, RowMeasures, RowQuestion};

#[test]
fn rows_have_the_best_token_and_the_log_sum_of_exact_arithmetic() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(8);
    for (rows, vocab, softcap) in [(1, 5, None), (3, 32_000, None), (2, 151_937, Some(2.0f32))] {
        let mut logits: Vec<f32> =
            random.floats(rows * vocab).iter().map(|logit| 9.0 * logit).collect();
        // The same largest logit twice: the first counts.
        for row in logits.chunks_exact_mut(vocab) {
            row[vocab - 1] = 9.5;
            row[vocab / 2] = 9.5;
        }
        let memory = on_gpu(&gpu, &logits);
        let mut measures = RowMeasures::new(&gpu, rows).expect("memory");
        gpu.measure_rows(memory.span(), (rows, vocab), softcap, &measures).expect("a launch");
        let got: Vec<_> = measures.wait(&gpu, rows).expect("measures").collect();
        let capped = |logit: f32| match softcap {
            Some(cap) => f64::from(cap) * (f64::from(logit) / f64::from(cap)).tanh(),
            None => f64::from(logit),
        };
        for (logit, left) in logits.iter().zip(from_gpu(&gpu, &memory, logits.len())) {
            assert!((capped(*logit) - f64::from(left)).abs() < 1e-6, "{logit} became {left}");
        }
        for (row, got) in logits.chunks_exact(vocab).zip(got) {
            let got = got.expect("finite logits");
            let log_sum = row.iter().map(|logit| capped(*logit).exp()).sum::<f64>().ln();
            assert_eq!(got.best as usize, vocab / 2);
            assert!((f64::from(got.log_sum) - log_sum).abs() < 1e-5, "{got:?}: {log_sum}");
            let logprob = capped(9.5) - log_sum;
            assert!((f64::from(got.best_logprob) - logprob).abs() < 1e-5, "{got:?}: {logprob}");
        }
    }
}

#[test]
fn a_row_that_is_not_finite_has_no_measure_and_its_neighbours_have() {
    let Some(gpu) = gpu() else { return };
    let vocab = 1000;
    let mut logits = Random(9).floats(3 * vocab);
    logits[vocab + 77] = f32::NAN;
    let memory = on_gpu(&gpu, &logits);
    let mut measures = RowMeasures::new(&gpu, 3).expect("memory");
    gpu.measure_rows(memory.span(), (3, vocab), None, &measures).expect("a launch");
    let got = measures.wait(&gpu, 3).expect("measures");
    let finite: Vec<bool> = got.map(|measure| measure.is_some()).collect();
    assert_eq!(finite, [true, false, true]);
}

/// What rows answer to questions about them: token, logit, total and, by id, the list.
#[derive(Clone, Debug, PartialEq)]
struct Answer {
    token: u32,
    logit: f32,
    total: f64,
    list: Option<Vec<(u32, f32)>>,
    others_below: f32,
}

/// Asks twice, because the second must not find what the first has left.
fn answers(gpu: &Gpu, logits: &[f32], vocab: usize, questions: &[RowQuestion]) -> Vec<Answer> {
    let rows = logits.len() / vocab;
    let memory = on_gpu(gpu, logits);
    let measures = RowMeasures::new(gpu, rows).expect("memory");
    let mut draws = RowDraws::new(gpu, (rows, vocab)).expect("memory");
    gpu.measure_rows(memory.span(), (rows, vocab), None, &measures).expect("a launch");
    let mut bytes = vec![0; questions.len() * RowQuestion::BYTES];
    RowQuestion::write_all(questions.iter(), &mut bytes);
    let asked = on_gpu(gpu, &bytes);
    let lists = questions.iter().filter(|question| question.list.is_some()).count();
    let mut ask = || {
        let count = (questions.len(), lists);
        draws.ask(gpu, (memory.span(), &measures), asked.span(), count).expect("a launch");
        let answers = draws.answers(gpu, questions.len()).expect("answers");
        let answers = answers.map(|answer| {
            let list = answer.list.map(|list| {
                let mut tokens: Vec<(u32, f32)> = list.tokens().collect();
                tokens.sort_unstable_by_key(|(id, _)| *id);
                tokens
            });
            let others_below = answer.list.map_or(f32::NAN, |list| list.others_below);
            let RowAnswer { token, logit, total, .. } = answer;
            Answer { token, logit, total, list, others_below }
        });
        answers.collect::<Vec<_>>()
    };
    let first = ask();
    assert_eq!(format!("{first:?}"), format!("{:?}", ask()), "asked again");
    first
}

/// exp((logit − largest) / temperature) in f64.
fn weights(row: &[f32], temperature: f32) -> Vec<f64> {
    let largest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let weight = |logit: &f32| ((f64::from(*logit) - largest) / f64::from(temperature)).exp();
    row.iter().map(weight).collect()
}

#[test]
fn tokens_are_drawn_by_the_inverse_of_the_exact_distribution() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(10);
    for (rows, vocab, spread) in
        [(3, 1, 1.0), (3, 7, 3.0), (5, 1025, 0.0), (4, 32_000, 9.0), (6, 128_256, 12.0)]
    {
        let logits: Vec<f32> =
            random.floats(rows * vocab).iter().map(|logit| spread * logit).collect();
        for round in 0..20 {
            let temperature = [1.0, 0.7, 1.9, 0.05][round % 4];
            let question = |row: usize| {
                let draw = match (round, row) {
                    (0, _) => 0.0,
                    // Beyond what can come: the last token that can be drawn.
                    (1, _) => 1.0 + 1e-9,
                    _ => random.next() as f64 / 2f64.powi(64),
                };
                RowQuestion { row, asked: Asked::Draw { temperature, draw }, list: None }
            };
            // From the last row to the first, not all of them.
            let questions: Vec<RowQuestion> = (round % 2..rows).rev().map(question).collect();
            let found = answers(&gpu, &logits, vocab, &questions);
            for (question, found) in questions.iter().zip(&found) {
                let row = &logits[question.row * vocab..][..vocab];
                let weights = weights(row, temperature);
                let (total, token) = (weights.iter().sum::<f64>(), found.token as usize);
                let before = weights[..token].iter().sum::<f64>() / total;
                let Asked::Draw { draw, .. } = question.asked else { unreachable!() };
                // Arguments of exp are off by 2^-23 of them, and those that count are below 20;
                // sums in f32 have 64 terms.
                let off = 1e-5;
                let after = before + weights[token] / total;
                let context = format!("{question:?} of {vocab}: {token}, {before} to {after}");
                assert!(draw.min(1.0) >= before - off && draw.min(1.0) <= after + off, "{context}");
                assert_eq!(found.logit, row[token]);
                assert!((found.total / total - 1.0).abs() < off, "{context}");
            }
            let alone = answers(&gpu, &logits, vocab, &questions[..1]);
            assert_eq!(format!("{:?}", alone[0]), format!("{:?}", found[0]), "a row by itself");
        }
    }
}

/// Holds a list against the row that it is of.
fn check_list(row: &[f32], bounds: ListBounds, found: &Answer) {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let context = format!("{bounds:?} of {}", row.len());
    let all = || (0u32..).zip(row.iter().copied());
    let from = |below: f32| all().filter(move |(_, logit)| largest - logit < below);
    let weights = weights(row, 1.0);
    let share = |tokens: &mut dyn Iterator<Item = (u32, f32)>| {
        let sum: f64 = tokens.map(|(id, _)| weights[id as usize]).sum();
        sum / weights.iter().sum::<f64>()
    };
    let suffices = |count: usize, share: f64, below: f32| {
        let has_mass = bounds.mass.is_some_and(|mass| share >= f64::from(mass));
        count >= bounds.count.min(row.len()) && (has_mass || below >= bounds.below)
    };
    // All tokens that lie less than `others_below` below the best, or all there are.
    let last_bin = found.others_below >= 64.0;
    let wanted: Vec<_> =
        if last_bin { all().collect() } else { from(found.others_below).collect() };
    let Some(list) = &found.list else {
        let fewest = (1..2048).map(|bin| bin as f32 / 32.0).find(|below| {
            let count = from(*below).count();
            suffices(count, 1.01 * share(&mut from(*below)), *below - 1.0 / 32.0)
        });
        let fewest = fewest.map_or(row.len(), |below| from(below + 1.0 / 16.0).count());
        assert!(fewest > RowDraws::LIST_MAX, "{context}: {fewest} tokens would do");
        return;
    };
    assert_eq!(*list, wanted, "{context}");
    let got = share(&mut list.iter().copied());
    assert!(suffices(list.len(), got * (1.0 + 1e-6), found.others_below), "{context}: {got}");
    // Not many more than that: two bins less would be too few.
    let fewer = found.others_below - 2.0 / 32.0;
    if fewer > 0.0 && !last_bin {
        let (count, share) = (from(fewer).count(), share(&mut from(fewer)));
        assert!(!suffices(count, share - 1e-3, fewer - 1.0 / 32.0), "{context}");
    }
}

#[test]
fn lists_have_the_most_likely_tokens_and_few_others() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(11);
    let bounds = |count, below, mass| ListBounds { count, below, mass };
    let all = [
        bounds(1, 0.0, None),
        bounds(20, 0.0, None),
        bounds(300, 0.0, None),
        bounds(1, 3.1, None),
        bounds(5, 4.6, None),
        bounds(1, f32::INFINITY, Some(0.6)),
        bounds(1, f32::INFINITY, Some(0.95)),
        bounds(20, 2.0, Some(0.9)),
        bounds(1, f32::INFINITY, Some(1e-30)),
    ];
    for (vocab, spread) in
        [(1, 1.0), (7, 20.0), (1024, 0.0), (1025, 0.0), (32_000, 9.0), (128_256, 1.0)]
    {
        // Products of three: most are small, few are large.
        let mut cubed = || random.floats(1)[0].powi(3) * spread * 2.0;
        let mut logits: Vec<f32> = (0..all.len() * vocab).map(|_| cubed()).collect();
        for row in logits.chunks_exact_mut(vocab) {
            row[vocab - 1] = row[vocab / 2];
        }
        let question = |(row, list): (usize, &ListBounds)| {
            let asked = if row % 2 == 0 && list.mass.is_none() {
                Asked::Logit((vocab / 2) as u32)
            } else {
                Asked::Nothing
            };
            RowQuestion { row, asked, list: Some(*list) }
        };
        let questions: Vec<RowQuestion> = all.iter().enumerate().map(question).collect();
        let found = answers(&gpu, &logits, vocab, &questions);
        for (question, found) in questions.iter().zip(&found) {
            let row = &logits[question.row * vocab..][..vocab];
            check_list(row, question.list.expect("a list"), found);
            if question.asked != Asked::Nothing {
                assert_eq!(found.logit, row[vocab / 2]);
            }
            if question.list.is_some_and(|list| list.mass.is_some()) {
                let total: f64 = weights(row, 1.0).iter().sum();
                assert!((found.total / total - 1.0).abs() < 1e-5, "{found:?}: {total}");
            }
        }
    }
}

#[test]
fn rows_that_are_not_finite_leave_their_neighbours_alone() {
    let Some(gpu) = gpu() else { return };
    let vocab = 5000;
    let healthy = Random(12).floats(3 * vocab);
    let mut spoiled = healthy.clone();
    spoiled[vocab + 77] = f32::NAN;
    spoiled[vocab + 99] = f32::INFINITY;
    let list = Some(ListBounds { count: 3, below: 0.0, mass: None });
    let question = |row| {
        let asked = Asked::Draw { temperature: 1.0, draw: 0.7 };
        RowQuestion { row, asked, list }
    };
    let questions = [question(0), question(1), question(2)];
    let wanted = answers(&gpu, &healthy, vocab, &questions);
    let got = answers(&gpu, &spoiled, vocab, &questions);
    assert_eq!((&got[0], &got[2]), (&wanted[0], &wanted[2]));
}
