//! Which compiler the build script takes for the kernels.

#[path = "../build.rs"]
#[allow(dead_code, clippy::print_stdout, reason = "the rest is the build script's")]
mod build_script;

use build_script::find_nvcc;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// A program that says of itself what an nvcc says.
fn nvcc(name: &str, said: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nvcc");
    fs::create_dir_all(&folder).expect("a folder of ours");
    let path = folder.join(name);
    fs::write(&path, format!("#!/bin/sh\n[ \"$1\" = --version ] && echo \"{said}\"\n"))
        .expect("a script");
    fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("a script that runs");
    path
}

#[test]
fn only_a_compiler_of_the_right_release_is_taken_and_others_are_named() {
    let tools = "Cuda compilation tools, release";
    let old = nvcc("old", &format!("{tools} 12.4, V12.4.131"));
    let new = nvcc("new", &format!("{tools} 13.0, V13.0.88"));
    let later = nvcc("later", &format!("{tools} 13.01, V13.1.5"));
    let mute = nvcc("mute", "clang");
    let absent = PathBuf::from("/nowhere/nvcc");
    assert_eq!(find_nvcc(&[absent.clone(), old.clone(), new.clone(), mute.clone()]), Ok(new));
    let refused = find_nvcc(&[absent, old.clone(), later.clone(), mute.clone()]).expect_err("none");
    let (old, later) = (old.display(), later.display());
    let rest = format!(
        "{old} is of release 12.4, {later} is of release 13.01, {} does not tell its release",
        mute.display()
    );
    assert!(refused.starts_with("/nowhere/nvcc can't be run (No such file"), "{refused}");
    assert!(refused.ends_with(&rest), "{refused}");
}
