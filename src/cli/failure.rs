//! Which exit code a failure gets. Codes follow sysexits where it has a word.

use super::bench::BenchError;
use tandem::actors::EngineError;
use tandem::config::ConfigError;
use tandem::request::{ErrorKind, RequestError};
use tandem::server::EndpointError;

/// Wrong usage; clap's own code.
pub const USAGE: u8 = 2;
/// The model file is bad or missing.
pub const DATA: u8 = 65;
/// No service answers.
pub const UNAVAILABLE: u8 = 69;
/// Another service owns the socket, or the engine is overloaded: later it may work.
pub const TEMPORARY: u8 = 75;
/// A setting is wrong.
pub const CONFIG: u8 = 78;
/// Ctrl-C.
pub const INTERRUPTED: u8 = 130;

/// An error that the service sent.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct ServiceError {
    /// `data.kind`.
    pub kind: String,
    /// Whether trying again may help.
    pub retryable: bool,
    /// What it says.
    pub message: String,
}

/// A failure whose exit code is known where it arises.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Exit {
    /// The exit code.
    pub code: u8,
    /// What to print.
    pub message: String,
}

/// The exit code of a failure: the first cause in the chain that has one, else 1.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(exit) = cause.downcast_ref::<Exit>() {
            return exit.code;
        }
        if cause.is::<BenchError>() {
            return USAGE;
        }
        if cause.is::<ConfigError>() {
            return CONFIG;
        }
        if let Some(error) = cause.downcast_ref::<EndpointError>() {
            return error.exit_status();
        }
        if let Some(EngineError::Model(error)) = cause.downcast_ref::<EngineError>() {
            return of_kind(error.kind().name(), error.kind().retryable());
        }
        if let Some(error) = cause.downcast_ref::<RequestError>() {
            return of_kind(error.kind().name(), error.kind().retryable());
        }
        if let Some(error) = cause.downcast_ref::<ServiceError>() {
            return of_kind(&error.kind, error.retryable);
        }
    }
    1
}

fn of_kind(kind: &str, retryable: bool) -> u8 {
    let is = |wanted: ErrorKind| kind == wanted.name();
    if is(ErrorKind::ModelInvalid) || is(ErrorKind::TokenizerInvalid) {
        DATA
    } else if is(ErrorKind::InvalidParams) {
        USAGE
    } else if retryable {
        TEMPORARY
    } else {
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn the_cause_decides_not_its_context() {
        let error = RequestError::ModelInvalid {
            file: "x.gguf".into(),
            offset: 0,
            field: "magic".into(),
            message: "is HTML".into(),
        };
        let wrapped = Err::<(), _>(error).context("loading").unwrap_err();
        assert_eq!(exit_code(&wrapped), DATA);
        assert_eq!(exit_code(&anyhow::anyhow!("anything else")), 1);
    }
}
