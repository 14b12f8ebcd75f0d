//! Streams: their strict life, cancelling, disconnecting, and clients that do not read.

use crate::raw_client::RawClient;
use crate::scripted_engine::{
    Act, accepted, delta, done, done_event, failed, progress, text_delta,
};
use crate::served::Served;
use serde_json::{Value, json};
use tandem::request::{Delta, Event, FinishReason, Input, Request, RequestError, TokenText};
use tandem::step::TokenLogprob;
use tandem::units::TokenId;

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().expect("a type")).collect()
}

fn hold_to_sequence(events: &[Value], id: &Value) {
    for (index, event) in events.iter().enumerate() {
        assert_eq!(event["seq"], index, "{event}");
        assert_eq!(&event["id"], id, "{event}");
    }
}

fn prompt(request: &Request) -> &str {
    if let Input::Text(text) = &request.input { text } else { "" }
}

#[test]
fn a_stream_lives_in_strict_order_without_a_gap() {
    let served = Served::start(|_| {
        vec![
            accepted(),
            progress(2, 5),
            progress(5, 5),
            delta("Hé"),
            // What an engine says again after a crash is no news.
            accepted(),
            progress(5, 5),
            delta("llo"),
            done(FinishReason::Stop),
        ]
    });
    let mut client = served.connect();
    for id in [json!("a"), json!(7), json!("7")] {
        client.ask(id.clone(), "generate", json!({"prompt": "x"}));
        let events = client.events();
        let wanted = ["accepted", "progress", "progress", "delta", "delta", "done"];
        assert_eq!(kinds(&events), wanted);
        hold_to_sequence(&events, &id);
        assert_eq!(events[0]["prompt_tokens"], 5);
        assert_eq!(events[1]["phase"], "prefill");
        assert_eq!(events[1]["total"], 5);
        assert_eq!(events[3]["text"], "Hé");
        assert_eq!(events[3]["token_ids"], json!([65]));
        assert!(events[3].get("tokens").is_none());
        assert_eq!(events[5]["finish_reason"], "stop");
        assert_eq!(events[5]["usage"]["completion_tokens"], 2);
        assert_eq!(events[5]["timings"]["total_ms"], 5.5);
        assert!(events[5].get("warnings").is_none());
    }
    client.ping();
}

fn token_text(id: u32, text: &str) -> TokenText {
    let token = TokenLogprob { id: TokenId(id), logprob: -0.5 };
    let other = TokenLogprob { id: TokenId(id + 1), logprob: f32::NEG_INFINITY };
    let top = vec![(token, text.to_owned()), (other, "?".to_owned())];
    TokenText { token, text: text.to_owned(), top }
}

#[test]
fn log_probabilities_come_with_their_tokens() {
    let script = vec![
        accepted(),
        Act::Say(Event::PromptLogprobs(vec![token_text(1, "p")])),
        Act::Say(Event::Delta(Delta {
            tokens: Some(vec![token_text(65, "A")]),
            ..text_delta("A")
        })),
        done(FinishReason::Length),
    ];
    let served = Served::start(move |_| script.clone());
    let mut client = served.connect();
    let params = json!({"prompt": "x", "logprobs": true, "top_logprobs": 2, "prompt_logprobs": 1});
    client.ask(1, "generate", params.clone());
    let events = client.events();
    assert_eq!(kinds(&events), ["accepted", "prompt_logprobs", "delta", "done"]);
    let wanted = json!([{"id": 65, "text": "A", "logprob": -0.5, "top": [
        {"id": 65, "text": "A", "logprob": -0.5}, {"id": 66, "text": "?", "logprob": null},
    ]}]);
    assert_eq!(events[2]["tokens"], wanted);
    let mut params = params;
    params["stream"] = json!(false);
    client.ask(1, "generate", params);
    let result = client.result(1);
    assert_eq!(result["tokens"], wanted);
    assert_eq!(result["prompt_logprobs"][0]["id"], 1);
    assert_eq!(served.engine.counts().requests[1].logprobs, Some(2));
}

#[test]
fn a_whole_answer_comes_as_one_result() {
    let second = Delta { index: 1, ..text_delta("two") };
    let script = vec![
        accepted(),
        delta("on"),
        Act::Say(Event::Delta(second)),
        delta("e"),
        Act::Say(Event::Done(done_event(vec![FinishReason::Stop, FinishReason::Length]))),
    ];
    let served = Served::start(move |_| script.clone());
    let mut client = served.connect();
    client.ask(1, "generate", json!({"prompt": "x", "n": 2, "stream": false, "colour": 1}));
    let result = client.result(1);
    assert_eq!(result["text"], "one");
    assert_eq!(result["finish_reason"], "stop");
    assert_eq!(result["answers"][0]["text"], "one");
    assert_eq!(result["answers"][1]["text"], "two");
    assert_eq!(result["answers"][1]["finish_reason"], "length");
    assert_eq!(result["token_ids"], json!([65, 65]));
    assert_eq!(result["usage"]["prompt_tokens"], 5);
    assert_eq!(result["warnings"], json!(["\"colour\" is unknown here and was ignored"]));
    client.ask(1, "generate", json!({"prompt": "x", "n": 2, "colour": 1}));
    let events = client.events();
    assert_eq!(events[0]["warnings"], result["warnings"]);
    assert_eq!(events[2]["index"], 1);
    assert_eq!(events[4]["finish_reasons"], json!(["stop", "length"]));
    assert_eq!(events[4]["warnings"], result["warnings"]);
}

#[test]
fn a_cancelled_stream_is_acknowledged_and_gets_its_end() {
    let served = Served::start(|_| {
        vec![accepted(), delta("a"), Act::AwaitCancel, done(FinishReason::Cancelled)]
    });
    let mut client = served.connect();
    client.ask("g", "generate", json!({"prompt": "x"}));
    assert_eq!(client.event()["type"], "accepted");
    assert_eq!(client.event()["type"], "delta");
    client.ask("c", "cancel", json!({"id": "g"}));
    assert_eq!(client.result("c")["cancelled"], true);
    let last = client.event();
    assert_eq!((&last["type"], &last["seq"]), (&json!("done"), &json!(2)));
    assert_eq!(last["finish_reason"], "cancelled");
    client.ask("c", "cancel", json!({"id": "g"}));
    assert_eq!(client.result("c")["cancelled"], false);
    assert_eq!(served.engine.counts().cancelled, 1);
    client.ask("g", "generate", json!({"prompt": "x", "stream": false}));
    client.ask("c", "cancel", json!({"id": "g"}));
    let result = client.result("g");
    assert_eq!((&result["text"], &result["finish_reason"]), (&json!("a"), &json!("cancelled")));
}

#[test]
fn cancel_knows_only_its_own_connections_requests_and_exact_ids() {
    let served = Served::start(|_| vec![accepted(), Act::AwaitCancel, done(FinishReason::Stop)]);
    let mut client = served.connect();
    client.ask(1, "generate", json!({"prompt": "x"}));
    assert_eq!(client.event()["type"], "accepted");
    let mut other = served.connect();
    other.ask("c", "cancel", json!({"id": 1}));
    assert_eq!(other.result("c")["cancelled"], false);
    for id in [json!("1"), json!(2)] {
        client.ask("c", "cancel", json!({"id": id}));
        assert_eq!(client.result("c")["cancelled"], false, "{id}");
    }
    assert_eq!(served.engine.counts().cancelled, 0);
}

#[test]
fn a_disconnect_cancels_all_of_the_connections_requests_and_no_others() {
    let served = Served::start(|_| vec![accepted(), Act::Hang]);
    let mut stays = served.connect();
    stays.ask(0, "generate", json!({"prompt": "x"}));
    assert_eq!(stays.event()["type"], "accepted");
    let mut leaves = served.connect();
    for id in 0..5 {
        leaves.ask(id, "generate", json!({"prompt": "x", "stream": id != 4}));
    }
    served.engine.wait_until(|counts| counts.events == 6);
    drop(leaves);
    served.engine.wait_until(|counts| counts.dropped == 5);
    stays.ping();
    assert_eq!(served.engine.counts().dropped, 5);
}

#[test]
fn a_half_closed_connection_gets_its_answers_and_then_its_end() {
    let served = Served::start(|_| {
        vec![accepted(), Act::AwaitGate, delta("late"), done(FinishReason::Stop)]
    });
    let mut client = served.connect();
    client.ask(1, "generate", json!({"prompt": "x"}));
    client.half_close();
    assert_eq!(client.event()["type"], "accepted");
    served.engine.open_gate();
    assert_eq!(kinds(&client.events()), ["delta", "done"]);
    assert_eq!(client.line(), None);
}

#[test]
fn a_half_closed_connection_that_closes_for_good_is_a_disconnect() {
    let served = Served::start(|_| vec![accepted(), Act::Hang]);
    let mut client = served.connect();
    client.ask(1, "generate", json!({"prompt": "x"}));
    client.half_close();
    assert_eq!(client.event()["type"], "accepted");
    served.engine.wait_until(|counts| counts.events == 1);
    assert_eq!(served.engine.counts().dropped, 0);
    drop(client);
    served.engine.wait_until(|counts| counts.dropped == 1);
}

#[test]
fn requests_of_one_connection_run_side_by_side() {
    let served = Served::start(|request| match prompt(request) {
        "slow" => vec![accepted(), Act::AwaitGate, delta("slow"), done(FinishReason::Stop)],
        _ => vec![accepted(), delta("fast"), done(FinishReason::Stop)],
    });
    let mut client = served.connect();
    client.ask("s", "generate", json!({"prompt": "slow"}));
    assert_eq!(client.event()["type"], "accepted");
    client.ask("f", "generate", json!({"prompt": "fast"}));
    hold_to_sequence(&client.events(), &json!("f"));
    client.ping();
    served.engine.open_gate();
    assert_eq!(kinds(&client.events()), ["delta", "done"]);
}

#[test]
fn a_client_that_does_not_read_stalls_its_own_streams_and_nobody_elses() {
    let served = Served::start(|request| match prompt(request) {
        "talk" => {
            let chatter = text_delta(&"x".repeat(1000));
            vec![accepted(), Act::Chatter(chatter), done(FinishReason::Cancelled)]
        }
        _ => vec![accepted(), delta("hi"), done(FinishReason::Stop)],
    });
    let mut deaf = served.connect();
    deaf.ask("talk", "generate", json!({"prompt": "talk"}));
    let mut other = served.connect();
    // The deaf client's stream stands still once the socket and the queues are full.
    let mut before = 0;
    loop {
        other.ask(1, "generate", json!({"prompt": "short"}));
        assert_eq!(other.events().len(), 3);
        let now = served.engine.counts();
        let of_deaf = now.events - 3 * (now.requests.len() - 1);
        if of_deaf == before && of_deaf > 10 {
            break;
        }
        before = of_deaf;
    }
    let bytes_pulled = before * 1000;
    assert!(bytes_pulled < 4 << 20, "{bytes_pulled} bytes pulled for a client that does not read");
    deaf.ask("c", "cancel", json!({"id": "talk"}));
    served.engine.wait_until(|counts| counts.cancelled == 1);
    let mut seq = 0;
    loop {
        let message = deaf.json();
        if message["id"] == "c" {
            continue;
        }
        assert_eq!(message["params"]["seq"], seq);
        seq += 1;
        if message["params"]["type"] == "done" {
            break;
        }
    }
    deaf.ping();
}

#[test]
fn control_replies_overtake_stream_data() {
    let served = Served::start(|_| {
        let chatter = text_delta(&"x".repeat(4000));
        vec![accepted(), Act::Chatter(chatter), done(FinishReason::Cancelled)]
    });
    let mut client = served.connect();
    for id in 0..8 {
        client.ask(id, "generate", json!({"prompt": "x"}));
    }
    served.engine.wait_until(|counts| counts.events > 30);
    client.ask("p", "ping", json!({}));
    client.ask("c", "cancel", json!({"id": 0}));
    // Lines are handled in order: the ping's answer is on its way.
    served.engine.wait_until(|counts| counts.cancelled == 1);
    // What the socket holds comes first: at most its buffer, one batch and what was in flight.
    let mut bytes_before = 0;
    loop {
        let line = client.line().expect("a line");
        if line.starts_with("{\"id\":\"p\"") {
            break;
        }
        bytes_before += line.len();
    }
    assert!(bytes_before < 1 << 20, "{bytes_before} bytes before the answer to a ping");
}

#[test]
fn an_engine_that_breaks_its_word_gives_an_internal_error() {
    let served = Served::start(|request| match prompt(request) {
        "no acceptance" => vec![delta("x"), done(FinishReason::Stop)],
        "no end" => vec![accepted(), Act::End],
        "panic" => vec![accepted(), delta("x"), Act::Panic],
        _ => vec![Act::Panic],
    });
    let mut client = served.connect();
    for prompt in ["no end", "panic"] {
        client.ask(1, "generate", json!({"prompt": prompt}));
        let events = client.events();
        hold_to_sequence(&events, &json!(1));
        assert_eq!(events[events.len() - 1]["error"]["data"]["kind"], "internal", "{prompt}");
    }
    for prompt in ["no acceptance", "panic at once"] {
        client.ask(1, "generate", json!({"prompt": prompt}));
        assert_eq!(client.error(1)["data"]["kind"], "internal", "{prompt}");
    }
    client.ping();
}

#[test]
fn figures_come_at_their_interval_until_cancelled() {
    let served = Served::start(|_| vec![failed(RequestError::ShuttingDown)]);
    let mut client = served.connect();
    client.ask("s", "stats.subscribe", json!({"interval_ms": 100}));
    assert_eq!(client.result("s")["interval_ms"], 100);
    for seq in 0..3 {
        let event = client.event();
        assert_eq!((&event["type"], &event["seq"]), (&json!("stats"), &json!(seq)));
        assert_eq!(event["stats"]["server"]["connections"], 1);
        assert_eq!(event["stats"]["engine"], json!({"events": 0}));
    }
    client.ask("c", "cancel", json!({"id": "s"}));
    let end = last_event(&mut client);
    assert_eq!(end["error"]["data"]["kind"], "cancelled");
}

fn last_event(client: &mut RawClient) -> Value {
    loop {
        let message = client.json();
        if message["params"]["type"] == "error" {
            return message["params"].clone();
        }
    }
}

#[test]
fn connections_that_close_leave_nothing_behind() {
    let served = Served::start(|_| vec![accepted(), Act::Hang]);
    let mut stays = served.connect();
    for round in 0..3 {
        let mut clients: Vec<RawClient> = (0..40).map(|_| served.connect()).collect();
        for client in &mut clients {
            client.ask(1, "generate", json!({"prompt": "x"}));
            assert_eq!(client.event()["type"], "accepted");
        }
        drop(clients);
        served.engine.wait_until(|counts| counts.dropped == 40 * (round + 1));
    }
    loop {
        stays.ask(1, "stats.get", json!({}));
        let stats = stays.result(1)["server"].clone();
        if stats["connections"] == 1 && stats["requests_live"] == 0 {
            assert_eq!(stats["connections_total"], 121);
            assert_eq!(stats["requests_total"], 120);
            return;
        }
    }
}
