//! The CPU interpreter: one match arm per op. Every worker of the pool walks the whole program,
//! does its share of each op and meets the others at a barrier when they are to read what it wrote.
//!
//! What is shared how (the rule of `buffers.rs`), and where the workers meet:
//!
//! | op | work of a worker | reads what others wrote before the last barrier | meets after |
//! |---|---|---|---|
//! | Embed, Receive | tokens; *all* | | if wide |
//! | Norm | tokens; *all* | projected | if wide |
//! | Project | rows of the matrices | the input | always |
//! | Rotate | runs of tokens inside one KV block | heads | if not left to Attend |
//! | Attend | (query tile, KV head) or segments of it, by cost | heads, KV store | always |
//! | Gate | hidden rows, whole 8-bit groups | normed | always |
//! | Route | experts, then tokens; *all* | normed, router logits | inside; if wide |
//! | GateExperts | (expert, hidden rows), by cost | normed, routes | always |
//! | DownExperts | rows of the residual stream | hidden, routes | always |
//! | Select | wanted rows; *all* | residual, projected | if wide |
//! | Logits | vocabulary rows, then wanted rows | selected, logits | inside |
//! | Send | tokens | projected | |
//! | SpillStart | tokens; *all* of normed | | if wide, or attended |
//! | SpillEnd | worker 0 says that the products are there | | |
//!
//! Rows of matrices are shared out by NUMA node: a worker begins with some that lie on its own.
//!
//! Nobody waits after the last op: the pool's job ends there. In a narrow step (`passes.rs`) every
//! worker does the *all* for itself: residual, normed, routes and selected are then in its own
//! memory (`own_buffers.rs`), the same bits in each, and it reads them at once. Where sequences
//! are short, Attend does what Rotate does (`cpu/rotate.rs`). What is left between the barriers
//! of a dense layer; of what is written, each worker has its part, which no other reads:
//!
//! | ops | written | read by all |
//! |---|---|---|
//! | Norm, Project; angles in the first layer | heads | projected |
//! | Rotate and Attend | attended, KV store, partials | heads, angles |
//! | Project | projected | attended |
//! | Norm, Gate | hidden, up | projected |
//! | Project | projected | hidden |
//!
//! These five are the fewest: each product, and attention, has all of an input of which every
//! worker has made a part. One more barrier is taken where tokens are routed, where an attention
//! is divided (before its segments are merged), and where heads are no whole 8-bit groups; per
//! step one after each product of a tile of logits, and one between tiles.
//!
//! No result depends on who does what: each element is computed in one fixed order, by one worker
//! or by each for itself.

mod attend;
mod experts;
mod products;
mod rotate;
mod spilled;
mod stream;

use super::batch::Batch;
use super::buffers::{Rows, StepBuffers};
use super::cpu_pool::Worker;
use super::expert_groups::ExpertScratch;
use super::kv_store::KvLayers;
use super::op_times::OpClocks;
use super::own_buffers::OwnBuffers;
use super::program::{Buffer, Op, Program};
use super::rotations::Rotations;
use super::sample::RowSamplers;
use super::spill::SpillStep;
use super::weights::Weights;
use crate::step::StepPlan;
use rotate::Rotation;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use tandem_cpu_kernels::Kernels;
use tandem_cpu_kernels::attention::{AttentionParams, AttentionScratch};

/// Everything that the workers of one step share; each works on a copy in which some of the buffers
/// are its own.
#[derive(Clone, Copy)]
pub(super) struct Step<'a> {
    pub program: &'a Program,
    pub weights: &'a Weights,
    pub kernels: &'static Kernels,
    pub plan: &'a StepPlan,
    pub batch: &'a Batch,
    pub buffers: StepBuffers<'a>,
    pub rotations: &'a Rotations,
    /// `[n_tokens, rotations.width()]`
    pub angles: Rows<'a>,
    pub kv: KvLayers<'a>,
    /// `[n_tokens, embedding_dim]` from the stage before.
    pub inlet: Option<&'a [f32]>,
    /// `[n_tokens, embedding_dim]` for the next stage.
    pub outlet: Option<Rows<'a>>,
    /// What a GPU has spilled to this stage.
    pub spill: Option<SpillStep<'a>>,
    /// Whether those who attend to a tile rotate its heads themselves.
    pub attention_rotates: bool,
    /// One per worker.
    pub own: &'a [Mutex<OwnBuffers>],
    /// One per worker.
    pub scratch: &'a [Mutex<AttentionScratch>],
    /// `[1, partials_max]`: unmerged segments of divided attentions.
    pub partials: Rows<'a>,
    /// One per worker; none when layers are dense.
    pub experts: &'a [Mutex<ExpertScratch>],
    pub samplers: &'a RowSamplers,
    /// Given while somebody wants to know each op's time.
    pub clocks: Option<&'a OpClocks>,
    /// How often the workers have met; worker 0 counts.
    pub barriers: &'a AtomicU64,
}

impl Step<'_> {
    /// Runs the program as one of the workers.
    pub fn execute(&self, worker: &Worker<'_>) {
        let mut own = self.own[worker.index].lock().unwrap_or_else(PoisonError::into_inner);
        let step: Step<'_> = *self;
        Step { buffers: own.views(step.buffers), ..step }.walk(worker);
    }

    fn walk(&self, worker: &Worker<'_>) {
        let mut is_elsewhere = false;
        for (index, op) in self.program.ops.iter().enumerate() {
            if let Op::SpillStart { unit, .. } = op {
                is_elsewhere = !self.spill.is_some_and(|spill| spill.computes(*unit));
            }
            if is_elsewhere {
                continue;
            }
            let started = self.clocks.map(|_| Instant::now());
            self.interpret(worker, index);
            let is_last = index + 1 == self.program.ops.len();
            if if is_last { self.clocks.is_some() } else { self.is_read_by_others(op) } {
                self.meet(worker);
            }
            if let (Some(clocks), Some(started)) = (self.clocks, started) {
                clocks.ended(worker.index, index, started.elapsed());
            }
        }
    }

    /// Whether workers read what others write in `op`.
    fn is_read_by_others(&self, op: &Op) -> bool {
        match op {
            Op::SpillStart { input: Buffer::Attended, .. } => true,
            Op::Embed { .. }
            | Op::Receive
            | Op::SpillStart { .. }
            | Op::Norm { .. }
            | Op::Route { .. }
            | Op::Select { .. } => !self.buffers.has_own_rows,
            Op::Rotate { .. } => !self.attention_rotates,
            Op::SpillEnd { .. } => false,
            _ => true,
        }
    }

    /// Waits for all workers.
    fn meet(&self, worker: &Worker<'_>) {
        if worker.index == 0 {
            // There is one writer, so nothing is lost between the load and the store.
            self.barriers.store(self.barriers.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        match self.clocks {
            None => worker.meet(),
            Some(clocks) => clocks.wait(worker.index, || worker.meet()),
        }
    }

    fn interpret(&self, worker: &Worker<'_>, index: usize) {
        match &self.program.ops[index] {
            Op::Embed { table, scale } => {
                self.enter(worker, |token, row| {
                    self.weights.copy_row(*table, self.plan.tokens[token].index(), row);
                    if *scale != 1.0 {
                        self.kernels.scale(row, *scale);
                    }
                });
            }
            Op::Receive => {
                let inlet = self.inlet.expect("a stage that receives was given a slot");
                self.enter(worker, |token, row| {
                    row.copy_from_slice(&inlet[token * row.len()..][..row.len()]);
                });
            }
            Op::Norm { pending, norm, precision } => {
                self.norm(worker, *pending, (*norm, *precision));
            }
            Op::Project { input, output, parts, precision } => {
                self.project(worker, (*input, *output), parts, *precision);
            }
            op @ Op::Rotate { .. } => {
                let rotation = Rotation::of(op).filter(|_| !self.attention_rotates);
                rotation.into_iter().for_each(|rotation| self.rotate(worker, rotation));
            }
            Op::Attend { shape, layer, window, scale, softcap } => {
                let n_heads = shape.n_heads;
                let params =
                    AttentionParams { n_heads, scale: *scale, window: *window, softcap: *softcap };
                let before = &self.program.ops[index - 1];
                let rotation = Rotation::of(before).filter(|_| self.attention_rotates);
                self.attend(worker, (*shape, *layer), params, rotation);
            }
            Op::Gate { gate, up, activation } => self.gate(worker, [*gate, *up], *activation),
            Op::Route { shape, router, weight_scale } => {
                self.route(worker, *shape, (*router, *weight_scale));
            }
            Op::GateExperts { shape, gate, up, activation } => {
                self.gate_experts(worker, *shape, [*gate, *up], *activation);
            }
            Op::DownExperts { shape, down } => self.down_experts(worker, *shape, *down),
            Op::SpillStart { unit, input, precision } => {
                self.take_spilled(worker, *unit, (*input, *precision));
            }
            Op::SpillEnd { unit, .. } => self.give_spilled(worker, *unit),
            Op::Send { pending } => self.send(worker, *pending),
            Op::Select { pending, norm } => self.select(worker, *pending, *norm),
            Op::Logits { output, softcap } => self.logits(worker, *output, *softcap),
        }
    }
}

/// All of row `row`, for writing.
///
/// # Safety
/// As [`Rows::part_mut`].
unsafe fn whole_row_mut<'a>(rows: Rows<'a>, row: usize) -> &'a mut [f32] {
    // SAFETY: passed on.
    unsafe { rows.part_mut(row, 0..rows.width) }
}
