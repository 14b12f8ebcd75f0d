//! An engine without a model: each request plays the script that a test wrote for it.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use futures_core::Stream;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tandem::request::{
    AddSpecial, Delta, DoneEvent, Event, FinishReason, ParseSpecial, Phase, Request, RequestError,
    Timings, Usage,
};
use tandem::server::{EngineHandle, EngineReport, EventStream, ServiceState};
use tandem::units::TokenId;
use tokio::sync::watch;

/// One act of a script.
#[derive(Clone)]
pub enum Act {
    /// Gives an event.
    Say(Event),
    /// Waits until the request is cancelled.
    AwaitCancel,
    /// Waits until [`ScriptedEngine::open_gate`].
    AwaitGate,
    /// Gives deltas until the request is cancelled.
    Chatter(Delta),
    /// Never says anything again, whatever happens.
    Hang,
    /// Panics.
    Panic,
    /// Ends the stream.
    End,
}

/// What happened so far.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub requests: Vec<Request>,
    /// Requests that were asked to end.
    pub cancelled: usize,
    /// Streams that are gone, whether ended or not.
    pub dropped: usize,
    /// Events given.
    pub events: usize,
}

#[derive(Default)]
struct Shared {
    counts: Counts,
    gate: bool,
    /// Streams end as `shutting_down`.
    stopped: bool,
    wakers: Vec<Waker>,
}

type Script = Box<dyn Fn(&Request) -> Vec<Act> + Send + Sync>;

/// The engine.
pub struct ScriptedEngine {
    script: Script,
    shared: Mutex<Shared>,
    changed: Condvar,
    live: watch::Sender<usize>,
    /// The reason, once the engine is gone.
    pub gone: watch::Sender<Option<String>>,
    pub state: watch::Sender<ServiceState>,
}

impl ScriptedEngine {
    pub fn new(script: impl Fn(&Request) -> Vec<Act> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            script: Box::new(script),
            shared: Mutex::default(),
            changed: Condvar::new(),
            live: watch::Sender::new(0),
            gone: watch::Sender::new(None),
            state: watch::Sender::new(ServiceState::Ready),
        })
    }

    /// A test that failed inside does not make its neighbours' threads fail too.
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<R>(&self, change: impl FnOnce(&mut Shared) -> R) -> R {
        let mut shared = self.lock();
        let result = change(&mut shared);
        let wakers = std::mem::take(&mut shared.wakers);
        drop(shared);
        self.changed.notify_all();
        wakers.into_iter().for_each(Waker::wake);
        result
    }

    /// Lets every [`Act::AwaitGate`] pass.
    pub fn open_gate(&self) {
        self.change(|shared| shared.gate = true);
    }

    pub fn counts(&self) -> Counts {
        self.lock().counts.clone()
    }

    /// Waits until a condition holds.
    pub fn wait_until(&self, condition: impl Fn(&Counts) -> bool) -> Counts {
        let deadline = Instant::now() + super::raw_client::PATIENCE;
        let mut shared = self.lock();
        while !condition(&shared.counts) {
            let left = deadline.checked_duration_since(Instant::now()).expect("it comes in time");
            shared =
                self.changed.wait_timeout(shared, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        shared.counts.clone()
    }
}

/// One request's stream.
struct ScriptedStream {
    engine: Arc<ScriptedEngine>,
    acts: std::vec::IntoIter<Act>,
    current: Option<Act>,
    cancelled: Mutex<bool>,
    ended: bool,
}

impl ScriptedStream {
    fn end(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            self.engine.live.send_modify(|live| *live -= 1);
        }
    }

    fn give(&mut self, event: Event) -> Poll<Option<Event>> {
        if event.is_terminal() {
            self.end();
        }
        self.engine.change(|shared| shared.counts.events += 1);
        Poll::Ready(Some(event))
    }
}

impl Stream for ScriptedStream {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let cancelled = *self.cancelled.lock().expect("no test panics inside");
        let engine = Arc::clone(&self.engine);
        loop {
            if self.current.is_none() {
                self.current = self.acts.next();
            }
            let (gate, stopped) = {
                let mut shared = engine.lock();
                shared.wakers.push(context.waker().clone());
                (shared.gate, shared.stopped)
            };
            let hangs = matches!(self.current, Some(Act::Hang));
            if stopped && !self.ended && !hangs {
                return self.give(Event::Failed(RequestError::ShuttingDown));
            }
            match self.current.take() {
                Some(Act::Say(event)) => return self.give(event),
                Some(Act::AwaitCancel) if cancelled => {}
                Some(Act::AwaitGate) if gate => {}
                Some(Act::Chatter(_)) if cancelled => {}
                Some(Act::Chatter(delta)) => {
                    self.current = Some(Act::Chatter(delta.clone()));
                    return self.give(Event::Delta(delta));
                }
                Some(Act::Panic) => panic!("the script says so"),
                Some(Act::End) | None => {
                    self.end();
                    return Poll::Ready(None);
                }
                waiting => {
                    self.current = waiting;
                    return Poll::Pending;
                }
            }
        }
    }
}

impl EventStream for ScriptedStream {
    fn cancel(&self) {
        *self.cancelled.lock().expect("no test panics inside") = true;
        self.engine.change(|shared| shared.counts.cancelled += 1);
    }
}

impl Drop for ScriptedStream {
    fn drop(&mut self) {
        self.end();
        self.engine.change(|shared| shared.counts.dropped += 1);
    }
}

/// The engine as the server holds it.
pub struct Handle(pub Arc<ScriptedEngine>);

impl EngineHandle for Handle {
    fn generate(&self, request: Request) -> Box<dyn EventStream> {
        let acts = (self.0.script)(&request);
        self.0.live.send_modify(|live| *live += 1);
        self.0.change(|shared| shared.counts.requests.push(request));
        Box::new(ScriptedStream {
            engine: Arc::clone(&self.0),
            acts: acts.into_iter(),
            current: None,
            cancelled: Mutex::new(false),
            ended: false,
        })
    }

    fn tokenize(
        &self,
        text: String,
        _: AddSpecial,
        _: ParseSpecial,
    ) -> BoxFuture<'_, Result<Vec<TokenId>, RequestError>> {
        async move {
            match text.as_str() {
                "hang" => std::future::pending().await,
                "refuse" => Err(RequestError::TokenizerInvalid {
                    field: "tokenizer.ggml.merges".into(),
                    message: "a merge of unknown parts".into(),
                }),
                text => Ok(text.bytes().map(|byte| TokenId(byte.into())).collect()),
            }
        }
        .boxed()
    }

    fn detokenize(&self, tokens: Vec<TokenId>) -> BoxFuture<'_, Result<String, RequestError>> {
        let bytes: Vec<u8> = tokens.iter().map(|token| token.0 as u8).collect();
        async move { Ok(String::from_utf8_lossy(&bytes).into_owned()) }.boxed()
    }

    fn models(&self) -> Vec<Value> {
        vec![json!({"name": "scripted", "context_tokens": 2048})]
    }

    fn plan(&self) -> Option<Value> {
        (*self.0.state.borrow() == ServiceState::Ready).then(|| json!({"stages": []}))
    }

    fn report(&self) -> EngineReport {
        let state = *self.0.state.borrow();
        EngineReport { state, steps: 7, has_work: false, details: json!({"scripted": true}) }
    }

    fn stats(&self) -> Value {
        json!({"events": self.0.counts().events})
    }

    fn ready(&self) -> BoxFuture<'_, Result<(), String>> {
        let mut state = self.0.state.subscribe();
        async move {
            let ready = state.wait_for(|state| *state == ServiceState::Ready).await;
            ready.map(|_| ()).map_err(|error| error.to_string())
        }
        .boxed()
    }

    fn ended(&self) -> BoxFuture<'_, String> {
        let mut gone = self.0.gone.subscribe();
        async move {
            let reason = gone.wait_for(Option::is_some).await.expect("the engine is here");
            reason.clone().unwrap_or_default()
        }
        .boxed()
    }

    fn shutdown(&self, drain: Duration) -> BoxFuture<'_, ()> {
        let mut live = self.0.live.subscribe();
        async move {
            let ended = live.wait_for(|live| *live == 0);
            let _ = tokio::time::timeout(drain, ended).await;
            self.0.change(|shared| shared.stopped = true);
        }
        .boxed()
    }
}

/// `accepted`.
pub fn accepted() -> Act {
    Act::Say(Event::Accepted { queue_position: 0, prompt_tokens: 5 })
}

/// Prefill progress.
pub fn progress(done: u64, total: u64) -> Act {
    Act::Say(Event::Progress { phase: Phase::Prefill, done, total, cached_tokens: 0 })
}

/// New text of the first answer, one token.
pub fn text_delta(text: &str) -> Delta {
    Delta { index: 0, text: text.to_owned(), token_ids: vec![TokenId(65)], tokens: None }
}

/// [`text_delta`] as an act.
pub fn delta(text: &str) -> Act {
    Act::Say(Event::Delta(text_delta(text)))
}

/// The end of a healthy stream.
pub fn done(reason: FinishReason) -> Act {
    Act::Say(Event::Done(done_event(vec![reason])))
}

/// The end of a healthy stream of several answers.
pub fn done_event(finish_reasons: Vec<FinishReason>) -> DoneEvent {
    DoneEvent {
        finish_reasons,
        usage: Usage { prompt_tokens: 5, completion_tokens: 2, ..Usage::default() },
        timings: Timings { queue_ms: 0.5, prefill_ms: 2.0, decode_ms: 3.0, total_ms: 5.5 },
        warnings: Vec::new(),
    }
}

/// The failure of a stream.
pub fn failed(error: RequestError) -> Act {
    Act::Say(Event::Failed(error))
}
