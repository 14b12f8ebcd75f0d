//! `tandem serve`: the service in the foreground, with the process's signals and systemd's
//! variables, which the library leaves alone.

use super::loading::LoadMeter;
use super::output::Output;
use anyhow::{Context, Result, anyhow};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tandem::actors::Engine;
use tandem::config::Config;
use tandem::server::{self, Ending, Endpoint, Folder, ServerOptions, Stop};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What systemd says of itself.
#[derive(Clone, Debug, Default)]
pub struct Systemd {
    /// `NOTIFY_SOCKET`.
    pub notify_socket: Option<OsString>,
    /// `WATCHDOG_USEC`.
    pub watchdog: Option<Duration>,
}

/// The socket and what is done about its folder.
#[derive(Clone, Debug)]
pub struct Listen {
    /// Where.
    pub socket: PathBuf,
    /// Ours alone, or one that the user named.
    pub folder: Folder,
    /// Where what was measured of this machine is kept.
    pub probe_folder: Option<PathBuf>,
}

/// Serves until a signal, a client's `shutdown`, or the engine's end.
///
/// # Errors
/// The socket is taken or unusable, the model can't be loaded, or the engine died.
pub async fn run(config: Config, listen: Listen, systemd: Systemd, output: Output) -> Result<()> {
    let probe_folder = listen.probe_folder;
    let endpoint = Endpoint::bind(&listen.socket, listen.folder)?;
    let stop = Stop::default();
    tokio::spawn(obey_signals(stop.clone()).context("the signal handlers")?);
    let mut meter = LoadMeter::start(output);
    let mut options = ServerOptions::from_config(&config);
    options.notify_socket = systemd.notify_socket;
    options.watchdog = systemd.watchdog;
    let builder = Engine::builder().config(config).probe_folder(probe_folder);
    let builder = builder.on_progress(move |progress| {
        meter.show(progress.done_bytes, progress.total_bytes);
    });
    let engine = builder.start()?;
    let (waiting, socket) = (engine.clone(), listen.socket.clone());
    let announced = tokio::spawn(async move {
        let ready = waiting.ready().await;
        if ready.is_ok() {
            let name = waiting.model_info().map(|info| info.name).unwrap_or_default();
            let runs_on = waiting.status().runs_on.unwrap_or_default();
            let socket = socket.display();
            let _ = output.notice(&format!("{name} is ready at {socket}, runs on {runs_on}"));
        }
    });
    let ending = server::serve(endpoint, Arc::new(engine.clone()), options, stop).await?;
    announced.abort();
    match ending {
        Ending::Drained => Ok(()),
        Ending::EngineLate => Err(anyhow!("the engine did not stop in time")),
        Ending::EngineGone { reason } => {
            // A model that can't be loaded says so with its own exit code.
            engine.ready().await?;
            Err(anyhow!(reason))
        }
    }
}

/// The first SIGTERM or SIGINT drains, the second stops at once.
fn obey_signals(stop: Stop) -> Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        either(&mut terminate, &mut interrupt).await;
        stop.drain.cancel();
        either(&mut terminate, &mut interrupt).await;
        stop.now.cancel();
    })
}

async fn either(first: &mut Signal, second: &mut Signal) {
    tokio::select! {
        _ = first.recv() => {}
        _ = second.recv() => {}
    }
}
