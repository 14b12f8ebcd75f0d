//! A stage without a model: the next token is a hash of the tokens so far, which it keeps in KV
//! blocks as a real stage keeps keys and values. A plan that relies on a block that was never
//! written, or was lost with an earlier stage, panics.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use tandem::actors::{
    BlockMover, FaultPoint, Faults, StageFactory, StageFault, StepRunner, TierSource,
};
use tandem::request::RequestError;
use tandem::step::{
    BlockCopy, CopyOutcome, CopyResult, LogitsTask, PlannedSequence, RowOutput, StepOutput,
    StepPlan, Tier, TokenLogprob,
};
use tandem::units::{BlockId, TokenId};

/// The tiny tokenizer's ids of printable ASCII, whose texts are themselves.
const FIRST_PRINTABLE: u64 = 33;
const PRINTABLE: u64 = 94;

/// The token that follows `tokens`: FNV-1a over the ids.
pub fn next_token(tokens: &[TokenId]) -> TokenId {
    let hash = tokens.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, token| {
        (hash ^ u64::from(token.0)).wrapping_mul(0x0100_0000_01b3)
    });
    TokenId((FIRST_PRINTABLE + (hash >> 17) % PRINTABLE) as u32)
}

/// The `count` tokens that follow a prompt.
pub fn continuation(prompt: &[TokenId], count: usize) -> Vec<TokenId> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(next_token(&tokens));
    }
    tokens.split_off(prompt.len())
}

/// Lets steps through, as many as it was given.
#[derive(Default)]
pub struct Gate {
    /// `None` is open.
    steps: Mutex<Option<u64>>,
    changed: Condvar,
    waits: AtomicU64,
}

impl Gate {
    pub fn close(&self) {
        *self.steps.lock().unwrap() = Some(0);
    }

    pub fn open(&self) {
        *self.steps.lock().unwrap() = None;
        self.changed.notify_all();
    }

    pub fn let_through(&self, count: u64) {
        if let Some(steps) = self.steps.lock().unwrap().as_mut() {
            *steps += count;
        }
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut steps = self.steps.lock().unwrap();
        while *steps == Some(0) {
            self.waits.fetch_add(1, Ordering::SeqCst);
            steps = self.changed.wait(steps).unwrap();
        }
        if let Some(left) = steps.as_mut() {
            *left -= 1;
        }
    }
}

/// Makes [`HashStage`]s.
#[derive(Default)]
pub struct HashStages {
    pub gate: Gate,
    /// Stages that start before others are refused; 0 means that none is.
    pub starts_max: usize,
    pub starts: AtomicUsize,
    pub faults: Arc<Faults>,
    pub block_tokens: usize,
    pub steps: AtomicU64,
    /// Blocks copied from the device to a lower tier, from a lower tier to the device, and to disk.
    pub copies: [AtomicU64; 3],
    /// How long each copy takes.
    pub copy_time: Mutex<Duration>,
    /// Every so manieth copy fails; 0 means that none does.
    pub copies_failing: AtomicU64,
    /// Pieces of the lower tiers that are still to be made ready ahead.
    pub to_prepare: AtomicU64,
    /// Copies that the disk has room for; 0 means that it never stops.
    pub disk_writes_max: AtomicU64,
    /// What the next start fails with.
    pub start_fault: Mutex<Option<StageFault>>,
    /// What the next step fails with.
    pub fault: Mutex<Option<StageFault>>,
    /// What the next step is refused with.
    pub refusal: Mutex<Option<RequestError>>,
}

/// What the tests' engine runs on; the factory is shared with the test.
pub struct SharedStages(pub Arc<HashStages>);

impl StageFactory for SharedStages {
    fn start(&self) -> Result<Box<dyn StepRunner>, StageFault> {
        let started = self.0.starts.fetch_add(1, Ordering::SeqCst);
        if self.0.starts_max > 0 && started >= self.0.starts_max {
            // Long enough for requests to arrive meanwhile.
            std::thread::sleep(std::time::Duration::from_millis(20));
            return Err("no memory for another stage".into());
        }
        if let Some(fault) = self.0.start_fault.lock().unwrap().take() {
            return Err(fault);
        }
        Ok(Box::new(HashStage { stages: Arc::clone(&self.0), store: Arc::default() }))
    }
}

/// `[block_tokens]` tokens of each block that was written.
type Blocks = HashMap<(Tier, BlockId), Vec<Option<TokenId>>>;

struct HashStage {
    stages: Arc<HashStages>,
    store: Arc<Mutex<Blocks>>,
}

/// The tiers behind a stage.
#[derive(Clone)]
struct HashTiers {
    stages: Arc<HashStages>,
    store: Arc<Mutex<Blocks>>,
}

impl TierSource for HashTiers {
    fn tiers(&self) -> Result<Box<dyn BlockMover>, StageFault> {
        self.store.lock().unwrap().retain(|(tier, _), _| *tier == Tier::Device);
        Ok(Box::new(self.clone()))
    }
}

impl HashTiers {
    fn copy(&self, copy: BlockCopy) -> CopyOutcome {
        let stages = &self.stages;
        std::thread::sleep(*stages.copy_time.lock().unwrap());
        let way = match (copy.from.0, copy.to.0) {
            (Tier::Device, _) => 0,
            (_, Tier::Device) => 1,
            _ => 2,
        };
        let count: u64 = stages.copies.iter().map(|way| way.load(Ordering::SeqCst)).sum();
        stages.copies[way].fetch_add(1, Ordering::SeqCst);
        let failing = stages.copies_failing.load(Ordering::SeqCst);
        let fails = failing > 0 && count % failing == failing - 1;
        let mut blocks = self.store.lock().unwrap();
        if fails || (copy.to.0 == Tier::Disk && self.disk_is_full(&blocks)) {
            blocks.remove(&copy.to);
            return CopyOutcome::Failed;
        }
        let bytes = blocks.get(&copy.from).cloned().expect("a copy of nothing");
        blocks.insert(copy.to, bytes);
        CopyOutcome::Done
    }

    fn disk_is_full(&self, blocks: &Blocks) -> bool {
        let most = self.stages.disk_writes_max.load(Ordering::SeqCst) as usize;
        most > 0 && blocks.keys().filter(|(tier, _)| *tier == Tier::Disk).count() >= most
    }
}

impl BlockMover for HashTiers {
    fn perform(&mut self, orders: &[BlockCopy], results: &mut Vec<CopyResult>) {
        results.extend(
            orders.iter().map(|copy| CopyResult { copy: *copy, outcome: self.copy(*copy) }),
        );
    }

    fn disk_stopped(&self) -> bool {
        self.disk_is_full(&self.store.lock().unwrap())
    }

    fn prepare_ahead(&mut self) -> bool {
        let left = &self.stages.to_prepare;
        left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
    }
}

impl HashStage {
    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.store.lock().unwrap()
    }

    fn write(&self, plan: &StepPlan, planned: &PlannedSequence) {
        let size = self.stages.block_tokens;
        let table = &plan.block_tables[planned.block_table.clone()];
        for (offset, token) in plan.tokens[planned.tokens.clone()].iter().enumerate() {
            let position = planned.position_start + offset;
            let block = (Tier::Device, table[position / size]);
            self.blocks().entry(block).or_insert_with(|| vec![None; size])[position % size] =
                Some(*token);
        }
    }

    /// The tokens of positions `0 ..= position`.
    fn read(&self, plan: &StepPlan, planned: &PlannedSequence, position: usize) -> Vec<TokenId> {
        let size = self.stages.block_tokens;
        let table = &plan.block_tables[planned.block_table.clone()];
        let blocks = self.blocks();
        let at = |position: usize| {
            let block = blocks.get(&(Tier::Device, table[position / size]));
            block.and_then(|tokens| tokens[position % size])
        };
        (0..=position)
            .map(|position| at(position).unwrap_or_else(|| panic!("no KV at {position}")))
            .collect()
    }
}

impl StepRunner for HashStage {
    fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), StageFault> {
        self.stages.gate.pass();
        self.stages.steps.fetch_add(1, Ordering::SeqCst);
        if let Some(fault) = self.stages.fault.lock().unwrap().take() {
            return Err(fault);
        }
        output.step = plan.step;
        output.refusal = self.stages.refusal.lock().unwrap().take();
        if output.refusal.is_some() {
            return Ok(());
        }
        for planned in &plan.sequences {
            self.write(plan, planned);
        }
        for (number, row) in plan.logits.iter().enumerate() {
            if number == plan.logits.len() / 2 {
                self.stages.faults.pass(FaultPoint::ExecutorInRun);
            }
            let planned = plan.sequences.iter().find(|planned| planned.id == row.sequence);
            let planned = planned.ok_or("a row of nobody")?;
            let position = planned.position_start + row.row - planned.tokens.start;
            let so_far = self.read(plan, planned, position);
            let (id, top) = match &row.task {
                LogitsTask::Sample { params, .. } => (next_token(&so_far), params.top_logprobs),
                LogitsTask::Score { target, top_logprobs } => (*target, *top_logprobs),
            };
            let token = TokenLogprob { id, logprob: -0.5 };
            output.rows.push(RowOutput {
                sequence: row.sequence,
                position: row.position,
                token,
                top: vec![token; top],
            });
        }
        Ok(())
    }

    fn tiers(&self) -> Arc<dyn TierSource> {
        Arc::new(HashTiers { stages: Arc::clone(&self.stages), store: Arc::clone(&self.store) })
    }
}
