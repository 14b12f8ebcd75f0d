//! How workers, rows and memory are divided over NUMA nodes that are made up.

use super::gpu::{gpu, with};
use super::spec;
use super::workers::{config, machine};
use proptest::prelude::*;
use tandem::config::{Config, CpuConfig};
use tandem::hardware::{Gpu, HardwareProfile};
use tandem::model::{ModelSpec, SyntheticModel};
use tandem::placement::{Device, NODE_ROWS, NodeTeams, Placement, Workers};

/// Nodes 0, 1, … with so many workers.
fn teams(sizes: &[usize]) -> NodeTeams {
    let nodes = sizes.iter().enumerate().flat_map(|(node, size)| vec![node as u32; *size]);
    NodeTeams::of_workers(&nodes.collect::<Vec<_>>())
}

proptest! {
    #[test]
    fn every_row_is_of_one_node_and_of_one_worker_near_it(
        sizes in prop::collection::vec(1_usize..40, 1..9),
        rows in 0_usize..60_000,
        unit in prop::sample::select(vec![1_usize, 4, 16, 32]),
    ) {
        let (teams, workers) = (teams(&sizes), sizes.iter().sum::<usize>());
        prop_assert_eq!(teams.count(), sizes.len());
        let mut next = 0;
        for (team, size) in sizes.iter().enumerate() {
            let near = teams.rows(team, rows);
            prop_assert_eq!(near.start, next);
            prop_assert!(near.end == rows || near.end.is_multiple_of(NODE_ROWS));
            next = near.end;
            let even = (rows * size) as f64 / workers as f64;
            let off = (near.len() as f64 - even).abs();
            prop_assert!(off <= NODE_ROWS as f64 + 1.0, "{off} from {even}");
            let own = teams.workers(team, workers);
            prop_assert_eq!(own.len(), *size);
            for worker in own.clone() {
                prop_assert_eq!(teams.team_of(worker), team);
                let cut = |worker| teams.first_unit((worker, workers), (rows, unit));
                let (start, end) = (cut(worker) * unit, rows.min(cut(worker + 1) * unit));
                prop_assert!(start <= end || start >= rows);
                if start < end {
                    prop_assert!(near.start <= start && end <= near.end, "{start}..{end}");
                }
                let units = near.len().div_ceil(unit);
                let share = cut(worker + 1) - cut(worker);
                let even = [units / size, units / size + 1];
                prop_assert!(even.contains(&share) || worker + 1 == own.end);
            }
        }
        prop_assert_eq!(next, rows);
        prop_assert_eq!(teams.first_unit((0, workers), (rows, unit)), 0);
        prop_assert_eq!(teams.first_unit((workers, workers), (rows, unit)), rows.div_ceil(unit));
    }

    #[test]
    fn one_node_is_divided_as_if_there_was_none(
        (workers, rows) in (1_usize..70, 0_usize..9_000),
        unit in prop::sample::select(vec![1_usize, 16, 32]),
    ) {
        let teams = NodeTeams::of_workers(&vec![3; workers]);
        prop_assert_eq!(&teams, &NodeTeams::default());
        prop_assert_eq!(teams.rows(0, rows), 0..rows);
        let units = rows.div_ceil(unit);
        for worker in 0..=workers {
            let first = teams.first_unit((worker, workers), (rows, unit));
            prop_assert_eq!(first, units * worker / workers);
        }
    }
}

#[test]
fn teams_of_another_number_of_workers_are_one() {
    assert_eq!(teams(&[2, 3]).of_all(5), teams(&[2, 3]));
    assert_eq!(teams(&[2, 3]).of_all(4), NodeTeams::default());
    let in_turn = NodeTeams::in_turn(vec![0, 2]);
    assert_eq!(in_turn.clone().of_all(7), in_turn);
    assert_eq!((in_turn.count(), in_turn.are_divided(), in_turn.portion(1, 50)), (1, false, 25));
    assert_eq!(NodeTeams::in_turn(vec![4]), NodeTeams::default());
}

fn choose(name: &str, changes: &[(&str, &str)], config: &CpuConfig) -> Workers {
    Workers::choose(&machine(name, changes), config).expect("a choice")
}

#[test]
fn workers_say_their_nodes() {
    let workers = choose("two_numa_nodes", &[], &config(0));
    assert_eq!(workers.nodes, NodeTeams::of_workers(&[1, 1, 1, 1, 0, 0, 0, 0]));
    assert_eq!(
        workers.to_string(),
        "8 threads on processors 4, 5, 6, 7, 1, 2, 3, 8: one per physical core; 4 on NUMA node 1, \
         4 on NUMA node 0, each node with its rows of all weights"
    );
    let one =
        choose("two_numa_nodes", &[("proc/self/status", "Cpus_allowed_list: 4-7")], &config(0));
    assert_eq!((one.threads, one.nodes), (4, NodeTeams::default()));
    assert_eq!(choose("smt_8_cores_16_threads", &[], &config(0)).nodes, NodeTeams::default());
}

#[test]
fn workers_without_a_node_have_memory_of_all_in_turn() {
    let unpinned = CpuConfig { pin: false, ..config(0) };
    let workers = choose("two_numa_nodes", &[], &unpinned);
    assert_eq!((workers.cpus.len(), &workers.nodes), (0, &NodeTeams::in_turn(vec![0, 1])));
    assert!(workers.to_string().ends_with("pages of weights lie on NUMA nodes 0, 1 in turn"));
    let off = CpuConfig { numa: "off".into(), ..unpinned };
    assert_eq!(choose("two_numa_nodes", &[], &off).nodes, NodeTeams::default());
}

#[test]
fn isolated_workers_are_those_of_one_node() {
    let isolated = CpuConfig { numa: "isolate".into(), ..config(0) };
    let workers = choose("two_numa_nodes", &[], &isolated);
    assert_eq!(workers.threads, 4);
    assert_eq!(workers.cpus.iter().map(|cpu| cpu.0).collect::<Vec<_>>(), [4, 5, 6, 7]);
    assert_eq!(workers.nodes, NodeTeams::default());
    let too_many = CpuConfig { threads: 9, ..isolated };
    assert!(Workers::choose(&machine("two_numa_nodes", &[]), &too_many).is_err());
}

#[test]
fn memory_of_a_forbidden_node_is_left_to_the_system() {
    let status = "Cpus_allowed_list: 0-15\nMems_allowed_list: 0";
    let workers = choose("two_numa_nodes", &[("proc/self/status", status)], &config(0));
    assert_eq!((workers.threads, &workers.nodes), (8, &NodeTeams::default()));
    assert!(workers.why.contains("this process may have none of NUMA node 1"), "{workers}");
}

/// A machine of two nodes with so many bytes free on each.
fn two_nodes(free: [u64; 2], gpus: Vec<Gpu>) -> HardwareProfile {
    let meminfo = |node: usize| {
        format!("Node {node} MemTotal: 99999999 kB\nNode {node} MemFree: {} kB", free[node] >> 10)
    };
    let [first, second] = [0, 1].map(meminfo);
    let topology = machine(
        "two_numa_nodes",
        &[
            ("sys/devices/system/node/node0/meminfo", &first),
            ("sys/devices/system/node/node1/meminfo", &second),
            ("proc/self/status", "Cpus_allowed_list: 0-15"),
        ],
    );
    HardwareProfile { topology, ..with(gpus) }
}

#[test]
fn a_plan_says_what_lies_on_which_node_and_where_too_little_is_free() {
    let plan = |free| {
        Placement::plan(&spec(), &two_nodes(free, vec![]), &Config::default()).expect("it fits")
    };
    let placement = plan([8 << 30, 8 << 30]);
    let stage = &placement.stages[0];
    let half = (stage.weight_bytes + stage.kv_bytes) / 2;
    assert_eq!(placement.node_bytes(), [(0, half), (1, half)]);
    assert_eq!(placement.notes, [""; 0]);
    let weights = &placement.explain()[0];
    assert!(weights.why.ends_with("; rows by NUMA node: 50 % on 0, 50 % on 1"), "{}", weights.why);
    let placement = plan([8 << 30, 4 << 10]);
    assert_eq!(placement.notes.len(), 1);
    let told = "NUMA node 1 has 4.00 KiB free of the ";
    assert!(placement.notes[0].starts_with(told), "{:?}", placement.notes);
    // Nodes that do not tell are not spoken of.
    assert_eq!(plan([0, 8 << 30]).notes, [""; 0]);
}

#[test]
fn threads_of_a_gpu_have_processors_near_to_it() {
    let spec: ModelSpec = "llama-8b:q4_0".parse::<SyntheticModel>().expect("a shape").spec();
    let near = |node| vec![Gpu { numa_node: node, ..gpu(0, 12 << 30) }];
    let plan = |node, limit: u64| {
        let mut config = Config::default();
        config.gpu.device = "0".into();
        config.gpu.vram_limit.0 = limit;
        Placement::plan(&spec, &two_nodes([64 << 30; 2], near(node)), &config).expect("it fits")
    };
    let ids = |workers: &Workers| {
        let numbers = |cpus: &[tandem::hardware::CpuId]| cpus.iter().map(|cpu| cpu.0).collect();
        (numbers(&workers.cpus), numbers(&workers.gpu_threads))
    };
    // Where nothing is spilled, no worker has any of them.
    let whole = plan(Some(1), 0);
    assert_eq!((whole.device(), whole.node_bytes()), (&Device::Gpu(0), vec![]));
    let (_, serving): (Vec<u32>, Vec<u32>) = ids(&whole.workers);
    assert_eq!(serving, [4, 5, 6, 7, 12, 13, 14, 15]);
    // The GPU's node gives up a worker.
    let spilled = plan(Some(1), 3 << 30);
    let (workers, serving): (Vec<u32>, Vec<u32>) = ids(&spilled.workers);
    assert_eq!((workers, serving), (vec![0, 1, 2, 3, 4, 5, 6], vec![7, 15]));
    assert_eq!(spilled.workers.nodes, teams(&[4, 3]));
    let bytes = spilled.spill.as_ref().expect("it is spilled").weight_bytes;
    assert_eq!(spilled.node_bytes(), [(0, bytes * 4 / 7), (1, bytes * 3 / 7)]);
    let rows = spilled.explain();
    let row = rows.iter().find(|row| row.what == "spilled weights").expect("a row");
    assert!(row.why.ends_with("; rows by NUMA node: 57 % on 0, 43 % on 1"), "{}", row.why);
    // Pieces end with a node's rows, so they are smaller, and as much of them fits into the ring.
    let mut off = Config::default();
    off.cpu.numa = "off".into();
    off.gpu.device = "0".into();
    off.gpu.vram_limit.0 = 3 << 30;
    let machine = two_nodes([64 << 30; 2], near(Some(1)));
    let off = Placement::plan(&spec, &machine, &off).expect("it fits").spill.expect("spilled");
    let spill = spilled.spill.as_ref().expect("it is spilled");
    assert!(spill.ring_slots > off.ring_slots, "{spill:?}");
    assert!(spill.ring_bytes.abs_diff(off.ring_bytes) < off.ring_bytes / 8, "{spill:?}, {off:?}");
    // Of a GPU whose node nobody knows.
    let unknown = plan(None, 3 << 30);
    assert_eq!((unknown.workers.threads, unknown.workers.gpu_threads.len()), (7, 0));
}
