//! The process: one runtime for the API and the console socket, one control thread for the VM.

use std::io;
use std::sync::Arc;
use std::sync::mpsc;

use tokio::net::UnixListener;
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};

use crate::api::{self, Api};
use crate::control::Control;
use crate::kick;
use crate::socket::{ApiSocket, SocketError};
use crate::status::Status;

/// The VMM cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The API has nowhere to be served.
    #[error("the API socket cannot be served")]
    Socket(#[from] SocketError),
    /// A thread, the runtime or a signal handler could not be had.
    #[error("the VMM cannot start")]
    Start(#[source] io::Error),
}

/// Serves the API until `vmm.shutdown` or a SIGTERM; the VM ends with it.
///
/// # Errors
///
/// Where the socket cannot be listened on, or a thread cannot be started. What goes wrong with the VM afterwards is
/// told to whoever asks through the API.
pub fn serve(socket: &ApiSocket) -> Result<(), ServeError> {
    let listening = socket.listen()?;
    kick::install_handler().map_err(ServeError::Start)?;
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        // A handful of connections: room for the usual 1024 events would be 12 KiB.
        .max_io_events_per_tick(32)
        .build()
        .map_err(ServeError::Start)?;
    let status = Arc::new(Status::default());
    let (messages, inbox) = mpsc::channel();
    let control = Control::new(
        messages.clone(),
        inbox,
        Arc::clone(&status),
        runtime.handle().clone(),
    );
    let control = control.start().map_err(ServeError::Start)?;
    let api = Arc::new(Api::new(messages, status));
    runtime.block_on(async {
        let listener = UnixListener::from_std(listening.listener).map_err(ServeError::Start)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Start)?;
        tokio::select! {
            () = api::serve_all(&listener, &api) => {}
            _ = terminate.recv() => tracing::info!("SIGTERM"),
        }
        // Joining would block the runtime; the reply comes when the vCPUs are down and the VM is dropped.
        api.quit().await;
        Ok::<(), ServeError>(())
    })?;
    if control.join().is_err() {
        tracing::error!("the control thread panicked");
    }
    Ok(())
}
