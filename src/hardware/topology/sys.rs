//! The topology as `/sys/devices/system` and `/proc/self/status` tell it.

use super::super::system_files::{SystemFiles, field, parse_id_list};
use super::{
    Cache, CacheKind, CoreKind, CpuId, LogicalCpu, NodeMemory, Topology, TopologySource, nodes_of,
};
use std::collections::{BTreeMap, BTreeSet};

const CPUS: &str = "sys/devices/system/cpu";
const NODES: &str = "sys/devices/system/node";

/// Processors of small cores by name: Intel's efficiency cores, and those of its low-power island.
const SMALL_CORES: [&str; 2] = ["sys/devices/cpu_atom/cpus", "sys/devices/cpu_lowpower/cpus"];

/// What tells how fast a core is, the surest first.
const CAPACITY_SIGNS: [&str; 3] =
    ["cpu_capacity", "cpufreq/cpuinfo_max_freq", "cpufreq/base_frequency"];

/// A core with less than this share of the largest capacity counts as an efficiency core. Cores of
/// one kind differ by less (favoured cores clock a few per cent higher), small cores by more.
const EFFICIENCY_SHARE: f64 = 0.75;

/// Reads everything but the quota.
pub(super) fn read(files: &SystemFiles) -> Topology {
    let allowed = allowed_cpus(files);
    let online = online_cpus(files, allowed.as_ref());
    let (kinds, nodes) = (core_kinds(files, &online), node_of_cpus(files));
    let mut cores: BTreeMap<BTreeSet<u32>, u32> = BTreeMap::new();
    let mut cpus = Vec::with_capacity(online.len());
    for id in &online {
        let count = cores.len() as u32;
        let core = *cores.entry(core_siblings(files, *id)).or_insert(count);
        let package: Option<i64> =
            files.number(&format!("{CPUS}/cpu{id}/topology/physical_package_id"));
        cpus.push(LogicalCpu {
            id: CpuId(*id),
            core,
            // Some virtual machines and ARM boards report −1.
            package: package.and_then(|package| u32::try_from(package).ok()).unwrap_or(0),
            numa_node: nodes.get(id).copied().unwrap_or(0),
            kind: kinds.get(id).copied().unwrap_or(CoreKind::Performance),
            usable: allowed.as_ref().is_none_or(|allowed| allowed.contains(id)),
        });
    }
    // Affinity that names only processors that are not online tells nothing.
    if !cpus.iter().any(|cpu| cpu.usable) {
        cpus.iter_mut().for_each(|cpu| cpu.usable = true);
    }
    let mut numa_nodes = nodes_of(&cpus, |node| node_memory(files, node));
    if numa_nodes.len() > 1 {
        let allowed = files.field("proc/self/status", "Mems_allowed_list");
        let allowed = allowed.and_then(|list| parse_id_list(&list));
        for node in &mut numa_nodes {
            node.is_allowed = allowed.as_ref().is_none_or(|allowed| allowed.contains(&node.id));
        }
    }
    Topology {
        caches: caches(files, &online),
        numa_nodes,
        cpus,
        cpu_quota: None,
        source: TopologySource::Sys,
    }
}

/// Processors in the affinity mask of this process.
fn allowed_cpus(files: &SystemFiles) -> Option<BTreeSet<u32>> {
    parse_id_list(&files.field("proc/self/status", "Cpus_allowed_list")?)
}

/// Processors that are switched on; without a word from `/sys` those that are allowed, and without
/// any word as many as the standard library sees.
fn online_cpus(files: &SystemFiles, allowed: Option<&BTreeSet<u32>>) -> BTreeSet<u32> {
    let listed = files.id_list(&format!("{CPUS}/online"));
    let folders = || Some(files.numbered(CPUS, "cpu")).filter(|folders| !folders.is_empty());
    listed.or_else(folders).or_else(|| allowed.cloned()).unwrap_or_else(|| {
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        (0..count as u32).collect()
    })
}

/// Processors of one physical core; `core_cpus_list` has an older name. A processor of which
/// nothing is known is a core of its own.
fn core_siblings(files: &SystemFiles, id: u32) -> BTreeSet<u32> {
    ["core_cpus_list", "thread_siblings_list"]
        .into_iter()
        .find_map(|name| files.id_list(&format!("{CPUS}/cpu{id}/topology/{name}")))
        .filter(|siblings| siblings.contains(&id))
        .unwrap_or_else(|| BTreeSet::from([id]))
}

/// Kinds of cores: Intel's hybrid processors name their sets, others tell a capacity per core, and
/// where nobody tells, the highest frequencies of small cores are far below those of large ones.
fn core_kinds(files: &SystemFiles, online: &BTreeSet<u32>) -> BTreeMap<u32, CoreKind> {
    let small = SMALL_CORES.iter().filter_map(|path| files.id_list(path));
    let named: BTreeSet<u32> = small.flatten().collect();
    if !named.is_empty() {
        return named.into_iter().map(|id| (id, CoreKind::Efficiency)).collect();
    }
    // A sign counts only when every core has it: what is not told is not small.
    let told = |sign: &&str| {
        let value = |id: &u32| Some((*id, files.number(&format!("{CPUS}/cpu{id}/{sign}"))?));
        online.iter().map(value).collect::<Option<Vec<(u32, f64)>>>()
    };
    let capacities = CAPACITY_SIGNS.iter().find_map(told).unwrap_or_default();
    let largest = capacities.iter().map(|(_, capacity)| *capacity).fold(0.0, f64::max);
    let kind = |(id, capacity): (u32, f64)| {
        let small = capacity < EFFICIENCY_SHARE * largest;
        (id, if small { CoreKind::Efficiency } else { CoreKind::Performance })
    };
    capacities.into_iter().map(kind).collect()
}

fn node_of_cpus(files: &SystemFiles) -> BTreeMap<u32, u32> {
    let mut nodes = BTreeMap::new();
    for node in files.numbered(NODES, "node") {
        let cpus = files.id_list(&format!("{NODES}/node{node}/cpulist")).unwrap_or_default();
        nodes.extend(cpus.into_iter().map(|cpu| (cpu, node)));
    }
    nodes
}

/// `Node 0 MemTotal:  24689432 kB` among others. What caches of files hold and nobody has touched
/// lately is free: the kernel drops it when memory is needed.
fn node_memory(files: &SystemFiles, node: u32) -> NodeMemory {
    let text = files.text(&format!("{NODES}/node{node}/meminfo")).unwrap_or_default();
    let bytes = |name: &str| -> Option<u64> {
        let value = field(&text, &format!("Node {node} {name}"))?;
        value.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    let cached = bytes("Inactive(file)").unwrap_or(0);
    NodeMemory {
        total_bytes: bytes("MemTotal").unwrap_or(0),
        free_bytes: bytes("MemFree").map_or(0, |free| free.saturating_add(cached)),
    }
}

fn caches(files: &SystemFiles, online: &BTreeSet<u32>) -> Vec<Cache> {
    let mut caches = BTreeSet::new();
    for id in online {
        let folder = format!("{CPUS}/cpu{id}/cache");
        for index in files.numbered(&folder, "index") {
            caches.extend(cache(files, &format!("{folder}/index{index}"), *id));
        }
    }
    caches.into_iter().collect()
}

fn cache(files: &SystemFiles, folder: &str, id: u32) -> Option<Cache> {
    let kind = match files.text(&format!("{folder}/type"))?.as_str() {
        "Data" => CacheKind::Data,
        "Instruction" => CacheKind::Instruction,
        "Unified" => CacheKind::Unified,
        _ => return None,
    };
    let cpus = files.id_list(&format!("{folder}/shared_cpu_list"));
    Some(Cache {
        level: files.number(&format!("{folder}/level"))?,
        kind,
        size_bytes: size_bytes(&files.text(&format!("{folder}/size"))?)?,
        cpus: cpus.unwrap_or_else(|| BTreeSet::from([id])).into_iter().map(CpuId).collect(),
    })
}

/// `32K`, `16M` or plain bytes.
fn size_bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}
