//! `tandem probe`: what this machine is, and what its parts reach. Measured once, then kept in the
//! user's cache folder until the machine is another.

use super::output::Output;
use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tandem::actors::compute_isa;
use tandem::config::{Config, CpuConfig};
use tandem::hardware::{
    ClosedGpu, CoreKind, Fingerprint, GPU_TOKENS_MEASURED, Gpu, GpuProductRates, GpuRates,
    HardwareProfile, Measured, NumaNode, Probe, ProductRates, TOKENS_MEASURED, Topology,
    disk_read_rate, load_measured, probe_file, roofs, store_measured,
};
use tandem::memory::{AlignedBytes, HugePages};
use tandem::placement::Workers;
use tandem::units::ByteSize;
use tandem_cpu_kernels::Kernels;

/// Host memory that is read: so many times what the caches of the third level hold, within bounds,
/// and at most a part of what is free.
const READ_CACHES: u64 = 8;
const READ_BYTES: [u64; 2] = [512 << 20, 2 << 30];
const READ_BYTES_QUICK: u64 = 64 << 20;
const READ_MEMORY_DIVISOR: u64 = 4;
/// Pinned memory for each way between host and GPU, at most a part of what is available. Reads
/// beside the copies push it out of the caches.
const COPY_BYTES: u64 = 256 << 20;
const COPY_BYTES_QUICK: u64 = 8 << 20;
const COPY_MEMORY_DIVISOR: u64 = 16;
/// How long a file is read.
const DISK: Duration = Duration::from_millis(1000);
const DISK_QUICK: Duration = Duration::from_millis(100);

/// What to measure, and whether again.
#[derive(Clone, Debug, Args)]
pub struct ProbeArguments {
    /// Also measure how fast this file is read, such as a model
    file: Option<PathBuf>,
    /// Measure again, whatever is known
    #[arg(long)]
    fresh: bool,
    /// Measure again with less memory in less time, less exactly, and keep nothing
    #[arg(long)]
    quick: bool,
}

/// Prints the profile of this machine; measures what is not known yet.
///
/// # Errors
/// A setting of the workers is wrong, there is no memory to measure, or FILE can't be read.
pub fn run(
    arguments: &ProbeArguments,
    config: &Config,
    folder: Option<&Path>,
    output: Output,
) -> Result<()> {
    let mut hardware = HardwareProfile::detect();
    let workers = Workers::choose(&hardware.topology, &config.cpu)?;
    let isa = compute_isa(config, workers.threads)?;
    let kernels = Kernels::for_isa(isa)?;
    let fingerprint = Fingerprint::of(&hardware, (workers.threads, &workers.cpus), isa);
    let kept_in = folder.map(probe_file).filter(|_| !arguments.quick);
    let known = kept_in.as_deref().filter(|_| !arguments.fresh);
    let known = known.and_then(|file| load_measured(file, &fingerprint));
    let is_known = known.is_some();
    let mut measured = match known {
        Some(measured) => measured,
        None => {
            output.notice("measuring this machine")?;
            measure(&hardware, &workers, kernels, (config, arguments.quick))?
        }
    };
    if let Some(file) = &arguments.file {
        let most = if arguments.quick { DISK_QUICK } else { DISK };
        let rate = disk_read_rate(file, most);
        measured.disk = Some(rate.with_context(|| file.display().to_string())?);
    }
    let is_new = !is_known || arguments.file.is_some();
    // What could not be measured now may be the next time.
    if let Some(file) = kept_in.as_deref().filter(|_| is_new && measured.notes.is_empty())
        && let Err(error) = store_measured(file, &fingerprint, &measured)
    {
        output.notice(&format!("not kept in {}: {error}", file.display()))?;
    }
    hardware.measured = Some(measured);
    if output.json {
        let profile = json!({
            "fingerprint": fingerprint, "hardware": hardware, "workers": workers,
            "is_known": is_known, "kept_in": kept_in,
        });
        return Ok(output.object(&profile)?);
    }
    print(&hardware, &workers, &fingerprint, output)
}

fn measure(
    hardware: &HardwareProfile,
    workers: &Workers,
    kernels: &'static Kernels,
    (config, is_quick): (&Config, bool),
) -> Result<Measured> {
    let caches = READ_CACHES * hardware.topology.cache_bytes(3);
    let (wanted, copies) = match is_quick {
        true => (READ_BYTES_QUICK, COPY_BYTES_QUICK),
        false => (caches.clamp(READ_BYTES[0], READ_BYTES[1]), COPY_BYTES),
    };
    let free = hardware.memory_available_bytes / READ_MEMORY_DIVISOR;
    let bytes = wanted.min(free).next_multiple_of(8) as usize;
    let huge_pages =
        if config.cpu.huge_pages { HugePages::Advise } else { HugePages::SystemDefault };
    let mut memory = AlignedBytes::zeroed(bytes, huge_pages)?;
    let cpus_of = |threads| {
        let fewer = CpuConfig { threads, ..config.cpu.clone() };
        Workers::choose(&hardware.topology, &fewer).map_or(Vec::new(), |workers| workers.cpus)
    };
    let probe = Probe {
        cpus_of: &cpus_of,
        team: roofs::Team { threads: workers.threads, cpus: workers.cpus.clone() },
        kernels,
        memory: bytemuck::cast_slice_mut(&mut memory[..]),
        copy_bytes: copies.min(hardware.memory_available_bytes / COPY_MEMORY_DIVISOR) as usize,
    };
    Ok(probe.measure(&hardware.gpus))
}

fn print(
    hardware: &HardwareProfile,
    workers: &Workers,
    fingerprint: &Fingerprint,
    output: Output,
) -> Result<()> {
    output.line(&output.heading(&fingerprint.cpu))?;
    for line in machine(hardware) {
        output.line(&line)?;
    }
    output.line(&format!("workers: {workers}"))?;
    let Some(measured) = &hardware.measured else { return Ok(()) };
    output.line("")?;
    output.table(&["measured", "rate", "how"], &rows(measured, workers.threads))?;
    for note in &measured.notes {
        output.line(&format!("note: {note}"))?;
    }
    Ok(())
}

/// What is known without measuring, in lines.
fn machine(hardware: &HardwareProfile) -> Vec<String> {
    let topology = &hardware.topology;
    let mut lines = vec![processors(topology)];
    let levels = (1..=4).map(|level| (level, topology.cache_bytes(level)));
    let caches: Vec<_> = levels
        .filter(|(_, bytes)| *bytes > 0)
        .map(|(level, bytes)| format!("L{level} {}", ByteSize(bytes)))
        .collect();
    if !caches.is_empty() {
        lines.push(format!("caches of all cores: {}", caches.join(", ")));
    }
    let (total, available) = (hardware.memory_total_bytes, hardware.memory_available_bytes);
    lines.push(format!(
        "memory: {} may be used, {} are available",
        ByteSize(total),
        ByteSize(available)
    ));
    if topology.numa_nodes.len() > 1 {
        lines.extend(topology.numa_nodes.iter().map(|node| of_node(node, topology)));
    }
    lines.extend(hardware.gpus.devices.iter().map(of_device));
    lines.extend(hardware.gpus.closed.iter().map(of_closed));
    lines.extend(hardware.gpus.absence.iter().map(|absence| format!("no GPU: {absence}")));
    lines
}

fn of_device(gpu: &Gpu) -> String {
    let (free, total) = (ByteSize(gpu.memory_free_bytes), ByteSize(gpu.memory_total_bytes));
    let node = gpu.numa_node.map(|node| format!(", attached to NUMA node {node}"));
    format!(
        "GPU {}: {}, compute capability {}, {} multiprocessors, {free} of {total} free{}",
        gpu.ordinal,
        gpu.name,
        gpu.compute_capability,
        gpu.multiprocessors,
        node.unwrap_or_default()
    )
}

fn of_closed(gpu: &ClosedGpu) -> String {
    let reason = gpu.refusal.as_ref().map(|reason| format!(": can't be used, {reason}"));
    format!("GPU {}: {}{}", gpu.ordinal, gpu.name, reason.unwrap_or_default())
}

fn of_node(node: &NumaNode, topology: &Topology) -> String {
    let usable = topology.usable_cpus().filter(|cpu| cpu.numa_node == node.id).count();
    let (free, total) = (ByteSize(node.memory_free_bytes), ByteSize(node.memory_bytes));
    let refused = if node.is_allowed { "" } else { ", none for this process" };
    format!(
        "NUMA node {}: {usable} of {} processors usable, {free} of {total} free{refused}",
        node.id,
        node.cpus.len()
    )
}

fn processors(topology: &Topology) -> String {
    let count = |number: usize, what: &str| match number {
        1 => format!("1 {what}"),
        _ => format!("{number} {what}s"),
    };
    let packages: std::collections::BTreeSet<_> =
        topology.cpus.iter().map(|cpu| cpu.package).collect();
    let small = topology.cpus.iter().filter(|cpu| cpu.kind == CoreKind::Efficiency).count();
    let mut parts = vec![
        count(packages.len(), "package"),
        count(topology.numa_nodes.len(), "NUMA node"),
        count(topology.core_count(), "core"),
        format!("{} of {} processors usable", topology.usable_cpus().count(), topology.cpus.len()),
    ];
    if small > 0 {
        parts.push(format!("{small} of them of small cores"));
    }
    parts.extend(topology.cpu_quota.map(|quota| format!("a quota of {quota} processors")));
    parts.join(", ")
}

fn bytes(rate: f64) -> String {
    format!("{:.1} GB/s", rate / 1e9)
}

fn operations(macs_per_second: f64) -> String {
    format!("{:.2} Top/s", 2.0 * macs_per_second / 1e12)
}

/// What was measured, in rows of a table.
fn rows(measured: &Measured, workers: usize) -> Vec<Vec<String>> {
    let threads = |threads: usize| match threads {
        1 => "1 thread".to_owned(),
        _ => format!("{threads} threads"),
    };
    let mut rows = Vec::new();
    let mut row = |what: &str, rate: String, how: String| rows.push(vec![what.into(), rate, how]);
    for read in &measured.reads {
        row("memory, read", bytes(read.bytes_per_second), threads(read.threads));
    }
    let cpu = &measured.cpu;
    let how = format!("{}, {}", cpu.numbers, threads(workers));
    row("CPU, arithmetic", operations(cpu.per_second), how);
    for ProductRates { dtype, macs_per_second } in &measured.products {
        let (rate, how) = of_products(&TOKENS_MEASURED, macs_per_second);
        row(&format!("CPU, products of {dtype}"), rate, how);
    }
    let widths = TOKENS_MEASURED.map(|tokens| tokens.to_string()).join(", ");
    let unhidden = measured.unhidden.map(|part| format!("{:.0} %", 100.0 * part)).join(", ");
    let how = format!("of reads and products the shorter, beside the longer; {widths} tokens");
    row("CPU, not hidden", unhidden, how);
    let elements = |rate: f64| format!("{:.2} G/s", rate / 1e9);
    row("CPU, norms", elements(measured.rows.norm), "elements, added and rounded too".to_owned());
    row("CPU, gates", elements(measured.rows.gate), "elements, rounded too".to_owned());
    row("CPU, choices", elements(measured.rows.logits), "logits".to_owned());
    let us = |us: f64| format!("{us:.2} µs");
    row("workers, one meeting", us(measured.meeting_us), threads(workers));
    row("a thread that sleeps", us(measured.wake_us), "until it runs".to_owned());
    for gpu in &measured.gpus {
        for (what, rate, how) in of_gpu(gpu) {
            row(&format!("GPU {}, {what}", gpu.ordinal), rate, how.into());
        }
        for GpuProductRates { dtype, macs_per_second } in &gpu.products {
            let (rate, how) = of_products(&GPU_TOKENS_MEASURED, macs_per_second);
            row(&format!("GPU {}, products of {dtype}", gpu.ordinal), rate, how);
        }
    }
    if let Some(disk) = &measured.disk {
        let how = if disk.is_direct { "directly" } else { "perhaps from memory" };
        let how = format!("{}, {how}", disk.file.display());
        row("file, read", bytes(disk.bytes_per_second), how);
    }
    rows
}

/// The rate of the widest step, and those of the others in words.
fn of_products(tokens: &[usize], macs_per_second: &[f64]) -> (String, String) {
    let rates = tokens.iter().zip(macs_per_second);
    let mut rates: Vec<_> = rates.map(|(tokens, rate)| (*tokens, operations(*rate))).collect();
    let (most, rate) = rates.pop().unwrap_or_default();
    let others: Vec<_> =
        rates.into_iter().map(|(tokens, rate)| format!("{rate} with {tokens}")).collect();
    (rate, format!("{most} tokens in a step; {}", others.join(", ")))
}

fn of_gpu(gpu: &GpuRates) -> [(&'static str, String, &str); 11] {
    let GpuRates { pinned, both_ways, pageable, beside_reads, .. } = gpu;
    [
        ("memory, read", bytes(gpu.read_bytes_per_second), "all multiprocessors"),
        ("arithmetic", operations(gpu.macs.per_second), &gpu.macs.numbers),
        ("copies to it", bytes(pinned.to_gpu), "pinned memory"),
        ("copies from it", bytes(pinned.from_gpu), "pinned memory"),
        ("copies to it", bytes(both_ways.to_gpu), "pinned memory, both ways at once"),
        ("copies from it", bytes(both_ways.from_gpu), "pinned memory, both ways at once"),
        ("copies to it", bytes(pageable.to_gpu), "pageable memory"),
        ("copies from it", bytes(pageable.from_gpu), "pageable memory"),
        ("copies to it", bytes(beside_reads.to_gpu), "pinned memory, while all workers read"),
        ("workers' reads", bytes(beside_reads.reads), "memory, while copies go to the GPU"),
        ("one crossing", format!("{:.1} µs", gpu.crossing_us), "a kernel, started and waited for"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_told_with_what_may_be_used_of_them() {
        let files = [
            ("sys/devices/system/cpu/online", "0-3"),
            ("sys/devices/system/node/node0/cpulist", "0-1"),
            ("sys/devices/system/node/node1/cpulist", "2-3"),
            (
                "sys/devices/system/node/node1/meminfo",
                "Node 1 MemTotal: 4096 kB\nNode 1 MemFree: 1024 kB\nNode 1 Inactive(file): 1024 kB",
            ),
            ("proc/self/status", "Cpus_allowed_list: 0-2\nMems_allowed_list: 0"),
        ];
        let root = tempfile::tempdir().expect("a temporary folder");
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            std::fs::write(path, text).expect("a file");
        }
        let topology = Topology::read(root.path());
        let told: Vec<_> =
            topology.numa_nodes.iter().map(|node| of_node(node, &topology)).collect();
        assert_eq!(told[0], "NUMA node 0: 2 of 2 processors usable, 0 B of 0 B free");
        assert_eq!(
            told[1],
            "NUMA node 1: 1 of 2 processors usable, 2.00 MiB of 4.00 MiB free, \
             none for this process"
        );
    }
}
