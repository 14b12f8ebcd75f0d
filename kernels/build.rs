//! Puts the compiled CUDA kernels where the crate embeds them. They are one file of code for all
//! architectures of `nvcc-flags.txt`, committed under `prebuilt/` by the hash of sources and flags,
//! so that a machine without CUDA builds a binary that uses a GPU wherever there is a driver.
//!
//! `TANDEM_KERNELS` says what to do: nothing (take the committed file; compile where it is stale
//! and a compiler is there), `compile` (and replace the committed file), `check` (compile and fail
//! where the committed file differs). The compiler is NVCC, or nvcc of CUDA_HOME, or of PATH, the
//! first of them that is of the release that the kernels are written for. `scripts/kernels`
//! installs one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const FLAGS: &str = "nvcc-flags.txt";
/// Another release makes other code of the same sources, or none: of those before not all
/// architectures are known.
const RELEASE: &str = "13.0";

fn main() {
    for variable in ["TANDEM_KERNELS", "NVCC", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed={FLAGS}");
    println!("cargo::rerun-if-changed=prebuilt");
    let mut sources: Vec<PathBuf> = fs::read_dir("src")
        .expect("the folder src")
        .map(|entry| entry.expect("an entry of src").path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "cu" || ending == "cuh"))
        .collect();
    sources.sort();
    let mut hash = Fnv::new();
    for path in sources.iter().map(PathBuf::as_path).chain([Path::new(FLAGS)]) {
        println!("cargo::rerun-if-changed={}", path.display());
        hash.add(path.to_string_lossy().as_bytes());
        hash.add(&fs::read(path).expect("a source of kernels"));
    }
    let prebuilt = PathBuf::from(format!("prebuilt/{:016x}.fatbin", hash.0));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("OUT_DIR")).join("kernels.fatbin");
    match env::var("TANDEM_KERNELS").as_deref() {
        Ok("compile") => {
            compile(&out);
            let _ = fs::remove_dir_all("prebuilt");
            fs::create_dir_all("prebuilt").expect("the folder prebuilt");
            fs::copy(&out, &prebuilt).expect("a copy in prebuilt");
        }
        Ok("check") => {
            compile(&out);
            let committed = fs::read(&prebuilt).unwrap_or_else(|error| {
                panic!("{}: {error}; run scripts/kernels and commit it", prebuilt.display())
            });
            let compiled = fs::read(&out).expect("what was compiled");
            let same = committed == compiled;
            assert!(same, "{} is stale: run scripts/kernels and commit it", prebuilt.display());
        }
        _ if prebuilt.is_file() => {
            fs::copy(&prebuilt, &out).expect("a copy of the prebuilt kernels");
        }
        _ => compile(&out),
    }
}

/// FNV-1a, 64 bits: names a file, guards nothing.
struct Fnv(u64);

impl Fnv {
    fn new() -> Fnv {
        Fnv(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

fn compile(out: &Path) {
    let flags = fs::read_to_string(FLAGS).expect("the flags of nvcc");
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    let named = env::var_os("NVCC").map(PathBuf::from);
    let candidates: Vec<_> = named.into_iter().chain(home).chain(["nvcc".into()]).collect();
    let nvcc = find_nvcc(&candidates).unwrap_or_else(|others| {
        panic!(
            "the kernels are to be compiled, since those that are committed are older than their \
             sources or TANDEM_KERNELS asks for it, and there is no nvcc of release {RELEASE}: \
             {others}. scripts/kernels installs one and renews the kernels"
        )
    });
    let mut command = Command::new(&nvcc);
    command.args(flags.split_whitespace()).args(["--threads", "2", "-o"]).arg(out);
    command.arg("all.cu").current_dir("src");
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{} failed: {status}", nvcc.display()),
        Err(error) => panic!("{} can't be run: {error}", nvcc.display()),
    }
}

/// The first of some compilers that is of the wanted release.
///
/// # Errors
/// What each of them is instead.
pub fn find_nvcc(candidates: &[PathBuf]) -> Result<PathBuf, String> {
    let mut others = Vec::new();
    for nvcc in candidates {
        let shown = nvcc.display();
        match Command::new(nvcc).arg("--version").output() {
            Err(error) => others.push(format!("{shown} can't be run ({error})")),
            Ok(output) => match release(&String::from_utf8_lossy(&output.stdout)) {
                Some(release) if release == RELEASE => return Ok(nvcc.clone()),
                Some(release) => others.push(format!("{shown} is of release {release}")),
                None => others.push(format!("{shown} does not tell its release")),
            },
        }
    }
    Err(others.join(", "))
}

/// The release in what nvcc says of its version, as in `release 13.0, V13.0.88`.
fn release(version: &str) -> Option<&str> {
    Some(version.split_once("release ")?.1.split_once(',')?.0.trim())
}
