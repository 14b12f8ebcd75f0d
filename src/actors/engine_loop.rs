//! The thread that turns the scheduler's crank: take commands, plan a step, hand it to the
//! executor, tell the streams about the step before while this one runs, apply what comes back.
//! Copies between KV tiers go to the swap thread and run beside the steps. It never waits for a
//! stream and never for anything but commands, the executor and, without a step, those copies.

use super::FaultPoint;
use super::executor::{Order, StepResult};
use super::lanes::{Command, Submission};
use super::links::{Delivery, Links};
use super::shared::{Occupancy, Shared};
use super::stream::StreamMessage;
use super::swap_lane::{SwapDesk, SwapResult};
use super::threads::{StopSignal, is_stopped};
use crate::hardware::pin_current_thread;
use crate::scheduler::{Scheduler, SchedulerStats, SequenceEvent, SequenceEventKind};
use crate::step::{StepOutput, StepPlan};
use crate::telemetry::StepTrace;
use crate::units::SequenceId;
use crossbeam_channel::select_biased;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// How often a loop that has sequences and nothing to compute looks at the clock: the resolution
/// of the deadlines of paused and waiting sequences.
const IDLE_TICK: Duration = Duration::from_millis(20);
/// The same without any sequence: only commands can change anything.
const EMPTY_TICK: Duration = Duration::from_secs(5);
/// Commands taken between two steps; the rest waits for the next.
const COMMANDS_PER_STEP_MAX: usize = 256;

/// How waiting for a step ended.
enum Waited {
    Done,
    Lost,
    Stopped,
}

/// The loop's state. Nothing in it has to survive: the streams know how to go on.
pub(super) struct EngineLoop {
    shared: Arc<Shared>,
    stop: StopSignal,
    scheduler: Scheduler,
    links: Links,
    plan: Box<StepPlan>,
    output: Box<StepOutput>,
    /// Happened and not delivered.
    events: Vec<SequenceEvent>,
    /// Which stage's KV the scheduler speaks of.
    generation: u64,
    swaps: SwapDesk,
    /// The figures that were published last.
    published: SchedulerStats,
    /// Counts engine loops, so that a stream can tell two deaths from one.
    life: u64,
    last_run_end_us: Option<u64>,
}

impl EngineLoop {
    pub(super) fn new(shared: Arc<Shared>, stop: StopSignal) -> Result<Self, String> {
        let loaded = shared.loaded.get().ok_or("no model is loaded")?;
        if let Some(Err(error)) = loaded.placement.workers.engine_loop.map(pin_current_thread) {
            tracing::warn!(%error, "the engine loop runs unpinned");
        }
        let scheduler = Scheduler::new(loaded.scheduler_options(&shared.config)?);
        // Copies of an earlier loop must not meet blocks that this one gives away.
        shared.swaps.loop_starts();
        Ok(Self {
            swaps: SwapDesk::new(&shared.swaps, scheduler.copies_max()),
            scheduler,
            links: Links::default(),
            plan: Box::default(),
            output: Box::default(),
            events: Vec::new(),
            generation: shared.steps.generation(),
            published: SchedulerStats::default(),
            life: shared.next_loop_life(),
            last_run_end_us: None,
            shared,
            stop,
        })
    }

    pub(super) fn run(mut self) -> Result<(), String> {
        while !is_stopped(&self.stop) {
            self.take_commands();
            self.meet_the_stage();
            self.take_copies();
            if !self.step() {
                break;
            }
            self.publish();
        }
        // Nobody's sequence is to blame for an end that was asked for.
        self.links.unmark();
        Ok(())
    }

    /// One step, or a wait for something to do; whether to go on.
    fn step(&mut self) -> bool {
        let plan_start_us = self.shared.now_us();
        self.shared.faults.pass(FaultPoint::SchedulerBeforePlan);
        self.plan.clear();
        self.scheduler.plan_step(plan_start_us, &mut self.plan);
        self.scheduler.drain_events(&mut self.events);
        self.send_copies();
        self.links.mark(&self.plan);
        if self.plan.is_empty() {
            self.last_run_end_us = None;
            self.deliver();
            // Before the wait: what an idle engine holds is what its watchdog looks at.
            self.publish();
            return self.idle();
        }
        self.shared.faults.pass(FaultPoint::SchedulerBeforeDispatch);
        let mut trace = StepTrace {
            step: self.plan.step,
            plan_start_us,
            tokens: self.plan.tokens.len(),
            sequences: self.plan.sequences.len(),
            copies: self.scheduler.copies_under_way(),
            ..StepTrace::default()
        };
        trace.run_start_us = self.shared.now_us();
        let ticket = self.dispatch();
        self.deliver();
        match self.await_step(ticket) {
            Waited::Done => self.apply(trace),
            Waited::Lost => self.lose_the_stage(),
            Waited::Stopped => return false,
        }
        true
    }

    /// Hands the plan to the executor and announces the sequences that start with it.
    fn dispatch(&mut self) -> u64 {
        let ticket = self.shared.steps.next_ticket();
        let (plan, output) = (std::mem::take(&mut self.plan), std::mem::take(&mut self.output));
        let now_us = self.shared.now_us();
        if let Some(end_us) = self.last_run_end_us {
            self.shared.metrics.step_gap.record(now_us.saturating_sub(end_us));
        }
        for planned in plan.sequences.iter() {
            self.links.start(planned.id, now_us);
        }
        let order = Order { ticket, generation: self.generation, plan, output };
        // Orders that no stage took are lost steps or a dead loop's, and nobody waits for them.
        // Without them the lane has room: sending must not block, or nothing could stop this loop.
        while self.shared.steps.orders.1.try_recv().is_ok() {}
        if self.shared.steps.orders.0.send(order).is_err() {
            unreachable!("the step lane belongs to Shared, which this loop holds");
        }
        ticket
    }

    fn await_step(&mut self, ticket: u64) -> Waited {
        let shared = Arc::clone(&self.shared);
        loop {
            let result = select_biased! {
                recv(self.stop) -> _ => return Waited::Stopped,
                recv(shared.steps.results.1) -> result => result,
                recv(shared.swaps.results.1) -> result => {
                    result.into_iter().for_each(|result| self.take_copy(result));
                    continue;
                }
            };
            match result {
                Ok(StepResult::Done(order)) if order.ticket == ticket => {
                    (self.plan, self.output) = (order.plan, order.output);
                    return Waited::Done;
                }
                Ok(StepResult::Stale(order)) if order.ticket == ticket => {
                    self.scheduler.step_not_run();
                    return Waited::Lost;
                }
                Ok(StepResult::Lost) if self.shared.steps.generation() != self.generation => {
                    let mut untaken = self.shared.steps.orders.1.try_iter();
                    if untaken.any(|order| order.ticket == ticket) {
                        self.scheduler.step_not_run();
                    }
                    return Waited::Lost;
                }
                // What was meant for a dead loop, or is known already.
                Ok(_) => {}
                Err(_) => return Waited::Stopped,
            }
        }
    }

    fn apply(&mut self, mut trace: StepTrace) {
        self.shared.faults.pass(FaultPoint::SchedulerBeforeApply);
        let now_us = self.shared.now_us();
        trace.run_end_us = now_us;
        self.scheduler.apply(now_us, &self.plan, &self.output, &mut self.events);
        self.shared.faults.pass(FaultPoint::SchedulerAfterApply);
        trace.apply_end_us = self.shared.now_us();
        let metrics = &self.shared.metrics;
        metrics.steps.add(1);
        metrics.step_tokens.add(trace.tokens as u64);
        metrics.plan_time.record(trace.run_start_us - trace.plan_start_us);
        metrics.step_time.record(trace.run_end_us - trace.run_start_us);
        self.shared.traces.push(trace);
        self.last_run_end_us = Some(now_us);
    }

    /// A dead stage is a preemption of every sequence.
    fn lose_the_stage(&mut self) {
        self.generation = self.shared.steps.generation();
        self.scheduler.executor_lost(self.shared.now_us(), &mut self.events);
        // What was ordered since the stage died is of no epoch that goes on.
        self.shared.swaps.loop_starts();
        self.swaps.reset(&self.shared.swaps);
        self.last_run_end_us = None;
    }

    /// Notices a stage that died while no step was in flight, and a swap thread that died.
    fn meet_the_stage(&mut self) {
        if self.shared.steps.generation() != self.generation {
            self.lose_the_stage();
        } else if !self.swaps.is_current(&self.shared.swaps) {
            self.swaps.reset(&self.shared.swaps);
            self.scheduler.tiers_lost(self.shared.now_us());
        }
    }

    /// Hands the copies that were begun to the swap thread.
    fn send_copies(&mut self) {
        self.scheduler.take_copies(&mut self.swaps.pending);
        self.swaps.send(&self.shared.swaps);
    }

    /// Takes in what the swap thread has done.
    fn take_copies(&mut self) {
        while let Ok(result) = self.shared.swaps.results.1.try_recv() {
            self.take_copy(result);
        }
    }

    fn take_copy(&mut self, result: SwapResult) {
        let Some(order) = self.swaps.open(result) else { return };
        self.scheduler.copied(self.shared.now_us(), &order.results, order.duration_us);
        if order.disk_stopped {
            self.scheduler.stop_disk();
        }
        self.swaps.recycle(order);
        self.swaps.send(&self.shared.swaps);
    }

    /// Waits for a command or for copies; whether to go on.
    fn idle(&mut self) -> bool {
        let tick = if self.scheduler.is_empty() { EMPTY_TICK } else { IDLE_TICK };
        let shared = Arc::clone(&self.shared);
        select_biased! {
            recv(self.stop) -> _ => return false,
            recv(shared.commands.receiver) -> command => {
                command.into_iter().for_each(|command| self.obey(command));
            }
            recv(shared.swaps.results.1) -> result => {
                result.into_iter().for_each(|result| self.take_copy(result));
            }
            default(tick) => {}
        }
        true
    }

    fn take_commands(&mut self) {
        for _ in 0..COMMANDS_PER_STEP_MAX {
            let Ok(command) = self.shared.commands.receiver.try_recv() else { return };
            self.obey(command);
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.submit(*submission),
            Command::Abort(id) => {
                self.links.remove(id);
                self.scheduler.abort(id);
            }
            Command::Resume(id) => match self.links.flush(id) {
                Delivery::Fine => self.scheduler.resume(id),
                Delivery::Full => {}
                Delivery::Gone => self.scheduler.abort(id),
            },
        }
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { sequence, lane, flow } = submission;
        let id = sequence.id;
        flow.enter_loop(self.life);
        self.links.add(id, lane, flow);
        self.shared.faults.pass(FaultPoint::SchedulerBeforeAdd);
        match self.scheduler.add(self.shared.now_us(), sequence) {
            Ok(position) => {
                let queue_position = position;
                self.tell(id, StreamMessage::Accepted { queue_position });
            }
            Err(error) => self.links.deliver_last(id, StreamMessage::Refused(error)),
        }
    }

    fn tell(&mut self, id: SequenceId, message: StreamMessage) {
        match self.links.deliver(id, message) {
            // Also where it is not paused: the reader may have asked for more between two messages,
            // and then this delivery has answered it.
            Delivery::Fine => self.scheduler.resume(id),
            Delivery::Full => self.scheduler.pause(id),
            Delivery::Gone => self.scheduler.abort(id),
        }
    }

    /// Tells the streams what happened, while the executor is at work.
    fn deliver(&mut self) {
        let at_us = self.last_run_end_us.unwrap_or_else(|| self.shared.now_us());
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            self.shared.faults.pass(FaultPoint::SchedulerInDelivery);
            let (id, kind) = (event.sequence, event.kind);
            let last =
                matches!(kind, SequenceEventKind::Finished { .. } | SequenceEventKind::Failed(_));
            let message = StreamMessage::Event { at_us, kind };
            if last {
                self.links.deliver_last(id, message);
            } else {
                self.tell(id, message);
            }
        }
        self.events = events;
    }

    fn publish(&mut self) {
        let (stats, before) = (self.scheduler.stats(), self.published);
        let metrics = &self.shared.metrics;
        metrics.blocks_swapped_out.add(stats.blocks_down - before.blocks_down);
        metrics.blocks_swapped_in.add(stats.blocks_up - before.blocks_up);
        metrics.blocks_moved_to_disk.add(stats.blocks_to_disk - before.blocks_to_disk);
        metrics.block_copies_failed.add(stats.copies_failed - before.copies_failed);
        metrics.draft_tokens.add(stats.draft_tokens - before.draft_tokens);
        let accepted = stats.draft_tokens_accepted - before.draft_tokens_accepted;
        metrics.draft_tokens_accepted.add(accepted);
        self.published = stats;
        let occupancy = Occupancy::of(&stats);
        *self.shared.occupancy.lock().unwrap_or_else(PoisonError::into_inner) = occupancy;
    }
}
