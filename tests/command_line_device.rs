//! Which device runs a model, as a person is told: by the service and by `tandem plan`.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "support/tiny_model.rs"]
mod tiny_model;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tiny_model::{Family, TinyModel};

const WHY: &str = "runs on the CPU: gpu.device is off";

fn tandem(arguments: &[&str], home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.args(arguments).current_dir(home).stdin(Stdio::null());
    command.env_clear().env("HOME", home).env("TANDEM__GPU__DEVICE", "off");
    command
}

/// Ended at the latest when dropped.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_service_says_once_it_is_ready_and_when_asked_what_it_runs_on() {
    let home = tempfile::tempdir().unwrap();
    TinyModel::new(Family::Llama).write(&home.path().join("tiny.gguf"));
    let socket = ["--socket", "tandem.sock"];
    let mut serve = tandem(&[&["serve", "-m", "tiny.gguf"], &socket[..]].concat(), home.path());
    let mut service = Service(serve.stderr(Stdio::piped()).spawn().unwrap());
    let lines = BufReader::new(service.0.stderr.take().unwrap()).lines();
    let mut lines = lines.map(Result::unwrap);
    let ready = lines.find(|line| line.contains(" is ready at ")).expect("a line when it is ready");
    assert!(ready.ends_with(WHY) && !ready.contains("WARN"), "{ready}");
    let shown = tandem(&[&["ps"], &socket[..]].concat(), home.path()).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let row = shown.lines().find(|line| line.starts_with("runs on")).expect("a row");
    assert!(row.ends_with(" the CPU: gpu.device is off"), "{row}");
}

#[test]
fn plan_takes_its_model_with_or_without_the_flag_that_other_commands_have() {
    let home = tempfile::tempdir().unwrap();
    TinyModel::new(Family::Llama).write(&home.path().join("tiny.gguf"));
    let plan = |arguments: &[&str]| {
        let output = tandem(&[&["plan"], arguments].concat(), home.path()).output().unwrap();
        let text = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        (output.status.code(), text)
    };
    for arguments in [&["tiny.gguf"][..], &["-m", "tiny.gguf"], &["--model", "tiny.gguf"]] {
        let (code, [told, message]) = plan(arguments);
        assert_eq!((code, message.as_str()), (Some(0), ""), "{arguments:?}");
        assert!(told.lines().any(|line| line == WHY), "{arguments:?}: {told}");
    }
    for (arguments, wanted) in [
        (&[][..], "no model: name a GGUF file"),
        (&["tiny.gguf", "-m", "tiny.gguf"], "cannot be used with"),
    ] {
        let (code, [_, message]) = plan(arguments);
        assert!(code == Some(2) && message.contains(wanted), "{code:?}: {message}");
    }
}
