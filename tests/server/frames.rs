//! Lines: how bytes become requests, and what is refused before any method sees it.

use crate::scripted_engine::{accepted, delta, done};
use crate::served::{Served, options};
use serde_json::{Value, json};
use tandem::request::FinishReason;

fn served() -> Served {
    Served::start(|_| vec![accepted(), delta("hi"), done(FinishReason::Stop)])
}

#[test]
fn a_request_split_at_every_byte_is_one_request() {
    let served = served();
    let mut client = served.connect();
    let line = "{\"id\":\"é\",\"method\":\"ping\",\"params\":{}}\r\n".as_bytes();
    for split in 0..=line.len() {
        client.send(&line[..split]);
        client.send(&line[split..]);
        assert_eq!(client.json(), json!({"id": "é", "result": {"pong": true}}), "at {split}");
    }
    for byte in line {
        client.send([*byte]);
    }
    assert_eq!(client.json()["id"], "é");
}

#[test]
fn several_requests_in_one_write_are_all_answered() {
    let served = served();
    let mut client = served.connect();
    client
        .send("{\"id\":1,\"method\":\"ping\"}\n\r\n \n{\"id\":2,\"method\":\"ping\"}\n{\"id\":3,");
    assert_eq!(client.json()["id"], 1);
    assert_eq!(client.json()["id"], 2);
    client.send("\"method\":\"ping\"}\n");
    assert_eq!(client.json()["id"], 3);
    let many: String =
        (0..5000).map(|id| format!("{{\"id\":{id},\"method\":\"ping\"}}\n")).collect();
    let mut writer = served.connect();
    std::thread::scope(|scope| {
        scope.spawn(|| client.send(many));
        writer.ping();
    });
    for id in 0..5000 {
        assert_eq!(client.json()["id"], id);
    }
}

#[test]
fn a_frame_over_16_mib_is_refused_and_its_connection_closed() {
    let served = served();
    let limit = options().limits.frame_bytes_max;
    assert_eq!(limit, 16 << 20);
    let line = |total: usize| {
        let head = "{\"id\":1,\"method\":\"ping\",\"params\":{\"fill\":\"";
        format!("{head}{}\"}}}}\n", "x".repeat(total - head.len() - 3))
    };
    let mut client = served.connect();
    client.send(line(limit));
    assert_eq!(client.result(1)["pong"], true);
    client.try_send(line(limit + 1));
    let answer = client.json();
    assert_eq!(answer["error"]["data"]["kind"], "frame_too_large");
    assert_eq!(answer["error"]["data"]["limit"], limit);
    assert_eq!(answer["id"], Value::Null);
    assert_eq!(client.line(), None);
    served.connect().ping();
}

#[test]
fn an_endless_line_is_refused_before_its_end() {
    let mut options = options();
    options.limits.frame_bytes_max = 4096;
    let served =
        Served::start_with(options, |_| vec![accepted(), crate::scripted_engine::Act::Hang]);
    let mut client = served.connect();
    client.ask("running", "generate", json!({"prompt": "x"}));
    assert_eq!(client.event()["type"], "accepted");
    while client.try_send([b'['; 1024]) {}
    assert_eq!(client.json()["error"]["data"]["kind"], "frame_too_large");
    client.expect_end();
    assert_eq!(served.engine.wait_until(|counts| counts.dropped == 1).cancelled, 1);
}

#[test]
fn what_is_no_json_is_a_parse_error_and_the_connection_goes_on() {
    let served = served();
    let mut client = served.connect();
    let deep = |depth: usize| {
        let params = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        format!("{{\"id\":1,\"method\":\"ping\",\"params\":{{\"x\":{params}}}}}").into_bytes()
    };
    let lines: Vec<(Vec<u8>, &str)> = vec![
        (b"hello".to_vec(), "expected"),
        (b"{\"id\":1".to_vec(), "EOF"),
        (b"{\"id\":1,\"method\":\"ping\"} x".to_vec(), "trailing"),
        (b"{\"id\":\"\xff\",\"method\":\"ping\"}".to_vec(), "UTF-8"),
        (b"{\"id\":1,\"method\":\"ping\",\"params\":{\"x\":1e999}}".to_vec(), "range"),
        (b"{\"id\":1,\"id\":2,\"method\":\"ping\"}".to_vec(), "duplicate key \"id\""),
        (
            b"{\"id\":1,\"method\":\"ping\",\"params\":{\"a\":[{\"b\":1,\"b\":1}]}}".to_vec(),
            "duplicate key \"b\"",
        ),
        (deep(63), "deeper than 64"),
        (deep(10_000), "deeper than 64"),
    ];
    for (line, part) in lines {
        client.send(&line);
        client.send("\n");
        let answer = client.json();
        assert_eq!(answer["error"]["data"]["kind"], "parse_error", "{answer}");
        assert_eq!(answer["id"], Value::Null);
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains(part), "{message} lacks {part}");
    }
    client.send(deep(62));
    client.send("\n");
    assert_eq!(client.result(1)["warnings"][0], "\"x\" is unknown here and was ignored");
}

#[test]
fn ids_are_echoed_as_they_came_and_bad_ones_refused() {
    let served = served();
    let mut client = served.connect();
    let longest = format!("\"{}\"", "x".repeat(128));
    for id in ["0", "1", "\"1\"", "-5", "9007199254740991", "\"a b\\n\"", longest.as_str()] {
        client.send(format!("{{\"id\":{id},\"method\":\"ping\"}}\n"));
        assert_eq!(client.line(), Some(format!("{{\"id\":{id},\"result\":{{\"pong\":true}}}}")));
    }
    let too_long = format!("\"{}\"", "é".repeat(65));
    let bad = ["null", "1.5", "1.0", "true", "[1]", "{}", "\"\"", "9007199254740992", &too_long];
    for id in bad {
        client.send(format!("{{\"id\":{id},\"method\":\"ping\"}}\n"));
        let answer = client.json();
        assert_eq!(answer["error"]["data"]["kind"], "invalid_request", "{id}");
        assert_eq!(answer["id"], Value::Null);
    }
}

#[test]
fn input_that_ends_inside_a_line_is_answered_before_the_connection_closes() {
    let served = served();
    let mut client = served.connect();
    client.send("{\"id\":1,\"method\":\"generate\",\"params\":{\"prompt\":\"x\"}}\n{\"id\":2");
    client.half_close();
    let mut kinds = Vec::new();
    while let Some(line) = client.line() {
        let message: Value = serde_json::from_str(&line).expect("JSON");
        let kind = message.pointer("/error/data/kind").or(message.pointer("/params/type"));
        kinds.push(kind.and_then(Value::as_str).expect("a kind").to_owned());
    }
    kinds.sort();
    assert_eq!(kinds, ["accepted", "delta", "done", "parse_error"]);
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// A line that may be a request, somewhere between intact and noise.
fn mutated(random: &mut Random) -> Vec<u8> {
    let seeds = [
        json!({"id": 1, "method": "generate", "params": {"prompt": "é", "stop": ["a"], "n": 2}}),
        json!({"id": "x", "method": "chat", "params": {"messages": [{"role": "u"}]}}),
        json!({"id": 2, "method": "tokenize", "params": {"text": "a", "add_special": true}}),
        json!({"id": 3, "method": "cancel", "params": {"id": 1}}),
        json!({"id": 4, "method": "stats.get", "jsonrpc": "2.0"}),
        json!({"id": 5, "method": "chat", "params": {"messages": [], "logit_bias": {"1": 2}}}),
    ];
    let mut line = seeds[random.below(seeds.len())].to_string().into_bytes();
    for _ in 0..random.below(8) {
        let at = random.below(line.len());
        match random.below(5) {
            0 => line[at] = random.next() as u8,
            1 => drop(line.remove(at)),
            2 => line.insert(at, b"{}[]\",:0e-.\\\n\xc3"[random.below(14)]),
            3 => line.truncate(at + 1),
            _ => line.extend_from_within(at..),
        }
        if line.is_empty() {
            line.push(b' ');
        }
    }
    line.push(b'\n');
    line
}

#[test]
fn noise_and_mutated_requests_leave_the_server_answering() {
    let seed = 0x007a_9de5;
    let mut random = Random(seed);
    let served = served();
    for round in 0..40 {
        let mut client = served.connect();
        let mut bytes = Vec::new();
        for _ in 0..40 {
            if random.below(8) == 0 {
                bytes.extend((0..random.below(200)).map(|_| random.next() as u8));
                bytes.push(b'\n');
            } else {
                bytes.extend(mutated(&mut random));
            }
        }
        let mut sender = served.connect();
        sender.ping();
        client.try_send(&bytes);
        client.half_close();
        while let Some(line) = client.line() {
            let message: Value = serde_json::from_str(&line)
                .unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error}: {line}"));
            assert!(message.is_object(), "seed {seed}, round {round}: {line}");
        }
        served.connect().ping();
    }
}
