//! The machine's facts, read from fake `/sys` and `/proc` trees and from this machine.

#[path = "hardware/nodes.rs"]
mod nodes;
#[path = "hardware/probe.rs"]
mod probe;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use tandem::config::GpuChoice;
use tandem::hardware::{
    CacheKind, CoreKind, CpuId, Gpus, HardwareProfile, PinError, Topology, choose_cpus,
    pin_current_thread, roofs,
};
use tempfile::TempDir;

/// A root with the given files.
fn tree(files: &[(&str, &str)]) -> TempDir {
    let root = tempfile::tempdir().expect("a temporary folder");
    add(root.path(), files);
    root
}

fn add(root: &Path, files: &[(&str, &str)]) {
    for (path, text) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        fs::write(path, format!("{text}\n")).expect("a file");
    }
}

/// One processor's files.
fn add_cpu(root: &Path, id: u32, package: i32, siblings: &str) {
    let topology = format!("sys/devices/system/cpu/cpu{id}/topology");
    add(
        root,
        &[
            (&format!("{topology}/physical_package_id"), &package.to_string()),
            (&format!("{topology}/core_cpus_list"), siblings),
        ],
    );
}

/// Two packages of two cores with two threads each, numbered as Linux does: second threads last.
fn two_sockets() -> TempDir {
    let root = tree(&[
        ("sys/devices/system/cpu/online", "0-7"),
        ("sys/devices/system/node/node0/cpulist", "0-1,4-5"),
        ("sys/devices/system/node/node1/cpulist", "2-3,6-7"),
        (
            "sys/devices/system/node/node1/meminfo",
            "Node 1 MemTotal:  2048 kB\nNode 1 MemFree: 5 kB",
        ),
        ("proc/self/status", "Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t0-7"),
    ]);
    for id in 0..8u32 {
        let (core, package) = (id % 4, (id % 4 / 2) as i32);
        add_cpu(root.path(), id, package, &format!("{core},{}", core + 4));
    }
    root
}

fn ids(cpus: &[CpuId]) -> Vec<u32> {
    cpus.iter().map(|cpu| cpu.0).collect()
}

#[test]
fn sockets_cores_and_nodes_are_told_apart() {
    let root = two_sockets();
    let topology = Topology::read(root.path());
    assert_eq!((topology.cpus.len(), topology.core_count()), (8, 4));
    let facts: Vec<_> =
        topology.cpus.iter().map(|cpu| (cpu.core, cpu.package, cpu.numa_node)).collect();
    assert_eq!(facts[..4], [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 1, 1)]);
    assert_eq!(facts[4..], facts[..4]);
    assert!(topology.cpus.iter().all(|cpu| cpu.kind == CoreKind::Performance && cpu.usable));
    assert_eq!(topology.numa_nodes.len(), 2);
    assert_eq!(topology.numa_nodes[1].memory_bytes, 2048 * 1024);
    assert_eq!((topology.usable_cpus().count(), topology.cpu_quota), (8, None));
}

#[test]
fn workers_get_whole_cores_first_and_one_node_after_the_other() {
    let root = two_sockets();
    let topology = Topology::read(root.path());
    assert_eq!(ids(&choose_cpus(&topology, 3)), [0, 1, 2]);
    assert_eq!(ids(&choose_cpus(&topology, 99)), [0, 1, 2, 3, 4, 5, 6, 7]);
    let status = "Cpus_allowed_list:\t1-3,5-7";
    add(root.path(), &[("proc/self/status", status)]);
    let topology = Topology::read(root.path());
    assert_eq!(topology.usable_cpus().count(), 6);
    // Node 1 has more usable processors now.
    assert_eq!(ids(&choose_cpus(&topology, 4)), [2, 3, 1, 6]);
}

#[test]
fn efficiency_cores_come_last() {
    let root = tree(&[
        ("sys/devices/system/cpu/online", "0-5"),
        ("sys/devices/cpu_core/cpus", "0-3"),
        ("sys/devices/cpu_atom/cpus", "4-5"),
    ]);
    for id in 0..4u32 {
        add_cpu(root.path(), id, 0, &format!("{}-{}", id / 2 * 2, id / 2 * 2 + 1));
    }
    (4..6).for_each(|id| add_cpu(root.path(), id, 0, &id.to_string()));
    let topology = Topology::read(root.path());
    let small: Vec<u32> = topology
        .cpus
        .iter()
        .filter(|cpu| cpu.kind == CoreKind::Efficiency)
        .map(|cpu| cpu.id.0)
        .collect();
    assert_eq!(small, [4, 5]);
    assert_eq!(ids(&choose_cpus(&topology, 6)), [0, 2, 4, 5, 1, 3]);
}

#[test]
fn capacities_tell_kinds_where_nobody_else_does() {
    let root = tree(&[
        ("sys/devices/system/cpu/online", "0-2"),
        ("sys/devices/system/cpu/cpu0/cpu_capacity", "1024"),
        ("sys/devices/system/cpu/cpu1/cpu_capacity", "980"),
        ("sys/devices/system/cpu/cpu2/cpu_capacity", "446"),
    ]);
    let kinds: Vec<_> = Topology::read(root.path()).cpus.iter().map(|cpu| cpu.kind).collect();
    assert_eq!(kinds, [CoreKind::Performance, CoreKind::Performance, CoreKind::Efficiency]);
}

#[test]
fn caches_are_counted_once() {
    let root = tree(&[("sys/devices/system/cpu/online", "0-1")]);
    for id in 0..2 {
        for (index, level, kind, size, shared) in [
            (0, "1", "Data", "48K", id.to_string()),
            (1, "1", "Instruction", "32K", id.to_string()),
            (3, "3", "Unified", "32M", "0-1".to_owned()),
        ] {
            let folder = format!("sys/devices/system/cpu/cpu{id}/cache/index{index}");
            add(
                root.path(),
                &[
                    (&format!("{folder}/level"), level),
                    (&format!("{folder}/type"), kind),
                    (&format!("{folder}/size"), size),
                    (&format!("{folder}/shared_cpu_list"), &shared),
                ],
            );
        }
    }
    let topology = Topology::read(root.path());
    assert_eq!(topology.caches.len(), 5);
    assert_eq!(topology.cache_bytes(1), 2 * 48 * 1024);
    assert_eq!(topology.cache_bytes(3), 32 << 20);
    assert_eq!(topology.cache_bytes(2), 0);
    let last = topology.caches.last().expect("a cache");
    assert_eq!(last.kind, CacheKind::Unified);
    assert_eq!(last.cpus, BTreeSet::from([CpuId(0), CpuId(1)]));
}

#[test]
fn quotas_of_both_versions_are_found() {
    let quota = |files: &[(&str, &str)]| {
        let root = two_sockets();
        add(root.path(), files);
        let topology = Topology::read(root.path());
        (topology.cpu_quota, topology.quota_threads())
    };
    let new = ("proc/self/cgroup", "0::/a/b");
    assert_eq!(quota(&[new, ("sys/fs/cgroup/a/b/cpu.max", "250000 100000")]), (Some(2.5), Some(2)));
    assert_eq!(quota(&[new, ("sys/fs/cgroup/a/b/cpu.max", "max 100000")]), (None, None));
    // The strictest ancestor holds, and a container's own root is read when the path is foreign.
    let (wide, narrow) = ("600000 100000", "300000 100000");
    let both = [new, ("sys/fs/cgroup/a/b/cpu.max", wide), ("sys/fs/cgroup/a/cpu.max", narrow)];
    assert_eq!(quota(&both), (Some(3.0), Some(3)));
    assert_eq!(quota(&[new, ("sys/fs/cgroup/cpu.max", "50000 100000")]), (Some(0.5), Some(1)));
    let old = ("proc/self/cgroup", "4:cpu,cpuacct:/x\n0::/");
    let period = ("sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us", "100000");
    let limit = "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us";
    assert_eq!(quota(&[old, period, (limit, "400000")]), (Some(4.0), Some(4)));
    assert_eq!(quota(&[old, period, (limit, "-1")]), (None, None));
}

#[test]
fn broken_and_missing_files_leave_a_usable_machine() {
    let empty = tree(&[]);
    let topology = Topology::read(empty.path());
    assert!(!topology.cpus.is_empty() && topology.numa_nodes.len() == 1);
    assert_eq!(HardwareProfile::read_memory(empty.path()), (0, 0));
    let broken = tree(&[
        ("sys/devices/system/cpu/online", "0-99999999999"),
        ("sys/devices/system/cpu/cpu0/topology/physical_package_id", "-1"),
        ("sys/devices/system/cpu/cpu0/topology/core_cpus_list", "7"),
        ("sys/devices/system/cpu/cpu0/cache/index0/size", "99999999999999999999G"),
        ("sys/devices/system/cpu/cpu1/cpu_capacity", "NaN"),
        ("proc/self/status", "Cpus_allowed_list:\t64-70"),
        ("proc/self/cgroup", "nonsense\n1\n0::/../../x"),
        ("sys/fs/cgroup/cpu.max", "a b"),
        ("proc/meminfo", "MemTotal: many kB"),
    ]);
    let topology = Topology::read(broken.path());
    assert_eq!(topology.cpus.len(), 2, "the folders say so");
    assert_eq!(topology.cpus[0].package, 0);
    assert!(topology.cpus.iter().all(|cpu| cpu.usable));
}

#[test]
fn memory_is_the_smallest_of_machine_and_groups() {
    let kib = 1024;
    let meminfo = ("proc/meminfo", "MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:  6000 kB");
    let read = |files: &[(&str, &str)]| {
        let root = tree(files);
        HardwareProfile::read_memory(root.path())
    };
    assert_eq!(read(&[meminfo]), (8000 * kib, 6000 * kib));
    let group = ("proc/self/cgroup", "0::/a");
    let limited = [
        meminfo,
        group,
        ("sys/fs/cgroup/a/memory.max", "4096000"),
        ("sys/fs/cgroup/a/memory.current", "2048000"),
        ("sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 1024000\nactive_file 7"),
    ];
    assert_eq!(read(&limited), (4000 * kib, 3000 * kib));
    let unlimited = [meminfo, group, ("sys/fs/cgroup/a/memory.max", "max")];
    assert_eq!(read(&unlimited), (8000 * kib, 6000 * kib));
    let old = [
        meminfo,
        ("proc/self/cgroup", "4:memory:/x"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712"),
        ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "1024000"),
        ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "9999999"),
    ];
    assert_eq!(read(&old), (1000 * kib, 0));
}

#[test]
fn this_machine_has_a_profile() {
    let profile = HardwareProfile::detect();
    println!("{profile:#?}");
    let topology = &profile.topology;
    let seen = std::thread::available_parallelism().expect("a number of processors").get();
    assert!(topology.usable_cpus().count() >= seen.min(topology.cpus.len()));
    assert!(profile.memory_total_bytes >= profile.memory_available_bytes);
    assert!(profile.memory_available_bytes > 0);
    let gpus = &profile.gpus;
    let is_without = gpus.devices.is_empty() && gpus.closed.is_empty();
    assert_eq!(is_without, gpus.absence.is_some());
    assert!(gpus.closed.iter().all(|gpu| gpu.refusal.is_some()), "all were asked for");
    let plain = Topology::read(Path::new("/"));
    let numbers = |topology: &Topology| -> Vec<_> {
        topology.usable_cpus().map(|cpu| (cpu.id, cpu.package, cpu.numa_node)).collect()
    };
    assert_eq!(numbers(topology), numbers(&plain), "hwloc, if built in, agrees with /sys");
    assert_eq!(topology.core_count(), plain.core_count());
    assert_eq!(topology.cache_bytes(3), plain.cache_bytes(3));
}

#[test]
fn gpus_that_are_not_wanted_are_left_alone() {
    let off = HardwareProfile::detect_for(&GpuChoice::Off).gpus;
    assert_eq!(off, Gpus { is_unasked: true, ..Gpus::default() });
    let all = Gpus::detect();
    let none = Gpus::detect_for(&GpuChoice::These(vec![usize::MAX]));
    assert!(none.devices.is_empty());
    assert!(none.closed.iter().all(|gpu| gpu.refusal.is_none()), "{none:?}");
    assert_eq!((none.names(), none.absence), (all.names(), all.absence));
}

#[test]
fn a_thread_is_pinned_where_it_may_run_and_told_where_not() {
    let cpu = choose_cpus(&Topology::detect(), 1)[0];
    let pinned = std::thread::spawn(move || pin_current_thread(cpu)).join().expect("no panic");
    assert_eq!(pinned, Ok(()));
    let refused = std::thread::spawn(|| pin_current_thread(CpuId(1023))).join().expect("no panic");
    assert_eq!(refused, Err(PinError::Refused { cpu: CpuId(1023) }));
    let beyond = pin_current_thread(CpuId(70_000));
    assert_eq!(beyond, Err(PinError::OutOfRange { cpu: CpuId(70_000) }));
}

#[test]
fn roofs_are_measured_on_any_team_and_memory() {
    let kernels = tandem_cpu_kernels::Kernels::best();
    // A processor that is not there leaves its thread unpinned; more threads than words idle.
    for (threads, cpus) in [(1, vec![]), (2, vec![CpuId(0), CpuId(9999)]), (5, vec![CpuId(0)])] {
        let team = roofs::Team { threads, cpus };
        for words in [3, 1 << 16] {
            let read = roofs::read_bytes_per_second(&team, kernels, &mut vec![0; words]);
            assert!(read.is_finite() && read > 0.0, "{team:?}: {read}");
        }
        let macs = roofs::macs_per_second(&team, kernels);
        assert!(macs.is_finite() && macs > 0.0, "{team:?}: {macs}");
    }
}
