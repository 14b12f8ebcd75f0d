//! What tests of the executor share: models that may be absent, stages, and plans built by hand.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tandem::executor::{KvOptions, PoolOptions, Stage, StageOptions, StagePart, StepPasses};
use tandem::formats::Checkpoint;
use tandem::model::ModelSpec;
use tandem::step::{LogitsRow, LogitsTask, PlannedSequence, StepOutput, StepPlan};
use tandem::tensor::KvDType;
use tandem::units::{BlockId, SequenceId, StepId, TokenId};
use tandem_cpu_kernels::Isa;

/// Tokens of a KV block in these tests.
pub const BLOCK_TOKENS: usize = 32;

/// The path of a fetched model. Absent: the test is skipped, unless models are required.
pub fn model_path(file: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".cache/models").join(file);
    if path.exists() {
        return Some(path);
    }
    let required = std::env::var_os("TANDEM_REQUIRE_MODELS").is_some() && file.contains("SmolLM2");
    assert!(!required, "{} is required and absent", path.display());
    eprintln!("skipped: {} is absent", path.display());
    None
}

/// A checkpoint and what it means.
#[derive(Clone)]
pub struct Model {
    pub checkpoint: Arc<Checkpoint>,
    pub spec: Arc<ModelSpec>,
}

impl Model {
    pub fn open(checkpoint: Checkpoint) -> Self {
        let spec = ModelSpec::from_checkpoint(&checkpoint).expect("a model");
        Self { checkpoint: Arc::new(checkpoint), spec: Arc::new(spec) }
    }

    /// A model file that lies in memory.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let checkpoint = Checkpoint::from_bytes(Path::new("tiny.gguf"), bytes);
        Self::open(checkpoint.expect("a checkpoint"))
    }

    /// A fetched model, if it is here.
    pub fn fetched(file: &str) -> Option<Self> {
        let checkpoint = Checkpoint::open(&model_path(file)?).expect("a checkpoint");
        Some(Self::open(checkpoint))
    }

    /// A stage of all layers.
    pub fn stage(&self, options: &StageOptions) -> Stage {
        Stage::load(self.checkpoint.clone(), self.spec.clone(), options, &mut |_| {})
            .expect("a stage")
    }
}

/// The instruction set that `TANDEM_TEST_ISA` names; without it the best one.
fn isa() -> Option<Isa> {
    std::env::var("TANDEM_TEST_ISA").ok().map(|name| name.parse().expect("an instruction set"))
}

/// Options for a whole model on so many threads, with room for `context_tokens`.
pub fn options(threads: usize, context_tokens: usize) -> StageOptions {
    let device_blocks = context_tokens.div_ceil(BLOCK_TOKENS);
    StageOptions {
        part: None::<StagePart>,
        pool: PoolOptions { threads, cores: Vec::new(), nodes: Default::default(), spin_us: 50 },
        isa: isa(),
        huge_pages: false,
        kv: KvOptions { block_tokens: BLOCK_TOKENS, dtype: KvDType::F16, device_blocks },
        step_tokens_max: 512,
        passes: StepPasses::ByCost,
        spill_streamed: None,
    }
}

/// Appends tokens `range` of a sequence to a plan; its KV blocks are `first_block ..`. Logits are
/// wanted of those rows whose next token `task` gives something for.
pub fn plan_tokens(
    plan: &mut StepPlan,
    (id, first_block): (u64, u32),
    tokens: &[TokenId],
    range: Range<usize>,
    task: impl Fn(usize) -> Option<LogitsTask>,
) {
    let (first, table) = (plan.tokens.len(), plan.block_tables.len());
    plan.tokens.extend_from_slice(&tokens[range.clone()]);
    let blocks = range.end.div_ceil(BLOCK_TOKENS) as u32;
    plan.block_tables.extend((first_block..first_block + blocks).map(BlockId));
    plan.sequences.push(PlannedSequence {
        id: SequenceId(id),
        tokens: first..plan.tokens.len(),
        position_start: range.start,
        block_table: table..plan.block_tables.len(),
    });
    for position in range.clone() {
        if let Some(task) = task(position) {
            plan.logits.push(LogitsRow {
                sequence: SequenceId(id),
                row: first + position - range.start,
                position: position + 1,
                task,
            });
        }
    }
    plan.step = StepId(plan.step.0 + 1);
}

/// The task of scoring the token that follows position `position`, if there is one.
pub fn score_next(
    tokens: &[TokenId],
    top_logprobs: usize,
) -> impl Fn(usize) -> Option<LogitsTask> + '_ {
    move |position| {
        let target = *tokens.get(position + 1)?;
        Some(LogitsTask::Score { target, top_logprobs })
    }
}

/// Runs a plan on a stage.
pub fn run(stage: &mut Stage, plan: &StepPlan) -> StepOutput {
    let mut output = StepOutput::default();
    stage.run(plan, &mut output).expect("a step");
    assert!(output.failures.is_empty(), "{:?}", output.failures);
    output
}
