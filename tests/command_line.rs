//! The command as a person runs it: the built binary, its output and its exit codes, on tiny models
//! that the test writes.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "support/tiny_model.rs"]
mod tiny_model;

use serde_json::Value;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use tiny_model::{Family, TinyModel};

/// A folder with a model and a socket's place, and the command run in it.
struct Desk {
    folder: TempDir,
}

impl Desk {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        TinyModel::new(Family::Llama).write(&folder.path().join("tiny.gguf"));
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        command.env_clear().env("TANDEM__GPU__DEVICE", "off");
        let mine = ["XDG_RUNTIME_DIR", "TMPDIR", "HOME"].map(|name| (name, self.folder.path()));
        command.envs(mine);
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(arguments)).unwrap()
    }

    fn nothing_is_left(&self) {
        let left: Vec<_> = std::fs::read_dir(self.folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with("tandem-"))
            .collect();
        assert!(left.is_empty(), "{left:?} is left behind");
    }

    /// The exit code and the message on standard error.
    fn fails(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.run(arguments);
        let code = output.status.code().expect("it was not killed");
        assert_ne!(code, 0, "{arguments:?}: {output:?}");
        (code, String::from_utf8(output.stderr).unwrap())
    }
}

/// A service in a process of its own, stopped at the latest when dropped.
struct Service(std::process::Child);

impl Service {
    fn start(desk: &Desk) -> Self {
        let mut command = desk.command(&["serve", "--model", "tiny.gguf", "--quiet"]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let service = Self(child);
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        loop {
            let output = desk.run(&["ps", "--json"]);
            if output.status.success() {
                let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
                if shown["status"]["state"] == "ready" {
                    return service;
                }
            }
            assert!(std::time::Instant::now() < deadline, "the service is not ready: {output:?}");
            std::thread::yield_now();
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It has ended already in a test that went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn settings_show_their_values_and_origins() {
    let desk = Desk::new();
    std::fs::write(desk.path("my.toml"), "[cpu]\nspin_us = 7\n").unwrap();
    let arguments = ["config", "show", "--json", "--config", "my.toml", "--set", "cpu.pin=false"];
    let output = desk.command(&arguments).env("TANDEM__LOG__LEVEL", "debug").output().unwrap();
    let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(shown["cpu.spin_us"]["value"], 7);
    assert_eq!(shown["cpu.spin_us"]["origin"]["kind"], "file");
    assert_eq!(shown["cpu.pin"]["origin"]["kind"], "flag");
    assert_eq!(shown["log.level"]["origin"]["name"], "TANDEM__LOG__LEVEL");
    assert_eq!(shown["kv.block_tokens"]["origin"]["kind"], "default");
}

#[test]
fn a_wrong_setting_is_named_with_its_origin() {
    let desk = Desk::new();
    let (code, message) = desk.fails(&["config", "show", "--set", "kv.block_tokens=17"]);
    assert_eq!(code, 78);
    assert!(message.contains("kv.block_tokens") && message.contains("flag"), "{message}");
    let (code, message) = desk.fails(&["config", "show", "--set", "kv.cache_bytes=-1"]);
    assert_eq!(code, 78);
    assert!(message.contains("kv.cache_bytes") && message.contains("24GiB"), "{message}");
}

#[test]
fn inspect_shows_a_model_and_names_what_a_bad_file_is() {
    let desk = Desk::new();
    let shown = desk.json(&["inspect", "tiny.gguf", "--json", "--tensors", "--metadata"]);
    assert_eq!(shown["architecture"], "llama");
    assert_eq!(shown["runs_here"], "yes");
    assert!(shown["tensors"].as_array().unwrap().len() > 10);
    std::fs::write(desk.path("page.gguf"), "<!DOCTYPE html><html></html>").unwrap();
    let (code, message) = desk.fails(&["inspect", "page.gguf"]);
    assert_eq!(code, 65);
    assert!(message.contains("HTML") && message.contains("page.gguf"), "{message}");
}

#[test]
fn plan_says_what_would_lie_where() {
    let desk = Desk::new();
    let shown = desk.json(&["plan", "tiny.gguf", "--json", "--context", "256"]);
    assert_eq!(shown["placement"]["context_tokens"], 256);
    let rows = shown["explain"].as_array().unwrap();
    assert!(rows.iter().any(|row| row["what"] == "weights" && row["bytes"].as_u64() > Some(0)));
    assert!(desk.ok(&["plan", "tiny.gguf"]).contains("KV cache"));
}

#[test]
fn a_limit_of_a_gpu_is_a_flag_of_all_that_place_a_model() {
    let desk = Desk::new();
    for arguments in [
        &["plan", "tiny.gguf", "--vram-limit", "24GiB"][..],
        &["bench", "tiny.gguf", "-p", "1", "-n", "0", "--no-roof", "--vram-limit", "24GiB"],
        &["generate", "the rain", "-m", "tiny.gguf", "-n", "1", "--vram-limit", "1_000"],
    ] {
        desk.ok(arguments);
    }
    for command in ["plan", "bench", "serve", "chat", "generate"] {
        let (code, message) = desk.fails(&[command, "--vram-limit", "12 parsecs"]);
        assert_eq!(code, 2, "{message}");
        assert!(message.contains("--vram-limit <BYTES>"), "{message}");
        assert!(message.contains("\"12 parsecs\"") && message.contains("24GiB"), "{message}");
    }
}

#[test]
fn a_wrong_setting_of_a_gpu_is_named_with_what_is_allowed() {
    let desk = Desk::new();
    for (setting, parts) in [
        ("gpu.device=first", ["gpu.device is first", "off, auto, all, or indices of GPUs"]),
        ("gpu.device=4096", ["gpu.device is 4096", "off or auto"]),
        ("gpu.vram_limit=12 parsecs", ["gpu.vram_limit", "\"12 parsecs\" is no size"]),
        ("gpu.vram_limit=-1", ["gpu.vram_limit", "\"-1\" is no size"]),
        ("gpu.vram_limit=true", ["gpu.vram_limit", "such as 24GiB"]),
    ] {
        let (code, message) = desk.fails(&["plan", "tiny.gguf", "--set", setting]);
        assert_eq!(code, 78, "{message}");
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    let shown = desk.json(&["plan", "tiny.gguf", "--json", "--set", "gpu.device=auto"]);
    assert!(shown["placement"]["margin_bytes"].as_u64() > Some(0), "{shown}");
}

#[test]
fn plan_says_how_many_threads_and_why() {
    let desk = Desk::new();
    let shown = desk.json(&["plan", "tiny.gguf", "--json", "--threads", "1"]);
    assert_eq!(shown["placement"]["workers"]["threads"], 1);
    let told = desk.ok(&["plan", "tiny.gguf", "--threads", "1"]);
    assert!(told.contains("1 thread") && told.contains(": as cpu.threads says"), "{told}");
    for command in ["plan", "serve"] {
        let model = if command == "serve" { ["-m", "tiny.gguf"] } else { ["tiny.gguf", "--quiet"] };
        let arguments = [[command].as_slice(), &model, &["--threads", "1024"]].concat();
        let (code, message) = desk.fails(&arguments);
        assert_eq!(code, 78, "{message}");
        assert!(message.contains("cpu.threads is 1024; allowed: 1 to "), "{message}");
    }
}

#[test]
fn a_kv_cache_in_8_bits_holds_more_and_answers() {
    let desk = Desk::new();
    let plan = |flags: &[&str]| {
        let arguments = [&["plan", "tiny.gguf", "--json"], flags].concat();
        desk.json(&arguments)["placement"].clone()
    };
    let (sixteen, eight) = (plan(&[]), plan(&["--kv-dtype", "q8_0"]));
    let same = plan(&["--cache-type-k", "q8_0", "--cache-type-v", "q8_0"]);
    assert_eq!(eight["device_blocks"], same["device_blocks"]);
    assert_eq!((&sixteen["kv_dtype"], &eight["kv_dtype"]), (&"f16".into(), &"q8_0".into()));
    let block_bytes = |placement: &serde_json::Value| {
        let kv_bytes = placement["stages"][0]["kv_bytes"].as_f64().unwrap();
        kv_bytes / placement["device_blocks"].as_f64().unwrap()
    };
    assert_eq!(block_bytes(&eight) / block_bytes(&sixteen), 8.5 / 16.0);
    let shown = desk.json(&["config", "show", "--json", "--set", "kv.dtype=q8_0"]);
    assert_eq!(shown["kv.dtype"]["value"], "q8_0");
    let answer = ["generate", "the rain", "-m", "tiny.gguf", "-n", "8", "--kv-dtype", "q8_0"];
    assert!(!desk.ok(&answer).trim().is_empty());
    for (wrong, part) in [
        (&["plan", "tiny.gguf", "--kv-dtype", "q4_0"][..], "q8_0"),
        (&["plan", "tiny.gguf", "--cache-type-k", "q8_0", "--cache-type-v", "f16"], "one type"),
        (&["generate", "the rain", "-m", "tiny.gguf", "--kv-dtype", "bf16"], "kv.dtype"),
    ] {
        let (code, message) = desk.fails(wrong);
        assert!(code == 78 && message.contains(part), "{code} {message}");
    }
}

#[test]
fn tokens_of_a_text_come_one_a_line() {
    let desk = Desk::new();
    let text = desk.ok(&["tokenize", "the rain", "--model", "tiny.gguf"]);
    let tokens = desk.json(&["tokenize", "the rain", "--model", "tiny.gguf", "--json"]);
    assert_eq!(text.lines().count(), tokens["tokens"].as_array().unwrap().len());
}

#[test]
fn a_model_is_loaded_when_no_service_runs() {
    let desk = Desk::new();
    let arguments =
        ["generate", "the rain", "-m", "tiny.gguf", "-n", "8", "-t", "0", "--ignore-eos"];
    let first = desk.ok(&arguments);
    assert_eq!(first, desk.ok(&arguments), "greedy answers repeat");
    assert!(!first.trim().is_empty());
    desk.nothing_is_left();
    desk.fails(&["generate", "the rain", "-m", "tiny.gguf", "-n", "0"]);
    desk.nothing_is_left();
}

#[test]
fn without_a_service_no_runtime_directory_is_needed() {
    let desk = Desk::new();
    for arguments in [
        &["generate", "the rain", "-m", "tiny.gguf", "-n", "2", "--ignore-eos"][..],
        &["tokenize", "the rain", "-m", "tiny.gguf"],
    ] {
        let output = desk.command(arguments).env_remove("XDG_RUNTIME_DIR").output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
    // A service of this user may really run at the other default place.
    let output = desk.command(&["ps"]).env_remove("XDG_RUNTIME_DIR").output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 69)), "{output:?}");
}

#[test]
fn variables_of_others_may_hold_any_bytes() {
    let desk = Desk::new();
    let bytes = std::ffi::OsStr::from_bytes(b"\xff");
    let output = desk.command(&["config", "show"]).env("OTHERS", bytes).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let output = desk.command(&["config", "show"]).env("TANDEM__LOG__LEVEL", bytes).output();
    assert_eq!(output.unwrap().status.code(), Some(78));
}

#[test]
fn the_log_has_no_colours_unless_at_a_terminal() {
    let desk = Desk::new();
    let (code, log) = desk.fails(&["serve", "--model", "absent.gguf"]);
    assert_eq!(code, 65);
    assert!(log.contains("absent.gguf") && !log.contains('\x1b'), "{log}");
}

#[test]
fn a_missing_file_or_model_is_named() {
    let desk = Desk::new();
    let (code, message) = desk.fails(&["serve"]);
    assert_eq!(code, 2);
    assert!(message.contains("--model"), "{message}");
    let (_, message) = desk.fails(&["perplexity", "absent.txt", "-m", "tiny.gguf"]);
    assert!(message.contains("absent.txt"), "{message}");
    let (code, message) = desk.fails(&["perplexity", "x", "-m", "tiny.gguf", "--chunks", "0"]);
    assert_eq!(code, 2);
    assert!(message.contains("--chunks"), "{message}");
}

#[test]
fn without_service_and_model_the_reason_is_told() {
    let desk = Desk::new();
    for arguments in [&["generate", "hello"][..], &["ps"], &["stop"]] {
        let (code, message) = desk.fails(arguments);
        assert_eq!(code, 69, "{arguments:?}");
        assert!(message.contains("no service answers"), "{message}");
    }
    let (code, message) = desk.fails(&["generate", "hello", "-m", "absent.gguf"]);
    assert_eq!(code, 65);
    assert!(message.contains("absent.gguf"), "{message}");
}

#[test]
fn a_service_answers_its_commands_and_stops() {
    let desk = Desk::new();
    let mut service = Service::start(&desk);
    let (code, message) = desk.fails(&["serve", "--model", "tiny.gguf"]);
    assert_eq!(code, 75, "a second one does not start");
    assert!(message.contains(&service.0.id().to_string()), "{message} names the first");
    let answer = desk.ok(&["generate", "the rain", "-n", "8", "-t", "0", "--ignore-eos"]);
    let local = Desk::new();
    let arguments =
        ["generate", "the rain", "-m", "tiny.gguf", "-n", "8", "-t", "0", "--ignore-eos"];
    assert_eq!(answer, local.ok(&arguments), "service and own engine agree");
    let chat = desk.ok(&["chat", "--prompt", "hello", "-n", "8", "--json"]);
    let last: Value = serde_json::from_str(chat.lines().last().unwrap()).unwrap();
    assert_eq!(last["type"], "done");
    let (code, message) = desk.fails(&["generate", "x", "--temperature", "100.1"]);
    assert_eq!(code, 2);
    assert!(message.contains("temperature is 100.1;"), "{message}");
    let output = desk.run(&["generate", "x", "-n", "2", "-m", "other.gguf"]);
    let notice = String::from_utf8(output.stderr).unwrap();
    assert!(notice.contains("tiny, not other"), "{notice}");
    let by_file = desk.ok(&["tokenize", "the rain", "-m", "tiny.gguf"]);
    assert_eq!(desk.ok(&["tokenize", "the rain"]), by_file);
    let shown = desk.ok(&["ps"]);
    assert!(shown.contains(" tiny (llama") && shown.lines().count() < 20, "{shown}");
    desk.ok(&["stop"]);
    assert_eq!(desk.fails(&["ps"]).0, 69, "stop returns when the service is gone");
    assert!(service.0.wait().unwrap().success());
}

/// Clock ticks of processor time that a process has taken, all its threads together.
fn ticks(process: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // `1 (a name) S …`: user and system time are the 14th and 15th field.
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn an_idle_service_takes_no_processor_time() {
    let desk = Desk::new();
    let service = Service::start(&desk);
    // Everything has run once: tokenizer, engine loop, workers, a stream.
    desk.ok(&["generate", "the rain", "-n", "8", "-t", "0", "--ignore-eos"]);
    let idle_second = || {
        let before = ticks(service.0.id());
        std::thread::sleep(Duration::from_secs(1));
        ticks(service.0.id()) - before
    };
    // The first seconds may see the end of the request. One thread that spins takes 100 of each.
    let seconds: Vec<u64> = (0..5).map(|_| idle_second()).take_while(|ticks| *ticks > 1).collect();
    assert!(seconds.len() < 5, "{seconds:?} clock ticks in a second each");
}

#[test]
fn perplexity_of_a_text_is_reported() {
    let desk = Desk::new();
    std::fs::write(desk.path("text.txt"), "the rain in the plain stays mainly ".repeat(20))
        .unwrap();
    let arguments =
        ["perplexity", "text.txt", "-m", "tiny.gguf", "--chunk", "64", "--chunks", "2", "--json"];
    let shown = desk.json(&arguments);
    assert_eq!(shown["chunks"], 2);
    // 32 of 64 tokens are the second half; its first one is context of the rest.
    assert_eq!(shown["scored_tokens"], 2 * 31);
    assert!(shown["perplexity"].as_f64().unwrap() > 1.0);
}

#[test]
fn completions_are_printed_for_every_shell() {
    let desk = Desk::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(desk.ok(&["completions", shell]).contains("tandem"), "{shell}");
    }
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let desk = Desk::new();
    let binary = Path::new(env!("CARGO_BIN_EXE_tandem"));
    let line = format!("{} config show | head -n 1", binary.display());
    let mut shell = Command::new("sh");
    shell.args(["-c", &line]).env_clear().env("PATH", "/usr/bin:/bin");
    let output = shell.current_dir(desk.folder.path()).output().unwrap();
    assert!(output.stderr.is_empty(), "{output:?}");
}
