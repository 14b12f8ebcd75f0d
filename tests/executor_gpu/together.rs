//! Models that share a GPU in one process, each on a thread of its own: what one waits for inside
//! of its steps another must not keep from it.

use super::spilled::{layers, spilling};
use super::stage::{Model, options, plan_tokens, score_next};
use super::tiny_model::{Family, TinyModel};
use super::{Bits, TOP, bits, load_now, random_tokens, step};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;
use tandem::executor::{GpuStage, StageOptions};
use tandem::step::StepPlan;
use tandem::tensor::DType;

/// How long all of it may take. A wait that never ends is not the GPU's, and no limit of its own
/// ends it.
const ALL: Duration = Duration::from_secs(60);
/// How often a model is loaded beside others that run.
const LOADS: usize = 5;

/// A model and what it answers when nobody else is there.
#[derive(Clone)]
struct Alone {
    model: Model,
    options: StageOptions,
    answers: Vec<Vec<Bits>>,
}

impl Alone {
    fn new(model: &TinyModel, options: impl FnOnce(&Model) -> StageOptions) -> Option<Self> {
        let model = Model::from_bytes(&model.gguf().bytes());
        let options = options(&model);
        let mut alone = Self { model, options, answers: Vec::new() };
        alone.answers = alone.answers_of(&mut alone.stage()?);
        Some(alone)
    }

    fn stage(&self) -> Option<GpuStage> {
        let weights = load_now(&self.model, &self.options)?;
        Some(GpuStage::start(Arc::new(weights), &self.options).unwrap())
    }

    /// A prompt, and steps of few tokens, of which shapes come again and are recorded.
    fn answers_of(&self, stage: &mut GpuStage) -> Vec<Vec<Bits>> {
        let tokens = random_tokens(&mut 9, 420, self.model.spec.vocab_size);
        let singles = (400..420).map(|start| start..start + 1);
        let ranges = [0..300, 300..320, 320..400].into_iter().chain(singles);
        let answers = ranges.map(|range| {
            let mut plan = StepPlan::default();
            plan_tokens(&mut plan, (0, 0), &tokens, range, score_next(&tokens, TOP));
            bits(&step(stage, &plan))
        });
        answers.collect()
    }

    /// Runs the same once more.
    fn again(&self, stage: &mut GpuStage) {
        assert!(self.answers_of(stage) == self.answers, "{}", self.model.spec.name);
    }
}

/// What one thread does until it says so.
fn side_by_side(done: &Sender<()>, work: impl FnOnce() + Send + 'static) {
    let done = done.clone();
    thread::spawn(move || {
        work();
        let _ = done.send(());
    });
}

#[test]
fn models_of_one_process_run_and_are_loaded_beside_each_other() {
    super::turn::take_turn();
    let tiny = |family| TinyModel { layers: 4, ..TinyModel::new(family).dtype(DType::Q4_0) };
    let all = [0, 1, 2, 3];
    let spilled = |streamed| move |model: &Model| spilling(model, layers(&all, &all), streamed);
    let Some(streaming) = Alone::new(&tiny(Family::Llama), spilled(100)) else { return };
    let shared = Alone::new(&tiny(Family::Qwen2), spilled(50)).unwrap();
    let resident = Alone::new(&tiny(Family::Qwen3), |_| options(2, 512)).unwrap();
    let ((done, is_done), loading) = (channel(), Arc::new(AtomicUsize::new(2)));
    for loaded in [shared.clone(), resident.clone()] {
        let loading = Arc::clone(&loading);
        side_by_side(&done, move || {
            for _ in 0..LOADS {
                let mut stage = loaded.stage().unwrap();
                (0..2).for_each(|_| loaded.again(&mut stage));
            }
            loading.fetch_sub(1, Ordering::SeqCst);
        });
    }
    for running in [streaming, shared, resident] {
        let loading = Arc::clone(&loading);
        side_by_side(&done, move || {
            let mut stage = running.stage().unwrap();
            while loading.load(Ordering::SeqCst) > 0 {
                running.again(&mut stage);
            }
        });
    }
    drop(done);
    for thread in 0..5 {
        let ended = is_done.recv_timeout(ALL);
        assert!(ended.is_ok(), "{thread} of 5 threads came to their end: {ended:?}");
    }
}
