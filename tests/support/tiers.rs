//! Tiers of KV blocks against a naive model of them, and moves of a stage's blocks.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use tandem::executor::{KvBlocks, KvTiers, TierOptions};
use tandem::step::{BlockCopy, CopyOutcome, CopyResult, Tier};
use tandem::units::BlockId;

/// A block of a tier.
pub type Place = (Tier, u32);

pub fn copy(from: Place, to: Place) -> BlockCopy {
    let place = |(tier, block)| (tier, BlockId(block));
    BlockCopy { from: place(from), to: place(to) }
}

/// Small tiers behind a stage's store.
pub fn tiers(kv: Arc<dyn KvBlocks>, disk_folder: &Path) -> KvTiers {
    let disk_folder = disk_folder.to_owned();
    KvTiers::new(kv, &TierOptions { host_blocks: 6, disk_blocks: 5, disk_folder }).expect("tiers")
}

/// What comes of orders.
pub fn perform(tiers: &mut KvTiers, orders: &[BlockCopy]) -> Vec<CopyOutcome> {
    let mut results = Vec::new();
    tiers.perform(orders, &mut results);
    let copies: Vec<BlockCopy> = results.iter().map(|result| result.copy).collect();
    assert_eq!(copies, orders, "a result for each order");
    results.iter().map(|CopyResult { outcome, .. }| *outcome).collect()
}

/// Copies blocks, which must go well.
pub fn moved(tiers: &mut KvTiers, moves: &[(Place, Place)]) {
    let orders: Vec<_> = moves.iter().map(|(from, to)| copy(*from, *to)).collect();
    let outcomes = perform(tiers, &orders);
    assert!(
        outcomes.iter().all(|outcome| *outcome == CopyOutcome::Done),
        "{orders:?} {outcomes:?}"
    );
}

fn split_mix(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Three tiers, and what a naive model says of each block.
pub struct World {
    kv: Arc<dyn KvBlocks>,
    pub tiers: KvTiers,
    blocks: [usize; 3],
    /// What lies where, by the number of the device block that it was at first; none where nothing
    /// usable is.
    known: HashMap<Place, Option<usize>>,
    /// By device block: its bytes at first.
    first: Vec<Vec<u8>>,
    seed: u64,
}

const TIERS: [Tier; 3] = [Tier::Device, Tier::Host, Tier::Disk];

impl World {
    /// All device blocks have bytes of their own, and other tiers nothing.
    pub fn new(kv: Arc<dyn KvBlocks>, options: &TierOptions, seed: u64) -> Self {
        let tiers = KvTiers::new(Arc::clone(&kv), options).expect("tiers");
        let blocks = [kv.device_blocks(), options.host_blocks, options.disk_blocks];
        let mut world = Self { kv, tiers, blocks, known: HashMap::new(), first: Vec::new(), seed };
        for block in 0..blocks[0] {
            let mut bytes = vec![0; world.kv.block_bytes()];
            bytes.fill_with(|| split_mix(&mut world.seed) as u8);
            world.known.insert((Tier::Device, block as u32), Some(block));
            world.first.push(bytes);
        }
        let bytes = world.first.concat();
        // SAFETY: nobody else uses the store, and the bytes are registered as long as that lasts.
        unsafe {
            let _registration = world.kv.register(&bytes).expect("registered memory");
            let blocks = bytes.chunks_exact(world.kv.block_bytes());
            let copies: Vec<_> = (0..).map(BlockId).zip(blocks).collect();
            world.kv.write(&copies).expect("bytes of blocks");
        }
        world
    }

    fn any(&mut self) -> Place {
        let tier = split_mix(&mut self.seed) as usize % 3;
        let block = split_mix(&mut self.seed) % self.blocks[tier] as u64;
        (TIERS[tier], block as u32)
    }

    /// Performs `count` random orders at once. Sources are blocks with known bytes, or such of the
    /// disk as have none.
    pub fn round(&mut self, count: usize) {
        let (mut orders, mut wanted) = (Vec::new(), Vec::new());
        while orders.len() < count {
            let (from, to) = (self.any(), self.any());
            let content = self.known.get(&from).copied().flatten();
            // So that enough is left to be moved.
            let may_fail = from.0 == Tier::Disk && self.known.values().flatten().count() > 3;
            if content.is_some() || may_fail {
                self.known.insert(to, content);
                let outcome =
                    if content.is_some() { CopyOutcome::Done } else { CopyOutcome::Failed };
                wanted.push(outcome);
                orders.push(copy(from, to));
            }
        }
        assert_eq!(perform(&mut self.tiers, &orders), wanted, "seed {}: {orders:?}", self.seed);
    }

    /// Compares all bytes with those of the model. Blocks of other tiers come to the device for
    /// that, one after the other.
    pub fn check(&mut self) {
        for block in 0..self.blocks[0] as u32 {
            self.compare((Tier::Device, block), block);
        }
        let behind: Vec<Place> = self.known.keys().copied().collect();
        for place in behind.into_iter().filter(|(tier, _)| *tier != Tier::Device) {
            let content = self.known[&place];
            if content.is_some() {
                moved(&mut self.tiers, &[(place, (Tier::Device, 0))]);
                self.known.insert((Tier::Device, 0), content);
                self.compare(place, 0);
            }
        }
    }

    /// Compares a device block with what the model says of a place.
    fn compare(&self, place: Place, block: u32) {
        let Some(wanted) = self.known[&place] else { return };
        let mut bytes = vec![0; self.kv.block_bytes()];
        // SAFETY: as in `new`.
        unsafe {
            let _registration = self.kv.register(&bytes).expect("registered memory");
            let copies = &mut [(BlockId(block), &mut bytes[..])];
            self.kv.read(copies).expect("bytes of a block");
        }
        assert!(bytes == self.first[wanted], "seed {}: {place:?} is not {wanted}", self.seed);
    }
}

/// Rounds of different lengths, and a look at all bytes now and then.
pub fn hold_random_orders(kv: &Arc<dyn KvBlocks>, options: &TierOptions, seed: u64) -> KvTiers {
    let mut world = World::new(Arc::clone(kv), options, seed);
    for round in 0..12 {
        world.round(1 + round * round);
        if round % 4 == 3 {
            world.check();
        }
    }
    world.tiers
}
