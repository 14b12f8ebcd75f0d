//! The limits that control groups (version 1 and 2) put on this process.
//!
//! A limit may stand at any ancestor of the process's group, and inside a container the path in
//! `/proc/self/cgroup` may not exist below the mount, whose root is then the container's group: so
//! every ancestor up to the root is read, missing files are skipped, and the smallest limit holds.

use super::system_files::SystemFiles;

/// Version 1 writes "no limit" as a number close to 2⁶³ that depends on the page size.
const UNLIMITED_BYTES: u64 = 1 << 60;

/// The group of one hierarchy, as a folder below the root.
struct Hierarchy {
    mount: String,
    path: String,
}

impl Hierarchy {
    /// The process's group and all its ancestors, the root included.
    fn folders(&self) -> Vec<String> {
        let mut folders = vec![self.mount.clone()];
        let mut folder = self.mount.clone();
        for part in self.path.split('/').filter(|part| !part.is_empty() && *part != "..") {
            folder = format!("{folder}/{part}");
            folders.push(folder.clone());
        }
        folders
    }
}

/// The version 1 hierarchy of a controller, and those of version 2 wherever they may be mounted.
fn hierarchies(files: &SystemFiles, controller: &str) -> (Vec<Hierarchy>, Vec<Hierarchy>) {
    let text = files.text("proc/self/cgroup").unwrap_or_default();
    let (mut old, mut new) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let at = |mount: &str| Hierarchy {
            mount: format!("sys/fs/cgroup{mount}"),
            path: path.to_owned(),
        };
        if controllers.is_empty() {
            new.extend([at(""), at("/unified")]);
        } else if controllers.split(',').any(|name| name == controller) {
            old.extend([at(&format!("/{controllers}")), at(&format!("/{controller}"))]);
        }
    }
    (old, new)
}

/// Processors' worth of time that the process may use per period; `None` without a limit.
pub(super) fn cpu_quota(files: &SystemFiles) -> Option<f64> {
    let (old, new) = hierarchies(files, "cpu");
    let of_new = new.iter().flat_map(Hierarchy::folders).filter_map(|folder| {
        let text = files.text(&format!("{folder}/cpu.max"))?;
        let (quota, period) = text.split_once(' ')?;
        ratio(quota.parse().ok()?, period.trim().parse().ok()?)
    });
    let of_old = old.iter().flat_map(Hierarchy::folders).filter_map(|folder| {
        let quota = files.number(&format!("{folder}/cpu.cfs_quota_us"))?;
        ratio(quota, files.number(&format!("{folder}/cpu.cfs_period_us"))?)
    });
    of_new.chain(of_old).min_by(f64::total_cmp)
}

/// `quota / period` when both are positive: version 1 writes −1 for no limit.
fn ratio(quota: f64, period: f64) -> Option<f64> {
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

/// `(total, available)` bytes of host memory for this process.
pub(super) fn memory(files: &SystemFiles) -> (u64, u64) {
    let kibibytes = |name: &str| {
        let value = files.field("proc/meminfo", name)?;
        let number: u64 = value.strip_suffix("kB")?.trim().parse().ok()?;
        number.checked_mul(1024)
    };
    let mut total = kibibytes("MemTotal").unwrap_or(0);
    let mut available = kibibytes("MemAvailable").or(kibibytes("MemFree")).unwrap_or(0);
    let (old, new) = hierarchies(files, "memory");
    let names_new = ["memory.max", "memory.current", "inactive_file"];
    let names_old = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"];
    for (groups, names) in [(new, names_new), (old, names_old)] {
        for folder in groups.iter().flat_map(Hierarchy::folders) {
            let Some((limit, free)) = memory_limit(files, &folder, names) else { continue };
            total = if total == 0 { limit } else { total.min(limit) };
            available = available.min(free);
        }
    }
    (total, available.min(total))
}

/// `(limit, free)` of one group. File cache that nobody has touched lately is free: the kernel
/// drops it when the group needs memory.
fn memory_limit(
    files: &SystemFiles,
    folder: &str,
    [limit, usage, cache]: [&str; 3],
) -> Option<(u64, u64)> {
    let limit: u64 = files.number(&format!("{folder}/{limit}"))?;
    if limit >= UNLIMITED_BYTES {
        return None;
    }
    let usage: u64 = files.number(&format!("{folder}/{usage}")).unwrap_or(0);
    let cache = files.field(&format!("{folder}/memory.stat"), cache);
    let cache: u64 = cache.and_then(|text| text.parse().ok()).unwrap_or(0);
    Some((limit, limit.saturating_sub(usage.saturating_sub(cache))))
}
