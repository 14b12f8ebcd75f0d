//! Gathers what an engine needs before it starts.

use super::root::{self, Source};
use super::{Engine, EngineError, Faults, LoadProgress};
use crate::config::Config;
use std::path::PathBuf;
use std::sync::Arc;

/// Called with every step of loading, on the loading thread.
pub(super) type OnProgress = Box<dyn FnMut(LoadProgress) + Send>;

/// An [`Engine`] in the making.
#[derive(Default)]
#[must_use = "nothing happens before `build` or `start`"]
pub struct EngineBuilder {
    config: Config,
    model: Option<PathBuf>,
    on_progress: Option<OnProgress>,
    probe_folder: Option<PathBuf>,
    faults: Arc<Faults>,
    stages: Option<Arc<dyn super::StageFactory>>,
}

impl EngineBuilder {
    /// The model: a GGUF file, the first part of a split one, or a Hugging Face folder. Wins over
    /// `config.model.path`.
    pub fn model(mut self, path: impl Into<PathBuf>) -> Self {
        self.model = Some(path.into());
        self
    }

    /// Every knob; without it the defaults of `config/default.toml`.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// Hears how loading gets on.
    pub fn on_progress(mut self, hear: impl FnMut(LoadProgress) + Send + 'static) -> Self {
        self.on_progress = Some(Box::new(hear));
        self
    }

    /// Where `tandem probe` keeps what it has measured of this machine: a model that a GPU can't
    /// hold is placed by that, and what is worth copying between KV tiers follows from it.
    pub fn probe_folder(mut self, folder: Option<PathBuf>) -> Self {
        self.probe_folder = folder;
        self
    }

    /// Panics at chosen points, for tests.
    #[doc(hidden)]
    pub fn faults(mut self, faults: Arc<Faults>) -> Self {
        self.faults = faults;
        self
    }

    /// Makes the executor's stages itself, for tests.
    #[doc(hidden)]
    pub fn stages(mut self, stages: Arc<dyn super::StageFactory>) -> Self {
        self.stages = Some(stages);
        self
    }

    /// Starts loading and returns at once: requests are refused as `not_ready` until
    /// [`Engine::ready`].
    ///
    /// # Errors
    /// A knob out of range, no model, no thread.
    pub fn start(mut self) -> Result<Engine, EngineError> {
        self.config.validate()?;
        if let Some(path) = self.model {
            self.config.model.path = path;
        }
        if self.config.model.path.as_os_str().is_empty() {
            return Err(EngineError::NoModel);
        }
        let Self { on_progress, probe_folder, stages, .. } = self;
        let source = Source { on_progress, probe_folder, stages };
        Ok(Engine::new(root::start(self.config, self.faults, source)?))
    }

    /// Loads the model and returns the engine when it can generate.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub async fn build(self) -> Result<Engine, EngineError> {
        let engine = self.start()?;
        engine.ready().await?;
        Ok(engine)
    }
}
