//! What each method does: answers at once, or starts a task that will.

use super::live::{Live, LiveTable};
use super::outbox::{Gone, Outbox};
use super::protocol::{
    self as wire, AfterRefusal, Catalogue, Command, ErrorObject, Inbound, Line, Method, NoParams,
    Refused, RequestId, add_special, error_line, parse_special, result_line,
};
use super::service::Service;
use super::stream::StreamTask;
use super::subscription;
use crate::units::TokenId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Interval of a subscription that names none.
const STATS_INTERVAL_MS: u64 = 1000;

/// What becomes of a connection after a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Line,
    Close,
}

/// The part of a connection that answers lines.
pub(super) struct Dispatcher {
    pub(super) service: Arc<Service>,
    pub(super) outbox: Outbox,
    pub(super) live: Arc<LiveTable>,
    /// The connection's running requests.
    pub(super) tasks: TaskTracker,
    /// Cancelled when nobody is there to answer.
    pub(super) gone: CancellationToken,
}

/// A command whose method and id are good.
struct Call {
    id: RequestId,
    method: Method,
    params: Map<String, Value>,
    warnings: Vec<String>,
}

impl Call {
    fn read<T: DeserializeOwned>(&mut self, catalogue: &Catalogue) -> Result<T, ErrorObject> {
        let params = std::mem::take(&mut self.params);
        catalogue.read(self.method, params, &mut self.warnings)
    }

    fn result(&self, result: &impl Serialize) -> Line {
        result_line(&self.id, result, &self.warnings)
    }
}

impl Dispatcher {
    /// Answers one line.
    pub(super) async fn handle(&self, line: Result<Inbound, Refused>) -> Result<Next, Gone> {
        let command = match line {
            Ok(Inbound::Hello) => return Ok(Next::Line),
            Ok(Inbound::Command(command)) => command,
            Err(refused) => {
                self.refuse(refused.id.as_ref(), &refused.error).await?;
                return Ok(match refused.then {
                    AfterRefusal::GoOn => Next::Line,
                    AfterRefusal::Close => Next::Close,
                });
            }
        };
        let id = command.id.clone();
        match self.call(command) {
            Ok(Some(answer)) => self.outbox.control.send(answer).await?,
            Ok(None) => {}
            Err(error) => self.refuse(Some(&id), &error).await?,
        }
        Ok(Next::Line)
    }

    /// Answers with an error.
    pub(super) async fn refuse(
        &self,
        id: Option<&RequestId>,
        error: &ErrorObject,
    ) -> Result<(), Gone> {
        self.service.admission.count_error();
        Ok(self.outbox.control.send(error_line(id, error)).await?)
    }

    /// The answer, or `None` if a task gives it.
    fn call(&self, command: Command) -> Result<Option<Line>, ErrorObject> {
        let Command { id, method, params, warnings } = command;
        self.live.check(&id)?;
        let mut call = Call { id, method: Method::named(&method)?, params, warnings };
        match call.method {
            Method::Generate => {
                let params: wire::GenerateParams = call.read(&self.service.catalogue)?;
                self.start_stream(call, params.into_request()?)?;
            }
            Method::Chat => {
                let params: wire::ChatParams = call.read(&self.service.catalogue)?;
                self.start_stream(call, params.into_request()?)?;
            }
            Method::Tokenize => self.tokenize(call)?,
            Method::Detokenize => self.detokenize(call)?,
            Method::StatsSubscribe => self.subscribe(call)?,
            _ => return self.answer(call).map(Some),
        }
        Ok(None)
    }

    /// The methods that are answered at once.
    fn answer(&self, mut call: Call) -> Result<Line, ErrorObject> {
        let service = &self.service;
        let catalogue = &service.catalogue;
        match call.method {
            Method::ModelsPlan => {
                let params: wire::PlanParams = call.read(catalogue)?;
                let plan = service.plan(params.model)?;
                return Ok(call.result(&wire::PlanResult { plan }));
            }
            Method::Cancel => {
                let params: wire::CancelParams = call.read(catalogue)?;
                let cancelled = self.live.cancel(&params.id);
                return Ok(call.result(&wire::CancelResult { cancelled }));
            }
            Method::Shutdown => {
                let params: wire::ShutdownParams = call.read(catalogue)?;
                let asked = params.drain_ms.map(Duration::from_millis);
                let drain = asked.unwrap_or(service.options.drain);
                service.ask_shutdown(drain);
                let drain_ms = drain.as_millis() as u64;
                return Ok(call.result(&wire::ShutdownResult { drain_ms }));
            }
            _ => {}
        }
        let NoParams {} = call.read(catalogue)?;
        Ok(match call.method {
            Method::Describe => call.result(&catalogue.describe()),
            Method::Status => call.result(&service.status()),
            Method::StatsGet => call.result(&service.stats()),
            Method::ModelsList => {
                call.result(&wire::ModelsResult { models: service.engine.models() })
            }
            _ => call.result(&wire::PingResult { pong: true }),
        })
    }

    fn begin(&self, id: RequestId) -> Result<Live, ErrorObject> {
        let permit = self.service.admission.request()?;
        let limit = self.service.options.limits.requests_per_connection_max;
        self.live.begin(id, limit, permit)
    }

    /// Runs a task until it ends or nobody is there to hear it; dropping it cancels its request.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let gone = self.gone.clone();
        self.tasks.spawn(async move {
            gone.run_until_cancelled(task).await;
        });
    }

    fn start_stream(
        &self,
        call: Call,
        request: (crate::request::Request, wire::Delivery),
    ) -> Result<(), ErrorObject> {
        let live = self.begin(call.id)?;
        let outbox = self.outbox.clone();
        let task = StreamTask::start(&self.service, outbox, live, request, call.warnings);
        self.spawn(task.run());
        Ok(())
    }

    fn subscribe(&self, mut call: Call) -> Result<(), ErrorObject> {
        let params: wire::SubscribeParams = call.read(&self.service.catalogue)?;
        let interval_ms = params.interval_ms.unwrap_or(STATS_INTERVAL_MS);
        let live = self.begin(call.id.clone())?;
        let interval = Duration::from_millis(interval_ms);
        let answer = call.result(&wire::SubscribeResult { interval_ms });
        let (service, outbox) = (Arc::clone(&self.service), self.outbox.clone());
        self.spawn(subscription::run(service, outbox, live, (answer, interval)));
        Ok(())
    }

    fn tokenize(&self, mut call: Call) -> Result<(), ErrorObject> {
        let params: wire::TokenizeParams = call.read(&self.service.catalogue)?;
        self.service.check_model(params.model)?;
        let service = Arc::clone(&self.service);
        let specials = (add_special(params.add_special), parse_special(params.parse_special));
        self.start_text_work(call, async move {
            let tokens = service.engine.tokenize(params.text, specials.0, specials.1).await?;
            let tokens = tokens.into_iter().map(|token| token.0).collect();
            Ok(wire::TokenizeResult { tokens })
        })
    }

    fn detokenize(&self, mut call: Call) -> Result<(), ErrorObject> {
        let params: wire::DetokenizeParams = call.read(&self.service.catalogue)?;
        self.service.check_model(params.model)?;
        let service = Arc::clone(&self.service);
        self.start_text_work(call, async move {
            let tokens = params.tokens.into_iter().map(TokenId).collect();
            let text = service.engine.detokenize(tokens).await?;
            Ok(wire::DetokenizeResult { text })
        })
    }

    /// Runs work with one result; the request is live meanwhile and can be cancelled.
    fn start_text_work<R: Serialize + Send + 'static>(
        &self,
        call: Call,
        work: impl Future<Output = Result<R, crate::request::RequestError>> + Send + 'static,
    ) -> Result<(), ErrorObject> {
        let live = self.begin(call.id.clone())?;
        let (outbox, service) = (self.outbox.clone(), Arc::clone(&self.service));
        self.spawn(async move {
            let outcome = live.cancelled.run_until_cancelled(work).await.unwrap_or_else(|| {
                Err(crate::request::RequestError::Cancelled { by: "client".to_owned() })
            });
            let line = match outcome {
                Ok(result) => call.result(&result),
                Err(error) => {
                    service.admission.count_error();
                    error_line(Some(&call.id), &error.into())
                }
            };
            // A connection that is gone needs no answer.
            if let Ok(slot) = outbox.stream.reserve().await {
                drop(live);
                slot.send(line);
            }
        });
        Ok(())
    }
}
