//! The house rules as tests: layers, sizes, names, unsafe, environment reads, unfinished work.
//! What a rule forbids is written in pieces here, so that this file keeps its own rules.

#[path = "tidy/functions.rs"]
mod functions;

use std::fs;
use std::path::{Path, PathBuf};

/// Modules of the library by layer, lowest first (`docs/architecture.md`).
const LAYERS: [&[&str]; 7] = [
    &["units", "tensor", "request", "step", "config"],
    &["formats", "hardware", "telemetry"],
    &["model", "tokenizer", "sampling", "speculative", "kv", "memory"],
    &["scheduler", "placement"],
    &["executor"],
    &["actors", "blocking"],
    &["server", "cli", "main"],
];

/// Imports inside one layer that are wanted; others of the same layer are refused (L0 excepted).
const SIDEWAYS: [(&str, &str); 2] = [("blocking", "actors"), ("cli", "server")];

/// The only files of the root package that may hold unsafe code.
const UNSAFE_FILES: [&str; 25] = [
    "src/executor/cpu.rs",
    "src/executor/cpu/attend.rs",
    "src/executor/cpu/experts.rs",
    "src/executor/cpu/products.rs",
    "src/executor/cpu/rotate.rs",
    "src/executor/cpu/spilled.rs",
    "src/executor/cpu/stream.rs",
    "src/executor/cpu_pool.rs",
    "src/executor/gpu/graphs.rs",
    "src/executor/gpu/inputs.rs",
    "src/executor/gpu/kv.rs",
    "src/executor/gpu/ops.rs",
    "src/executor/gpu/pipeline_kv.rs",
    "src/executor/gpu/spill_measure.rs",
    "src/executor/gpu/spill_sender.rs",
    "src/executor/gpu/spill_thread.rs",
    "src/executor/gpu/spill_weights.rs",
    "src/executor/handoff/gpu.rs",
    "src/executor/kv_store.rs",
    "src/executor/kv_tiers/blocks.rs",
    "src/executor/spill.rs",
    "src/executor/buffers.rs",
    "src/formats/mapped_file.rs",
    "src/memory/arena.rs",
    "src/memory/nodes.rs",
];

const FILE_LINES_MAX: usize = 400;
const LINE_COLUMNS_MAX: usize = 100;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.map(|entry| entry.expect("a readable folder")) {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        let skipped = ["target", ".git", ".cache", "corpus", "artifacts", "data"];
        if path.is_dir() && !skipped.contains(&name.as_str()) {
            files_below(&path, found);
        } else if path.is_file() {
            found.push(path);
        }
    }
}

/// All files of the repository with the given endings, relative to its root, with their text.
fn sources(folders: &[&str], endings: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for folder in folders {
        files_below(&root().join(folder), &mut found);
    }
    found.sort();
    found
        .into_iter()
        .filter(|path| {
            let ending = path.extension().map(|e| e.to_string_lossy().into_owned());
            endings.contains(&"*") || ending.is_some_and(|e| endings.contains(&e.as_str()))
        })
        .filter_map(|path| {
            let text = fs::read_to_string(&path).ok()?;
            let relative = path.strip_prefix(root()).ok()?.to_string_lossy().into_owned();
            Some((relative, text))
        })
        .collect()
}

fn rust_sources() -> Vec<(String, String)> {
    let folders = ["src", "kernels", "cpu_kernels", "tests", "benches", "examples", "fuzz"];
    sources(&folders, &["rs"])
}

fn report(rule: &str, offences: Vec<String>) {
    assert!(offences.is_empty(), "{rule}:\n  {}", offences.join("\n  "));
}

fn layer_of(module: &str) -> Option<usize> {
    LAYERS.iter().position(|modules| modules.contains(&module))
}

/// The library module that a file of `src/` belongs to.
fn module_of(file: &str) -> &str {
    let inner = file.trim_start_matches("src/");
    inner.split('/').next().unwrap_or(inner).trim_end_matches(".rs")
}

/// Every `crate::x` or `tandem::x` that a text names outside comments.
fn named_modules(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        for prefix in ["crate::", "tandem::"] {
            for (at, _) in code.match_indices(prefix) {
                let rest = &code[at + prefix.len()..];
                let name: String =
                    rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                found.push((number + 1, name));
            }
        }
    }
    found
}

#[test]
fn imports_only_point_down() {
    let mut offences = Vec::new();
    for (file, text) in sources(&["src"], &["rs"]) {
        let module = module_of(&file);
        if module == "lib" {
            continue;
        }
        let Some(layer) = layer_of(module) else {
            offences.push(format!("{file}: module {module} is in no layer"));
            continue;
        };
        for (line, named) in named_modules(&text) {
            let Some(target) = layer_of(&named) else { continue };
            let sideways = target == layer && layer > 0 && named != module;
            let wanted = SIDEWAYS.contains(&(module, named.as_str()));
            if target > layer || (sideways && !wanted && !(module == "main" && target == layer)) {
                offences.push(format!("{file}:{line}: {module} must not import {named}"));
            }
        }
    }
    report("imports only point down (LAYERS in this test)", offences);
}

#[test]
fn the_server_sees_only_the_engine() {
    let mut offences = Vec::new();
    for (file, text) in sources(&["src/server"], &["rs"]) {
        for (line, named) in named_modules(&text) {
            if ["scheduler", "executor", "kv", "memory", "model"].contains(&named.as_str()) {
                offences.push(format!("{file}:{line}: server must not import {named}"));
            }
        }
    }
    report("the server sees only the engine", offences);
}

#[test]
fn files_and_lines_are_short() {
    let mut offences = Vec::new();
    for (file, text) in rust_sources() {
        let lines = text.lines().count();
        if lines > FILE_LINES_MAX {
            offences.push(format!("{file}: {lines} lines, at most {FILE_LINES_MAX}"));
        }
        for (number, line) in text.lines().enumerate() {
            let columns = line.chars().count();
            if columns > LINE_COLUMNS_MAX {
                offences.push(format!("{file}:{}: {columns} columns", number + 1));
            }
        }
    }
    report("files and lines are short", offences);
}

#[test]
fn functions_are_short_and_take_few_parameters() {
    let mut offences = Vec::new();
    for (file, text) in rust_sources() {
        offences.extend(functions::offences(&file, &text));
    }
    report("functions are short and take few parameters", offences);
}

#[test]
fn unsafe_code_stays_in_its_files() {
    let mut offences = Vec::new();
    for (file, text) in sources(&["src"], &["rs"]) {
        if UNSAFE_FILES.contains(&file.as_str()) {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or("");
            if code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe") {
                offences.push(format!("{file}:{}", number + 1));
            }
        }
    }
    report("unsafe code stays in the files that UNSAFE_FILES lists", offences);
}

#[test]
fn names_say_something() {
    let banned = ["utils", "util", "common", "helpers", "helper", "types", "manager", "core"];
    let mut offences = Vec::new();
    for (file, _) in rust_sources() {
        if file.split('/').any(|part| banned.contains(&part.trim_end_matches(".rs"))) {
            offences.push(file);
        }
    }
    report("no file or folder is named utils, common, helpers, types, manager or core", offences);
}

#[test]
fn every_module_opens_with_what_it_is() {
    let mut offences = Vec::new();
    for (file, text) in sources(&["src", "kernels/src", "cpu_kernels/src"], &["rs"]) {
        let opening: String = text
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .map(|line| line.trim_start_matches("//!"))
            .collect();
        let sentences = opening.matches(". ").count() + usize::from(opening.ends_with('.'));
        let wanted = if file.ends_with("/mod.rs") { 2 } else { 1 };
        if sentences < wanted {
            offences.push(format!("{file}: {sentences} sentences of //!, at least {wanted}"));
        }
    }
    report("every module opens with what it owns, must not know, and who calls it", offences);
}

#[test]
fn the_library_reads_no_environment_and_prints_nothing() {
    let mut offences = Vec::new();
    let words = [concat!("env:", ":var"), concat!("print", "ln!"), concat!("signal", "::ctrl_c")];
    for (file, text) in sources(&["src", "kernels/src", "cpu_kernels/src"], &["rs"]) {
        if ["main", "cli"].contains(&module_of(&file)) || file.ends_with("/build.rs") {
            continue;
        }
        let library = text.split("#[cfg(test)]").next().unwrap_or("");
        for (number, line) in library.lines().enumerate() {
            let code = line.split("//").next().unwrap_or("");
            if words.iter().any(|word| code.contains(word)) {
                offences.push(format!("{file}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    report("the library reads no environment, prints nothing, installs no handler", offences);
}

#[test]
fn every_channel_has_a_bound() {
    let words = [concat!("unbounded", "_channel("), concat!("unbounded", "(")];
    let mut offences = Vec::new();
    for (file, text) in rust_sources() {
        for (number, line) in text.lines().enumerate() {
            if words.iter().any(|word| line.contains(word)) {
                offences.push(format!("{file}:{}", number + 1));
            }
        }
    }
    report("every queue has a bound", offences);
}

#[test]
fn nothing_is_left_unfinished_or_tied_to_one_machine() {
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("to", "do!("),
        concat!("unimpl", "emented!("),
        concat!("/wo", "rk/"),
        concat!("/ro", "ot/"),
        concat!("pypi", ".org"),
        concat!("npmjs", ".org"),
        concat!("debian", ".org"),
        concat!("crates", ".io/"),
        concat!("../", "shared"),
    ];
    let folders = [
        "src",
        "kernels",
        "cpu_kernels",
        "tests",
        "benches",
        "examples",
        "fuzz",
        "scripts",
        "docs",
        "config",
        ".ci",
    ];
    let mut all = sources(&folders, &["*"]);
    for file in ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Cargo.toml", "deny.toml"] {
        if let Ok(text) = fs::read_to_string(root().join(file)) {
            all.push((file.to_owned(), text));
        }
    }
    let mut offences = Vec::new();
    for (file, text) in all.iter().filter(|(file, _)| !file.ends_with("Cargo.lock")) {
        for (number, line) in text.lines().enumerate() {
            if let Some(word) = words.iter().find(|word| line.contains(**word)) {
                offences.push(format!("{file}:{}: {word}", number + 1));
            }
        }
    }
    report("nothing is left unfinished or tied to one machine", offences);
}

#[test]
fn every_dependency_says_what_it_saves_us() {
    let mut offences = Vec::new();
    for file in ["Cargo.toml", "kernels/Cargo.toml", "cpu_kernels/Cargo.toml"] {
        let text = fs::read_to_string(root().join(file)).expect("a manifest");
        let (mut inside, mut explained) = (false, false);
        for line in text.lines() {
            if line.starts_with('[') {
                inside = line.contains("dependencies");
            } else if line.starts_with('#') {
                explained = true;
            } else if line.is_empty() {
                explained = false;
            } else if inside && !explained && !line.contains("path = ") {
                offences.push(format!("{file}: {line}"));
            }
        }
    }
    report("every group of dependencies has a comment that says what it saves us", offences);
}

#[test]
fn every_knob_is_explained() {
    let mut offences = Vec::new();
    for (file, text) in sources(&["config"], &["toml"]) {
        for line in text.lines() {
            if line.contains('=') && !line.starts_with('#') && !line.contains(" # ") {
                offences.push(format!("{file}: {line}"));
            }
        }
    }
    report("every knob in config says its unit and why", offences);
}
