//! `stencil serve`: the engine behind its socket, until a signal ends it. VMs go on running without it.

use std::env;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::available_parallelism;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use stencil_api::server::{Listen, Server, Tokens};
use stencil_core::{DataDir, error_chain};
use stencil_engine::{Config, Engine};
use stencil_vmm::{CloudHypervisor, Hypervisor, MicroVm, Qemu};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::args::Serve;
use crate::failure::Failure;
use crate::{pager, place};

/// The server waits far more than it works: more threads than this only cost memory. It leaves half of the cores to the
/// VMMs that a request wakes; threads that hand the request to each other keep them from it.
const MOST_THREADS: usize = 4;

pub(crate) fn run(asked: Serve, socket: Option<PathBuf>) -> Result<(), Failure> {
    // Dropped last: what was said is written before the process ends.
    let _log = log();
    allow_many_files();
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(available_parallelism().map_or(1, |cores| (cores.get() / 2).clamp(1, MOST_THREADS)))
        .enable_all()
        .build()
        .map_err(Failure::Runtime)?
        .block_on(serve(asked, socket))
}

/// Lines are written to standard error by a thread of their own: no request waits for it, not even where nobody reads it.
/// Then lines are lost once 128,000 wait.
fn log() -> WorkerGuard {
    // RUST_LOG as in `info,stencil_engine=debug`.
    let filter = env::var("RUST_LOG")
        .ok()
        .and_then(|text| text.parse::<Targets>().ok());
    let (writer, guard) = tracing_appender::non_blocking(io::stderr());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(io::stderr().is_terminal());
    tracing_subscriber::registry()
        .with(filter.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO)))
        .with(lines)
        .init();
    guard
}

/// A server holds a descriptor or two for each VM; the soft limit of a shell, often 1024, is not meant for that.
fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // With the old limit it serves fewer VMs, and says so when there are too many.
    let _ = setrlimit(Resource::Nofile, raised);
}

async fn serve(asked: Serve, socket: Option<PathBuf>) -> Result<(), Failure> {
    let data = place::absolute(asked.data.map_or_else(place::default_data, Ok)?)?;
    let socket = place::absolute(socket.unwrap_or_else(|| DataDir::new(&data).socket()))?;
    let listen = match asked.listen {
        None => None,
        Some(address) => Some(Listen {
            address,
            tokens: match &asked.token_file {
                Some(file) => Some(Tokens::load(file)?),
                None if asked.no_auth => None,
                None => return Err(Failure::NoToken { address }),
            },
            allow_hosts: asked.allow_hosts,
        }),
    };
    let binary = asked
        .vmms
        .microvm
        .map_or_else(MicroVm::find, Ok)
        .map_err(Failure::NoMicrovm)?;
    let microvm = MicroVm::new(binary.clone());
    // Asked now, so that a binary that cannot be used is told to who starts the server.
    let version = microvm.version().await.map_err(|source| Failure::BadMicrovm {
        path: binary.clone(),
        source,
    })?;
    let mut hypervisors: Vec<Arc<dyn Hypervisor>> = vec![Arc::new(microvm)];
    let cloud_hypervisor = asked.vmms.cloud_hypervisor;
    hypervisors.extend(CLOUD_HYPERVISOR.offer(cloud_hypervisor).await?);
    hypervisors.extend(QEMU.offer(asked.vmms.qemu).await?);
    let mut signals = Signals::new().map_err(Failure::Runtime)?;

    let config = Config {
        data: data.clone(),
        hypervisors,
        armed: asked.armed,
        log_limit: asked.log_limit.0,
    };
    let engine = Engine::open(config).await.map_err(|source| Failure::Open {
        data: data.clone(),
        source: Box::new(source),
    })?;
    let server = Server::bind(engine.clone(), &socket, listen)
        .await?
        .allow_origins(asked.allow_origins);
    tracing::info!(microvm = %binary.display(), version, data = %data.display(), "open");
    if let Some(address) = server.tcp_address() {
        if asked.no_auth {
            tracing::warn!(%address, "every user of this host can do everything by this address");
        }
        tracing::info!("listening on {} and http://{address}", socket.display());
    } else {
        tracing::info!("listening on {}", socket.display());
    }
    server.run(signals.any()).await;
    engine.close().await;
    tracing::info!("ended; VMs go on running");
    Ok(())
}

/// A VMM that a server runs without.
struct Optional {
    name: &'static str,
    /// What names its binary.
    option: &'static str,
    find: fn() -> Option<PathBuf>,
    new: fn(PathBuf) -> Result<Arc<dyn Hypervisor>, Failure>,
}

const CLOUD_HYPERVISOR: Optional = Optional {
    name: "Cloud Hypervisor",
    option: "--cloud-hypervisor",
    find: CloudHypervisor::find,
    new: |path| {
        let pager = pager::command().map_err(Failure::Runtime)?;
        Ok(Arc::new(CloudHypervisor::new(path).with_pager(pager)))
    },
};

const QEMU: Optional = Optional {
    name: "QEMU",
    option: "--qemu",
    find: Qemu::find,
    new: |path| Ok(Arc::new(Qemu::new(path))),
};

impl Optional {
    /// It, if there is one that can be used. One that was asked for by name must be.
    async fn offer(&self, asked: Option<PathBuf>) -> Result<Option<Arc<dyn Hypervisor>>, Failure> {
        let Self { name, option, .. } = *self;
        let is_asked_for = asked.is_some();
        let Some(path) = asked.or_else(self.find) else {
            return Ok(None);
        };
        let vmm = (self.new)(path.clone())?;
        match vmm.version().await {
            Ok(version) => {
                tracing::info!(path = %path.display(), version, "{name} is offered");
                Ok(Some(vmm))
            }
            Err(source) if is_asked_for => Err(Failure::BadVmm {
                path,
                name,
                option,
                source: Box::new(source),
            }),
            Err(error) => {
                tracing::warn!(error = error_chain(&error), "{name} is not offered");
                Ok(None)
            }
        }
    }
}

/// The signals that end the server. SIGHUP comes when the terminal it was started from goes away.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn any(&mut self) {
        let name = tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hang_up.recv() => "SIGHUP",
        };
        tracing::info!("{name}: ending once requests are answered");
    }
}
