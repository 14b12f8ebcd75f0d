//! Which exit code a failure gets. Codes follow sysexits where it has a word.

use super::bench::BenchError;
use tandem::actors::EngineError;
use tandem::config::ConfigError;
use tandem::executor::ExecutorError;
use tandem::request::{ErrorKind, RequestError};
use tandem::server::EndpointError;
use tandem::server::client::ClientError;
use tandem::telemetry::LoggingError;
use tandem_kernels::GpuError;

/// Wrong usage; clap's own code.
pub const USAGE: u8 = 2;
/// The model file is bad or missing.
pub const DATA: u8 = 65;
/// No service answers.
pub const UNAVAILABLE: u8 = 69;
/// Another service owns the socket, the engine is overloaded, memory is short, or a GPU was lost or
/// hung: later it may work.
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

/// The failure in one sentence. A cause that the words before it repeat is not said twice.
pub fn sentence(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if cause.starts_with(&said) {
            said = cause;
        } else if !said.contains(&cause) {
            said = format!("{said}: {cause}");
        }
    }
    said
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
        if cause.is::<ConfigError>() || cause.is::<LoggingError>() {
            return CONFIG;
        }
        // A transparent error hides its inner one from the chain.
        if let Some(EngineError::Config(_)) = cause.downcast_ref::<EngineError>() {
            return CONFIG;
        }
        if let Some(error) = cause.downcast_ref::<EndpointError>() {
            return match error {
                EndpointError::NoRuntimeDir | EndpointError::PathTooLong { .. } => CONFIG,
                other => other.exit_status(),
            };
        }
        if let Some(ClientError::Connect { .. } | ClientError::Gone { .. }) = cause.downcast_ref() {
            return UNAVAILABLE;
        }
        if let Some(EngineError::Model(error) | EngineError::Gpu(error)) = cause.downcast_ref() {
            return of_request(error);
        }
        if let Some(error) = cause.downcast_ref::<RequestError>() {
            return of_request(error);
        }
        if let Some(
            ExecutorError::Vram(_)
            | ExecutorError::Gpu(GpuError::OutOfMemory { .. } | GpuError::HostOutOfMemory { .. }),
        ) = cause.downcast_ref()
        {
            return TEMPORARY;
        }
        if let Some(error) = cause.downcast_ref::<ServiceError>() {
            return of_kind(&error.kind, error.retryable);
        }
    }
    1
}

fn of_request(error: &RequestError) -> u8 {
    match error {
        // Whether a GPU can run a model, and keeps its KV, is known only with the model.
        RequestError::InvalidParams { field, .. }
            if field.starts_with("gpu.") || field == "kv.dtype" =>
        {
            CONFIG
        }
        other => of_kind(other.kind().name(), other.kind().retryable()),
    }
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
    use tandem::memory::LedgerError;

    #[test]
    fn no_cause_is_told_twice() {
        let source = || std::io::Error::other("no such thing");
        let repeated =
            anyhow::Error::new(ClientError::Connect { path: "s".into(), source: source() });
        assert_eq!(sentence(&repeated), "s: no service answers: no such thing");
        let context = Err::<(), _>(source()).context("text.txt").unwrap_err();
        assert_eq!(sentence(&context), "text.txt: no such thing");
    }

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
        let full = GpuError::HostOutOfMemory { ordinal: 0, need_bytes: 5 };
        assert_eq!(exit_code(&ExecutorError::from(full).into()), TEMPORARY);
        let (ordinal, purpose) = (0, "KV cache");
        let (need_bytes, free_bytes, capacity_bytes) = (5, 3, 9);
        let refused =
            LedgerError::DoesNotFit { ordinal, purpose, need_bytes, free_bytes, capacity_bytes };
        assert_eq!(exit_code(&ExecutorError::from(refused).into()), TEMPORARY);
    }
}
