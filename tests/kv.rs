//! The accounting of KV blocks against a naive oracle, and the names of blocks.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use proptest::prelude::*;
use tandem::kv::{BlockHash, BlockPool, ChainHasher, PoolCounts, TierBlocks, Tiers, blocks_for};
use tandem::step::{CopyOutcome, Tier};
use tandem::units::{BlockId, TokenId};

const BLOCK_TOKENS: usize = 4;

fn tokens(name: u32) -> Vec<TokenId> {
    (0..BLOCK_TOKENS as u32).map(|at| TokenId(name * 10 + at)).collect()
}

fn hash(name: u32) -> BlockHash {
    ChainHasher::new([3; 16]).block(None, &tokens(name))
}

/// Allocates and publishes a block of that name.
fn published(pool: &mut BlockPool, name: u32) -> BlockId {
    let id = pool.allocate().unwrap();
    pool.publish(id, hash(name), None, &tokens(name));
    id
}

fn find(pool: &BlockPool, name: u32) -> Option<BlockId> {
    pool.find(hash(name), None, &tokens(name))
}

#[test]
fn blocks_are_counted_in_whole_ones() {
    assert_eq!([0, 1, 16, 17].map(|tokens| blocks_for(tokens, 16)), [0, 1, 1, 2]);
}

#[test]
fn an_empty_pool_gives_nothing() {
    assert_eq!(BlockPool::new(0, BLOCK_TOKENS).allocate(), None);
    let mut pool = BlockPool::new(2, BLOCK_TOKENS);
    assert_ne!(pool.allocate().unwrap(), pool.allocate().unwrap());
    assert_eq!(pool.allocate(), None);
}

#[test]
fn an_unreferenced_block_is_found_until_its_room_is_needed() {
    let mut pool = BlockPool::new(2, BLOCK_TOKENS);
    let first = published(&mut pool, 1);
    let second = published(&mut pool, 2);
    pool.release(second);
    pool.release(first);
    assert_eq!(pool.counts(), PoolCounts { used: 0, cached: 2, free: 0 });
    assert_eq!(find(&pool, 1), Some(first));
    assert_eq!(pool.allocate(), Some(second), "the least recently used goes first");
    assert_eq!((find(&pool, 1), find(&pool, 2)), (Some(first), None));
    pool.check_invariants();
}

#[test]
fn a_block_that_is_used_again_becomes_the_last_to_go() {
    let mut pool = BlockPool::new(3, BLOCK_TOKENS);
    let ids: Vec<BlockId> = (0..3).map(|name| published(&mut pool, name)).collect();
    ids.iter().for_each(|id| pool.release(*id));
    pool.retain(ids[0]);
    pool.release(ids[0]);
    let order: Vec<BlockId> = (0..3).map(|_| pool.allocate().unwrap()).collect();
    assert_eq!(order, [ids[1], ids[2], ids[0]]);
}

#[test]
fn empty_blocks_are_taken_before_cached_ones() {
    let mut pool = BlockPool::new(2, BLOCK_TOKENS);
    let cached = published(&mut pool, 1);
    pool.release(cached);
    assert_ne!(pool.allocate(), Some(cached));
    assert_eq!(find(&pool, 1), Some(cached));
}

#[test]
fn a_hit_is_verified_by_its_tokens_and_by_its_parent() {
    let mut pool = BlockPool::new(2, BLOCK_TOKENS);
    let id = published(&mut pool, 1);
    assert_eq!(pool.find(hash(1), None, &tokens(2)), None, "the same name for other tokens");
    assert_eq!(pool.find(hash(1), Some(hash(5)), &tokens(1)), None, "another beginning");
    assert_eq!(find(&pool, 1), Some(id));
}

#[test]
fn content_that_is_known_keeps_its_first_block() {
    let mut pool = BlockPool::new(2, BLOCK_TOKENS);
    let first = published(&mut pool, 1);
    let second = published(&mut pool, 1);
    assert_eq!(find(&pool, 1), Some(first));
    pool.release(second);
    assert_eq!(pool.counts(), PoolCounts { used: 1, cached: 0, free: 1 });
    pool.check_invariants();
}

#[test]
fn a_cleared_pool_has_forgotten_everything() {
    let mut pool = BlockPool::new(2, BLOCK_TOKENS);
    let id = published(&mut pool, 1);
    pool.clear();
    assert_eq!((find(&pool, 1), pool.references(id)), (None, 0));
    assert_eq!(pool.counts(), PoolCounts { used: 0, cached: 0, free: 2 });
    pool.check_invariants();
}

#[test]
#[should_panic(expected = "without a reference")]
fn a_block_is_released_as_often_as_it_was_taken() {
    let mut pool = BlockPool::new(1, BLOCK_TOKENS);
    let id = pool.allocate().unwrap();
    pool.release(id);
    pool.release(id);
}

#[test]
#[should_panic(expected = "only full blocks")]
fn a_part_of_a_block_has_no_name() {
    let mut pool = BlockPool::new(1, BLOCK_TOKENS);
    let id = pool.allocate().unwrap();
    pool.publish(id, hash(1), None, &tokens(1)[..3]);
}

#[test]
fn a_name_stands_for_all_tokens_before_it_and_needs_the_key() {
    let text: Vec<TokenId> = (0..11).map(TokenId).collect();
    let names = |key, tokens: &[TokenId]| {
        let mut hashes = Vec::new();
        ChainHasher::new([key; 16]).extend(&mut hashes, tokens, BLOCK_TOKENS);
        hashes
    };
    let all = names(1, &text);
    assert_eq!(all.len(), 2, "only full blocks");
    let mut other = text.clone();
    other[0] = TokenId(99);
    assert_ne!(all[1], names(1, &other)[1], "the second block's tokens are the same");
    assert_ne!(all[0], names(2, &text)[0], "nobody without the key can name a block");
    let mut grown = names(1, &text[..5]);
    ChainHasher::new([1; 16]).extend(&mut grown, &text, BLOCK_TOKENS);
    assert_eq!(grown, all, "a chain is extended from where it was");
}

/// Two blocks in each tier, and a named one of the device that nobody refers to.
fn tiers() -> (Tiers, BlockId) {
    let mut tiers = Tiers::new(TierBlocks { device: 2, host: 2, disk: 2 }, BLOCK_TOKENS);
    let id = published(&mut tiers.device, 1);
    tiers.device.release(id);
    (tiers, id)
}

fn find_below(tiers: &Tiers) -> Option<(Tier, BlockId)> {
    tiers.find(&[Tier::Host, Tier::Disk], (hash(1), None), &tokens(1))
}

#[test]
fn neither_end_of_a_copy_is_given_away_before_its_end() {
    let (mut tiers, id) = tiers();
    let copy = tiers.begin_copy((Tier::Device, id), Tier::Host).unwrap();
    assert_ne!(tiers.device.allocate(), Some(id));
    assert_eq!(tiers.device.allocate(), None);
    assert_eq!(find_below(&tiers), None, "what is not there yet is not found");
    assert_eq!(find(&tiers.device, 1), Some(id), "the source stays in use");
    tiers.end_copy(copy, CopyOutcome::Done);
    tiers.check_invariants();
    assert_eq!(find_below(&tiers), Some(copy.to));
    assert_eq!(tiers.copy_below((Tier::Device, id)), Some(copy.to));
    assert_eq!(tiers.device.allocate(), Some(id));
}

#[test]
fn a_copy_that_fails_leaves_nothing_to_be_found() {
    let (mut tiers, id) = tiers();
    let down = tiers.begin_copy((Tier::Device, id), Tier::Disk).unwrap();
    tiers.end_copy(down, CopyOutcome::Failed);
    assert_eq!((find_below(&tiers), find(&tiers.device, 1)), (None, Some(id)));
    let down = tiers.begin_copy((Tier::Device, id), Tier::Disk).unwrap();
    tiers.end_copy(down, CopyOutcome::Done);
    tiers.device.clear();
    let up = tiers.begin_copy(down.to, Tier::Device).unwrap();
    tiers.end_copy(up, CopyOutcome::Failed);
    tiers.check_invariants();
    assert_eq!(find_below(&tiers), None, "what can't be read is not tried again");
    assert_eq!(tiers.device.counts(), PoolCounts { used: 0, cached: 0, free: 2 });
}

#[test]
fn what_was_copied_down_is_evicted_first() {
    let (mut tiers, old) = tiers();
    let young = published(&mut tiers.device, 2);
    tiers.device.release(young);
    assert_eq!(tiers.next_uncopied(Tier::Device, 2), Some(old));
    let copy = tiers.begin_copy((Tier::Device, young), Tier::Host).unwrap();
    tiers.end_copy(copy, CopyOutcome::Done);
    assert_eq!(tiers.next_uncopied(Tier::Device, 1), None, "the first to go is known below");
    assert_eq!(tiers.next_uncopied(Tier::Device, 2), Some(old));
    assert_eq!(tiers.device.allocate(), Some(young));
}

#[test]
fn a_block_that_comes_up_is_known_in_both_tiers() {
    let (mut tiers, id) = tiers();
    let down = tiers.begin_copy((Tier::Device, id), Tier::Host).unwrap();
    tiers.end_copy(down, CopyOutcome::Done);
    tiers.device.clear();
    let up = tiers.begin_copy(down.to, Tier::Device).unwrap();
    tiers.end_copy(up, CopyOutcome::Done);
    assert_eq!(tiers.find(&[Tier::Device], (hash(1), None), &tokens(1)), Some(up.to));
    assert_eq!(tiers.copy_below(up.to), Some(down.to));
    tiers.clear_below();
    assert_eq!((find_below(&tiers), find(&tiers.device, 1)), (None, Some(up.to.1)));
    tiers.check_invariants();
}

/// The pool as a list of (id, references, name), oldest release first.
#[derive(Default)]
struct Oracle {
    blocks: Vec<(BlockId, u32, Option<u32>)>,
}

impl Oracle {
    fn named(&self, name: u32) -> Option<usize> {
        self.blocks.iter().position(|block| block.2 == Some(name))
    }

    fn counts(&self, count: usize) -> PoolCounts {
        let used = self.blocks.iter().filter(|block| block.1 > 0).count();
        let cached = self.blocks.len() - used;
        PoolCounts { used, cached, free: count - used - cached }
    }
}

proptest! {
    #[test]
    fn the_pool_is_what_a_naive_one_is(
        count in 1usize..12,
        orders in prop::collection::vec((0u8..4, 0u32..9), 0..300),
    ) {
        let mut pool = BlockPool::new(count, BLOCK_TOKENS);
        let mut oracle = Oracle::default();
        for (order, name) in orders {
            let at = (!oracle.blocks.is_empty()).then(|| name as usize % oracle.blocks.len());
            match (order, at) {
                (0, _) => {
                    let evicted = oracle.blocks.iter().position(|block| block.1 == 0);
                    let full = oracle.blocks.len() == count;
                    let given = pool.allocate();
                    prop_assert_eq!(given.is_some(), !full || evicted.is_some());
                    let Some(id) = given else { continue };
                    if full {
                        prop_assert_eq!(oracle.blocks.remove(evicted.unwrap()).0, id);
                    }
                    prop_assert!(oracle.blocks.iter().all(|block| block.0 != id));
                    oracle.blocks.push((id, 1, None));
                }
                (1, Some(at)) if oracle.blocks[at].1 > 0 => {
                    pool.release(oracle.blocks[at].0);
                    oracle.blocks[at].1 -= 1;
                    if oracle.blocks[at].1 == 0 {
                        let block = oracle.blocks.remove(at);
                        if block.2.is_some() {
                            oracle.blocks.push(block);
                        }
                    }
                }
                (2, Some(at)) if oracle.blocks[at].1 > 0 => {
                    pool.publish(oracle.blocks[at].0, hash(name), None, &tokens(name));
                    if oracle.blocks[at].2.is_none() && oracle.named(name).is_none() {
                        oracle.blocks[at].2 = Some(name);
                    }
                }
                (3, _) => {
                    let at = oracle.named(name);
                    prop_assert_eq!(find(&pool, name), at.map(|at| oracle.blocks[at].0));
                    if let Some(at) = at {
                        pool.retain(oracle.blocks[at].0);
                        oracle.blocks[at].1 += 1;
                    }
                }
                _ => {}
            }
            pool.check_invariants();
            prop_assert_eq!(pool.counts(), oracle.counts(count));
        }
    }
}
