//! Every row of the protocol's error table, provoked over a real socket.

use crate::raw_client::RawClient;
use crate::scripted_engine::{Act, accepted, failed};
use crate::served::{Served, options};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tandem::request::{ErrorKind, Request, RequestError};

/// Holds an error object to the table and to the facts that it has to carry.
fn check(error: &Value, kind: &str, facts: Value) {
    let row = ErrorKind::TABLE.iter().find(|row| row.1 == kind).expect("a kind of the table");
    assert_eq!(error["data"]["kind"], kind, "{error}");
    assert_eq!(error["code"], row.2, "{error}");
    assert_eq!(error["data"]["retryable"], row.4, "{error}");
    assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{error}");
    for (fact, value) in facts.as_object().expect("facts") {
        assert_eq!(&error["data"][fact], value, "{fact} of {error}");
    }
}

/// What the engine can fail with, each with the facts that the client must get.
fn engine_failures() -> Vec<(RequestError, &'static str, Value)> {
    let text = str::to_owned;
    vec![
        (
            RequestError::ContextExceeded { prompt_tokens: 9000, context_tokens: 2048 },
            "context_exceeded",
            json!({"prompt_tokens": 9000, "context_tokens": 2048}),
        ),
        (
            RequestError::InsufficientMemory {
                device: text("host"),
                need: 10,
                free: 3,
                suggest: text("a smaller context"),
            },
            "insufficient_memory",
            json!({"device": "host", "need": 10, "free": 3, "suggest": "a smaller context"}),
        ),
        (
            RequestError::Overloaded { queue_depth: 512, retry_after_ms: 250 },
            "overloaded",
            json!({"queue_depth": 512, "retry_after_ms": 250}),
        ),
        (
            RequestError::DeadlineExceeded { deadline_ms: 5 },
            "deadline_exceeded",
            json!({"deadline_ms": 5}),
        ),
        (
            RequestError::ModelNotFound { got: text("x"), loaded: vec![text("y")] },
            "model_not_found",
            json!({"got": "x", "loaded": ["y"]}),
        ),
        (
            RequestError::ModelInvalid {
                file: "/m.gguf".into(),
                offset: 24,
                field: text("magic"),
                message: text("no GGUF"),
            },
            "model_invalid",
            json!({"file": "/m.gguf", "offset": 24, "field": "magic"}),
        ),
        (
            RequestError::ModelLost { model: text("m"), reason: text("the file is gone") },
            "model_lost",
            json!({"model": "m"}),
        ),
        (
            RequestError::TokenizerInvalid { field: text("merges"), message: text("none") },
            "tokenizer_invalid",
            json!({"field": "merges"}),
        ),
        (
            RequestError::TemplateError { line: 3, column: 7, message: text("no such filter") },
            "template_error",
            json!({"line": 3, "column": 7}),
        ),
        (
            RequestError::GrammarError { line: 1, column: 2, message: text("no such rule") },
            "grammar_error",
            json!({"line": 1, "column": 2}),
        ),
        (
            RequestError::NotReady { reason: text("loading"), retry_after_ms: 1000 },
            "not_ready",
            json!({"retry_after_ms": 1000}),
        ),
    ]
}

/// What the engine can fail with once a stream runs.
fn stream_failures() -> Vec<(RequestError, &'static str, Value)> {
    let text = str::to_owned;
    vec![
        (RequestError::Internal { message: text("a bug") }, "internal", json!({})),
        (RequestError::SlowConsumer { waited_ms: 30_000 }, "slow_consumer", json!({})),
        (RequestError::NumericError { position: 17 }, "numeric_error", json!({"position": 17})),
        (
            RequestError::GpuLost { device: text("gpu0"), class: text("xid 79"), restarts: 1 },
            "gpu_lost",
            json!({"device": "gpu0", "class": "xid 79", "restarts": 1}),
        ),
        (
            RequestError::GpuHung { device: text("gpu0"), class: text("timeout"), restarts: 2 },
            "gpu_hung",
            json!({"device": "gpu0", "class": "timeout", "restarts": 2}),
        ),
        (
            RequestError::ActorRestarted { actor: text("executor"), restarts: 3 },
            "actor_restarted",
            json!({"actor": "executor", "restarts": 3}),
        ),
        (RequestError::PoisonRequest { crashes: 2 }, "poison_request", json!({"crashes": 2})),
    ]
}

#[test]
fn the_engines_refusals_are_the_requests_error() {
    let failures = engine_failures();
    let script = failures.clone();
    let served = Served::start(move |request| vec![failed(script[index_of(request)].0.clone())]);
    let mut client = served.connect();
    for (index, (_, kind, facts)) in failures.iter().enumerate() {
        for stream in [true, false] {
            let params = json!({"prompt_tokens": [index], "stream": stream});
            client.ask(index, "generate", params);
            check(&client.error(index), kind, facts.clone());
        }
    }
}

/// Which failure a request asks for.
fn index_of(request: &Request) -> usize {
    let tandem::request::Input::Tokens(tokens) = &request.input else { panic!("tokens") };
    tokens[0].index()
}

#[test]
fn the_engines_failures_end_a_stream_as_its_terminal_event() {
    let failures = stream_failures();
    let script = failures.clone();
    let served =
        Served::start(move |request| vec![accepted(), failed(script[index_of(request)].0.clone())]);
    let mut client = served.connect();
    for (index, (_, kind, facts)) in failures.iter().enumerate() {
        client.ask(index, "generate", json!({"prompt_tokens": [index]}));
        let events = client.events();
        assert_eq!(events.len(), 2, "{events:?}");
        assert_eq!(events[1]["seq"], 1);
        check(&events[1]["error"], kind, facts.clone());
        client.ask(index, "generate", json!({"prompt_tokens": [index], "stream": false}));
        check(&client.error(index), kind, facts.clone());
    }
}

#[test]
fn requests_that_are_none_are_refused_by_kind() {
    let served = Served::start(|_| vec![]);
    let mut client = served.connect();
    let refused = |client: &mut RawClient, line: &str, id: Value, kind: &str, facts: Value| {
        client.send(format!("{line}\n"));
        let answer = client.json();
        assert_eq!(answer["id"], id, "{answer}");
        check(&answer["error"], kind, facts);
    };
    let c = &mut client;
    refused(c, "{\"id\":1,", Value::Null, "parse_error", json!({}));
    refused(c, "{\"id\":1}", json!(1), "invalid_request", json!({"field": "method"}));
    let unknown = r#"{"id":"a","method":"models.load"}"#;
    refused(c, unknown, json!("a"), "method_not_found", json!({"got": "\"models.load\""}));
    let facts = json!({"field": "prompt", "got": "missing"});
    refused(c, r#"{"id":2,"method":"generate"}"#, json!(2), "invalid_params", facts);
    let old = r#"{"id":3,"method":"ping","jsonrpc":"1.0"}"#;
    refused(c, old, json!(3), "unsupported_version", json!({"field": "jsonrpc"}));
    let session = r#"{"id":4,"method":"generate","params":{"prompt":"x","session":"s"}}"#;
    refused(c, session, json!(4), "session_not_found", json!({"got": "s"}));
    let model = r#"{"id":5,"method":"models.plan","params":{"model":"m"}}"#;
    let facts = json!({"got": "m", "loaded": ["scripted"]});
    refused(c, model, json!(5), "model_not_found", facts);
    let text = r#"{"id":6,"method":"tokenize","params":{"text":"refuse"}}"#;
    refused(c, text, json!(6), "tokenizer_invalid", json!({}));
    client.ping();
}

#[test]
fn a_client_of_another_major_version_is_told_and_let_go() {
    let served = Served::start(|_| vec![]);
    let mut client = served.connect();
    client.say(&json!({"hello": {"protocol": {"major": 1, "minor": 9}}}));
    client.ping();
    client.say(&json!({"hello": {"protocol": {"major": 2, "minor": 0}}}));
    let facts = json!({"got": "2", "allowed": "1"});
    check(&client.json()["error"], "unsupported_version", facts);
    assert_eq!(client.line(), None);
}

#[test]
fn a_request_cancelled_before_its_acceptance_fails_as_cancelled() {
    let script = vec![Act::AwaitCancel, crate::scripted_engine::done(FINISH_CANCELLED)];
    let served = Served::start(move |_| script.clone());
    let mut client = served.connect();
    for stream in [true, false] {
        client.ask("g", "generate", json!({"prompt": "x", "stream": stream}));
        client.ask("c", "cancel", json!({"id": "g"}));
        assert_eq!(client.result("c")["cancelled"], true);
        check(&client.error("g"), "cancelled", json!({"by": "client"}));
    }
    client.ask("t", "tokenize", json!({"text": "hang"}));
    client.ask("c", "cancel", json!({"id": "t"}));
    check(&client.error("t"), "cancelled", json!({"by": "client"}));
}

const FINISH_CANCELLED: tandem::request::FinishReason = tandem::request::FinishReason::Cancelled;

#[test]
fn an_id_in_use_is_refused_and_its_owner_goes_on() {
    let served = Served::start(|_| {
        vec![accepted(), Act::AwaitGate, crate::scripted_engine::done(FINISH_CANCELLED)]
    });
    let mut client = served.connect();
    client.ask("a", "generate", json!({"prompt": "x"}));
    assert_eq!(client.event()["type"], "accepted");
    for method in ["generate", "ping", "no such method"] {
        client.ask("a", method, json!({"prompt": "x"}));
        check(&client.error("a"), "duplicate_id", json!({"id": "a"}));
    }
    served.connect().ask("a", "ping", json!({}));
    served.engine.open_gate();
    assert_eq!(client.event()["type"], "done");
    client.ask("a", "ping", json!({}));
    assert_eq!(client.result("a")["pong"], true);
}

#[test]
fn too_many_requests_and_connections_are_refused_as_overloaded() {
    let mut options = options();
    options.limits.requests_per_connection_max = 2;
    options.limits.connections_max = 2;
    let served = Served::start_with(options, |_| vec![accepted(), Act::Hang]);
    let mut client = served.connect();
    for id in [1, 2] {
        client.ask(id, "generate", json!({"prompt": "x"}));
        assert_eq!(client.event()["type"], "accepted");
    }
    client.ask(3, "generate", json!({"prompt": "x"}));
    let facts = json!({"queue_depth": 2, "limit": 2, "retry_after_ms": 1000});
    check(&client.error(3), "overloaded", facts);
    client.ping();
    let _second = served.connect();
    let mut third = RawClient::connect_silently(&served.path);
    let answer = third.json();
    assert_eq!(answer["id"], Value::Null);
    check(&answer["error"], "overloaded", json!({"limit": 2}));
    assert_eq!(third.line(), None);
}

#[test]
fn a_draining_server_refuses_new_requests_and_answers_the_rest() {
    let served = Served::start(|_| vec![accepted(), Act::Hang]);
    let mut client = served.connect();
    client.ask(0, "generate", json!({"prompt": "x"}));
    assert_eq!(client.event()["type"], "accepted");
    client.ask(1, "shutdown", json!({"drain_ms": 600_000}));
    assert_eq!(client.result(1)["drain_ms"], 600_000);
    for (method, params) in [
        ("generate", json!({"prompt": "x"})),
        ("chat", json!({"messages": [{"role": "user", "content": "x"}]})),
        ("tokenize", json!({"text": "x"})),
        ("stats.subscribe", json!({})),
    ] {
        client.ask(2, method, params);
        check(&client.error(2), "shutting_down", json!({}));
    }
    client.ask(3, "status", json!({}));
    assert_eq!(client.result(3)["state"], "draining");
}

/// Connects as another user.
fn connect_as_stranger(path: std::path::PathBuf) -> RawClient {
    let connect = move || {
        let stranger = rustix::process::Uid::from_raw(65_534);
        // Linux keeps credentials per thread: only this one, which ends here, changes.
        rustix::thread::set_thread_res_uid(None, stranger, None).expect("root may");
        RawClient::connect_silently(&path)
    };
    std::thread::spawn(connect).join().expect("no panic")
}

#[test]
fn another_user_is_refused_even_if_the_files_let_it_in() {
    use std::os::unix::fs::PermissionsExt;
    let is_root = rustix::process::geteuid().is_root();
    let mut options = options();
    if !is_root {
        // We cannot become somebody else, so the socket is said to be somebody else's.
        options.owner_uid += 1;
    }
    let served = Served::start_with(options, |_| vec![]);
    let open = |path: &std::path::Path, mode: u32| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("ours");
    };
    open(&served.path, 0o666);
    open(served.path.parent().expect("a folder"), 0o755);
    let path = served.path.clone();
    let mut client =
        if is_root { connect_as_stranger(path) } else { RawClient::connect_silently(&path) };
    check(&client.json()["error"], "permission", json!({}));
    assert_eq!(client.line(), None);
}

#[test]
fn every_kind_of_the_table_is_provoked_in_this_file() {
    let text = include_str!("errors.rs");
    let frames = include_str!("frames.rs");
    let missing: BTreeSet<&str> = ErrorKind::TABLE
        .iter()
        .map(|row| row.1)
        .filter(|kind| !text.contains(&format!("\"{kind}\"")))
        .filter(|kind| !frames.contains(&format!("\"{kind}\"")))
        .collect();
    assert_eq!(missing, BTreeSet::new());
}
