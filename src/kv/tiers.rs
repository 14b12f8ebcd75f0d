//! All tiers' blocks together. A copy between two tiers takes a reference of its source and of its
//! destination, so that neither is given to anybody else before the copy has ended; only then has
//! the destination the source's name.

use super::pool::BlockPool;
use super::prefix::BlockHash;
use crate::step::{BlockCopy, CopyOutcome, Tier};
use crate::units::{BlockId, TokenId};

/// Where a block lies.
pub type Place = (Tier, BlockId);

/// How many blocks each tier has; 0 switches one off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierBlocks {
    /// Blocks that attention reads.
    pub device: usize,
    /// Blocks in host memory behind them.
    pub host: usize,
    /// Blocks in a file behind those.
    pub disk: usize,
}

/// The blocks of all tiers.
#[derive(Clone, Debug)]
pub struct Tiers {
    /// The device tier.
    pub device: BlockPool,
    host: BlockPool,
    disk: BlockPool,
}

impl Tiers {
    /// Free blocks of `block_tokens` tokens.
    pub fn new(blocks: TierBlocks, block_tokens: usize) -> Self {
        Self {
            device: BlockPool::new(blocks.device, block_tokens),
            host: BlockPool::new(blocks.host, block_tokens),
            disk: BlockPool::new(blocks.disk, block_tokens),
        }
    }

    /// One tier.
    pub fn pool(&self, tier: Tier) -> &BlockPool {
        match tier {
            Tier::Device => &self.device,
            Tier::Host => &self.host,
            Tier::Disk => &self.disk,
        }
    }

    fn pool_mut(&mut self, tier: Tier) -> &mut BlockPool {
        match tier {
            Tier::Device => &mut self.device,
            Tier::Host => &mut self.host,
            Tier::Disk => &mut self.disk,
        }
    }

    /// Blocks of the tiers below the device.
    pub fn lower_len(&self) -> usize {
        self.host.len() + self.disk.len()
    }

    /// Takes one more reference.
    pub fn retain(&mut self, (tier, block): Place) {
        self.pool_mut(tier).retain(block);
    }

    /// Gives one reference back.
    ///
    /// # Panics
    /// When nobody refers to the block.
    pub fn release(&mut self, (tier, block): Place) {
        self.pool_mut(tier).release(block);
    }

    /// The first of `tiers` with the block of that name, tokens and parent.
    pub fn find(
        &self,
        tiers: &[Tier],
        (hash, parent): (BlockHash, Option<BlockHash>),
        tokens: &[TokenId],
    ) -> Option<Place> {
        tiers.iter().find_map(|tier| {
            let block = self.pool(*tier).find(hash, parent, tokens)?;
            Some((*tier, block))
        })
    }

    /// Where below `tier` a block's content is known as well.
    pub fn copy_below(&self, (tier, block): Place) -> Option<Place> {
        let pool = self.pool(tier);
        let name = pool.name(block)?;
        let below = [Tier::Host, Tier::Disk].into_iter().filter(|below| *below > tier);
        let mut found = below.filter_map(|below| {
            let known = self.pool(below).find(name.hash, name.parent, pool.tokens_of(block))?;
            Some((below, known))
        });
        found.next()
    }

    /// Of the first `scan` blocks of a tier that will be evicted, the oldest one whose name is
    /// known in no lower tier.
    pub fn next_uncopied(&self, tier: Tier, scan: usize) -> Option<BlockId> {
        let pool = self.pool(tier);
        let lower: &[&BlockPool] = match tier {
            Tier::Device => &[&self.host, &self.disk],
            Tier::Host => &[&self.disk],
            Tier::Disk => &[],
        };
        pool.cached().take(scan).find(|block| {
            let name = pool.name(*block);
            name.is_some_and(|name| !lower.iter().any(|pool| pool.knows(name.hash)))
        })
    }

    /// Begins a copy into a block that the tier `to` has left. It has a reference of either block
    /// until [`Tiers::end_copy`]; whoever wants the destination takes another.
    pub fn begin_copy(&mut self, from: Place, to: Tier) -> Option<BlockCopy> {
        let block = self.pool_mut(to).allocate()?;
        self.retain(from);
        Some(BlockCopy { from, to: (to, block) })
    }

    /// Ends a copy: names its destination after its source and gives both references back. A copy
    /// to the device that failed takes its source's name: nobody is to find that again.
    pub fn end_copy(&mut self, copy: BlockCopy, outcome: CopyOutcome) {
        let (from, to) = (copy.from, copy.to);
        let done = outcome == CopyOutcome::Done;
        if done {
            self.name_after(from, to);
        } else if to.0 == Tier::Device {
            self.pool_mut(from.0).forget(from.1);
        }
        match from.0 < to.0 && done {
            true => self.pool_mut(from.0).release_copied(from.1),
            false => self.release(from),
        }
        self.release(to);
    }

    fn name_after(&mut self, from: Place, to: Place) {
        let (source, destination) = match (from.0, to.0) {
            (Tier::Device, Tier::Host) => (&self.device, &mut self.host),
            (Tier::Device, Tier::Disk) => (&self.device, &mut self.disk),
            (Tier::Host, Tier::Device) => (&self.host, &mut self.device),
            (Tier::Host, Tier::Disk) => (&self.host, &mut self.disk),
            (Tier::Disk, Tier::Device) => (&self.disk, &mut self.device),
            (Tier::Disk, Tier::Host) => (&self.disk, &mut self.host),
            // Nothing is copied within a tier.
            _ => return,
        };
        if let Some(name) = source.name(from.1) {
            destination.publish(to.1, name.hash, name.parent, source.tokens_of(from.1));
        }
    }

    /// Forgets what lies below the device. Whoever referred to it must forget as well.
    pub fn clear_below(&mut self) {
        self.host.clear();
        self.disk.clear();
    }

    /// Forgets everything: the bytes behind the ids are gone.
    pub fn clear(&mut self) {
        self.device.clear();
        self.clear_below();
    }

    /// Checks each tier; for tests and simulations.
    ///
    /// # Panics
    /// When a tier's books are wrong, with the values.
    pub fn check_invariants(&self) {
        for tier in [Tier::Device, Tier::Host, Tier::Disk] {
            self.pool(tier).check_invariants();
        }
    }
}
