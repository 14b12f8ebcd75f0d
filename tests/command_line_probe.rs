//! `tandem probe` as a person runs it: what it prints and what it keeps. Never how fast anything
//! is.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn probe(arguments: &[&str], home: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.arg("probe").args(arguments).current_dir(home);
    command.env_clear().env("HOME", home).output().unwrap()
}

fn ok(arguments: &[&str], home: &Path) -> String {
    let output = probe(arguments, home);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_quick_probe_shows_the_machine_and_keeps_nothing() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("file"), vec![1; 1 << 20]).unwrap();
    let told = ok(&["--quick", "file", "--set", "cpu.threads=1"], home.path());
    for part in ["NUMA node", "memory, read", "1 thread", "CPU, arithmetic", "Top/s", "file, read"]
    {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
    let output = probe(&["--quick", "none", "--set", "cpu.threads=1"], home.path());
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && message.contains("none: No such file"), "{message}");
}

#[test]
fn a_machine_is_measured_once() {
    let home = tempfile::tempdir().unwrap();
    let shown = |arguments: &[&str]| -> Value {
        let all = [arguments, &["--json", "--set", "cpu.threads=1"]].concat();
        serde_json::from_str(&ok(&all, home.path())).unwrap()
    };
    let (first, second) = (shown(&[]), shown(&[]));
    assert_eq!((&first["is_known"], &second["is_known"]), (&false.into(), &true.into()));
    let measured = |shown: &Value| shown["hardware"]["measured"]["reads"].clone();
    assert_eq!(measured(&first).as_array().unwrap().len(), 1);
    let file = Path::new(first["kept_in"].as_str().unwrap());
    assert!(file.starts_with(home.path().join(".cache/tandem")), "{}", file.display());
    assert_eq!(shown(&["--fresh"])["is_known"], false);
}
