//! NUMA nodes: their memory, the processors that are chosen of them, and the GPUs that are attached
//! to them, on made-up machines.

use super::{add, ids, tree, two_sockets};
use proptest::prelude::*;
use std::collections::BTreeSet;
use tandem::hardware::{
    CpuId, Gpu, Gpus, PinError, Topology, choose_cpus, keep_current_thread_on, spread_cpus,
};

#[test]
fn memory_of_nodes_is_free_and_allowed_or_not() {
    let root = two_sockets();
    let told = |root: &tempfile::TempDir| {
        let nodes = Topology::read(root.path()).numa_nodes;
        nodes.iter().map(|node| (node.memory_free_bytes, node.is_allowed)).collect::<Vec<_>>()
    };
    assert_eq!(told(&root), [(0, true), (5 << 10, true)]);
    let lines = "Node 1 MemTotal: 900 kB\nNode 1 MemFree: 5 kB\nNode 1 Inactive(file): 7 kB";
    add(root.path(), &[("sys/devices/system/node/node1/meminfo", lines)]);
    add(root.path(), &[("proc/self/status", "Cpus_allowed_list: 0-7\nMems_allowed_list: 1")]);
    assert_eq!(told(&root), [(0, false), (12 << 10, true)]);
    // Where there is one node, nobody looks.
    let one = tree(&[
        ("sys/devices/system/cpu/online", "0-1"),
        ("proc/self/status", "Cpus_allowed_list: 0-1\nMems_allowed_list: 7"),
    ]);
    assert_eq!(told(&one), [(0, true)]);
}

#[test]
fn workers_are_spread_over_nodes_side_by_side() {
    let root = two_sockets();
    let spread = |workers| ids(&spread_cpus(&Topology::read(root.path()), workers));
    assert_eq!(spread(1), [0]);
    assert_eq!(spread(2), [0, 2]);
    assert_eq!(spread(3), [0, 1, 2]);
    assert_eq!(spread(4), [0, 1, 2, 3]);
    // Second threads of cores come with their node.
    assert_eq!(spread(6), [0, 1, 4, 2, 3, 6]);
    assert_eq!(spread(99), [0, 1, 4, 5, 2, 3, 6, 7]);
    // Three of four processors of node 0 are forbidden.
    add(root.path(), &[("proc/self/status", "Cpus_allowed_list: 1-3,6-7")]);
    assert_eq!(spread(3), [2, 3, 1]);
    assert_eq!(spread(2), [2, 1]);
}

proptest! {
    #[test]
    fn nodes_get_workers_in_proportion(
        sizes in prop::collection::vec(1_usize..20, 1..6),
        wanted in 1_usize..120,
    ) {
        let all: usize = sizes.iter().sum();
        let root = tree(&[("sys/devices/system/cpu/online", &format!("0-{}", all - 1))]);
        let mut first = 0;
        for (node, size) in sizes.iter().enumerate() {
            let list = format!("{first}-{}", first + size - 1);
            let path = format!("sys/devices/system/node/node{node}/cpulist");
            add(root.path(), &[(&path, &list)]);
            first += size;
        }
        let topology = Topology::read(root.path());
        let spread = spread_cpus(&topology, wanted);
        let node = |id: &CpuId| topology.cpus[id.0 as usize].numa_node;
        prop_assert_eq!(spread.len(), wanted.min(all));
        let distinct: BTreeSet<_> = spread.iter().collect();
        prop_assert_eq!(distinct.len(), spread.len());
        let mut seen = BTreeSet::new();
        for run in spread.chunk_by(|a, b| node(a) == node(b)) {
            prop_assert!(seen.insert(node(&run[0])), "a node twice in {:?}", spread);
        }
        for (index, size) in sizes.iter().enumerate() {
            let got = spread.iter().filter(|id| node(id) == index as u32).count();
            let even = (spread.len() * size) as f64 / all as f64;
            prop_assert!((got as f64 - even).abs() < 1.0, "{got} of node {index}, {even}");
        }
        if sizes.len() == 1 {
            prop_assert_eq!(spread, choose_cpus(&topology, wanted));
        }
    }
}

#[test]
fn gpus_know_their_node_where_the_system_does() {
    let gpu = |ordinal: usize, address: &str| Gpu {
        ordinal,
        name: "Fake 8".into(),
        pci_address: address.into(),
        numa_node: Some(9),
        memory_total_bytes: 1,
        memory_free_bytes: 1,
        compute_capability: "9.0".into(),
        multiprocessors: 8,
        holders: Vec::new(),
    };
    let root = tree(&[
        ("sys/bus/pci/devices/0000:3b:00.0/numa_node", "1"),
        ("sys/bus/pci/devices/0000:5e:00.0/numa_node", "-1"),
    ]);
    let addresses = ["0000:3b:00.0", "0000:5e:00.0", "0001:3b:00.0"];
    let devices = addresses.iter().enumerate().map(|(at, address)| gpu(at, address)).collect();
    let mut gpus = Gpus { devices, ..Gpus::default() };
    gpus.find_nodes(root.path());
    let nodes: Vec<_> = gpus.devices.iter().map(|gpu| gpu.numa_node).collect();
    assert_eq!(nodes, [Some(1), None, None]);
}

#[test]
fn a_thread_is_kept_on_some_processors_and_so_are_those_that_it_starts() {
    let cpu = choose_cpus(&Topology::detect(), 1)[0];
    let kept = std::thread::spawn(move || {
        keep_current_thread_on(&[cpu]).expect("a processor of ours");
        let count = || std::thread::available_parallelism().expect("a number").get();
        (count(), std::thread::spawn(count).join().expect("no panic"))
    });
    assert_eq!(kept.join().expect("no panic"), (1, 1));
    assert_eq!(keep_current_thread_on(&[]), Ok(()));
    let beyond = keep_current_thread_on(&[cpu, CpuId(70_000)]);
    assert_eq!(beyond, Err(PinError::OutOfRange { cpu: CpuId(70_000) }));
    let refused = std::thread::spawn(|| keep_current_thread_on(&[CpuId(1023)])).join();
    assert_eq!(refused.expect("no panic"), Err(PinError::Refused { cpu: CpuId(1023) }));
}
