//! Sets up logging for the binary. The library itself never calls this: a host program keeps its
//! own subscriber.

use std::io;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Whether log lines have ANSI colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogColors {
    /// For a terminal.
    Ansi,
    /// For files and pipes.
    Plain,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The filter does not parse.
    #[error("log.level {got:?} is no level and no filter: {reason}")]
    Filter {
        /// The text that came.
        got: String,
        /// What the parser says.
        reason: String,
    },
    /// The process has a subscriber already.
    #[error("logging is set up already: {0}")]
    Taken(String),
}

/// Sends log lines to standard error from now on, for the whole process.
///
/// # Errors
/// A filter that does not parse; a process that has a subscriber already.
pub fn start_logging(
    level: &str,
    format: LogFormat,
    colors: LogColors,
) -> Result<(), LoggingError> {
    let filter = EnvFilter::try_new(level).map_err(|error| LoggingError::Filter {
        got: level.to_owned(),
        reason: error.to_string(),
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colors == LogColors::Ansi)
        .with_writer(io::stderr);
    match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    }
    .map_err(|error| LoggingError::Taken(error.to_string()))
}
