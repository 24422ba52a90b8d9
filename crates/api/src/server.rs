//! The server: its listeners, and how it ends without cutting anyone off who is nearly done.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use stencil_engine::Engine;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

use crate::closing::Closing;
use crate::connections;
use crate::guard::Guard;
use crate::routes::{App, router};
use crate::socket::{self, SocketName};

pub use crate::guard::Listen;
pub use crate::socket::SocketError;
pub use crate::tokens::{SHORTEST_TOKEN, TokenError, Tokens};

/// How long operations that have begun may go on when the server is to end. What is longer is left half-way, and the
/// next server finds each instance as it was before the operation or as it is after it.
const DRAIN: Duration = Duration::from_secs(10);

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Not on the Unix socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The system refused.
    #[error("cannot listen on {address}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// Whoever reaches the address could do everything.
    #[error(
        "{address} can be reached from other machines: it takes tokens; name a file of them with --token-file, which is made \
         if it is not there"
    )]
    Open {
        /// The address.
        address: SocketAddr,
    },
}

/// A server that listens and does not answer yet.
#[derive(Debug)]
pub struct Server {
    engine: Engine,
    unix: UnixListener,
    tcp: Option<(TcpListener, Listen)>,
    allow_origins: Vec<String>,
    /// Keeps the socket's name as long as the server.
    name: SocketName,
}

impl Server {
    /// Listens on the Unix socket at `socket`, which only this user can open, and on `listen` if it is given.
    ///
    /// # Errors
    /// [`ServeError::Open`] for an address that others can reach, without tokens; if somebody listens there already, or the system
    /// refuses. Then it listens nowhere.
    pub async fn bind(engine: Engine, socket: &Path, listen: Option<Listen>) -> Result<Self, ServeError> {
        let tcp = match listen {
            Some(listen) => {
                let address = listen.address;
                if listen.tokens.is_none() && !address.ip().is_loopback() {
                    return Err(ServeError::Open { address });
                }
                let listener = TcpListener::bind(address)
                    .await
                    .map_err(|source| ServeError::Tcp { address, source })?;
                Some((listener, listen))
            }
            None => None,
        };
        let (unix, name) = socket::listen_at(socket)?;
        let unix = UnixListener::from_std(unix).map_err(|source| SocketError::Io {
            what: "watch",
            path: socket.to_owned(),
            source,
        })?;
        Ok(Self {
            engine,
            unix,
            tcp,
            allow_origins: Vec::new(),
            name,
        })
    }

    /// Lets web pages of these origins ask, such as `https://panel.example`. No other page may.
    #[must_use]
    pub fn allow_origins(self, allow_origins: Vec<String>) -> Self {
        Self {
            allow_origins,
            ..self
        }
    }

    /// The TCP address, with the port that the system chose where 0 was asked for.
    #[must_use]
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref().and_then(|(tcp, _)| tcp.local_addr().ok())
    }

    /// Answers until `stop` returns, then lets what has begun end, for at most 10 seconds. VMs go on running.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let (close, closing) = watch::channel(false);
        let closing = Closing(closing);
        let app = App {
            engine: self.engine,
            closing: closing.clone(),
        };
        let guard = Guard {
            tcp: None,
            allow_origins: self.allow_origins,
        };
        let unix = axum::serve(self.unix, router(app.clone(), guard.clone()))
            .with_graceful_shutdown(closing.clone().begun());
        let tcp = async {
            if let Some((listener, listen)) = self.tcp {
                let guard = Guard {
                    tcp: Some(listen),
                    ..guard
                };
                connections::serve(listener, router(app, guard), closing).await;
            }
        };
        let mut serving = std::pin::pin!(async { tokio::join!(unix, tcp) });
        tokio::select! {
            _ = &mut serving => return,
            () = stop => {}
        }
        close.send_replace(true);
        if tokio::time::timeout(DRAIN, serving).await.is_err() {
            tracing::warn!(after = ?DRAIN, "requests that were still being answered are cut off");
        }
        drop(self.name);
    }
}
