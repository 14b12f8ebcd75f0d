//! Sampling of rows of which a few bytes leave the GPU, against sampling the whole row.

use super::stage::{Model, options, plan_tokens, run, score_next};
use super::tiny_model::{Family, TinyModel, split_mix};
use super::{EXACT, TOP, bits, distance, on_gpu, random_tokens, step};
use std::sync::Arc;
use tandem::executor::GpuStage;
use tandem::request::SamplingParams;
use tandem::sampling::{Sampler, draw};
use tandem::step::{LogitsTask, RowOutput, StepOutput, StepPlan};
use tandem::tensor::DType;
use tandem::units::TokenId;
use tandem_kernels::{Asked, Gpu, RowDraws, RowMeasures, RowQuestion, driver};

/// Widest step in which float weights meet activations in f32.
const F32_TOKENS_MAX: usize = 128;

/// Parameters of many kinds, without bias and penalties.
fn kinds() -> Vec<SamplingParams> {
    let plain = SamplingParams::default();
    let of = |change: &dyn Fn(&mut SamplingParams)| {
        let mut params = plain.clone();
        change(&mut params);
        params
    };
    vec![
        plain.clone(),
        of(&|p| p.temperature = 0.3),
        of(&|p| (p.temperature, p.top_logprobs) = (1.7, 5)),
        of(&|p| p.top_k = 1),
        of(&|p| (p.top_k, p.top_logprobs) = (10, 20)),
        of(&|p| (p.top_k, p.top_p, p.min_p) = (40, 0.8, 0.01)),
        of(&|p| (p.top_k, p.typical_p) = (50, 0.7)),
        of(&|p| p.top_p = 0.9),
        of(&|p| (p.top_p, p.min_p, p.temperature) = (0.99, 0.05, 2.0)),
        of(&|p| p.min_p = 0.1),
        of(&|p| p.typical_p = 0.8),
        of(&|p| (p.temperature, p.top_logprobs) = (0.0, 3)),
        of(&|p| p.temperature = 0.0),
        // As much as the vocabulary has, and more.
        of(&|p| p.top_k = 1000),
        of(&|p| (p.top_p, p.top_logprobs) = (f32::MIN_POSITIVE, 1000)),
    ]
}

/// All tokens of a prompt in one step, each row sampled with other parameters; with a bias of 0
/// the rows have to travel as a whole.
fn sampled(tokens: &[TokenId], seed: u64, bias: &[(TokenId, f32)]) -> StepPlan {
    let kinds: Vec<Arc<SamplingParams>> = kinds()
        .into_iter()
        .map(|params| {
            let logit_bias = bias.to_vec();
            Arc::new(SamplingParams { seed: Some(seed), logit_bias, ..params })
        })
        .collect();
    let mut plan = StepPlan::default();
    plan_tokens(&mut plan, (1, 0), tokens, 0..tokens.len(), |position| {
        // Of some rows nothing is wanted.
        let params = kinds[(position + seed as usize) % kinds.len()].clone();
        let sample = LogitsTask::Sample { params, history: 0..0, prompt_tokens: 0 };
        (position % 7 != 3).then_some(sample)
    });
    plan
}

fn compare(gpu: &mut GpuStage, tokens: &[TokenId], seed: u64) -> Vec<RowOutput> {
    let parts = step(gpu, &sampled(tokens, seed, &[]));
    let whole = step(gpu, &sampled(tokens, seed, &[(TokenId(0), 0.0)]));
    for (part, whole) in parts.iter().zip(&whole) {
        let context = format!("position {} of seed {seed}", part.position);
        let ids = |row: &RowOutput| -> Vec<TokenId> {
            std::iter::once(&row.token).chain(&row.top).map(|token| token.id).collect()
        };
        assert_eq!(ids(part), ids(whole), "{context}");
        let of = |row: &RowOutput| row.token.logprob;
        // The two sum the row in another order.
        assert!((of(part) - of(whole)).abs() < 1e-5, "{context}: {part:?}, {whole:?}");
    }
    parts
}

#[test]
fn rows_that_stay_give_the_tokens_of_rows_that_travel() {
    for family in [Family::Llama, Family::Gemma3] {
        let model = TinyModel::new(family).dtype(DType::F32);
        let model = Model::from_bytes(&model.gguf().bytes());
        let options = options(2, 1024);
        let Some(mut gpu) = on_gpu(&model, &options) else { return };
        let mut cpu = model.stage(&options);
        let (mut rows, mut differing) = (0, 0);
        // Narrow steps, and more rows than exist at once.
        for (seed, length) in (0..).zip([300, 300, 140, 8, 60, 1, 3, 100, 100, 120, 128]) {
            let tokens = random_tokens(&mut (seed + 1), length, model.spec.vocab_size);
            let parts = compare(&mut gpu, &tokens, seed);
            if length > F32_TOKENS_MAX {
                continue;
            }
            let on_cpu = run(&mut cpu, &sampled(&tokens, seed, &[])).rows;
            rows += parts.len();
            let differs = |(a, b): &(&RowOutput, &RowOutput)| a.token.id != b.token.id;
            differing += parts.iter().zip(&on_cpu).filter(differs).count();
        }
        println!("{family:?}: {differing} of {rows} sampled tokens differ from the CPU's");
        // Of n tokens of about the same probability each bound between two moves by some
        // EXACT / √n / 2 where logits are EXACT apart, and a draw may meet any of n bounds.
        let chance = EXACT * (model.spec.vocab_size as f64).sqrt() / 2.0;
        let expected = chance * rows as f64;
        assert!(differing as f64 <= expected + 4.0 * expected.sqrt(), "{family:?}: {differing}");
    }
}

#[test]
fn sampled_tokens_do_not_depend_on_the_rest_of_the_step() {
    let model = Model::from_bytes(&TinyModel::new(Family::Qwen3).gguf().bytes());
    let Some(mut gpu) = on_gpu(&model, &options(1, 2048)) else { return };
    let params: Vec<_> = kinds().into_iter().map(Arc::new).collect();
    let sequences: Vec<Vec<TokenId>> =
        (0..8).map(|seed| random_tokens(&mut (seed + 40), 5, model.spec.vocab_size)).collect();
    let planned = |plan: &mut StepPlan, id: usize, range: std::ops::Range<usize>, kind: usize| {
        plan_tokens(plan, (id as u64, 4 * id as u32), &sequences[id], range, |position| {
            let params = params[kind % params.len()].clone();
            let task = LogitsTask::Sample { params, history: 0..0, prompt_tokens: 0 };
            (position == 4).then_some(task)
        });
    };
    for id in 0..sequences.len() {
        let mut prompt = StepPlan::default();
        planned(&mut prompt, id, 0..4, 0);
        step(&mut gpu, &prompt);
    }
    for round in 0..params.len() {
        let mut together = StepPlan::default();
        (0..sequences.len()).for_each(|id| planned(&mut together, id, 4..5, id + round));
        let together = bits(&step(&mut gpu, &together));
        for id in 0..sequences.len() {
            let mut alone = StepPlan::default();
            planned(&mut alone, id, 4..5, id + round);
            assert_eq!(bits(&step(&mut gpu, &alone)), together[id..=id], "{id} in round {round}");
        }
    }
}

#[test]
fn a_scored_token_that_is_not_listed_has_its_log_probability() {
    let model = TinyModel::new(Family::Llama).dtype(DType::F32);
    let model = Model::from_bytes(&model.gguf().bytes());
    let options = options(2, 512);
    let Some(mut gpu) = on_gpu(&model, &options) else { return };
    let tokens = random_tokens(&mut 77, 200, model.spec.vocab_size);
    for top in [0, TOP] {
        let mut plan = StepPlan::default();
        plan_tokens(&mut plan, (0, 0), &tokens, 0..200, score_next(&tokens, top));
        let mut output = StepOutput::default();
        gpu.run(&plan, &mut output).unwrap();
        let on_cpu = run(&mut model.stage(&options), &plan).rows;
        let (_, most) = distance(&output.rows, &on_cpu);
        assert!(most < 1e-2, "{most} nats apart");
        assert!(output.rows.iter().all(|row| row.top.len() == top));
    }
}

/// Rows like those of a large model on a GPU, if there is one.
#[test]
fn tokens_drawn_from_large_rows_are_those_of_the_sampler() {
    super::turn::take_turn();
    let opened = driver().map_err(tandem_kernels::GpuError::from);
    let gpu = match opened.and_then(|driver| Gpu::open(&driver, 0)) {
        Ok(gpu) => gpu,
        Err(error) if std::env::var_os("TANDEM_REQUIRE_GPU").is_none() => {
            println!("skipped: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let mut seed = 12;
    for (vocab, spread) in [(128_256, 4.0), (151_937, 1.0), (32_000, 9.0), (1000, 0.0)] {
        // Sums of four are near to normal.
        let mut uniform = || (split_mix(&mut seed) >> 40) as f32 / (1 << 23) as f32 - 1.0;
        let mut logit = || spread * (0..4).map(|_| uniform()).sum::<f32>();
        let row: Vec<f32> = (0..vocab).map(|_| logit()).collect();
        let memory = gpu.alloc(vocab * 4).unwrap();
        gpu.upload(&row, memory.span()).unwrap();
        let measures = RowMeasures::new(&gpu, 1).unwrap();
        gpu.measure_rows(memory.span(), (1, vocab), None, &measures).unwrap();
        let mut draws = RowDraws::new(&gpu, (1, vocab)).unwrap();
        let questions = gpu.alloc(RowQuestion::BYTES).unwrap();
        let mut sampler = Sampler::new(vocab);
        for position in 0..100 {
            let temperature = [1.0, 0.6, 1.3, 0.01, 1e-30][position % 5];
            let params = SamplingParams { temperature, ..SamplingParams::default() };
            let asked = Asked::Draw { temperature, draw: draw(&params, position) };
            let question = RowQuestion { row: 0, asked, list: None };
            let mut bytes = [0; RowQuestion::BYTES];
            RowQuestion::write_all([question].iter(), &mut bytes);
            gpu.upload(&bytes, questions.span()).unwrap();
            draws.ask(&gpu, (memory.span(), &measures), questions.span(), (1, 0)).unwrap();
            let got = draws.answers(&gpu, 1).unwrap().next().unwrap();
            let wanted = sampler.sample(&mut row.clone(), &params, &[], 0, position).unwrap();
            let context = format!("{question:?} of {vocab}");
            assert_eq!(TokenId(got.token), wanted.token.id, "{context}");
            assert_eq!(got.logit, row[got.token as usize], "{context}");
        }
    }
}
