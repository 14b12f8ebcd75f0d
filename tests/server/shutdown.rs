//! The end: every stream gets its terminal event, and nothing is waited for without a bound.

use crate::raw_client::RawClient;
use crate::scripted_engine::{Act, ScriptedEngine, accepted, delta, done, text_delta};
use crate::served::{Served, options};
use serde_json::{Value, json};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;
use tandem::request::{FinishReason, Request};
use tandem::server::{Ending, ServerOptions, ServiceState};

const STREAMS: usize = 5;

fn draining_for(drain: Duration) -> ServerOptions {
    ServerOptions { drain, ..options() }
}

/// A client with [`STREAMS`] accepted streams, on one of which the answer is wanted whole.
fn client_with_streams(served: &Served) -> RawClient {
    let mut client = served.connect();
    for id in 0..STREAMS {
        client.ask(id, "generate", json!({"prompt": "x", "stream": id != 0}));
    }
    served.engine.wait_until(|counts| counts.events >= STREAMS);
    client
}

/// Reads to the connection's end and returns every stream's terminal message, by id.
fn terminals(client: &mut RawClient) -> Vec<Value> {
    let mut ends = vec![Value::Null; STREAMS];
    let mut next_seq = [0; STREAMS];
    while let Some(line) = client.line() {
        let message: Value = serde_json::from_str(&line).expect("JSON");
        let params = message.get("params").unwrap_or(&message);
        let id = params["id"].as_u64().expect("one of ours") as usize;
        assert_eq!(ends[id], Value::Null, "something after the terminal event: {line}");
        if message.get("params").is_some() {
            assert_eq!(params["seq"], next_seq[id], "{line}");
            next_seq[id] += 1;
        }
        let is_end = params["type"] == "done" || params.get("error").is_some();
        if is_end || params.get("result").is_some() {
            ends[id] = params.clone();
        }
    }
    ends
}

fn hold_to_shutting_down(ends: &[Value]) {
    for end in ends {
        assert_eq!(end["error"]["data"]["kind"], "shutting_down", "{end}");
        assert_eq!(end["error"]["data"]["retryable"], true);
    }
}

fn endless(_: &Request) -> Vec<Act> {
    vec![accepted(), Act::AwaitCancel, done(FinishReason::Cancelled)]
}

#[test]
fn a_drain_lets_running_streams_end() {
    let mut served = Served::start_with(draining_for(Duration::from_secs(600)), |_| {
        vec![accepted(), Act::AwaitGate, delta("late"), done(FinishReason::Stop)]
    });
    let mut client = client_with_streams(&served);
    let path = served.path.clone();
    served.stop.drain.cancel();
    let mut other = served.connect();
    loop {
        other.ask(0, "status", json!({}));
        if other.result(0)["state"] == "draining" {
            break;
        }
    }
    served.engine.open_gate();
    let ends = terminals(&mut client);
    assert_eq!(ends[0]["result"]["text"], "late");
    assert!(ends[1..].iter().all(|end| end["finish_reason"] == "stop"), "{ends:?}");
    assert_eq!(other.line(), None);
    assert_eq!(served.ending(), Ending::Drained);
    assert!(!path.exists());
}

#[test]
fn after_the_drain_time_every_stream_ends_as_shutting_down() {
    let mut served = Served::start_with(draining_for(Duration::from_millis(50)), endless);
    let mut client = client_with_streams(&served);
    served.stop.drain.cancel();
    hold_to_shutting_down(&terminals(&mut client));
    assert_eq!(served.ending(), Ending::Drained);
}

#[test]
fn a_second_signal_ends_a_long_drain_at_once() {
    let mut served = Served::start_with(draining_for(Duration::from_secs(600)), endless);
    let mut client = client_with_streams(&served);
    served.stop.drain.cancel();
    served.stop.now.cancel();
    hold_to_shutting_down(&terminals(&mut client));
    assert_eq!(served.ending(), Ending::Drained);
}

#[test]
fn a_client_may_end_the_server_and_another_may_hurry_it() {
    let mut served = Served::start(endless);
    let mut client = client_with_streams(&served);
    let mut other = served.connect();
    other.ask(1, "shutdown", json!({"drain_ms": 600_000}));
    assert_eq!(other.result(1)["drain_ms"], 600_000);
    other.ask(2, "shutdown", json!({"drain_ms": 0}));
    assert_eq!(other.result(2)["drain_ms"], 0);
    hold_to_shutting_down(&terminals(&mut client));
    other.expect_end();
    assert_eq!(served.ending(), Ending::Drained);
}

#[test]
fn streams_that_an_engine_leaves_hanging_get_their_end_from_the_server() {
    let mut served =
        Served::start_with(draining_for(Duration::ZERO), |_| vec![accepted(), Act::Hang]);
    let mut client = client_with_streams(&served);
    client.ask("s", "stats.subscribe", json!({"interval_ms": 3_600_000}));
    assert_eq!(client.result("s")["interval_ms"], 3_600_000);
    served.stop.drain.cancel();
    let mut ends = Vec::new();
    while let Some(line) = client.line() {
        let message: Value = serde_json::from_str(&line).expect("JSON");
        let end = message.get("params").unwrap_or(&message).clone();
        if end.get("error").is_some() {
            ends.push(end);
        }
    }
    assert_eq!(ends.len(), STREAMS + 1, "the subscription too");
    hold_to_shutting_down(&ends);
    assert_eq!(served.ending(), Ending::Drained);
}

#[test]
fn an_engine_that_dies_ends_the_server_with_its_reason() {
    let mut served = Served::start(|_| vec![accepted(), Act::Hang]);
    let mut client = client_with_streams(&served);
    served.engine.gone.send_replace(Some("restarted too often".to_owned()));
    hold_to_shutting_down(&terminals(&mut client));
    let reason = "restarted too often".to_owned();
    assert_eq!(served.ending(), Ending::EngineGone { reason });
}

#[test]
fn a_client_that_does_not_read_does_not_hold_up_the_end() {
    let mut options = draining_for(Duration::ZERO);
    options.flush = Duration::from_millis(100);
    let mut served = Served::start_with(options, |_| {
        vec![accepted(), Act::Chatter(text_delta(&"x".repeat(5000))), done(FinishReason::Stop)]
    });
    let mut deaf = served.connect();
    deaf.ask(0, "generate", json!({"prompt": "x"}));
    served.engine.wait_until(|counts| counts.events > 20);
    served.stop.drain.cancel();
    assert_eq!(served.ending(), Ending::Drained);
    deaf.expect_cut();
}

#[test]
fn a_supervisor_hears_of_readiness_life_and_end() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let address = folder.path().join("notify");
    let supervisor = UnixDatagram::bind(&address).expect("a free path");
    supervisor.set_read_timeout(Some(crate::raw_client::PATIENCE)).expect("a timeout");
    let heard = || {
        let mut message = [0; 256];
        let bytes = supervisor.recv(&mut message).expect("a message in time");
        String::from_utf8_lossy(&message[..bytes]).into_owned()
    };
    let mut options = draining_for(Duration::ZERO);
    options.notify_socket = Some(address.into_os_string());
    options.watchdog = Some(Duration::from_millis(40));
    let engine = ScriptedEngine::new(endless);
    engine.state.send_replace(ServiceState::Loading);
    let mut served = Served::start_engine(options, engine);
    let mut client = served.connect();
    client.ask(1, "models.plan", json!({}));
    assert_eq!(client.error(1)["data"]["kind"], "not_ready");
    supervisor.set_nonblocking(true).expect("ours");
    assert!(supervisor.recv(&mut [0; 16]).is_err(), "ready before a token can be generated");
    supervisor.set_nonblocking(false).expect("ours");
    served.engine.state.send_replace(ServiceState::Ready);
    assert!(heard().starts_with("READY=1\n"));
    assert_eq!(heard(), "WATCHDOG=1");
    assert_eq!(heard(), "WATCHDOG=1");
    served.stop.drain.cancel();
    while heard() != "STOPPING=1" {}
    assert_eq!(served.ending(), Ending::Drained);
}
