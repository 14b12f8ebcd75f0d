//! The device tier: reference counts, the free list, and blocks that nobody refers to but that
//! still hold a known prefix. Those are found again by name, or evicted least recently used first.

use super::prefix::BlockHash;
use crate::units::{BlockId, TokenId};
use std::collections::{BTreeMap, HashMap};

/// What an indexed block holds.
#[derive(Clone, Debug)]
struct Content {
    hash: BlockHash,
    parent: Option<BlockHash>,
    tokens: Box<[TokenId]>,
}

#[derive(Clone, Debug, Default)]
struct Block {
    references: u32,
    content: Option<Content>,
    /// When it lost its last reference; its key in `evictable`.
    released_at: u64,
}

/// How many blocks are in which state. They add up to the pool's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolCounts {
    /// Referred to by at least one sequence.
    pub used: usize,
    /// Unreferenced, holding a known prefix.
    pub cached: usize,
    /// Unreferenced and empty.
    pub free: usize,
}

/// All blocks of the device tier. Every operation is O(1) or O(log n).
#[derive(Clone, Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    index: HashMap<BlockHash, BlockId>,
    /// Unreferenced blocks with content, by the time of their release.
    evictable: BTreeMap<u64, BlockId>,
    clock: u64,
}

impl BlockPool {
    /// A pool of `count` free blocks.
    pub fn new(count: usize) -> Self {
        let blocks = vec![Block::default(); count];
        let mut pool = Self {
            blocks,
            free: Vec::with_capacity(count),
            index: HashMap::new(),
            evictable: BTreeMap::new(),
            clock: 0,
        };
        pool.clear();
        pool
    }

    /// Blocks of the pool.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether the pool has no blocks at all.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Blocks that [`BlockPool::allocate`] can still give.
    pub fn available(&self) -> usize {
        self.free.len() + self.evictable.len()
    }

    /// Blocks by state.
    pub fn counts(&self) -> PoolCounts {
        let (cached, free) = (self.evictable.len(), self.free.len());
        PoolCounts { used: self.blocks.len() - cached - free, cached, free }
    }

    /// How many sequences refer to a block.
    pub fn references(&self, block: BlockId) -> u32 {
        self.blocks[block.index()].references
    }

    /// A block with one reference and no content, evicting the oldest cached one if none is free.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.evictable.pop_first()?;
                self.forget(block);
                block
            }
        };
        self.blocks[block.index()].references = 1;
        Some(block)
    }

    /// Gives back one reference.
    ///
    /// # Panics
    /// When nobody refers to the block.
    pub fn release(&mut self, id: BlockId) {
        self.clock += 1;
        let block = &mut self.blocks[id.index()];
        assert!(block.references > 0, "block {id:?} is released without a reference");
        block.references -= 1;
        if block.references > 0 {
            return;
        }
        if block.content.is_some() {
            block.released_at = self.clock;
            self.evictable.insert(self.clock, id);
        } else {
            self.free.push(id);
        }
    }

    /// Makes a referenced, fully computed block findable. If its content is known already under
    /// another id, that one stays.
    pub fn publish(
        &mut self,
        id: BlockId,
        hash: BlockHash,
        parent: Option<BlockHash>,
        tokens: &[TokenId],
    ) {
        let block = &mut self.blocks[id.index()];
        assert!(block.references > 0, "block {id:?} is published without a reference");
        if block.content.is_some() || self.index.contains_key(&hash) {
            return;
        }
        block.content = Some(Content { hash, parent, tokens: tokens.into() });
        self.index.insert(hash, id);
    }

    /// The block of that name, if its tokens and its parent are really these. Takes no reference.
    pub fn find(
        &self,
        hash: BlockHash,
        parent: Option<BlockHash>,
        tokens: &[TokenId],
    ) -> Option<BlockId> {
        let id = *self.index.get(&hash)?;
        let content = self.blocks[id.index()].content.as_ref()?;
        (content.parent == parent && *content.tokens == *tokens).then_some(id)
    }

    /// Takes one more reference of a block that [`BlockPool::find`] gave.
    pub fn retain(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.index()];
        if block.references == 0 {
            let found = self.evictable.remove(&block.released_at);
            assert_eq!(found, Some(id), "an unreferenced block is retained only from the cache");
        }
        block.references += 1;
    }

    /// Whether taking a reference would make the block unavailable to others.
    pub fn is_unreferenced(&self, id: BlockId) -> bool {
        self.blocks[id.index()].references == 0
    }

    /// Forgets everything: the bytes behind the ids are gone.
    pub fn clear(&mut self) {
        let count = self.blocks.len();
        self.blocks.fill(Block::default());
        self.index.clear();
        self.evictable.clear();
        self.free.clear();
        self.free.extend((0..count as u32).rev().map(BlockId));
    }

    fn forget(&mut self, id: BlockId) {
        if let Some(content) = self.blocks[id.index()].content.take() {
            self.index.remove(&content.hash);
        }
    }
}
