//! The server: its listeners, and how it ends without cutting anyone off who is nearly done.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use stencil_engine::Engine;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

use crate::closing::Closing;
use crate::routes::{App, router};
use crate::socket::{self, SocketName};

pub use crate::socket::SocketError;

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
}

/// A server that listens and does not answer yet.
#[derive(Debug)]
pub struct Server {
    engine: Engine,
    unix: UnixListener,
    tcp: Option<TcpListener>,
    /// Keeps the socket's name as long as the server.
    name: SocketName,
}

impl Server {
    /// Listens on the Unix socket at `socket`, which only this user can open, and on `listen` if it is given. Whoever
    /// can reach `listen` can do everything: there are no users and no passwords.
    ///
    /// # Errors
    /// If somebody listens there already, or the system refuses; then it listens nowhere.
    pub async fn bind(engine: Engine, socket: &Path, listen: Option<SocketAddr>) -> Result<Self, ServeError> {
        let tcp = match listen {
            Some(address) => Some(
                TcpListener::bind(address)
                    .await
                    .map_err(|source| ServeError::Tcp { address, source })?,
            ),
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
            name,
        })
    }

    /// The TCP address, with the port that the system chose where 0 was asked for.
    #[must_use]
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref().and_then(|tcp| tcp.local_addr().ok())
    }

    /// Answers until `stop` returns, then lets what has begun end, for at most 10 seconds. VMs go on running.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let (close, closing) = watch::channel(false);
        let closing = Closing(closing);
        let app = router(App {
            engine: self.engine,
            closing: closing.clone(),
        });
        let unix = axum::serve(self.unix, app.clone()).with_graceful_shutdown(closing.clone().begun());
        let tcp = async {
            match self.tcp {
                Some(tcp) => {
                    axum::serve(tcp, app)
                        .with_graceful_shutdown(closing.begun())
                        .await
                }
                None => Ok(()),
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
