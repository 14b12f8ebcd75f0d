//! The host tier: blocks of preempted sequences, each owned by exactly one of them.

use crate::units::BlockId;

/// Blocks of the host tier.
#[derive(Clone, Debug)]
pub struct HostPool {
    count: usize,
    free: Vec<BlockId>,
}

impl HostPool {
    /// A pool of `count` free blocks; 0 switches the tier off.
    pub fn new(count: usize) -> Self {
        let mut pool = Self { count, free: Vec::with_capacity(count) };
        pool.clear();
        pool
    }

    /// Blocks of the pool.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether the tier is switched off.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Blocks in use.
    pub fn used(&self) -> usize {
        self.count - self.free.len()
    }

    /// Whether so many blocks can be had now.
    pub fn can_allocate(&self, blocks: usize) -> bool {
        self.free.len() >= blocks
    }

    /// One block.
    pub fn allocate(&mut self) -> Option<BlockId> {
        self.free.pop()
    }

    /// Gives one block back.
    pub fn release(&mut self, block: BlockId) {
        assert!(self.free.len() < self.count, "host block {block:?} is released twice");
        self.free.push(block);
    }

    /// Forgets everything: the bytes behind the ids are gone.
    pub fn clear(&mut self) {
        self.free.clear();
        self.free.extend((0..self.count as u32).rev().map(BlockId));
    }
}
