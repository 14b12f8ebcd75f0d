//! How `chat`, `generate`, `ps` and `stop` reach an engine: through the running service, or, when
//! there is none and a model was named, through one of their own behind a private socket. Either
//! way they speak the protocol, so there is one code path.

use super::failure::{Exit, ServiceError, UNAVAILABLE};
use super::output::{Output, ProgressUnit};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tandem::actors::Engine;
use tandem::config::Config;
use tandem::server::client::{Client, ClientError, EventReader};
use tandem::server::protocol::{ErrorObject, WireEvent};
use tandem::server::{self, Endpoint, Folder, ServerOptions, Stop};
use tokio::task::JoinHandle;

/// How often a service that loads its model is asked whether it has done so.
const LOADING_POLL: Duration = Duration::from_millis(100);
/// How often a socket is tried whose service ends.
const ENDING_POLL: Duration = Duration::from_millis(20);

/// Where an engine may be found.
#[derive(Clone, Debug)]
pub struct Place {
    /// The service's socket.
    pub socket: PathBuf,
    /// What an engine of our own is built from; without a model path there is none.
    pub config: Config,
}

/// A connection to an engine.
pub struct Connection {
    client: Client,
    embedded: Option<Embedded>,
}

/// An engine of our own with its private service.
struct Embedded {
    stop: Stop,
    service: JoinHandle<Result<()>>,
    folder: PathBuf,
}

/// The events of one request.
pub struct Events {
    reader: EventReader,
}

impl Connection {
    /// Asks the running service; without one, starts an engine if a model was named.
    ///
    /// # Errors
    /// No service and no model, or a model that can't be loaded.
    pub async fn open(place: Place, output: Output) -> Result<Self> {
        match Client::connect(&place.socket).await {
            Ok(client) => Self { client, embedded: None }.loaded(output).await,
            Err(error) if !error.is_no_service() => Err(error.into()),
            Err(_) if place.config.model.path.as_os_str().is_empty() => {
                Err(no_service(&place.socket, "; start one with `tandem serve`, or name a --model"))
            }
            Err(_) => Self::embed(place.config, output).await,
        }
    }

    /// Asks the running service.
    ///
    /// # Errors
    /// There is none.
    pub async fn to_service(place: &Place) -> Result<Self> {
        match Client::connect(&place.socket).await {
            Ok(client) => Ok(Self { client, embedded: None }),
            Err(error) if error.is_no_service() => Err(no_service(&place.socket, "")),
            Err(ClientError::Gone { .. }) => Err(no_service(&place.socket, "; it is ending")),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until a service that drains has closed the connection and freed its socket.
    pub async fn ended(mut self, place: &Place) {
        self.client.closed().await;
        while !matches!(Client::connect(&place.socket).await, Err(error) if error.is_no_service()) {
            tokio::time::sleep(ENDING_POLL).await;
        }
    }

    /// Waits while the service loads its model.
    async fn loaded(mut self, output: Output) -> Result<Self> {
        let mut told = false;
        while self.call("status", json!({})).await?["state"] == "loading" {
            if !std::mem::replace(&mut told, true) {
                output.notice("the service loads its model")?;
            }
            tokio::time::sleep(LOADING_POLL).await;
        }
        Ok(self)
    }

    async fn embed(config: Config, output: Output) -> Result<Self> {
        let engine = load(config.clone(), output).await?;
        let folder = std::env::temp_dir().join(format!("tandem-{}", std::process::id()));
        let path = folder.join("tandem.sock");
        let endpoint = Endpoint::bind(&path, Folder::Private)?;
        let (options, stop) = (ServerOptions::from_config(&config), Stop::default());
        let serving = server::serve(endpoint, Arc::new(engine), options, stop.clone());
        let service = tokio::spawn(async move {
            serving.await?;
            Ok(())
        });
        let client = Client::connect(&path).await?;
        Ok(Self { client, embedded: Some(Embedded { stop, service, folder }) })
    }

    /// Calls a method that has one result.
    ///
    /// # Errors
    /// The service refuses or is gone.
    pub async fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.client.call(method, params).await.map_err(refusal)
    }

    /// Calls a method that has events.
    ///
    /// # Errors
    /// The service is gone.
    pub async fn stream(&mut self, method: &str, params: Value) -> Result<Events> {
        Ok(Events { reader: self.client.stream(method, params).await.map_err(refusal)? })
    }

    /// Leaves the service; one of our own is stopped.
    ///
    /// # Errors
    /// Our own service failed.
    pub async fn close(self) -> Result<()> {
        drop(self.client);
        if let Some(embedded) = self.embedded {
            embedded.stop.drain.cancel();
            embedded.service.await.context("the embedded service")??;
            // Its lock file may still lie there; a folder of /tmp is not worth failing for.
            let _ = std::fs::remove_dir_all(&embedded.folder);
        }
        Ok(())
    }
}

impl Events {
    /// The next event in the protocol's words.
    ///
    /// # Errors
    /// The request failed, or the service is gone.
    pub async fn next(&mut self) -> Result<Value> {
        match self.reader.next().await {
            Some(Ok(WireEvent::Error { error })) => Err(service_error(&error).into()),
            Some(Ok(event)) => Ok(serde_json::to_value(event)?),
            Some(Err(error)) => Err(refusal(error)),
            None => {
                let message = "the stream ended without its terminal event".to_owned();
                Err(Exit { code: UNAVAILABLE, message }.into())
            }
        }
    }

    /// Asks for the end; the terminal event still comes.
    ///
    /// # Errors
    /// The service is gone.
    pub async fn cancel(&self) -> Result<()> {
        self.reader.cancel().await.map_err(refusal)
    }
}

/// Loads a model with a bar on the terminal.
///
/// # Errors
/// See `EngineError`.
pub async fn load(config: Config, output: Output) -> Result<Engine> {
    let bar = output.progress("loading", ProgressUnit::Bytes);
    let shown = bar.clone();
    let engine = Engine::builder().config(config).on_progress(move |progress| {
        shown.set_length(progress.total_bytes);
        shown.set_position(progress.done_bytes);
    });
    let engine = engine.build().await?;
    bar.finish_and_clear();
    Ok(engine)
}

fn no_service(socket: &Path, hint: &str) -> anyhow::Error {
    let message = format!("no service answers at {}{hint}", socket.display());
    Exit { code: UNAVAILABLE, message }.into()
}

fn refusal(error: ClientError) -> anyhow::Error {
    match error.refusal() {
        Some(object) => service_error(object).into(),
        None => error.into(),
    }
}

fn service_error(object: &ErrorObject) -> ServiceError {
    ServiceError {
        kind: object.data.kind.clone(),
        retryable: object.data.retryable,
        message: object.message.clone(),
    }
}
