//! What sessions and operations ask of a link.

use std::sync::Arc;

use stencil_agent::{Exec, ExecError, Output, SessionId, TtySize};
use tokio::sync::oneshot;

use super::session::Shared;

/// What is asked of a link.
#[derive(Debug)]
pub(super) enum Ask {
    Exec {
        /// A number that this link has not used.
        session: SessionId,
        exec: Exec,
        shared: Arc<Shared>,
        /// Told the command's process id in the guest.
        opened: oneshot::Sender<Result<u32, NotOpened>>,
    },
    Stdin {
        session: SessionId,
        bytes: Vec<u8>,
    },
    StdinClosed {
        session: SessionId,
    },
    Credit {
        session: SessionId,
        stream: Output,
        bytes: u32,
    },
    Resize {
        session: SessionId,
        size: TtySize,
    },
    Signal {
        session: SessionId,
        signal: u8,
    },
    Freeze(oneshot::Sender<Result<(), String>>),
    PowerOff,
}

/// A command does not run.
#[derive(Debug)]
pub(super) enum NotOpened {
    /// The guest refused.
    Refused(ExecError, String),
    /// The request fits in no frame.
    TooLarge,
    /// The link was lost meanwhile; why, as part of a sentence.
    Lost(String),
}
