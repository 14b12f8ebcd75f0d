//! The blocks of one tier: reference counts, the free list, and blocks that nobody refers to but
//! that still hold a known prefix. Those are found again by name, or evicted least recently used
//! first. Everything is sized when the pool is made: no operation allocates, each is O(1) in the
//! blocks.

use super::lru::LruList;
use super::prefix::{BlockHash, NameState};
use crate::units::{BlockId, TokenId};
use std::collections::HashMap;

/// What an indexed block holds; its tokens are in `BlockPool::tokens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub hash: BlockHash,
    pub parent: Option<BlockHash>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    references: u32,
    name: Option<Name>,
}

/// How giving back a reference left a block.
enum Released {
    /// Others refer to it.
    Referenced,
    /// Nobody does, and it has a name.
    Named,
    /// Nobody does, and it has none.
    Nameless,
}

/// How many blocks are in which state. They add up to the pool's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolCounts {
    /// Referred to by at least one sequence or copy.
    pub used: usize,
    /// Unreferenced, holding a known prefix.
    pub cached: usize,
    /// Unreferenced and empty.
    pub free: usize,
}

impl PoolCounts {
    /// Blocks in any state.
    pub fn total(&self) -> usize {
        self.used + self.cached + self.free
    }
}

/// All blocks of a tier.
#[derive(Clone, Debug)]
pub struct BlockPool {
    block_tokens: usize,
    blocks: Vec<Block>,
    /// `[count, block_tokens]`: the tokens of named blocks, to verify a hit.
    tokens: Vec<TokenId>,
    free: Vec<BlockId>,
    index: HashMap<BlockHash, BlockId, NameState>,
    /// Unreferenced blocks with a name.
    cached: LruList,
}

impl BlockPool {
    /// A pool of `count` free blocks of `block_tokens` tokens.
    pub fn new(count: usize, block_tokens: usize) -> Self {
        let mut pool = Self {
            block_tokens,
            blocks: vec![Block::default(); count],
            tokens: vec![TokenId(0); count * block_tokens],
            free: Vec::with_capacity(count),
            // At most half full, so that the map cleans its tombstones in place for ever.
            index: HashMap::with_capacity_and_hasher(2 * count + 2, NameState::default()),
            cached: LruList::new(count),
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
        self.free.len() + self.cached.len()
    }

    /// Blocks by state.
    pub fn counts(&self) -> PoolCounts {
        let (cached, free) = (self.cached.len(), self.free.len());
        PoolCounts { used: self.blocks.len() - cached - free, cached, free }
    }

    /// Blocks that hold nothing.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// How many sequences and copies refer to a block.
    pub fn references(&self, block: BlockId) -> u32 {
        self.blocks[block.index()].references
    }

    /// A block with one reference and no name, evicting the oldest cached one if none is free.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let block = self.cached.pop()?;
                self.take_name(block);
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
        match self.take_reference(id) {
            Released::Named => self.cached.push(id),
            Released::Nameless => self.free.push(id),
            Released::Referenced => {}
        }
    }

    /// As [`BlockPool::release`], but a block that only the cache remembers now is the first to be
    /// evicted: its content lies in a lower tier as well.
    pub(super) fn release_copied(&mut self, id: BlockId) {
        match self.take_reference(id) {
            Released::Named => self.cached.push_oldest(id),
            Released::Nameless => self.free.push(id),
            Released::Referenced => {}
        }
    }

    fn take_reference(&mut self, id: BlockId) -> Released {
        let block = &mut self.blocks[id.index()];
        assert!(block.references > 0, "block {id:?} is released without a reference");
        block.references -= 1;
        match (block.references, block.name) {
            (0, Some(_)) => Released::Named,
            (0, None) => Released::Nameless,
            _ => Released::Referenced,
        }
    }

    /// What a block is called, if anything.
    pub(super) fn name(&self, id: BlockId) -> Option<Name> {
        self.blocks[id.index()].name
    }

    /// Whether a block of that name is here.
    pub(super) fn knows(&self, hash: BlockHash) -> bool {
        self.index.contains_key(&hash)
    }

    /// The unreferenced named blocks in the order in which they will be evicted.
    pub(super) fn cached(&self) -> impl Iterator<Item = BlockId> {
        std::iter::successors(self.cached.oldest(), |block| self.cached.newer(*block))
    }

    /// Takes a referenced block's name away: its content is not to be trusted.
    pub(super) fn forget(&mut self, id: BlockId) {
        assert!(self.references(id) > 0, "block {id:?} is forgotten without a reference");
        self.take_name(id);
    }

    /// Makes a referenced, fully computed block findable. If its content is known already under
    /// another id, that one stays.
    ///
    /// # Panics
    /// When nobody refers to the block, or `tokens` do not fill one.
    pub fn publish(
        &mut self,
        id: BlockId,
        hash: BlockHash,
        parent: Option<BlockHash>,
        tokens: &[TokenId],
    ) {
        assert_eq!(tokens.len(), self.block_tokens, "only full blocks have names");
        let block = &mut self.blocks[id.index()];
        assert!(block.references > 0, "block {id:?} is published without a reference");
        if block.name.is_some() || self.index.contains_key(&hash) {
            return;
        }
        block.name = Some(Name { hash, parent });
        self.tokens[id.index() * self.block_tokens..][..self.block_tokens].copy_from_slice(tokens);
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
        let name = self.blocks[id.index()].name?;
        (name.parent == parent && self.tokens_of(id) == tokens).then_some(id)
    }

    /// Takes one more reference of a block that [`BlockPool::find`] gave.
    pub fn retain(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.index()];
        if block.references == 0 {
            self.cached.remove(id);
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
        self.cached.clear();
        self.free.clear();
        self.free.extend((0..count as u32).rev().map(BlockId));
    }

    /// Checks that each block is in exactly one state and that the index tells the truth; for
    /// tests and simulations.
    ///
    /// # Panics
    /// When it does not hold, with the values.
    pub fn check_invariants(&self) {
        let mut free = vec![false; self.blocks.len()];
        for id in &self.free {
            assert!(!std::mem::replace(&mut free[id.index()], true), "{id:?} is free twice");
        }
        let mut named = 0;
        for (index, block) in self.blocks.iter().enumerate() {
            let id = BlockId(index as u32);
            let states = (block.references > 0, self.cached.contains(id), free[index]);
            let expected = match (block.references, block.name) {
                (0, None) => (false, false, true),
                (0, Some(_)) => (false, true, false),
                _ => (true, false, false),
            };
            assert_eq!(states, expected, "{id:?} as (referenced, cached, free): {block:?}");
            if let Some(name) = block.name {
                assert_eq!(self.index.get(&name.hash), Some(&id), "the index knows {id:?}");
                named += 1;
            }
        }
        assert_eq!(self.index.len(), named, "names in the index and on blocks");
    }

    pub(super) fn tokens_of(&self, id: BlockId) -> &[TokenId] {
        &self.tokens[id.index() * self.block_tokens..][..self.block_tokens]
    }

    fn take_name(&mut self, id: BlockId) {
        if let Some(name) = self.blocks[id.index()].name.take() {
            self.index.remove(&name.hash);
        }
    }
}
