//! Owns the ledger of a GPU's memory, and the host buffers that weights and KV live in. It must not
//! know what the bytes mean: a label says what they are for. Called by the executor when it loads
//! weights and makes stages, and in a step only where its inputs outgrow their room.

mod arena;
mod ledger;
mod nodes;

pub use arena::{
    ALIGNMENT, AlignedBytes, ArenaError, ArenaRange, DisjointChunks, HostArena, HugePages,
    populate, prefer_huge_pages,
};
pub use ledger::{Commitment, Ledger, LedgerError, LedgerReport, PurposeBytes, Reservation};
pub use nodes::{NodeError, nodes_of_pages, prefer_node, take_nodes_in_turn};
