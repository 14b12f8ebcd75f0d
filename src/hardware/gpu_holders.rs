//! The processes that hold memory of a GPU, named where their numbers are this process's words.

use super::system_files::SystemFiles;
use serde::Serialize;
use std::path::Path;

/// The PID namespace of a Linux host; its number is the same on all of them (`PROC_PID_INIT_INO` of
/// the kernel's `proc_ns.h`).
const HOST_NAMESPACE: &str = "pid:[4026531836]";

/// A process that holds memory of a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryHolder {
    /// Its number: in a container perhaps the host's.
    pub pid: u32,
    /// What the system calls it; empty where it does not tell, and in a container.
    pub name: String,
    /// Bytes, if the driver tells.
    pub bytes: Option<u64>,
}

/// All but the process `own`, with their names by the `/proc` below `root`.
///
/// The driver's numbers are those of the host or of this process's namespace, which of them it does
/// not say. Where these two are not the same, a number may be that of another process here, so
/// nobody is named.
pub(super) fn others(
    holders: &[tandem_kernels::MemoryHolder],
    root: &Path,
    own: u32,
) -> Vec<MemoryHolder> {
    let files = SystemFiles::new(root);
    let namespace = files.link("proc/self/ns/pid");
    let is_host = namespace.is_some_and(|namespace| namespace == Path::new(HOST_NAMESPACE));
    let name = |pid: u32| is_host.then(|| files.text(&format!("proc/{pid}/comm"))).flatten();
    let others = holders.iter().filter(|holder| holder.pid != own);
    let named = others.map(|holder| MemoryHolder {
        pid: holder.pid,
        name: name(holder.pid).unwrap_or_default(),
        bytes: holder.bytes,
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn processes_are_named_where_their_numbers_are_the_hosts() {
        let holders = [10, 11, 12].map(|pid| tandem_kernels::MemoryHolder { pid, bytes: Some(5) });
        for (namespace, names) in [
            (Some(HOST_NAMESPACE), ["trainer", ""]),
            (Some("pid:[4026532281]"), ["", ""]),
            (None, ["", ""]),
        ] {
            let root = tempfile::tempdir().unwrap();
            for folder in ["proc/self/ns", "proc/10", "proc/11"] {
                fs::create_dir_all(root.path().join(folder)).unwrap();
            }
            for (pid, name) in [(10, "trainer\n"), (11, "this\n")] {
                fs::write(root.path().join(format!("proc/{pid}/comm")), name).unwrap();
            }
            if let Some(namespace) = namespace {
                symlink(namespace, root.path().join("proc/self/ns/pid")).unwrap();
            }
            // The process of number 11 is this one, and 12 has ended.
            let named = others(&holders, root.path(), 11);
            let wanted = [(10, names[0]), (12, names[1])];
            let got: Vec<_> = named.iter().map(|holder| (holder.pid, &*holder.name)).collect();
            assert_eq!(got, wanted, "{namespace:?}");
            assert!(named.iter().all(|holder| holder.bytes == Some(5)));
        }
    }
}
