//! A server on a socket of its own, with a scripted engine behind it.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use super::raw_client::{PATIENCE, RawClient};
use super::scripted_engine::{Act, Handle, ScriptedEngine};
use std::path::PathBuf;
use std::sync::Arc;
use tandem::config::Config;
use tandem::request::Request;
use tandem::server::{self, Ending, Endpoint, EndpointError, Folder, ServerOptions, Stop};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

/// A running server. Dropping it ends it at once.
pub struct Served {
    pub engine: Arc<ScriptedEngine>,
    pub path: PathBuf,
    pub stop: Stop,
    pub runtime: Runtime,
    ending: Option<JoinHandle<Result<Ending, EndpointError>>>,
    _folder: TempDir,
}

/// The options that tests start from.
pub fn options() -> ServerOptions {
    ServerOptions::from_config(&Config::default())
}

impl Served {
    pub fn start(script: impl Fn(&Request) -> Vec<Act> + Send + Sync + 'static) -> Self {
        Self::start_with(options(), script)
    }

    pub fn start_with(
        options: ServerOptions,
        script: impl Fn(&Request) -> Vec<Act> + Send + Sync + 'static,
    ) -> Self {
        Self::start_engine(options, ScriptedEngine::new(script))
    }

    pub fn start_engine(options: ServerOptions, engine: Arc<ScriptedEngine>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("t.sock");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let endpoint = Endpoint::bind(&path, Folder::AsFound).expect("a free path");
        let stop = Stop::default();
        let handle = Arc::new(Handle(Arc::clone(&engine)));
        let serving = server::serve(endpoint, handle, options, stop.clone());
        let ending = Some(runtime.spawn(serving));
        Self { engine, path, stop, runtime, ending, _folder: folder }
    }

    /// A client that has read the hello.
    pub fn connect(&self) -> RawClient {
        RawClient::connect(&self.path)
    }

    /// Waits for the server's end.
    pub fn ending(&mut self) -> Ending {
        let ending = self.ending.take().expect("asked for once");
        let ended = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, ending).await });
        ended.expect("an end in time").expect("no panic").expect("a socket")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.now.cancel();
        if self.ending.is_some() && !std::thread::panicking() {
            self.ending();
        }
    }
}
