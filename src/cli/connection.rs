//! How `chat`, `generate`, `ps` and `stop` reach an engine: through the running service, or, when
//! there is none and a model was named, through one of their own behind a private socket. Either
//! way they speak the protocol, so there is one code path.

use super::failure::{Exit, ServiceError, TEMPORARY, UNAVAILABLE, USAGE};
use super::loading::LoadMeter;
use super::output::Output;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tandem::actors::Engine;
use tandem::config::Config;
use tandem::server::client::{Client, ClientError, EventReader};
use tandem::server::protocol::{ErrorObject, WireEvent};
use tandem::server::{self, Endpoint, EndpointError, Folder, ServerOptions, Stop};
use tokio::task::JoinHandle;

/// How often a service that loads its model is asked whether it has done so.
const LOADING_POLL: Duration = Duration::from_millis(100);
/// How often a service that ends is looked for.
const ENDING_POLL: Duration = Duration::from_millis(20);
/// How long a service may take to say its hello, which it does at once unless it is stopped.
const HELLO_PATIENCE: Duration = Duration::from_secs(10);

/// Where an engine may be found.
#[derive(Clone, Debug)]
pub struct Place {
    /// The service's socket; `None` if none is named and there is no runtime directory.
    pub socket: Option<PathBuf>,
    /// What an engine of our own is built from; without a model path there is none.
    pub config: Config,
}

impl Place {
    /// The service's socket.
    ///
    /// # Errors
    /// There is no place for one.
    pub fn socket(&self) -> Result<&Path, EndpointError> {
        self.socket.as_deref().ok_or(EndpointError::NoRuntimeDir)
    }

    fn names_model(&self) -> bool {
        !self.config.model.path.as_os_str().is_empty()
    }

    /// What the model that was named would be called by a service.
    fn model_name(&self) -> String {
        self.config.model.name()
    }
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
        let socket = match place.socket() {
            Ok(socket) => socket,
            Err(_) if place.names_model() => return Self::embed(place.config, output).await,
            Err(error) => return Err(error.into()),
        };
        match connect(socket).await? {
            Ok(client) => {
                let connection = Self { client, embedded: None }.loaded(output).await?;
                connection.tell_other_model(&place, output).await?;
                Ok(connection)
            }
            Err(error) if !error.is_no_service() => Err(error.into()),
            Err(_) if place.names_model() => Self::embed(place.config, output).await,
            Err(_) => Err(no_service(socket, "; start one with `tandem serve`, or name a --model")),
        }
    }

    /// Asks the running service.
    ///
    /// # Errors
    /// There is none.
    pub async fn to_service(place: &Place) -> Result<Self> {
        let socket = place.socket()?;
        match connect(socket).await? {
            Ok(client) => Ok(Self { client, embedded: None }),
            Err(error) if error.is_no_service() => Err(no_service(socket, "")),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits while the service loads its model.
    async fn loaded(self, output: Output) -> Result<Self> {
        let (mut told, mut meter) = (false, LoadMeter::start(output));
        loop {
            let status = self.call("status", json!({})).await?;
            if status["state"] != "loading" {
                break;
            }
            if !std::mem::replace(&mut told, true) {
                output.notice("the service loads its model")?;
            }
            let bytes = |field: &str| status["engine"]["load"][field].as_u64().unwrap_or(0);
            if bytes("total_bytes") > 0 {
                meter.show(bytes("done_bytes"), bytes("total_bytes"));
            }
            tokio::time::sleep(LOADING_POLL).await;
        }
        Ok(self)
    }

    /// Says so if the service answers with another model than the one that was named.
    async fn tell_other_model(&self, place: &Place, output: Output) -> Result<()> {
        if !place.names_model() {
            return Ok(());
        }
        let wanted = place.model_name();
        let status = self.call("status", json!({})).await?;
        let served: Vec<&str> =
            status["models"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if !served.is_empty() && !served.contains(&wanted.as_str()) {
            let served = served.join(", ");
            output.notice(&format!("the running service answers, with {served}, not {wanted}"))?;
        }
        Ok(())
    }

    async fn embed(config: Config, output: Output) -> Result<Self> {
        let engine = load(config.clone(), output).await?;
        let folder = private_folder()?;
        let path = folder.join("tandem.sock");
        let endpoint = Endpoint::bind(&path, Folder::Private)?;
        let (options, stop) = (ServerOptions::from_config(&config), Stop::default());
        let serving = server::serve(endpoint, Arc::new(engine), options, stop.clone());
        let service = tokio::spawn(async move {
            serving.await?;
            Ok(())
        });
        let client = Client::connect(&path).await;
        // Nobody else is to connect, and so nothing is left behind, however this process ends.
        std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(Self { client: client?, embedded: Some(Embedded { stop, service }) })
    }

    /// Calls a method that has one result.
    ///
    /// # Errors
    /// The service refuses or is gone.
    pub async fn call(&self, method: &str, params: Value) -> Result<Value> {
        self.client.call(method, params).await.map_err(refusal)
    }

    /// Calls a method that has events.
    ///
    /// # Errors
    /// The service is gone.
    pub async fn stream(&mut self, method: &str, params: Value) -> Result<Events> {
        Ok(Events { reader: self.client.stream(method, params).await.map_err(refusal)? })
    }

    /// Waits until the service at `socket` that this connection speaks to is gone.
    ///
    /// # Errors
    /// It is still there after `patience`.
    pub async fn ended(&self, socket: &Path, patience: Duration) -> Result<()> {
        let boot_id = &self.client.hello().boot_id;
        let gone = async {
            loop {
                match Client::connect(socket).await {
                    Err(error) if error.is_no_service() => break,
                    // Another life of the service, such as systemd starts, is another service.
                    Ok(client) if client.hello().boot_id != *boot_id => break,
                    _ => tokio::time::sleep(ENDING_POLL).await,
                }
            }
        };
        tokio::time::timeout(patience, gone).await.map_err(|_| {
            let message = format!("the service is still there after {} s", patience.as_secs());
            Exit { code: TEMPORARY, message }.into()
        })
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

/// A new folder that only this user may enter.
fn private_folder() -> Result<PathBuf> {
    let base = std::env::temp_dir();
    // A number is taken only if an earlier process of the same id was killed while it started.
    let names = (0..100).map(|number| format!("tandem-{}-{number}", std::process::id()));
    for folder in names.map(|name| base.join(name)) {
        match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| folder.display().to_string()),
        }
    }
    bail!("{}: no free name for a private folder", base.display())
}

/// Refuses a configuration that names no model.
///
/// # Errors
/// Wrong usage: the flag is missing.
pub fn require_model(config: &Config) -> Result<()> {
    if config.model.path.as_os_str().is_empty() {
        let message =
            "no model: name a GGUF file or a Hugging Face folder with --model FILE".to_owned();
        return Err(Exit { code: USAGE, message }.into());
    }
    Ok(())
}

/// Loads a model with a bar on the terminal.
///
/// # Errors
/// See `EngineError`.
pub async fn load(config: Config, output: Output) -> Result<Engine> {
    require_model(&config)?;
    let mut meter = LoadMeter::start(output);
    let engine = Engine::builder().config(config).probe_folder(super::cache_folder());
    let engine = engine.on_progress(move |progress| {
        meter.show(progress.done_bytes, progress.total_bytes);
    });
    Ok(engine.build().await?)
}

/// A connection, or why there is none; fails if whoever listens there says nothing.
async fn connect(socket: &Path) -> Result<Result<Client, ClientError>> {
    tokio::time::timeout(HELLO_PATIENCE, Client::connect(socket)).await.map_err(|_| {
        let seconds = HELLO_PATIENCE.as_secs();
        let silent = format!("the service at {} says nothing for {seconds} s", socket.display());
        Exit { code: UNAVAILABLE, message: silent }.into()
    })
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
