//! Memory on NUMA nodes, asked of the system that the tests run on. One without nodes, or one that
//! refuses, is told and skipped.

#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use tandem::hardware::Topology;
use tandem::memory::{
    AlignedBytes, HugePages, NodeError, nodes_of_pages, populate, prefer_node, take_nodes_in_turn,
};

const PAGE: usize = 4096;

/// What the system said, or that it does not let us ask.
fn allowed<T>(result: Result<T, NodeError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

#[test]
fn pages_come_from_the_node_that_was_asked_for() {
    for node in Topology::detect().numa_nodes.into_iter().filter(|node| node.is_allowed) {
        for huge_pages in [HugePages::Advise, HugePages::SystemDefault] {
            let mut bytes = AlignedBytes::zeroed(9 << 20, huge_pages).expect("a buffer");
            let Some(()) = allowed(prefer_node(&bytes, node.id)) else { return };
            let Some(before) = allowed(nodes_of_pages(&bytes, PAGE)) else { return };
            assert_eq!(before.len(), (9 << 20) / PAGE);
            assert!(before.iter().all(Option::is_none), "no page before it is touched");
            bytes[..PAGE].fill(1);
            populate(&bytes);
            let after = nodes_of_pages(&bytes, PAGE).expect("as before");
            let there = after.iter().filter(|found| **found == Some(node.id)).count();
            // A wish: where the node is full the rest lies elsewhere.
            assert!(there * 10 > after.len() * 9, "{there} of {} on {}", after.len(), node.id);
            assert!(bytes[..PAGE].iter().all(|byte| *byte == 1) && bytes[PAGE] == 0);
        }
    }
}

#[test]
fn pages_of_all_nodes_are_taken_in_turn() {
    let nodes = Topology::detect().numa_nodes.into_iter().filter(|node| node.is_allowed);
    let nodes: Vec<u32> = nodes.map(|node| node.id).collect();
    let bytes = AlignedBytes::zeroed(64 * PAGE, HugePages::SystemDefault).expect("a buffer");
    let Some(()) = allowed(take_nodes_in_turn(&bytes, &nodes)) else { return };
    populate(&bytes);
    let Some(found) = allowed(nodes_of_pages(&bytes, PAGE)) else { return };
    for node in &nodes {
        let there = found.iter().filter(|found| **found == Some(*node)).count();
        assert!(there * nodes.len() * 2 > found.len(), "{there} of {} on {node}", found.len());
    }
}

#[test]
fn nodes_that_are_not_there_are_refused_and_leave_memory_usable() {
    let mut bytes = AlignedBytes::zeroed(4 * PAGE, HugePages::SystemDefault).expect("a buffer");
    assert!(matches!(prefer_node(&bytes, 5000), Err(NodeError::OutOfRange { node: 5000 })));
    assert!(matches!(prefer_node(&bytes, 1023), Err(NodeError::Refused { .. })));
    bytes.fill(7);
    assert!(bytes.iter().all(|byte| *byte == 7));
    // Less than a page has no node of its own.
    assert!(prefer_node(&bytes[1..PAGE], 1023).is_ok());
    assert_eq!(nodes_of_pages(&bytes[1..PAGE], PAGE).expect("nothing is asked"), []);
}
