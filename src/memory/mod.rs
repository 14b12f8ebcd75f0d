//! Owns the accounting of memory per device and the host buffers that weights and KV live in. It
//! must not know what the bytes mean: a label says what they are for. Called by placement's callers
//! and the executor when they load, never during a step.

mod arena;
mod ledger;
mod nodes;

pub use arena::{
    ALIGNMENT, AlignedBytes, ArenaError, ArenaRange, DisjointChunks, HostArena, HugePages,
    populate, prefer_huge_pages,
};
pub use ledger::{
    Commitment, Device, Ledger, LedgerError, LedgerReport, PurposeBytes, Reservation,
};
pub use nodes::{NodeError, nodes_of_pages, prefer_node, take_nodes_in_turn};
