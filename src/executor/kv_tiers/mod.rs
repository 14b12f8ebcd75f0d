//! The bytes of KV blocks on their way between a stage's own store, host memory and a file. It owns
//! the tiers behind the device's and performs orders of copies while the stage runs steps; it must
//! not know why a block moves. The engine's swap thread calls it.

mod blocks;
mod disk;
mod host;

pub use blocks::{KvBlocks, Registration};

use super::ExecutorError;
use crate::step::{BlockCopy, CopyOutcome, CopyResult, Tier};
use crate::units::BlockId;
use blocks::{read_blocks, write_blocks};
use disk::DiskTier;
use host::HostTier;
use std::path::PathBuf;
use std::sync::Arc;

/// Orders that are performed at once at most. The results of all of them come together.
const RUN_ORDERS_MAX: usize = 256;
/// Host memory, about, that blocks cross which can't go straight from one tier to the other.
const BOUNCE_BYTES: usize = 16 << 20;

/// How many blocks the tiers behind the device's have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierOptions {
    /// Blocks of host memory.
    pub host_blocks: usize,
    /// Blocks of the file; 0 for no file.
    pub disk_blocks: usize,
    /// Where the file is made.
    pub disk_folder: PathBuf,
}

/// Bytes of the tiers behind the device's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierBytes {
    /// Host memory of the whole tier. Pages exist once they are used.
    pub host: usize,
    /// Host memory so far registered with a GPU's driver, which copies from and to it by itself.
    pub host_pinned: usize,
    /// Host memory so far that the driver would not register: blocks in it take a detour.
    pub host_pageable: usize,
    /// Host memory through which blocks cross on detours.
    pub bounce: usize,
    /// The file.
    pub disk: usize,
}

/// The tiers behind a stage's store, for the thread that copies.
pub struct KvTiers {
    host: HostTier,
    bounce: HostTier,
    disk: Option<DiskTier>,
    // Last: memory is registered with its driver.
    kv: Arc<dyn KvBlocks>,
}

impl KvTiers {
    /// Empty tiers behind a store. Host memory and the file are there in whole afterwards, but
    /// beyond the first 512 MiB pages and registrations only come ahead of use
    /// ([`KvTiers::prepare_ahead`]), or with it.
    ///
    /// # Errors
    /// Memory refused, or [`ExecutorError::DiskTier`].
    pub fn new(kv: Arc<dyn KvBlocks>, options: &TierOptions) -> Result<Self, ExecutorError> {
        let block_bytes = kv.block_bytes();
        let bounce_blocks = match options.host_blocks + options.disk_blocks {
            0 => 0,
            _ => (BOUNCE_BYTES / block_bytes.max(1)).clamp(1, RUN_ORDERS_MAX),
        };
        let mut bounce = HostTier::new(&*kv, bounce_blocks)?;
        bounce.prepare_all(&*kv)?;
        let mut host = HostTier::new(&*kv, options.host_blocks)?;
        while host.prepare_ahead(&*kv) {}
        let disk = (options.disk_blocks > 0).then(|| DiskTier::create(options, block_bytes));
        Ok(Self { host, bounce, disk: disk.transpose()?, kv })
    }

    /// Performs orders as if one after the other, and appends a result for each, in their order.
    /// After a failed copy nothing usable is at its destination, and the source is as it was.
    ///
    /// The rule that makes this safe beside running steps is the scheduler's: from an order to its
    /// result nobody writes the device's block that it reads, or touches the one that it writes.
    pub fn perform(&mut self, orders: &[BlockCopy], results: &mut Vec<CopyResult>) {
        sleep_exactly();
        let mut rest = orders;
        while !rest.is_empty() {
            let (run, others) = rest.split_at(self.run_length(rest));
            let mut outcomes = vec![CopyOutcome::Done; run.len()];
            self.copy(run, &mut outcomes);
            let results_of_run = run.iter().zip(outcomes);
            results.extend(results_of_run.map(|(&copy, outcome)| CopyResult { copy, outcome }));
            rest = others;
        }
    }

    /// Registers some host memory, about 16 MiB, where less than 512 MiB is ready behind what is in
    /// use. Whether it did: then there may be more to do. For moments without orders.
    pub fn prepare_ahead(&mut self) -> bool {
        self.host.prepare_ahead(&*self.kv)
    }

    /// Whether the disk tier has stopped, because the disk was full or failed or gave back other
    /// bytes than it had got: then copies to it fail at once. What is there can still be read.
    pub fn disk_stopped(&self) -> bool {
        self.disk.as_ref().is_some_and(DiskTier::is_stopped)
    }

    /// Bytes held.
    pub fn bytes(&self) -> TierBytes {
        TierBytes {
            host: self.host.bytes(),
            host_pinned: self.host.pinned_bytes(),
            host_pageable: self.host.pageable_bytes(),
            bounce: self.bounce.bytes(),
            disk: self.disk.as_ref().map_or(0, DiskTier::bytes),
        }
    }

    /// How many of the first orders can be performed at once with the result of one after the
    /// other: they go one way, and none needs or overwrites what another has written. Memory is
    /// registered at the beginning of a run alone, so that steps get their turn in the driver.
    fn run_length(&mut self, orders: &[BlockCopy]) -> usize {
        let first = orders[0];
        let (is_direct, exists) = (self.is_direct(&first), self.exists(&first));
        let most = if is_direct { RUN_ORDERS_MAX } else { self.bounce.len() };
        let mut length = 1;
        while let Some(order) = orders[..orders.len().min(most)].get(length) {
            let is_alike = (order.from.0, order.to.0) == (first.from.0, first.to.0)
                && exists
                && self.exists(order)
                && !self.host_block(order).is_some_and(|block| self.host.is_new(block))
                && self.is_direct(order) == is_direct;
            let mut before = orders[..length].iter();
            if !is_alike || before.any(|other| [order.from, order.to].contains(&other.to)) {
                break;
            }
            length += 1;
        }
        length
    }

    fn exists(&self, order: &BlockCopy) -> bool {
        [order.from, order.to].iter().all(|(tier, block)| block.index() < self.len(*tier))
    }

    /// Blocks of a tier.
    fn len(&self, tier: Tier) -> usize {
        match tier {
            Tier::Device => self.kv.device_blocks(),
            Tier::Host => self.host.len(),
            Tier::Disk => self.disk.as_ref().map_or(0, DiskTier::len),
        }
    }

    /// The host block of a copy between it and the device, if it is one.
    fn host_block(&self, order: &BlockCopy) -> Option<usize> {
        let block = match (order.from, order.to) {
            ((Tier::Device, _), (Tier::Host, block)) => block,
            ((Tier::Host, block), (Tier::Device, _)) => block,
            _ => return None,
        };
        Some(block.index()).filter(|block| *block < self.host.len())
    }

    /// Whether the device copies from or to the order's host block by itself.
    fn is_direct(&mut self, order: &BlockCopy) -> bool {
        let block = self.host_block(order);
        block.is_some_and(|block| self.host.prepare(&*self.kv, block))
    }

    /// Performs a run of orders.
    fn copy(&mut self, run: &[BlockCopy], outcomes: &mut [CopyOutcome]) {
        if !self.exists(&run[0]) {
            tracing::error!(order = ?run[0], "a copy of a KV block that does not exist");
            outcomes.fill(CopyOutcome::Failed);
        } else if self.is_direct(&run[0]) {
            self.copy_directly(run, outcomes);
        } else {
            self.fill_bounce(run, outcomes);
            self.drain_bounce(run, outcomes);
        }
    }

    fn copy_directly(&mut self, run: &[BlockCopy], outcomes: &mut [CopyOutcome]) {
        let done = if run[0].to.0 == Tier::Host {
            let to = self.host.blocks_mut(run.iter().map(|order| order.to.1.index()));
            let mut copies: Vec<_> = run.iter().map(|order| order.from.1).zip(to).collect();
            read_blocks(&*self.kv, &mut copies)
        } else {
            let from = run.iter().map(|order| self.host.block(order.from.1.index()));
            let copies: Vec<_> = run.iter().map(|order| order.to.1).zip(from).collect();
            write_blocks(&*self.kv, &copies)
        };
        fail_on_error(done, outcomes);
    }

    /// Copies the sources of a run to the first blocks of the bounce buffer.
    fn fill_bounce(&mut self, run: &[BlockCopy], outcomes: &mut [CopyOutcome]) {
        let sources = run.iter().map(|order| order.from.1);
        let bounce = self.bounce.blocks_mut(0..run.len());
        match run[0].from.0 {
            Tier::Device => {
                let mut copies: Vec<_> = sources.zip(bounce).collect();
                fail_on_error(read_blocks(&*self.kv, &mut copies), outcomes);
            }
            Tier::Host => {
                for (block, to) in sources.zip(bounce) {
                    to.copy_from_slice(self.host.block(block.index()));
                }
            }
            Tier::Disk => {
                let disk = self.disk.as_mut().expect("its blocks exist");
                for ((block, to), outcome) in sources.zip(bounce).zip(outcomes) {
                    *outcome = disk.read(block.index(), to);
                }
            }
        }
    }

    /// Copies those blocks of the bounce buffer that were filled to the destinations of a run.
    fn drain_bounce(&mut self, run: &[BlockCopy], outcomes: &mut [CopyOutcome]) {
        if let (Tier::Disk, Some(disk)) = (run[0].to.0, &mut self.disk) {
            // What is there goes, also where nothing comes.
            run.iter().for_each(|order| disk.forget(order.to.1.index()));
        }
        let filled: Vec<(BlockId, &[u8], &mut CopyOutcome)> = run
            .iter()
            .zip(outcomes)
            .enumerate()
            .filter(|(_, (_, outcome))| **outcome == CopyOutcome::Done)
            .map(|(index, (order, outcome))| (order.to.1, self.bounce.block(index), outcome))
            .collect();
        match run[0].to.0 {
            Tier::Device => {
                let copies: Vec<_> =
                    filled.iter().map(|(block, from, _)| (*block, *from)).collect();
                if let Err(error) = write_blocks(&*self.kv, &copies) {
                    tell(&error);
                    filled.into_iter().for_each(|(_, _, outcome)| *outcome = CopyOutcome::Failed);
                }
            }
            Tier::Host => {
                for (block, from, _) in filled {
                    self.host.block_mut(block.index()).copy_from_slice(from);
                }
            }
            Tier::Disk => {
                let disk = self.disk.as_mut().expect("its blocks exist");
                for (block, from, outcome) in filled {
                    *outcome = disk.write(block.index(), from);
                }
            }
        }
    }
}

/// Has sleeps of this thread end within a microsecond of their time, not 50: looks at copies are
/// that short.
fn sleep_exactly() {
    // Where that is refused copies take a fifth longer.
    #[cfg(target_os = "linux")]
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1000));
}

fn fail_on_error(done: Result<(), ExecutorError>, outcomes: &mut [CopyOutcome]) {
    if let Err(error) = done {
        tell(&error);
        outcomes.fill(CopyOutcome::Failed);
    }
}

fn tell(error: &ExecutorError) {
    tracing::error!(%error, "KV blocks could not be copied");
}
