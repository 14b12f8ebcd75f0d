//! The topology through libhwloc: the only file that knows its bindings. What hwloc does not tell
//! (affinity, quota, kinds of cores) stays as `/sys` told it.

use super::{Cache, CacheKind, CpuId, LogicalCpu, NodeMemory, Topology, TopologySource, nodes_of};
use hwloc2::{ObjectType, Topology as Hwloc, TopologyObject};
use std::collections::BTreeMap;

/// hwloc's view of the processors, or `sys` as it is when hwloc does not work.
pub(super) fn refine(sys: Topology) -> Topology {
    read(&sys).unwrap_or(sys)
}

fn read(sys: &Topology) -> Option<Topology> {
    let hwloc = Hwloc::new()?;
    let known: BTreeMap<u32, &LogicalCpu> = sys.cpus.iter().map(|cpu| (cpu.id.0, cpu)).collect();
    let cores = hwloc.objects_with_type(&ObjectType::Core).ok()?;
    let packages = hwloc.objects_with_type(&ObjectType::Package).unwrap_or_default();
    let mut cpus = Vec::new();
    for unit in hwloc.objects_with_type(&ObjectType::PU).ok()? {
        let id = unit.os_index();
        let base = known.get(&id)?;
        let package = holder(&packages, id).map(TopologyObject::os_index);
        let node = unit.nodeset().and_then(|nodes| u32::try_from(nodes.first()).ok());
        cpus.push(LogicalCpu {
            core: holder(&cores, id)?.logical_index(),
            package: package.unwrap_or(base.package),
            numa_node: node.unwrap_or(base.numa_node),
            ..**base
        });
    }
    if !cpus.iter().any(|cpu| cpu.usable) {
        return None;
    }
    cpus.sort_by_key(|cpu| cpu.id);
    let known = |node| sys.numa_nodes.iter().find(|known| known.id == node);
    let memory = |node| {
        known(node).map_or(NodeMemory::default(), |known| NodeMemory {
            total_bytes: known.memory_bytes,
            free_bytes: known.memory_free_bytes,
        })
    };
    let mut numa_nodes = nodes_of(&cpus, memory);
    for node in &mut numa_nodes {
        node.is_allowed = known(node.id).is_none_or(|known| known.is_allowed);
    }
    Some(Topology {
        caches: caches(&hwloc, &cpus),
        numa_nodes,
        cpus,
        cpu_quota: sys.cpu_quota,
        source: TopologySource::Hwloc,
    })
}

/// The object whose processors include `cpu`. Containment is asked instead of walking up to a
/// parent of some type: newer libraries have types that the bindings' enum does not know.
fn holder<'a>(objects: &[&'a TopologyObject], cpu: u32) -> Option<&'a TopologyObject> {
    objects.iter().copied().find(|object| object.cpuset().is_some_and(|set| set.is_set(cpu)))
}

fn caches(hwloc: &Hwloc, cpus: &[LogicalCpu]) -> Vec<Cache> {
    let levels = [
        (ObjectType::L1Cache, 1, CacheKind::Data),
        (ObjectType::L2Cache, 2, CacheKind::Unified),
        (ObjectType::L3Cache, 3, CacheKind::Unified),
    ];
    let mut caches = Vec::new();
    for (object_type, level, kind) in levels {
        for object in hwloc.objects_with_type(&object_type).unwrap_or_default() {
            let (Some(set), Some(facts)) = (object.cpuset(), object.cache_attributes()) else {
                continue;
            };
            let inside = |id: &CpuId| set.is_set(id.0);
            let cpus = cpus.iter().map(|cpu| cpu.id).filter(inside).collect();
            caches.push(Cache { level, kind, size_bytes: facts.size(), cpus });
        }
    }
    caches.sort();
    caches
}
