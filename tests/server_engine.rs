//! The real engine behind the socket, on the tiny model that tests write.

#[path = "support/raw_client.rs"]
mod raw_client;
#[allow(clippy::unwrap_used, reason = "what is unwrapped there holds in tests")]
#[path = "actors/rig.rs"]
mod rig;

use raw_client::RawClient;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use tandem::actors::Engine;
use tandem::config::Config;
use tandem::request::{ChatMessage, Request, SamplingParams};
use tandem::server::{self, Ending, Endpoint, EndpointError, Folder, ServerOptions, Stop};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

/// A server with the tiny model.
struct Served {
    engine: Engine,
    path: PathBuf,
    stop: Stop,
    runtime: Runtime,
    ending: Option<JoinHandle<Result<Ending, EndpointError>>>,
    _folder: TempDir,
}

impl Served {
    fn start(config: Config) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("t.sock");
        let endpoint = Endpoint::bind(&path, Folder::AsFound).expect("a free path");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let options = ServerOptions::from_config(&config);
        let building = Engine::builder().model(rig::tiny_model_file()).config(config).build();
        let engine = runtime.block_on(building).expect("a model");
        let stop = Stop::default();
        let serving = server::serve(endpoint, Arc::new(engine.clone()), options, stop.clone());
        let ending = Some(runtime.spawn(serving));
        Self { engine, path, stop, runtime, ending, _folder: folder }
    }

    fn connect(&self) -> RawClient {
        RawClient::connect(&self.path)
    }

    fn ending(&mut self) -> Ending {
        let ending = self.ending.take().expect("asked for once");
        let ended = self
            .runtime
            .block_on(async { tokio::time::timeout(raw_client::PATIENCE, ending).await });
        ended.expect("an end in time").expect("no panic").expect("a socket")
    }

    /// What the library answers by itself.
    fn alone(&self, request: Request) -> String {
        self.runtime.block_on(self.engine.generate(request).collect_text()).expect("an answer")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.now.cancel();
        if self.ending.is_some() && !std::thread::panicking() {
            self.ending();
        }
    }
}

fn greedy(prompt: &str, tokens: usize) -> Request {
    let mut request = Request::text(prompt).max_tokens(tokens).sampling(SamplingParams::greedy());
    request.ignore_eos = true;
    request
}

fn greedy_params(prompt: &str, tokens: usize) -> Value {
    json!({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true})
}

/// The text of a stream whose order and numbers are held to the protocol's rules.
fn text_of(events: &[Value]) -> String {
    let mut rank = 0;
    for (index, event) in events.iter().enumerate() {
        assert_eq!(event["seq"], index, "{event}");
        let order = ["accepted", "progress", "prompt_logprobs", "delta", "done"];
        let here = order.iter().position(|kind| event["type"] == *kind).expect("a healthy stream");
        assert!(here >= rank, "{event} after {}", order[rank]);
        rank = here;
    }
    events.iter().filter_map(|event| event["text"].as_str()).collect()
}

#[test]
fn answers_over_the_socket_are_the_librarys() {
    let served = Served::start(rig::config());
    let mut client = served.connect();
    let alone = served.alone(greedy("the rain in", 40));
    client.ask(1, "generate", greedy_params("the rain in", 40));
    let events = client.events();
    assert_eq!(text_of(&events), alone);
    let end = &events[events.len() - 1];
    assert_eq!(end["finish_reason"], "length");
    assert_eq!(end["usage"]["completion_tokens"], 40);
    let mut params = greedy_params("the rain in", 40);
    params["stream"] = json!(false);
    params["logprobs"] = json!(true);
    params["top_logprobs"] = json!(3);
    client.ask(2, "generate", params);
    let whole = client.result(2);
    assert_eq!(whole["text"], alone);
    let tokens = whole["tokens"].as_array().expect("tokens");
    assert_eq!(tokens.len(), 40);
    for token in tokens {
        let top = token["top"].as_array().expect("alternatives");
        assert_eq!(top.len(), 3);
        assert_eq!(top[0]["id"], token["id"], "greedy takes the best");
    }
    let message = ChatMessage { role: "user".to_owned(), content: "hello".to_owned() };
    let mut chat = Request::chat(vec![message.clone()]).max_tokens(10);
    chat.sampling = SamplingParams::greedy();
    let chat_params = json!({"messages": [message], "max_tokens": 10, "temperature": 0});
    client.ask(3, "chat", chat_params);
    assert_eq!(text_of(&client.events()), served.alone(chat));
}

#[test]
fn many_clients_at_once_get_what_each_gets_alone() {
    let served = Served::start(rig::config());
    let prompt = |number: usize| format!("client {number} asks");
    let alone: Vec<String> = (0..24).map(|n| served.alone(greedy(&prompt(n), 24))).collect();
    std::thread::scope(|scope| {
        for (number, wanted) in alone.iter().enumerate() {
            let mut client = served.connect();
            scope.spawn(move || {
                client.ask(number, "generate", greedy_params(&prompt(number), 24));
                assert_eq!(text_of(&client.events()), *wanted, "client {number}");
            });
        }
    });
}

#[test]
fn a_slow_reader_is_paused_and_ended_and_its_neighbour_is_not() {
    let mut config = rig::config();
    config.stream.window_bytes = "4096".parse().expect("a size");
    config.stream.slow_consumer_ms = 300;
    let served = Served::start(config);
    let mut deaf = served.connect();
    let mut params = greedy_params("talk", 400);
    // Much to read per token, so that it is more than the kernel keeps for a socket.
    for (field, value) in [("n", json!(16)), ("logprobs", json!(true)), ("top_logprobs", json!(20))]
    {
        params[field] = value;
    }
    deaf.ask(1, "generate", params);
    let mut other = served.connect();
    while served.engine.stats().metrics.streams_paused == 0 {
        other.ask(1, "generate", greedy_params("short", 4));
        assert_eq!(other.events().last().expect("an end")["type"], "done");
    }
    rig::eventually("the slow reader's end", || served.engine.stats().metrics.requests_failed == 1);
    other.ask(1, "generate", greedy_params("short", 4));
    assert_eq!(other.events().last().expect("an end")["type"], "done");
    let events = deaf.events();
    let end = events.last().expect("an end");
    assert_eq!(end["error"]["data"]["kind"], "slow_consumer", "{end}");
    assert_eq!(end["error"]["data"]["waited_ms"], 300);
    assert_eq!(end["seq"], events.len() - 1, "nothing is lost before the end");
    deaf.ping();
}

#[test]
fn a_disconnect_frees_what_its_requests_held() {
    let served = Served::start(rig::config());
    let mut client = served.connect();
    for id in 0..4 {
        client.ask(id, "generate", greedy_params("a long story", 2000));
    }
    let mut accepted = 0;
    while accepted < 4 {
        accepted += usize::from(client.event()["type"] == "accepted");
    }
    drop(client);
    rig::eventually("an idle engine", || {
        let stats = served.engine.stats();
        stats.sequences.running + stats.sequences.waiting == 0
            && stats.status.requests_live == 0
            && stats.blocks.used == 0
    });
}

#[test]
fn the_engines_own_refusals_reach_the_client() {
    let served = Served::start(rig::config());
    let mut client = served.connect();
    let unknown_token = 4_000_000_000_u32;
    for (method, params, kind) in [
        ("generate", json!({"prompt_tokens": vec![5; 4000]}), "context_exceeded"),
        ("generate", json!({"prompt": "x", "model": "other"}), "model_not_found"),
        ("generate", json!({"prompt_tokens": [unknown_token]}), "invalid_params"),
        ("generate", json!({"prompt": ""}), "invalid_params"),
        ("detokenize", json!({"tokens": [unknown_token]}), "invalid_params"),
    ] {
        client.ask(1, method, params.clone());
        let data = client.error(1)["data"].clone();
        assert_eq!(data["kind"], kind, "{params}: {data}");
        match kind {
            "context_exceeded" => assert_eq!(data["prompt_tokens"], 4000),
            "model_not_found" => assert_eq!(data["got"], "other"),
            _ => assert!(data["field"].is_string(), "{data}"),
        }
    }
    client.ping();
}

#[test]
fn a_deadline_ends_an_answer_early_and_says_so() {
    let served = Served::start(rig::config());
    let mut client = served.connect();
    let mut params = greedy_params("a long story", 2000);
    params["n"] = json!(16);
    params["deadline_ms"] = json!(200);
    client.ask(1, "generate", params);
    let mut message = client.json();
    while message["params"]["type"] != "done" && message.get("error").is_none() {
        message = client.json();
    }
    // A machine that is too busy to begin in time refuses instead.
    let reason = message.pointer("/params/finish_reason").or(message.pointer("/error/data/kind"));
    let reason = reason.and_then(Value::as_str).expect("a reason");
    assert!(["deadline", "deadline_exceeded"].contains(&reason), "{message}");
}

#[test]
fn figures_model_and_plan_are_the_engines() {
    let served = Served::start(rig::config());
    let mut client = served.connect();
    let info = served.engine.model_info().expect("a loaded model");
    client.ask(1, "models.list", json!({}));
    assert_eq!(client.result(1)["models"][0]["name"], info.name);
    client.ask(1, "status", json!({}));
    let status = client.result(1);
    assert_eq!((&status["state"], &status["models"][0]), (&json!("ready"), &json!(info.name)));
    client.ask(1, "models.plan", json!({"model": info.name}));
    assert_eq!(client.result(1)["plan"]["context_tokens"], info.context_tokens);
    client.ask(1, "generate", greedy_params("x", 4));
    client.events();
    client.ask(1, "status", json!({}));
    assert_eq!(client.result(1)["engine"]["runs_on"], "the CPU: gpu.device is off");
    client.ask(1, "stats.get", json!({}));
    let stats = client.result(1);
    assert_eq!(stats["engine"]["metrics"]["completion_tokens"], 4);
    assert_eq!(stats["server"]["requests_total"], 1);
    client.ask(1, "tokenize", json!({"text": "héllo", "add_special": false}));
    let tokens = client.result(1)["tokens"].clone();
    client.ask(1, "detokenize", json!({"tokens": tokens}));
    assert_eq!(client.result(1)["text"], "héllo");
}

#[test]
fn a_drain_ends_every_stream_of_a_busy_engine() {
    let mut config = rig::config();
    config.server.drain_ms = 100;
    let mut served = Served::start(config);
    let mut client = served.connect();
    for id in 0..6 {
        client.ask(id, "generate", greedy_params("a long story", 2000));
    }
    let mut accepted = 0;
    while accepted < 6 {
        accepted += usize::from(client.event()["type"] == "accepted");
    }
    served.stop.drain.cancel();
    let mut ends = 0;
    while let Some(line) = client.line() {
        let message: Value = serde_json::from_str(&line).expect("JSON");
        if ["done", "error"].iter().any(|kind| message["params"]["type"] == *kind) {
            ends += 1;
        }
    }
    assert_eq!(ends, 6);
    assert_eq!(served.ending(), Ending::Drained);
    assert!(!served.path.exists());
}
