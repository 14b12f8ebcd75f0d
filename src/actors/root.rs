//! Starts an engine.

use super::builder::OnProgress;
use super::shared::Shared;
use super::{EngineError, Faults, StageFactory};
use crate::config::Config;
use std::sync::Arc;

#[allow(dead_code, reason = "loading comes with the next commit")]
pub(super) struct Source {
    pub(super) on_progress: Option<OnProgress>,
    pub(super) stages: Option<Arc<dyn StageFactory>>,
}

pub(super) fn start(
    config: Config,
    faults: Arc<Faults>,
    _source: Source,
) -> Result<Arc<Shared>, EngineError> {
    let shared = Arc::new(Shared::new(config, faults));
    shared.die(EngineError::NoModel);
    Ok(shared)
}
