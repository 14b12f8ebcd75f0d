//! Why there is no engine, or no longer one. What a single request can suffer is `RequestError`.

use crate::config::ConfigError;
use crate::request::RequestError;

/// Why an engine could not be built or is gone.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EngineError {
    /// A knob is out of its range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No model file was named.
    #[error("no model: give a path to a GGUF file or a Hugging Face folder")]
    NoModel,
    /// The model cannot be used: its file, its vocabulary, or the memory that it needs.
    #[error("{0}")]
    Model(RequestError),
    /// The operating system refused a thread.
    #[error("thread {thread} could not be started: {reason}")]
    Thread {
        /// Its name.
        thread: String,
        /// What the system says.
        reason: String,
    },
    /// Something panicked while the model was loaded.
    #[error("loading the model failed: {message}")]
    LoadPanicked {
        /// The panic's message.
        message: String,
    },
    /// An actor failed more often than it may be restarted.
    #[error("{actor} failed and was restarted {restarts} times; the engine is dead: {reason}")]
    Dead {
        /// Which actor.
        actor: String,
        /// How often it was restarted within the window.
        restarts: u32,
        /// Its last failure.
        reason: String,
    },
    /// The GPU failed so that nothing of this process works on it any more, or does not answer.
    #[error("{0}; the GPU can be used again by a new process only")]
    Gpu(RequestError),
    /// The engine was shut down.
    #[error("the engine was shut down")]
    Stopped,
}

impl From<RequestError> for EngineError {
    fn from(error: RequestError) -> Self {
        Self::Model(error)
    }
}

impl From<EngineError> for RequestError {
    /// The same in the words of a request that meets such an engine.
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Model(error) | EngineError::Gpu(error) => error,
            EngineError::Dead { actor, restarts, .. } => Self::ActorRestarted { actor, restarts },
            EngineError::Stopped => Self::ShuttingDown,
            EngineError::Config(error) => {
                Self::InvalidParams { field: error.field, got: error.got, allowed: error.allowed }
            }
            other => Self::Internal { message: other.to_string() },
        }
    }
}
