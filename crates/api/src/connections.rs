//! Connections over TCP: bounded in number and in the time that they may be silent, so that strangers take nothing from those who
//! ask by the Unix socket.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::closing::Closing;

/// The most connections at a time. Further ones wait in the kernel.
const MOST: usize = 512;
/// How long the head of a request may take to arrive, and how long a connection may be idle before one begins.
const HEAD_DEADLINE: Duration = Duration::from_secs(5);
/// How long it waits after the system could accept no connection, as when files run out.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Answers until the server closes, and then until what has begun has been answered.
pub(crate) async fn serve(listener: TcpListener, app: Router, closing: Closing) {
    let (room, mut connections) = (Arc::new(Semaphore::new(MOST)), JoinSet::new());
    let mut closed = std::pin::pin!(closing.clone().begun());
    loop {
        let accepting = async {
            // It is never closed.
            let permit = Arc::clone(&room).acquire_owned().await.ok();
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            accepted = accepting => accepted,
            () = &mut closed => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(AFTER_FAILURE).await;
                continue;
            }
        };
        // Small replies do not wait for more.
        let _ = stream.set_nodelay(true);
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_DEADLINE)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app.clone()))
            .with_upgrades();
        let closing = closing.clone();
        connections.spawn(async move {
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = &mut connection => ended,
                () = closing.begun() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection over TCP ended early");
            }
            drop(permit);
        });
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    connections.join_all().await;
}
