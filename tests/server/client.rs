//! The typed client against a real socket.

use crate::scripted_engine::{Act, accepted, delta, done, failed};
use crate::served::Served;
use serde_json::{Value, json};
use std::io::Write;
use std::os::unix::net::UnixListener;
use tandem::request::{FinishReason, Input, RequestError};
use tandem::server::client::{Client, ClientError};
use tandem::server::protocol::{StatusResult, TokenizeResult, WireEvent};

fn served() -> Served {
    Served::start(|request| match &request.input {
        Input::Text(text) if text == "endless" => {
            vec![accepted(), delta("a"), Act::AwaitCancel, done(FinishReason::Cancelled)]
        }
        Input::Text(text) if text == "full" => {
            vec![failed(RequestError::Overloaded { queue_depth: 3, retry_after_ms: 5 })]
        }
        _ => vec![accepted(), delta("Hel"), delta("lo"), done(FinishReason::Stop)],
    })
}

fn connect(served: &Served) -> Client {
    served.runtime.block_on(Client::connect(&served.path)).expect("a server")
}

#[test]
fn calls_and_whole_answers_are_typed() {
    let served = served();
    let client = connect(&served);
    assert_eq!(client.hello().models, ["scripted"]);
    served.runtime.block_on(async {
        let status: StatusResult = client.call("status", json!({})).await.expect("a status");
        assert_eq!(status.pid, std::process::id());
        let text = json!({"text": "A"});
        let tokens: TokenizeResult = client.call("tokenize", text).await.expect("tokens");
        assert_eq!(tokens.tokens, [65]);
        let whole = client.whole("generate", json!({"prompt": "x"})).await.expect("an answer");
        assert_eq!((whole.answer.text.as_str(), whole.usage.prompt_tokens), ("Hello", 5));
        let refused = client.call::<Value>("generate", json!({"prompt": 3})).await;
        let error = refused.expect_err("a number is no prompt");
        assert_eq!(error.refusal().map(|error| error.kind()), Some("invalid_params"));
    });
}

#[test]
fn streams_run_side_by_side_and_can_be_cancelled() {
    let served = served();
    let client = connect(&served);
    served.runtime.block_on(async {
        let params = json!({"prompt": "endless"});
        let mut endless = client.stream("generate", params).await.expect("a stream");
        let mut short = client.stream("generate", json!({"prompt": "x"})).await.expect("a stream");
        let mut text = String::new();
        while let Some(event) = short.next().await {
            if let WireEvent::Delta { text: new, .. } = event.expect("an event") {
                text.push_str(&new);
            }
        }
        assert_eq!(text, "Hello");
        endless.cancel().await.expect("a connection");
        let mut last = None;
        while let Some(event) = endless.next().await {
            last = Some(event.expect("an event"));
        }
        let Some(WireEvent::Done { finish_reason, .. }) = last else { panic!("{last:?}") };
        assert_eq!(finish_reason, FinishReason::Cancelled);
        let mut full =
            client.stream("generate", json!({"prompt": "full"})).await.expect("a stream");
        let error = full.next().await.expect("an error").expect_err("overloaded");
        assert_eq!(error.refusal().map(|error| error.kind()), Some("overloaded"));
        assert!(full.next().await.is_none());
        let params = json!({"interval_ms": 100});
        let mut stats = client.stream("stats.subscribe", params).await.expect("a stream");
        let first = stats.next().await.expect("figures");
        assert!(matches!(first, Ok(WireEvent::Stats { .. })), "{first:?}");
    });
}

#[test]
fn dropping_the_client_ends_its_requests() {
    let served = served();
    let client = connect(&served);
    served.runtime.block_on(async {
        let params = json!({"prompt": "endless"});
        let mut stream = client.stream("generate", params).await.expect("a stream");
        assert!(stream.next().await.expect("an event").is_ok());
        drop(client);
        while stream.next().await.is_some_and(|event| event.is_ok()) {}
    });
    served.engine.wait_until(|counts| counts.dropped == 1);
}

#[test]
fn a_server_that_goes_ends_what_waits() {
    let mut served = served();
    let client = connect(&served);
    let mut stream = served
        .runtime
        .block_on(client.stream("generate", json!({"prompt": "endless"})))
        .expect("a stream");
    assert!(served.runtime.block_on(stream.next()).is_some_and(|event| event.is_ok()));
    served.stop.now.cancel();
    served.ending();
    served.runtime.block_on(async {
        let mut last = None;
        while let Some(event) = stream.next().await {
            last = Some(event);
        }
        let Some(Ok(WireEvent::Error { error })) = last else { panic!("{last:?}") };
        assert_eq!(error.kind(), "shutting_down");
        let gone = client.call::<Value>("ping", json!({})).await.expect_err("nobody is there");
        assert!(matches!(gone, ClientError::Gone { .. }), "{gone}");
    });
}

#[test]
fn no_service_and_another_protocol_are_told_apart() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("s");
    let error = runtime.block_on(Client::connect(&path)).expect_err("no socket");
    assert!(error.is_no_service(), "{error}");
    let listener = UnixListener::bind(&path).expect("a free path");
    let answer = |line: &'static str| {
        let listener = listener.try_clone().expect("ours");
        std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().expect("a client");
            socket.write_all(line.as_bytes()).expect("a reader");
        })
    };
    let hello = concat!(
        r#"{"hello":{"protocol":{"major":2,"minor":0},"server":"s","features":[],"limits":"#,
        r#"{"frame_bytes_max":1,"json_depth_max":1,"json_values_max":1,"id_bytes_max":1,"#,
        r#""connections_max":1,"requests_per_connection_max":1,"queue_max":1,"window_bytes":1,"#,
        r#""slow_consumer_ms":1},"pid":1,"boot_id":"","models":[]}}"#,
        "\n"
    );
    for (line, part) in [(hello, "protocol 2"), ("GET / HTTP/1.1\n", "does not know")] {
        let server = answer(line);
        let error = runtime.block_on(Client::connect(&path)).expect_err("no tandem 1");
        assert!(error.to_string().contains(part), "{error}");
        assert!(!error.is_no_service());
        server.join().expect("no panic");
    }
}
