//! How many workers and where, on machines whose `/sys` and `/proc` lie in `tests/data/machines`.

use std::fs;
use std::path::Path;
use tandem::config::{Config, ConfigError, CpuConfig};
use tandem::hardware::Topology;
use tandem::placement::{NodeTeams, Workers};

/// A machine's topology by its file of lines `path = text`. Later ones of the same path hold.
pub fn machine(name: &str, changes: &[(&str, &str)]) -> Topology {
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/machines/{name}.txt"));
    let text = fs::read_to_string(file).expect("a machine");
    let root = tempfile::tempdir().expect("a temporary folder");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let files = lines.map(|line| line.split_once(" = ").expect("path = text"));
    for (path, text) in files.chain(changes.iter().copied()) {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, format!("{text}\n")).expect("a file");
    }
    Topology::read(root.path())
}

pub fn config(threads: usize) -> CpuConfig {
    CpuConfig { threads, ..Config::default().cpu }
}

/// Threads, their processors and the engine loop's.
type Chosen = (usize, Vec<u32>, Option<u32>);

fn chosen(workers: &Workers) -> Chosen {
    let cpus = workers.cpus.iter().map(|cpu| cpu.0).collect();
    (workers.threads, cpus, workers.engine_loop.map(|cpu| cpu.0))
}

fn choose(name: &str, threads: usize) -> Chosen {
    let workers = Workers::choose(&machine(name, &[]), &config(threads)).expect("a choice");
    chosen(&workers)
}

#[test]
fn a_small_virtual_machine_is_filled() {
    assert_eq!(choose("vm_2_cores", 0), (2, vec![0, 1], None));
    assert_eq!(choose("vm_2_cores", 1), (1, vec![0], Some(1)));
}

#[test]
fn a_core_gets_one_worker_however_many_threads_it_has() {
    assert_eq!(choose("smt_8_cores_16_threads", 0), (8, (0..8).collect(), Some(8)));
    // Whoever asks for more gets the second threads.
    assert_eq!(choose("smt_8_cores_16_threads", 12).1, (0..12).collect::<Vec<_>>());
}

#[test]
fn efficiency_cores_are_left_out_unless_asked_for() {
    let large: Vec<u32> = (0..16).step_by(2).collect();
    assert_eq!(choose("hybrid_8p_16e", 0), (8, large.clone(), Some(16)));
    assert_eq!(choose("hybrid_8p_16e", 6).1, large[..6]);
    // Small cores come before second threads of large ones.
    let all: Vec<u32> = large.iter().copied().chain(16..32).chain((1..16).step_by(2)).collect();
    assert_eq!(choose("hybrid_8p_16e", 32), (32, all, None));
    assert_eq!(choose("hybrid_4p_4e_by_frequency", 0), (4, vec![0, 1, 2, 3], Some(4)));
}

#[test]
fn efficiency_cores_are_used_where_nothing_else_is_left() {
    let mask = ("proc/self/status", "Cpus_allowed_list: 20-23");
    let workers = Workers::choose(&machine("hybrid_8p_16e", &[mask]), &config(0)).expect("some");
    assert_eq!(chosen(&workers), (4, vec![20, 21, 22, 23], None));
    let mask = ("proc/self/status", "Cpus_allowed_list: 3,20-23");
    let workers = Workers::choose(&machine("hybrid_8p_16e", &[mask]), &config(0)).expect("some");
    assert_eq!(chosen(&workers), (1, vec![3], Some(20)));
}

#[test]
fn a_quota_limits_the_threads_and_forbids_pinning() {
    assert_eq!(choose("container_1.5_of_8", 0), (1, vec![], None));
    assert_eq!(choose("cgroup_v1_4_of_16", 0), (4, vec![], None));
    // More than the quota is honoured and said to be so.
    let container = machine("container_1.5_of_8", &[]);
    let workers = Workers::choose(&container, &config(3)).expect("it may");
    assert_eq!(chosen(&workers), (3, vec![], None));
    assert!(workers.why.contains("although"), "{workers}");
    let tiny = machine("container_1.5_of_8", &[("sys/fs/cgroup/cpu.max", "20000 100000")]);
    assert_eq!(Workers::choose(&tiny, &config(0)).expect("one").threads, 1);
}

#[test]
fn a_quota_of_all_cores_changes_nothing() {
    for (quota, cpus) in [("800000 100000", 8), ("799999 100000", 0), ("max 100000", 8)] {
        let container = machine("container_1.5_of_8", &[("sys/fs/cgroup/cpu.max", quota)]);
        let workers = Workers::choose(&container, &config(0)).expect("some");
        assert_eq!(workers.cpus.len(), cpus, "{quota}: {workers}");
    }
    // Second threads are no cores: a quota of 8 is all of this machine.
    let group = ("proc/self/cgroup", "0::/");
    let quota = ("sys/fs/cgroup/cpu.max", "800000 100000");
    let server = machine("smt_8_cores_16_threads", &[group, quota]);
    assert_eq!(Workers::choose(&server, &config(0)).expect("some").cpus.len(), 8);
}

#[test]
fn only_processors_that_are_allowed_and_online_are_used() {
    assert_eq!(choose("affinity_3_of_8", 0), (3, vec![1, 4, 6], None));
}

#[test]
fn numa_nodes_get_workers_in_proportion_unless_that_is_off() {
    // Processor 0 is not allowed, but its core's second thread is.
    let all = vec![4, 5, 6, 7, 1, 2, 3, 8];
    assert_eq!(choose("two_numa_nodes", 0), (8, all.clone(), Some(12)));
    assert_eq!(choose("two_numa_nodes", 4), (4, vec![4, 5, 1, 2], Some(6)));
    let off = CpuConfig { numa: "off".into(), ..config(4) };
    let machine = machine("two_numa_nodes", &[]);
    let workers = Workers::choose(&machine, &off).expect("a choice");
    assert_eq!(chosen(&workers), (4, vec![4, 5, 6, 7], Some(1)));
    assert_eq!(workers.nodes, NodeTeams::default());
    let off = CpuConfig { threads: 0, ..off };
    assert_eq!(Workers::choose(&machine, &off).expect("a choice").cpus.len(), all.len());
}

#[test]
fn more_threads_than_processors_are_refused() {
    for (name, most) in [("vm_2_cores", 2), ("affinity_3_of_8", 3), ("hybrid_8p_16e", 32)] {
        assert_eq!(choose(name, most).0, most);
        let refused = Workers::choose(&machine(name, &[]), &config(most + 1)).unwrap_err();
        let ConfigError { field, got, allowed } = refused;
        assert_eq!((field.as_str(), got), ("cpu.threads", (most + 1).to_string()));
        assert!(allowed.starts_with(&format!("1 to {most}, ")), "{allowed}");
    }
}

#[test]
fn nothing_is_pinned_when_pinning_is_off() {
    let off = CpuConfig { pin: false, ..config(0) };
    let workers = Workers::choose(&machine("hybrid_8p_16e", &[]), &off).expect("some");
    assert_eq!(chosen(&workers), (8, vec![], None));
}

#[test]
fn a_choice_says_what_and_why() {
    let told = |name: &str, threads| {
        let workers = Workers::choose(&machine(name, &[]), &config(threads)).expect("a choice");
        workers.to_string()
    };
    assert_eq!(told("vm_2_cores", 0), "2 threads on processors 0, 1: one per physical core");
    assert_eq!(
        told("hybrid_8p_16e", 0),
        "8 threads on processors 0, 2, 4, 6, 8, 10, 12, 14: one per performance core; \
         16 efficiency cores are left out"
    );
    assert_eq!(
        told("container_1.5_of_8", 0),
        "1 thread: the control group's quota grants 1 whole processor; \
         not pinned, since a quota is time on any processor"
    );
    assert_eq!(told("vm_2_cores", 1), "1 thread on processor 0: as cpu.threads says");
}
