//! A stage and the steps that it is driven with: what the engine loop would plan for some streams,
//! without the engine.

use super::arguments::Test;
use super::device::DeviceStage;
use super::record::OpSplit;
use anyhow::{Result, bail};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem::config::Config;
use tandem::executor::KvOptions;
use tandem::hardware::HardwareProfile;
use tandem::model::ModelSpec;
use tandem::placement::{Device, Placement};
use tandem::request::{RequestError, SamplingParams};
use tandem::step::{BlockCopy, LogitsRow, LogitsTask, PlannedSequence, StepOutput, StepPlan, Tier};
use tandem::tensor::KvDType;
use tandem::units::{BlockId, ByteSize, SequenceId, TokenId};

/// How large a rig is.
#[derive(Clone, Copy, Debug)]
pub struct RigSize {
    /// Tokens of a KV block.
    pub block_tokens: usize,
    /// How keys and values are kept.
    pub kv_dtype: KvDType,
    /// Blocks of each stream.
    pub stream_blocks: usize,
    /// Streams.
    pub streams: usize,
    /// Tokens of the widest step.
    pub step_tokens_max: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
}

impl RigSize {
    /// Refuses what does not fit, before anything is loaded; says how it is placed.
    pub fn place(
        &mut self,
        spec: &ModelSpec,
        hardware: &HardwareProfile,
        config: &Config,
    ) -> Result<Placement> {
        let blocks = self.kv().device_blocks;
        let block_bytes = spec.kv_bytes_per_token(self.kv_dtype) * self.block_tokens as u64;
        let mut config = config.clone();
        config.model.context_tokens = self.stream_blocks * self.block_tokens;
        config.kv.cache_bytes = ByteSize(blocks as u64 * block_bytes);
        let placement = Placement::plan(spec, hardware, &config)?;
        if placement.kv_dtype != self.kv_dtype {
            self.kv_dtype = placement.kv_dtype;
            return self.place(spec, hardware, &config);
        }
        if placement.device_blocks < blocks {
            let free = placement.device_blocks as u64 * block_bytes;
            let suggest = "use fewer streams, or less depth".to_owned();
            let need = config.kv.cache_bytes.0;
            let device = match placement.device() {
                Device::Cpu => "host memory".to_owned(),
                gpu => gpu.to_string(),
            };
            return Err(RequestError::InsufficientMemory { device, need, free, suggest }.into());
        }
        Ok(placement)
    }

    /// The KV store of all streams.
    pub fn kv(&self) -> KvOptions {
        let device_blocks = self.streams * self.stream_blocks;
        let (block_tokens, dtype) = (self.block_tokens, self.kv_dtype);
        KvOptions { block_tokens, dtype, device_blocks }
    }
}

/// A stage under test.
pub struct Rig {
    stage: DeviceStage,
    size: RigSize,
    plan: StepPlan,
    output: StepOutput,
    greedy: Arc<SamplingParams>,
    /// Per stream: its last token.
    last: Vec<TokenId>,
    /// Per stream: positions whose keys and values have been computed at some time.
    filled: Vec<usize>,
}

/// Some tokens of one stream.
struct Piece {
    stream: usize,
    position: usize,
    tokens: usize,
    /// Whether the token after them is wanted.
    samples: Samples,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Samples {
    Nothing,
    Next,
}

impl Rig {
    /// A rig on a stage whose KV store has `streams · stream_blocks` blocks.
    pub fn new(stage: DeviceStage, size: RigSize) -> Self {
        Self {
            stage,
            size,
            plan: StepPlan::default(),
            output: StepOutput::default(),
            greedy: Arc::new(SamplingParams::greedy()),
            last: vec![TokenId(0); size.streams],
            filled: vec![0; size.streams],
        }
    }

    /// Workers that the system did not let be pinned, after a first step.
    pub fn pin_failures(&self) -> usize {
        self.stage.pin_failures()
    }

    /// Runs a test once and says how long it took, the depth not counted.
    ///
    /// # Errors
    /// The executor fails, or logits are not finite.
    pub fn once(&mut self, test: &Test) -> Result<Duration> {
        self.fill(test)?;
        let started = Instant::now();
        self.prompt(test)?;
        for step in 0..test.generated {
            let position = test.depth + test.prompt + step;
            self.plan.clear();
            for stream in 0..test.streams {
                let piece = Piece { stream, position, tokens: 1, samples: Samples::Next };
                self.add(&piece);
            }
            self.step()?;
        }
        let took = started.elapsed();
        for filled in &mut self.filled[..test.streams] {
            *filled = (*filled).max(test.length());
        }
        Ok(took)
    }

    /// As [`Rig::once`], and says where the time went.
    ///
    /// # Errors
    /// As [`Rig::once`].
    pub fn once_by_op(&mut self, test: &Test) -> Result<OpSplit> {
        self.fill(test)?;
        let first = self.plan.step.0;
        self.stage.start_op_times()?;
        self.once(test)?;
        let times = self.stage.take_op_times();
        Ok(OpSplit { steps: self.plan.step.0 - first, times })
    }

    /// Gives every stream keys and values at all positions of the test's depth. Which, does not
    /// change how long attention takes, so older ones stay and streams copy those of the first.
    fn fill(&mut self, test: &Test) -> Result<()> {
        while self.filled[0] < test.depth {
            let position = self.filled[0];
            let tokens = (test.depth - position).min(self.size.step_tokens_max);
            self.plan.clear();
            self.add(&Piece { stream: 0, position, tokens, samples: Samples::Nothing });
            self.step()?;
            self.filled[0] += tokens;
        }
        self.plan.clear();
        for stream in 1..test.streams {
            let blocks = self.filled[stream] / self.size.block_tokens
                ..test.depth.div_ceil(self.size.block_tokens);
            let copies = blocks.map(|block| BlockCopy {
                from: (Tier::Device, self.block(0, block)),
                to: (Tier::Device, self.block(stream, block)),
            });
            let copies: Vec<_> = copies.collect();
            self.plan.copies.extend(copies);
            self.filled[stream] = self.filled[stream].max(test.depth);
        }
        if self.plan.copies.is_empty() { Ok(()) } else { self.step() }
    }

    /// All prompts, one after the other, in steps as wide as they may be.
    fn prompt(&mut self, test: &Test) -> Result<()> {
        self.plan.clear();
        for stream in 0..test.streams {
            let mut done = 0;
            while done < test.prompt {
                let room = self.size.step_tokens_max - self.plan.tokens.len();
                let tokens = room.min(test.prompt - done);
                let ends = done + tokens == test.prompt;
                let samples = if ends { Samples::Next } else { Samples::Nothing };
                self.add(&Piece { stream, position: test.depth + done, tokens, samples });
                done += tokens;
                if self.plan.tokens.len() == self.size.step_tokens_max {
                    self.step()?;
                    self.plan.clear();
                }
            }
        }
        if self.plan.tokens.is_empty() { Ok(()) } else { self.step() }
    }

    fn block(&self, stream: usize, block: usize) -> BlockId {
        BlockId((stream * self.size.stream_blocks + block) as u32)
    }

    /// Plans tokens of a stream: its last one if it is one, else those of a made-up text.
    fn add(&mut self, piece: &Piece) {
        let Piece { stream, position, tokens, samples } = *piece;
        let (first, table) = (self.plan.tokens.len(), self.plan.block_tables.len());
        if tokens == 1 {
            self.plan.tokens.push(self.last[stream]);
        } else {
            let text = position..position + tokens;
            let vocab = self.size.vocab;
            self.plan.tokens.extend(text.map(|position| made_up(stream, position, vocab)));
        }
        let blocks = 0..(position + tokens).div_ceil(self.size.block_tokens);
        let blocks: Vec<_> = blocks.map(|block| self.block(stream, block)).collect();
        self.plan.block_tables.extend(blocks);
        let sequence = SequenceId(stream as u64);
        self.plan.sequences.push(PlannedSequence {
            id: sequence,
            tokens: first..self.plan.tokens.len(),
            position_start: position,
            block_table: table..self.plan.block_tables.len(),
        });
        if samples == Samples::Next {
            let params = Arc::clone(&self.greedy);
            self.plan.logits.push(LogitsRow {
                sequence,
                row: self.plan.tokens.len() - 1,
                position: position + tokens,
                task: LogitsTask::Sample { params, history: 0..0, prompt_tokens: 0 },
            });
        }
    }

    fn step(&mut self) -> Result<()> {
        self.plan.step.0 += 1;
        self.stage.run(&self.plan, &mut self.output)?;
        if let Some(refusal) = self.output.refusal.take() {
            return Err(refusal.into());
        }
        if let Some(failure) = self.output.failures.first() {
            let (stream, position) = (failure.sequence.0, failure.position);
            bail!("the logits of stream {stream} at position {position} are not finite");
        }
        for row in &self.output.rows {
            self.last[row.sequence.0 as usize] = row.token.id;
        }
        Ok(())
    }
}

/// A text without repetitions that a cache could learn: Knuth's multiplicative hash.
pub fn made_up(stream: usize, position: usize, vocab: usize) -> TokenId {
    let hash = (stream * 7919 + position + 1).wrapping_mul(2_654_435_761) >> 8;
    TokenId((hash % vocab) as u32)
}
