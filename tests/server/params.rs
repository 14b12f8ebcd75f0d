//! Parameters: wrong types and numbers out of range are refused by name, never bent.

use crate::raw_client::RawClient;
use crate::scripted_engine::{accepted, done};
use crate::served::Served;
use serde_json::{Map, Value, json};
use tandem::request::{
    AddSpecial, FinishReason, Input, ParseSpecial, Priority, Request, SamplingParams,
};
use tandem::server::protocol::{Catalogue, GenerateParams, Method};
use tandem::units::TokenId;

fn served() -> Served {
    Served::start(|_| vec![accepted(), done(FinishReason::Stop)])
}

fn with(field: &str, value: &Value) -> Value {
    json!({"prompt": "x", field: value})
}

fn expect_refusal(client: &mut RawClient, method: &str, params: &Value, field: &str) -> Value {
    client.ask(1, method, params.clone());
    let message = client.json();
    let error = &message["error"];
    assert_eq!(error["data"]["kind"], "invalid_params", "{params}: {message}");
    assert_eq!(error["data"]["field"], field, "{params}: {message}");
    for fact in ["got", "allowed"] {
        assert!(error["data"][fact].as_str().is_some_and(|text| !text.is_empty()), "{message}");
    }
    error["data"].clone()
}

#[test]
fn every_parameter_of_generate_refuses_every_wrong_type() {
    let served = served();
    let mut client = served.connect();
    let schema = Catalogue::default().params_schema(Method::Generate).clone();
    let properties = schema["properties"].as_object().expect("properties");
    let values =
        [json!(true), json!(3), json!(0.25), json!("interactive"), json!([]), json!({"a": "b"})];
    // What each parameter takes of these; everything else must be refused by name.
    let takes = |field: &str| match field {
        "prompt" | "model" | "stop" | "session" | "priority" => vec![3, 4],
        "prompt_tokens" | "stop_token_ids" | "dry_sequence_breakers" => vec![4],
        "logprobs" | "stream" | "ignore_eos" | "parse_special" | "add_special" => vec![0],
        "logit_bias" => vec![5],
        "temperature" | "min_p" | "frequency_penalty" | "presence_penalty" | "top_p"
        | "typical_p" | "repetition_penalty" | "dry_multiplier" | "dry_base" => vec![1, 2],
        _ => vec![1],
    };
    assert!(properties.len() > 30, "{}", properties.len());
    for field in properties.keys() {
        for (index, value) in values.iter().enumerate() {
            if !takes(field).contains(&index) {
                expect_refusal(&mut client, "generate", &with(field, value), field);
            }
        }
    }
    client.ping();
    assert_eq!(served.engine.counts().requests.len(), 0);
}

#[test]
fn numbers_out_of_range_are_refused_with_the_range() {
    let served = served();
    let mut client = served.connect();
    for (field, value, allowed) in [
        ("temperature", json!(-0.1), "a number from 0 to 100"),
        ("temperature", json!(1e30), "a number from 0 to 100"),
        ("top_p", json!(0), "a number above 0 and up to 1"),
        ("top_p", json!(1.01), "a number above 0 and up to 1"),
        ("min_p", json!(-1), "a number from 0 to 1"),
        ("typical_p", json!(0.0), "a number above 0 and up to 1"),
        ("top_k", json!(-1), "an integer from 0 to 4294967295"),
        ("repetition_penalty", json!(0), "a number from 0.01 to 100"),
        ("frequency_penalty", json!(2.5), "a number from -2 to 2"),
        ("presence_penalty", json!(-2.5), "a number from -2 to 2"),
        ("dry_base", json!(0.5), "a number from 1 to 100"),
        ("seed", json!(-1), "an integer of at least 0"),
        ("max_tokens", json!(5.0), "an integer from 0 to 4294967295"),
        ("top_logprobs", json!(21), "an integer from 0 to 20"),
        ("prompt_logprobs", json!(21), "an integer from 0 to 20"),
        ("n", json!(0), "an integer from 1 to 16"),
        ("n", json!(17), "an integer from 1 to 16"),
        ("deadline_ms", json!(0), "an integer from 1 to 604800000"),
        ("ttft_deadline_ms", json!(604_800_001), "an integer from 1 to 604800000"),
        ("priority", json!("urgent"), "\"interactive\" or \"batch\""),
    ] {
        let data = expect_refusal(&mut client, "generate", &with(field, &value), field);
        assert_eq!(data["allowed"], allowed, "{field}");
        assert_eq!(data["got"], value.to_string(), "{field}");
    }
}

#[test]
fn what_lies_inside_arrays_and_objects_is_refused_by_its_path() {
    let served = served();
    let mut client = served.connect();
    let many = |n: usize| Value::from(vec!["x"; n]);
    for (field, value, path) in [
        ("stop", json!(["a", ""]), "stop[1]"),
        ("stop", json!(""), "stop"),
        ("stop", json!(["a", 1]), "stop[1]"),
        ("stop", many(17), "stop"),
        ("stop_token_ids", json!([1, -1]), "stop_token_ids[1]"),
        ("stop_token_ids", json!([4_294_967_296_u64]), "stop_token_ids[0]"),
        ("logit_bias", json!({"7": 101}), "logit_bias.7"),
        ("logit_bias", json!({"7": null}), "logit_bias.7"),
        ("logit_bias", json!({"seven": 1}), "logit_bias"),
        ("logit_bias", json!({"07": 1}), "logit_bias"),
        ("dry_sequence_breakers", many(33), "dry_sequence_breakers"),
        ("prompt_tokens", json!([]), "prompt_tokens"),
        ("prompt_tokens", json!([1]), "prompt_tokens"),
        ("top_logprobs", json!(3), "top_logprobs"),
        ("max_tokens", json!(0), "max_tokens"),
    ] {
        expect_refusal(&mut client, "generate", &with(field, &value), path);
    }
    let entries: Map<String, Value> = (0..1025).map(|i| (i.to_string(), json!(1))).collect();
    expect_refusal(&mut client, "generate", &with("logit_bias", &json!(entries)), "logit_bias");
    for (params, path) in [
        (json!({}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": ["hi"]}), "messages[0]"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": ["x"]}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": "x"}], "n": "2"}), "n"),
    ] {
        expect_refusal(&mut client, "chat", &params, path);
    }
    for (method, params, path) in [
        ("tokenize", json!({}), "text"),
        ("tokenize", json!({"text": "a", "add_special": 1}), "add_special"),
        ("detokenize", json!({"tokens": "a"}), "tokens"),
        ("detokenize", json!({"tokens": [1, 2.5]}), "tokens[1]"),
        ("cancel", json!({}), "id"),
        ("cancel", json!({"id": null}), "id"),
        ("shutdown", json!({"drain_ms": -1}), "drain_ms"),
        ("stats.subscribe", json!({"interval_ms": 99}), "interval_ms"),
        ("models.plan", json!({"model": 1}), "model"),
    ] {
        expect_refusal(&mut client, method, &params, path);
    }
    client.ping();
}

#[test]
fn every_parameter_reaches_the_engine_as_it_came() {
    let served = served();
    let mut client = served.connect();
    let params = json!({
        "prompt_tokens": [1, 2], "model": "m", "max_tokens": 9, "temperature": 0.5, "top_k": 4,
        "top_p": 0.9, "min_p": 0.05, "typical_p": 0.8, "seed": u64::MAX, "stop": "end",
        "stop_token_ids": [3], "ignore_eos": true, "repetition_penalty": 1.5,
        "frequency_penalty": -1, "presence_penalty": 2, "penalty_last_n": 64,
        "dry_multiplier": 0.8, "dry_base": 2, "dry_allowed_length": 3, "dry_penalty_last_n": 10,
        "dry_sequence_breakers": ["\n"], "logit_bias": {"13": -100, "2": 0.5}, "logprobs": true,
        "top_logprobs": 5, "prompt_logprobs": 0, "n": 3, "parse_special": true,
        "add_special": false, "priority": "batch", "deadline_ms": 5000, "ttft_deadline_ms": 100,
    });
    client.ask(1, "generate", params);
    client.events();
    let mut sampling = SamplingParams {
        temperature: 0.5,
        top_k: 4,
        top_p: 0.9,
        min_p: 0.05,
        typical_p: 0.8,
        repetition_penalty: 1.5,
        frequency_penalty: -1.0,
        presence_penalty: 2.0,
        penalty_last_n: Some(64),
        logit_bias: vec![(TokenId(13), -100.0), (TokenId(2), 0.5)],
        seed: Some(u64::MAX),
        ..SamplingParams::default()
    };
    sampling.dry.multiplier = 0.8;
    sampling.dry.base = 2.0;
    sampling.dry.allowed_length = 3;
    sampling.dry.last_n = Some(10);
    sampling.dry.sequence_breakers = vec!["\n".to_owned()];
    let mut wanted = Request::new(Input::Tokens(vec![TokenId(1), TokenId(2)]));
    wanted.model = Some("m".to_owned());
    wanted.add_special = AddSpecial::No;
    wanted.parse_special = ParseSpecial::Yes;
    wanted.sampling = sampling;
    wanted.max_tokens = Some(9);
    wanted.stop = vec!["end".to_owned()];
    wanted.stop_token_ids = vec![TokenId(3)];
    wanted.ignore_eos = true;
    wanted.n = 3;
    wanted.logprobs = Some(5);
    wanted.prompt_logprobs = Some(0);
    wanted.priority = Priority::Batch;
    wanted.deadline = Some(std::time::Duration::from_millis(5000));
    wanted.ttft_deadline = Some(std::time::Duration::from_millis(100));
    let schema = Catalogue::default().params_schema(Method::Generate).clone();
    let got = served.engine.counts().requests.remove(0);
    assert_eq!(got, wanted);
    // A parameter that is added to the protocol has to be added here.
    assert_eq!(schema["properties"].as_object().map(Map::len), Some(34));
}

#[test]
fn absent_and_null_parameters_are_the_defaults() {
    let served = served();
    let mut client = served.connect();
    let schema = Catalogue::default().params_schema(Method::Generate).clone();
    let properties = schema["properties"].as_object().expect("properties");
    let mut nulls: Map<String, Value> =
        properties.keys().map(|field| (field.clone(), Value::Null)).collect();
    nulls.insert("prompt".to_owned(), json!("x"));
    for params in [json!({"prompt": "x"}), Value::Object(nulls)] {
        client.ask(1, "generate", params);
        client.events();
    }
    let chat = json!({"messages": [{"role": "user", "content": "é"}]});
    client.ask(1, "chat", chat);
    client.events();
    let requests = served.engine.counts().requests;
    assert_eq!(requests[0], Request::text("x"));
    assert_eq!(requests[1], requests[0]);
    let Input::Chat(messages) = &requests[2].input else { panic!("a chat") };
    assert_eq!((messages[0].role.as_str(), messages[0].content.as_str()), ("user", "é"));
}

#[test]
fn what_is_announced_is_what_the_engine_checks() {
    let catalogue = Catalogue::default();
    let schema = catalogue.params_schema(Method::Generate);
    let properties = schema["properties"].as_object().expect("properties");
    let read = |field: &str, value: &Value| -> Result<Request, Value> {
        let Value::Object(params) = with(field, value) else { panic!("an object") };
        let params: GenerateParams = serde_json::from_value(Value::Object(params))
            .unwrap_or_else(|error| panic!("{field} {value}: {error}"));
        let read = params.into_request().map(|(request, _)| request);
        read.map_err(|error| json!(error.data))
    };
    // Without the schema's check in front, the engine's own words refuse what lies outside.
    for (field, step) in [
        ("temperature", 0.01),
        ("top_p", 0.01),
        ("min_p", 0.01),
        ("typical_p", 0.01),
        ("repetition_penalty", 0.001),
        ("frequency_penalty", 0.01),
        ("presence_penalty", 0.01),
        ("dry_multiplier", 0.01),
        ("dry_base", 0.01),
        ("n", 1.0),
    ] {
        let property = &properties[field];
        let number = |value: f64| {
            if field == "n" { json!(value as u64) } else { json!(value) }
        };
        let low = property["minimum"].as_f64().or(property["exclusiveMinimum"].as_f64());
        let (low, high) = (low.expect("a low end"), property["maximum"].as_f64().expect("a high"));
        assert!(read(field, &number(high)).is_ok(), "{field}");
        assert_eq!(read(field, &number(high + step)).unwrap_err()["field"], field);
        if property.get("minimum").is_some() {
            assert!(read(field, &number(low)).is_ok(), "{field}");
            assert_eq!(read(field, &number(low - step)).unwrap_err()["field"], field);
        } else {
            assert_eq!(read(field, &number(low)).unwrap_err()["field"], field);
        }
    }
}

#[test]
fn describe_has_every_method_event_and_error() {
    let served = served();
    let mut client = served.connect();
    client.ask(1, "describe", json!({}));
    let described = client.result(1);
    for (_, name) in Method::ALL {
        for part in ["params", "result"] {
            assert_eq!(described["methods"][name][part]["type"], "object", "{name} {part}");
        }
    }
    let text = described.to_string();
    assert!(!text.contains("$ref"), "everything stands where it is used");
    for kind in ["accepted", "progress", "prompt_logprobs", "delta", "done", "error", "stats"] {
        assert!(
            described["events"].to_string().contains(&format!("\"const\":\"{kind}\"")),
            "{kind}"
        );
    }
    assert_eq!(described["errors"].as_array().map(Vec::len), Some(29));
    assert_eq!(described["hello"]["properties"]["limits"]["type"], "object");
}

#[test]
fn the_simple_methods_answer() {
    let served = served();
    let mut client = served.connect();
    for (method, params, field, wanted) in [
        ("ping", json!({}), "/pong", json!(true)),
        ("status", json!({}), "/state", json!("ready")),
        ("status", json!({}), "/models", json!(["scripted"])),
        ("status", json!({}), "/engine/scripted", json!(true)),
        ("stats.get", json!({}), "/server/requests_total", json!(0)),
        ("models.list", json!({}), "/models/0/name", json!("scripted")),
        ("models.plan", json!({"model": "scripted"}), "/plan/stages", json!([])),
        ("tokenize", json!({"text": "AB"}), "/tokens", json!([65, 66])),
        ("detokenize", json!({"tokens": [67]}), "/text", json!("C")),
        ("ping", json!({"x": 1}), "/warnings/0", json!("\"x\" is unknown here and was ignored")),
    ] {
        client.ask(1, method, params);
        let result = client.result(1);
        assert_eq!(result.pointer(field), Some(&wanted), "{method}: {result}");
    }
}
