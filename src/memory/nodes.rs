//! Which NUMA node memory lies on: the wish before it is touched, and the question after.
//!
//! A wish is never an order: where a node has no memory left, the system takes another's. Systems
//! without nodes, and containers that may not ask, refuse it; pages then lie near whoever touches
//! them first, as ever.

use std::io;

/// Nodes that the system's sets of them have room for here.
const NODES_MAX: u32 = 1024;
/// The smallest page.
const PAGE: usize = 4096;
/// Bits of a word of a set.
#[cfg(target_os = "linux")]
const WORD_BITS: u32 = usize::BITS;

/// Why memory can't be put on nodes, or nobody knows where it lies.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The number does not fit the system's sets.
    #[error("NUMA node {node} is beyond the {NODES_MAX} that memory can be put on")]
    OutOfRange {
        /// The node asked for.
        node: u32,
    },
    /// The system refused.
    #[error("the system refuses {call}: {source}")]
    Refused {
        /// What it was asked for.
        call: &'static str,
        /// What it said.
        source: io::Error,
    },
}

/// Has the whole pages of some memory come from one node, as long as that has some left. Pages that
/// are there already stay where they are.
///
/// # Errors
/// [`NodeError`]; the memory is as it was.
pub fn prefer_node(bytes: &[u8], node: u32) -> Result<(), NodeError> {
    set_policy(bytes, Policy::Preferred, &[node])
}

/// The same from some nodes in turn, page by page (huge page by huge page where there are such).
///
/// # Errors
/// [`NodeError`]; the memory is as it was.
pub fn take_nodes_in_turn(bytes: &[u8], nodes: &[u32]) -> Result<(), NodeError> {
    set_policy(bytes, Policy::InTurn, nodes)
}

/// The node of one page in each `step` bytes, `None` for one that does not exist yet.
///
/// # Errors
/// [`NodeError::Refused`].
///
/// # Panics
/// When `step` is 0.
pub fn nodes_of_pages(bytes: &[u8], step: usize) -> Result<Vec<Option<u32>>, NodeError> {
    let pages: Vec<usize> = whole_pages(bytes).map_or(Vec::new(), |(start, len)| {
        (start..start + len).step_by(step.next_multiple_of(PAGE)).collect()
    });
    query(&pages)
}

#[derive(Clone, Copy)]
enum Policy {
    Preferred,
    InTurn,
}

/// Address and length of the pages that lie in `bytes`; none where there is no whole one.
fn whole_pages(bytes: &[u8]) -> Option<(usize, usize)> {
    let start = bytes.as_ptr().addr().next_multiple_of(PAGE);
    let end = (bytes.as_ptr().addr() + bytes.len()) / PAGE * PAGE;
    (end > start).then(|| (start, end - start))
}

#[cfg(target_os = "linux")]
fn set_policy(bytes: &[u8], policy: Policy, nodes: &[u32]) -> Result<(), NodeError> {
    let mut set = [0_usize; (NODES_MAX / WORD_BITS) as usize];
    for node in nodes {
        if *node >= NODES_MAX {
            return Err(NodeError::OutOfRange { node: *node });
        }
        set[(node / WORD_BITS) as usize] |= 1 << (node % WORD_BITS);
    }
    let Some((start, len)) = whole_pages(bytes) else { return Ok(()) };
    let mode = match policy {
        Policy::Preferred => libc::MPOL_PREFERRED,
        Policy::InTurn => libc::MPOL_INTERLEAVE,
    };
    // SAFETY: the pages are mapped, since they are borrowed, and the call changes no content; the
    // set has as many bits as it says (the system counts one more than it reads).
    let refused = unsafe {
        let bits = u64::from(NODES_MAX) + 1;
        libc::syscall(libc::SYS_mbind, start, len, mode as usize, set.as_ptr(), bits, 0_usize)
    };
    if refused == 0 { Ok(()) } else { Err(refusal("to put memory on nodes")) }
}

#[cfg(target_os = "linux")]
fn query(pages: &[usize]) -> Result<Vec<Option<u32>>, NodeError> {
    let mut found = vec![-1_i32; pages.len()];
    if pages.is_empty() {
        return Ok(Vec::new());
    }
    // SAFETY: without nodes to move pages to, the call moves none; it writes as many numbers as
    // there are pages, for which `found` has room.
    let refused = unsafe {
        let (no_nodes, this) = (std::ptr::null::<i32>(), 0_usize);
        libc::syscall(
            libc::SYS_move_pages,
            this,
            pages.len(),
            pages.as_ptr(),
            no_nodes,
            found.as_mut_ptr(),
            0_usize,
        )
    };
    if refused != 0 {
        return Err(refusal("to tell nodes"));
    }
    Ok(found.into_iter().map(|node| u32::try_from(node).ok()).collect())
}

#[cfg(target_os = "linux")]
fn refusal(call: &'static str) -> NodeError {
    NodeError::Refused { call, source: io::Error::last_os_error() }
}

#[cfg(not(target_os = "linux"))]
fn set_policy(_bytes: &[u8], _policy: Policy, _nodes: &[u32]) -> Result<(), NodeError> {
    Err(unsupported("to put memory on nodes"))
}

#[cfg(not(target_os = "linux"))]
fn query(_pages: &[usize]) -> Result<Vec<Option<u32>>, NodeError> {
    Err(unsupported("to tell nodes"))
}

#[cfg(not(target_os = "linux"))]
fn unsupported(call: &'static str) -> NodeError {
    NodeError::Refused { call, source: io::ErrorKind::Unsupported.into() }
}
