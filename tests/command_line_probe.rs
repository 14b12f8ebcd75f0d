//! `tandem probe` as a person runs it: what it prints and what it keeps. Never how fast anything
//! is.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "support/tiny_model.rs"]
mod tiny_model;

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use tiny_model::{Family, TinyModel};

fn tandem(arguments: &[&str], home: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.args(arguments).current_dir(home);
    command.env_clear().env("HOME", home).env("TANDEM__GPU__DEVICE", "off").output().unwrap()
}

fn probe(arguments: &[&str], home: &Path) -> Output {
    tandem(&[&["probe"], arguments].concat(), home)
}

/// What `tandem plan` prints of a tiny model.
fn plan(arguments: &[&str], home: &Path) -> String {
    TinyModel::new(Family::Llama).write(&home.join("tiny.gguf"));
    let output = tandem(&[&["plan", "tiny.gguf"], arguments].concat(), home);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
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
    // A plan with as many workers predicts what they reach.
    let one = ["--set", "cpu.threads=1", "--set", "gpu.device=off"];
    let told = plan(&one, home.path());
    assert!(told.contains("predicted") && told.contains("1 stream "), "{told}");
    let arguments = [&one[..], &["--json"]].concat();
    let shown: Value = serde_json::from_str(&plan(&arguments, home.path())).unwrap();
    let (first, more) = (&shown["prediction"]["decode"][0], &shown["prediction"]["gib_more"]);
    assert_eq!((&first["streams"], more), (&1.into(), &Value::Null));
    assert!(first["tokens_per_second"].as_f64() > Some(0.0), "{shown}");
    assert_eq!(shown["measured"], Value::Null);
    // What was predicted can be run.
    let measured = [&one[..], &["--measured", "--context", "600"]].concat();
    let told = plan(&measured, home.path());
    assert!(told.contains("of predicted") && told.contains(" %"), "{told}");
    let shown: Value =
        serde_json::from_str(&plan(&[&measured[..], &["--json"]].concat(), home.path())).unwrap();
    assert!(told.contains("products") && told.contains("workers' meetings"), "{told}");
    let stages = shown["measured"]["stages"].as_array().unwrap();
    let decode = |stage: &str| {
        let is_it = |row: &&Value| row["of"] == "1 stream" && row["stage"] == stage;
        stages.iter().find(is_it).unwrap_or_else(|| panic!("{stage}: {shown}"))
    };
    for stage in ["products", "attention"] {
        let row = decode(stage);
        for seconds in ["predicted_seconds", "measured_seconds"] {
            assert!(row[seconds].as_f64() > Some(0.0), "{row}");
        }
    }
    assert!(decode("between steps")["measured_seconds"].as_f64() > Some(0.0), "{shown}");
    assert!(stages.iter().any(|row| row["of"] == "a prompt of 512"), "{shown}");
    for kind in ["decode", "prompt"] {
        let [predicted, run] =
            ["prediction", "measured"].map(|of| shown[of][kind].as_array().unwrap());
        assert_eq!(predicted.len(), run.len(), "{shown}");
        assert!(run.iter().all(|speed| speed.as_f64() > Some(0.0)) && !run.is_empty(), "{shown}");
    }
}

#[test]
fn a_plan_predicts_nothing_on_a_machine_that_was_not_measured() {
    let home = tempfile::tempdir().unwrap();
    let hint = "`tandem probe` measures this machine; then plan predicts tokens/s";
    assert!(plan(&[], home.path()).contains(hint));
    let shown: Value = serde_json::from_str(&plan(&["--json"], home.path())).unwrap();
    assert!(shown.get("prediction").is_some_and(Value::is_null), "{shown}");
    let output = tandem(&["plan", "tiny.gguf", "--measured"], home.path());
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && message.contains("tandem probe"), "{message}");
    assert!(!home.path().join(".cache").exists(), "a plan measures nothing");
}
