//! Which unreferenced block was used longest ago: a doubly linked list threaded through an array
//! by block, so that every operation is O(1) and none allocates.

use crate::units::BlockId;

#[derive(Clone, Copy, Debug, Default)]
struct Link {
    older: Option<BlockId>,
    newer: Option<BlockId>,
    member: bool,
}

/// Blocks in the order of their insertion.
#[derive(Clone, Debug)]
pub(super) struct LruList {
    links: Vec<Link>,
    oldest: Option<BlockId>,
    newest: Option<BlockId>,
    len: usize,
}

impl LruList {
    /// An empty list over blocks `0 .. count`.
    pub fn new(count: usize) -> Self {
        Self { links: vec![Link::default(); count], oldest: None, newest: None, len: 0 }
    }

    /// Blocks in the list.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether a block is in the list.
    pub fn contains(&self, block: BlockId) -> bool {
        self.links[block.index()].member
    }

    /// Appends a block as the newest.
    pub fn push(&mut self, block: BlockId) {
        let link = &mut self.links[block.index()];
        assert!(!link.member, "{block:?} is in the list already");
        *link = Link { older: self.newest, newer: None, member: true };
        match self.newest.replace(block) {
            Some(before) => self.links[before.index()].newer = Some(block),
            None => self.oldest = Some(block),
        }
        self.len += 1;
    }

    /// Puts a block before the oldest.
    pub fn push_oldest(&mut self, block: BlockId) {
        let link = &mut self.links[block.index()];
        assert!(!link.member, "{block:?} is in the list already");
        *link = Link { older: None, newer: self.oldest, member: true };
        match self.oldest.replace(block) {
            Some(after) => self.links[after.index()].older = Some(block),
            None => self.newest = Some(block),
        }
        self.len += 1;
    }

    /// The oldest.
    pub fn oldest(&self) -> Option<BlockId> {
        self.oldest
    }

    /// The block that came after a member.
    pub fn newer(&self, block: BlockId) -> Option<BlockId> {
        self.links[block.index()].newer
    }

    /// Takes out the oldest.
    pub fn pop(&mut self) -> Option<BlockId> {
        let block = self.oldest?;
        self.remove(block);
        Some(block)
    }

    /// Takes out any block.
    pub fn remove(&mut self, block: BlockId) {
        let link = std::mem::take(&mut self.links[block.index()]);
        assert!(link.member, "{block:?} is not in the list");
        match link.older {
            Some(older) => self.links[older.index()].newer = link.newer,
            None => self.oldest = link.newer,
        }
        match link.newer {
            Some(newer) => self.links[newer.index()].older = link.older,
            None => self.newest = link.older,
        }
        self.len -= 1;
    }

    /// Takes out everything.
    pub fn clear(&mut self) {
        self.links.fill(Link::default());
        (self.oldest, self.newest, self.len) = (None, None, 0);
    }
}
