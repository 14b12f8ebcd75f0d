//! `tandem bench` as a person runs it: what it prints, that its numbers agree with each other, and
//! what it refuses. Never how fast anything is.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "support/tiny_model.rs"]
mod tiny_model;

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use tandem::model::FileType;
use tandem::tensor::DType;
use tiny_model::{Family, TinyModel};

/// Short runs on one thread; the roofs take a second and are left out.
const SHORT: [&str; 9] = ["-p", "40", "-n", "3", "-r", "2", "-t", "1", "--no-roof"];

fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command
        .arg("bench")
        .args(arguments)
        .env_clear()
        .env("TANDEM__GPU__DEVICE", "off")
        .output()
        .unwrap()
}

fn ok(arguments: &[&str]) -> String {
    let output = bench(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(arguments: &[&str]) -> Vec<Value> {
    serde_json::from_str(&ok(&[arguments, &["-o", "json"]].concat())).unwrap()
}

/// Exit code and message of a command that must be refused.
fn refused(arguments: &[&str]) -> (i32, String) {
    let output = bench(arguments);
    assert!(output.stdout.is_empty(), "{arguments:?}: {output:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn near(got: f64, wanted: f64) -> bool {
    (got - wanted).abs() <= 1e-6 * wanted.abs()
}

fn number(record: &Value, field: &str) -> f64 {
    record[field].as_f64().unwrap_or_else(|| panic!("{field} of {record}"))
}

/// Everything that must hold of a record however fast the machine is.
fn check(record: &Value) {
    let samples = |name: &str| -> Vec<f64> {
        record[name].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
    };
    let (ns, ts) = (samples("samples_ns"), samples("samples_ts"));
    let mean = |samples: &[f64]| samples.iter().sum::<f64>() / samples.len() as f64;
    let stream_tokens = number(record, "n_prompt") + number(record, "n_gen");
    let tokens = number(record, "n_parallel") * stream_tokens;
    assert_eq!(number(record, "n_tokens"), tokens, "{record}");
    assert!(ns.iter().all(|ns| *ns > 0.0), "{record}");
    assert!(ns.iter().zip(&ts).all(|(ns, ts)| near(*ts, tokens * 1e9 / ns)), "{record}");
    assert!(near(number(record, "avg_ts"), mean(&ts)), "{record}");
    assert!((number(record, "avg_ns") - mean(&ns)).abs() <= 1.0, "{record}");
    assert_eq!(record["test_time"].as_str().unwrap().len(), "2026-01-01T00:00:00Z".len());
}

#[test]
fn shapes_run_with_weights_of_every_type() {
    let pure = DType::ALL.map(|dtype| format!("pure-{dtype}"));
    let files = FileType::names().map(str::to_owned);
    for types in files.chain(pure) {
        let name = format!("tiny:{types}");
        let records = json(&[&["--synthetic", &name][..], &SHORT].concat());
        assert_eq!(records.len(), 2, "{name}");
        records.iter().for_each(check);
        assert_eq!(records[0]["model_filename"], "", "{name}");
    }
    let records = json(&[&["--synthetic", "tiny-qwen2:q4_k_m"][..], &SHORT].concat());
    assert_eq!(records[0]["model_type"], "qwen2 1M Q4_K - Medium");
    let records = json(&[&["--synthetic", "tiny-qwen3moe:q4_k_m"][..], &SHORT].concat());
    assert_eq!(records[0]["model_type"], "qwen3moe 4M Q4_K - Medium");
}

#[test]
fn a_files_every_combination_is_measured_and_adds_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    TinyModel::new(Family::Llama).dtype(DType::Q4_0).write(&path);
    let arguments = ["-m", path.to_str().unwrap(), "-d", "0,50", "--n-parallel", "1,3"];
    let more = ["--pg", "5,2", "--ubatch-size", "32", "-q"];
    let records = json(&[&arguments[..], &SHORT, &more].concat());
    let shape = |record: &Value| {
        ["n_parallel", "n_depth", "n_prompt", "n_gen"].map(|name| record[name].as_u64().unwrap())
    };
    let mut wanted = Vec::new();
    for (streams, depth) in [(1, 0), (1, 50), (3, 0), (3, 50)] {
        wanted.extend([(40, 0), (0, 3), (5, 2)].map(|(p, n)| [streams, depth, p, n]));
    }
    assert_eq!(records.iter().map(shape).collect::<Vec<_>>(), wanted);
    for record in &records {
        check(record);
        assert_eq!(record["model_type"], "llama 1M Q4_0");
        assert_eq!(record["n_ubatch"], 32);
        assert_eq!(record["samples_ns"].as_array().unwrap().len(), 2);
        assert!(number(record, "ops_steps") >= 1.0);
        let ops = record["ops"].as_array().unwrap();
        assert!(ops.iter().all(|op| number(op, "work_ns") + number(op, "wait_ns") > 0.0));
        let named = |name: &str| ops.iter().any(|op| op["op"] == name);
        assert!(named("attention") && named("down"), "{ops:?}");
        assert!(record["roof_read_percent"].is_null());
    }
}

#[test]
fn shares_of_the_roofs_follow_from_what_is_reported() {
    let records = json(&["--synthetic", "tiny:q8_0", "-p", "64", "-n", "4", "-t", "2", "-q"]);
    for record in &records {
        let seconds = number(record, "avg_ns") / 1e9;
        for (work, roof, percent) in [
            ("read_bytes", "roof_read_bytes_per_s", "roof_read_percent"),
            ("matmul_ops", "roof_matmul_ops_per_s", "roof_matmul_percent"),
        ] {
            let wanted = 100.0 * number(record, work) / seconds / number(record, roof);
            let got = number(record, percent);
            assert!((got - wanted).abs() <= 1e-3 * wanted, "{percent}: {got}, not {wanted}");
        }
    }
}

#[test]
fn every_format_has_the_same_fields_under_llama_benchs_names() {
    let arguments = [&["--synthetic", "tiny:q4_0", "-q"][..], &SHORT].concat();
    let records = json(&arguments);
    let lines = ok(&[&arguments[..], &["--json"]].concat());
    assert_eq!(lines.lines().count(), 2);
    let line: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    let keys = |record: &Value| record.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&line), keys(&records[0]));
    let csv = ok(&[&arguments[..], &["-o", "csv"]].concat());
    let names: Vec<&str> = csv.lines().next().unwrap().split(',').collect();
    for name in [
        "build_commit",
        "cpu_info",
        "gpu_info",
        "backends",
        "model_filename",
        "model_type",
        "model_size",
        "model_n_params",
        "n_batch",
        "n_ubatch",
        "n_threads",
        "type_k",
        "type_v",
        "n_prompt",
        "n_gen",
        "n_depth",
        "test_time",
        "avg_ns",
        "stddev_ns",
        "avg_ts",
        "stddev_ts",
    ] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    let mut fields = keys(&records[0]);
    fields.retain(|name| {
        !["samples_ns", "samples_ts", "ops_steps", "ops_clock", "ops"].contains(&name.as_str())
    });
    assert_eq!(fields.len(), names.len());
    assert!(names.iter().all(|name| fields.contains(&(*name).to_owned())), "{names:?}");
    for line in csv.lines().skip(1) {
        assert!(line.starts_with('"') && line.ends_with('"'), "{line}");
        assert_eq!(line.split("\",\"").count(), names.len(), "{line}");
    }
}

#[test]
fn the_table_reads_like_llama_benchs() {
    let more = ["-d", "16", "--n-parallel", "2", "-q"];
    let table = ok(&[&["--synthetic", "tiny:q4_0"][..], &SHORT, &more].concat());
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
    };
    let rows: Vec<Vec<String>> = table.lines().map(cells).collect();
    let heads = ["model", "size", "params", "backend", "threads", "streams", "test", "t/s"];
    assert_eq!(rows[0][..8], heads.map(str::to_owned));
    assert_eq!(rows[2][0], "llama 1M Q4_0");
    assert_eq!((rows[2][6].as_str(), rows[3][6].as_str()), ("pp40 @ d16", "tg3 @ d16"));
    assert!(rows[2][7].contains(" ± "), "{table}");
    assert!(table.contains("| gate, up"), "{table}");
    let widths: Vec<usize> = table.lines().take(4).map(|line| line.chars().count()).collect();
    assert!(widths.iter().all(|width| *width == widths[0]), "{table}");
}

#[test]
fn what_can_not_be_measured_is_refused_with_a_reason() {
    for (arguments, code, reason) in [
        (&["--synthetic", "mixtral:q4_0"][..], 2, "qwen2.5-7b, mixtral-8x7b, qwen3-30b-a3b"),
        (&["--synthetic", "llama-9b:q4_0"], 2, "llama-70b, qwen2.5-7b"),
        (&["--synthetic", "llama-8b:q4"], 2, "Q4_K_M"),
        (&["--synthetic", "llama-8b"], 2, "SHAPE:TYPE"),
        (&["--synthetic", "tiny:q4_0", "-p", "1-0"], 2, "range"),
        (&["--synthetic", "tiny:q4_0", "-p", "0", "-n", "0"], 2, "nothing to measure"),
        (&["--synthetic", "tiny:q4_0", "--n-parallel", "9", "--ub", "8"], 2, "--ubatch-size"),
        (&["absent.gguf"], 65, "absent.gguf"),
        (&["--synthetic", "llama-70b:f32", "--n-parallel", "500", "-d", "100000"], 75, "memory"),
        (&[], 2, "--synthetic"),
    ] {
        let (got, message) = refused(arguments);
        assert_eq!(got, code, "{arguments:?}: {message}");
        assert!(message.contains(reason), "{arguments:?}: {message}");
    }
    assert!(!Path::new("absent.gguf").exists());
}
