//! What all connections of a server share.

use super::admission::Admission;
use super::options::{ServerOptions, Stop};
use super::protocol::{
    Catalogue, ErrorObject, Hello, JsonLimits, StatsResult, StatusResult, VERSION,
};
use super::{EngineHandle, ServiceState};
use crate::request::RequestError;
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Name and version as clients see them.
const SERVER: &str = concat!("tandem/", env!("CARGO_PKG_VERSION"));
/// Bound on [`Service::flush_time`] when the server is to end at once.
const HURRIED_FLUSH: Duration = Duration::from_millis(250);
/// What this server can do, by name.
const FEATURES: [&str; 7] =
    ["deadlines", "dry", "logprobs", "priorities", "prompt_logprobs", "stats", "streaming"];

/// What all connections of a server share.
pub(super) struct Service {
    pub(super) engine: Arc<dyn EngineHandle>,
    pub(super) options: ServerOptions,
    pub(super) catalogue: Catalogue,
    pub(super) admission: Arc<Admission>,
    /// The drain time that a client asked for with `shutdown`, the shortest of all.
    pub(super) shutdown_asked: watch::Sender<Option<Duration>>,
    /// The engine's work is over: streams end, connections write what is left and close.
    pub(super) closing: CancellationToken,
    stop: Stop,
    boot_id: String,
    started: Instant,
}

impl Service {
    pub(super) fn new(engine: Arc<dyn EngineHandle>, options: ServerOptions, stop: Stop) -> Self {
        Self {
            engine,
            options,
            catalogue: Catalogue::default(),
            admission: Arc::default(),
            shutdown_asked: watch::Sender::new(None),
            closing: CancellationToken::new(),
            stop,
            boot_id: random_hex(),
            started: Instant::now(),
        }
    }

    /// How long a connection may take to read what is left for it.
    pub(super) fn flush_time(&self) -> Duration {
        let flush = self.options.flush;
        if self.stop.now.is_cancelled() { flush.min(HURRIED_FLUSH) } else { flush }
    }

    pub(super) fn json_limits(&self) -> JsonLimits {
        let limits = &self.options.limits;
        JsonLimits { depth_max: limits.json_depth_max, values_max: limits.json_values_max }
    }

    pub(super) fn hello(&self) -> Hello {
        Hello {
            protocol: VERSION,
            server: SERVER.to_owned(),
            features: FEATURES.map(str::to_owned).to_vec(),
            limits: self.options.limits.clone(),
            pid: std::process::id(),
            boot_id: self.boot_id.clone(),
            models: self.model_names(),
        }
    }

    pub(super) fn status(&self) -> StatusResult {
        let report = self.engine.report();
        let counts = self.admission.stats();
        let draining = self.admission.is_draining() && report.state != ServiceState::Stopped;
        StatusResult {
            state: if draining { ServiceState::Draining } else { report.state },
            server: SERVER.to_owned(),
            pid: std::process::id(),
            boot_id: self.boot_id.clone(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            models: self.model_names(),
            connections: counts.connections,
            requests_live: counts.requests_live,
            engine: report.details,
        }
    }

    pub(super) fn stats(&self) -> StatsResult {
        StatsResult { server: self.admission.stats(), engine: self.engine.stats() }
    }

    /// The plan of a model.
    pub(super) fn plan(&self, model: Option<String>) -> Result<Value, ErrorObject> {
        self.check_model(model)?;
        self.engine.plan().ok_or_else(|| {
            let reason = "the model is being loaded".to_owned();
            RequestError::NotReady { reason, retry_after_ms: 1000 }.into()
        })
    }

    /// Refuses a model that is not served here.
    pub(super) fn check_model(&self, model: Option<String>) -> Result<(), ErrorObject> {
        let (Some(got), loaded) = (model, self.model_names()) else { return Ok(()) };
        if loaded.is_empty() || loaded.contains(&got) {
            return Ok(());
        }
        Err(RequestError::ModelNotFound { got, loaded }.into())
    }

    /// Notes that a client wants the server to end; the shortest drain time wins.
    pub(super) fn ask_shutdown(&self, drain: Duration) {
        self.admission.drain();
        self.shutdown_asked.send_modify(|asked| {
            *asked = Some(asked.map_or(drain, |earlier| earlier.min(drain)));
        });
    }

    fn model_names(&self) -> Vec<String> {
        let models = self.engine.models();
        let names = models.iter().filter_map(|model| model.get("name")?.as_str());
        names.map(str::to_owned).collect()
    }
}

/// 128 random bits; without the operating system's randomness the clock and the process have to do,
/// since a boot id is compared and not kept secret.
fn random_hex() -> String {
    let mut bytes = [0_u8; 16];
    if getrandom::fill(&mut bytes).is_err() {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let nanos = now.map_or(0, |since| since.as_nanos());
        bytes = (nanos << 32 | u128::from(std::process::id())).to_be_bytes();
    }
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
