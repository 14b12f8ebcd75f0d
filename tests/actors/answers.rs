//! What a stream says: stop strings, several answers, log-probabilities, refusals.

use crate::rig::hash_stage::continuation;
use crate::rig::{Rig, prompt, read, request};
use tandem::request::{ErrorKind, Event, FinishReason, Phase, Request, RequestError};
use tandem::units::TokenId;

/// Printable tokens of the tiny vocabulary are their own characters.
fn text_of(tokens: &[TokenId]) -> String {
    tokens.iter().map(|token| char::from(token.0 as u8)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_in_order_and_count_what_they_should() {
    let rig = Rig::new().await;
    let read = read(rig.engine.generate(request(&prompt(5, 45), 12))).await;
    assert_eq!(read.text, text_of(&continuation(&prompt(5, 45), 12)));
    assert!(matches!(read.events[0], Event::Accepted { prompt_tokens: 45, .. }));
    let progress = read.events.iter().find_map(|event| match event {
        Event::Progress { phase: Phase::Prefill, done, total, .. } => Some((*done, *total)),
        _ => None,
    });
    assert_eq!(progress, Some((45, 45)));
    let Some(Event::Done(done)) = read.end else { panic!("{:?}", read.end) };
    assert_eq!((done.usage.prompt_tokens, done.usage.completion_tokens), (45, 12));
    let timings = done.timings;
    let parts = timings.queue_ms + timings.prefill_ms + timings.decode_ms;
    assert!(timings.decode_ms > 0.0 && parts <= timings.total_ms + 0.001, "{timings:?}");
    assert!(done.warnings.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_the_answer_before_it() {
    let rig = Rig::new().await;
    let expected = continuation(&prompt(6, 45), 40);
    let text = text_of(&expected);
    let mut stopped = request(&prompt(6, 45), 40);
    stopped.stop = vec![text[10..13].to_owned(), "never".into()];
    let read = read(rig.engine.generate(stopped)).await;
    let before = text.find(&text[10..13]).unwrap();
    assert_eq!(read.text, text[..before]);
    let Some(Event::Done(done)) = read.end else { panic!("{:?}", read.end) };
    assert_eq!(done.finish_reasons, [FinishReason::Stop]);
    assert_eq!(done.usage.completion_tokens, before + 3, "the stop string's tokens were made");
    assert_eq!(read.tokens, expected[..before + 3], "and are reported");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_token_ends_the_answer_and_is_not_part_of_it() {
    let rig = Rig::new().await;
    let expected = continuation(&prompt(7, 45), 40);
    let mut stopped = request(&prompt(7, 45), 40);
    stopped.stop_token_ids = vec![expected[9]];
    let at = expected.iter().position(|token| *token == expected[9]).unwrap();
    let read = read(rig.engine.generate(stopped)).await;
    assert_eq!(read.tokens, expected[..at]);
    let Some(Event::Done(done)) = read.end else { panic!("{:?}", read.end) };
    assert_eq!(done.finish_reasons, [FinishReason::Stop]);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_answers_come_merged_and_are_told_apart() {
    let rig = Rig::new().await;
    let mut several = request(&prompt(8, 70), 15);
    several.n = 3;
    let answer = rig.engine.generate(several).collect().await.unwrap();
    assert_eq!(answer.texts, vec![text_of(&continuation(&prompt(8, 70), 15)); 3]);
    assert_eq!(answer.done.finish_reasons, [FinishReason::Length; 3]);
    assert_eq!(answer.done.usage.completion_tokens, 45);
    assert!(answer.done.usage.cached_tokens >= 32, "later answers share the prompt's blocks");
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_come_with_texts_and_alternatives() {
    let rig = Rig::new().await;
    let mut with = request(&prompt(9, 45), 6);
    with.logprobs = Some(2);
    let read = read(rig.engine.generate(with)).await;
    let told: Vec<_> = read
        .events
        .iter()
        .filter_map(|event| match event {
            Event::Delta(delta) => delta.tokens.clone(),
            _ => None,
        })
        .flatten()
        .collect();
    assert_eq!(told.len(), 6);
    for (token, expected) in told.iter().zip(continuation(&prompt(9, 45), 6)) {
        assert_eq!(token.token.id, expected);
        assert_eq!(token.text, text_of(&[expected]));
        assert_eq!(token.top.len(), 2);
        assert_eq!(token.token.logprob, -0.5);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prompt_log_probabilities_come_once_and_complete() {
    let rig = Rig::new().await;
    let mut scored = request(&prompt(10, 700), 3);
    scored.prompt_logprobs = Some(1);
    let read = read(rig.engine.generate(scored)).await;
    let scores: Vec<_> = read
        .events
        .iter()
        .filter_map(|event| match event {
            Event::PromptLogprobs(scores) => Some(scores),
            _ => None,
        })
        .collect();
    assert_eq!(scores.len(), 1);
    let ids: Vec<TokenId> = scores[0].iter().map(|score| score.token.id).collect();
    assert_eq!(ids, prompt(10, 700)[1..]);
    assert_eq!(read.tokens.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_can_be_scored_without_an_answer() {
    let rig = Rig::new().await;
    let mut scored = request(&prompt(10, 90), 0);
    scored.prompt_logprobs = Some(0);
    let read = read(rig.engine.generate(scored)).await;
    let has_scores = |event: &Event| matches!(event, Event::PromptLogprobs(s) if s.len() == 89);
    assert!(read.events.iter().any(has_scores), "{:?}", read.events);
    let Some(Event::Done(done)) = read.end else { panic!("{:?}", read.end) };
    assert_eq!(done.usage.completion_tokens, 0);
    assert_eq!(done.finish_reasons, [FinishReason::Length]);
}

async fn refused(rig: &Rig, request: Request) -> RequestError {
    match read(rig.engine.generate(request)).await.end {
        Some(Event::Failed(error)) => error,
        other => panic!("{other:?} instead of a refusal"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_model_cannot_do_is_refused_with_the_field() {
    let rig = Rig::new().await;
    let field_of = |error: RequestError| match error {
        RequestError::InvalidParams { field, .. } => field,
        other => panic!("{other}"),
    };
    let outside = TokenId(320);
    let bad = request(&[TokenId(1), outside], 4);
    assert_eq!(field_of(refused(&rig, bad).await), "prompt_tokens");
    let mut bad = request(&prompt(1, 5), 4);
    bad.sampling.logit_bias = vec![(outside, 1.0)];
    assert_eq!(field_of(refused(&rig, bad).await), "logit_bias");
    let mut bad = request(&prompt(1, 5), 4);
    bad.stop_token_ids = vec![outside];
    assert_eq!(field_of(refused(&rig, bad).await), "stop_token_ids");
    assert_eq!(field_of(refused(&rig, request(&[], 4)).await), "prompt");
    let mut bad = request(&prompt(1, 5), 4);
    bad.sampling.top_p = f32::NAN;
    assert_eq!(field_of(refused(&rig, bad).await), "top_p");
    let mut bad = request(&prompt(1, 5), 4);
    bad.model = Some("gpt-9".into());
    assert_eq!(refused(&rig, bad).await.kind(), ErrorKind::ModelNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_context_bounds_prompt_and_answer() {
    let rig = Rig::new().await;
    let full = refused(&rig, request(&prompt(1, 2048), 4)).await;
    assert_eq!(full, RequestError::ContextExceeded { prompt_tokens: 2048, context_tokens: 2048 });
    let read = read(rig.engine.generate(request(&prompt(1, 2040), 100))).await;
    assert_eq!(read.tokens, continuation(&prompt(1, 2040), 8));
    let Some(Event::Done(done)) = read.end else { panic!("{:?}", read.end) };
    assert_eq!(done.finish_reasons, [FinishReason::Length]);
    assert!(done.warnings[0].contains("room for 8"), "{:?}", done.warnings);
}
