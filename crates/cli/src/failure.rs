//! How a command fails, and how that is told: a sentence that says what would be right, on standard error.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde_json::json;
use stencil_api::client::ClientError;
use stencil_api::server::{ServeError, TokenError};
use stencil_core::{State, error_chain};
use stencil_engine::EngineError;
use stencil_vmm::VmmError;

use crate::output::printable;

/// A command that was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Pager(#[from] stencil_vmm::pager::PagerError),
    /// The state was not reached in time.
    #[error("{name} is {state}, not {wanted}")]
    NotReached {
        name: String,
        state: State,
        wanted: State,
    },
    /// What failed was told one by one.
    #[error("{failed} of {all} failed")]
    SomeFailed { failed: usize, all: usize },
    /// A command in a guest ended, and has told itself what it had to.
    #[error("the command ended with {code}")]
    Ended { code: u8 },
    #[error("{0}")]
    Copy(String),
    #[error("cannot copy")]
    Archive(#[source] stencil_agent::archive::ArchiveError),
    #[error("cannot wait for signals")]
    Signal(#[source] io::Error),
    #[error("cannot use the terminal")]
    Terminal(#[source] io::Error),
    #[error("cannot read the standard input")]
    Input(#[source] io::Error),
    #[error("cannot write to the standard output")]
    Output(#[source] io::Error),
    #[error("{} cannot be made absolute", path.display())]
    Path { path: PathBuf, source: io::Error },
    #[error(
        "there is no HOME to find the data directory in; name it with --data, or the server's socket with --socket"
    )]
    NoHome,
    #[error("cannot start up")]
    Runtime(#[source] io::Error),
    #[error("there is no VMM to run instances with; name it with --microvm")]
    NoMicrovm(#[source] VmmError),
    #[error("{} cannot be used as the VMM; name another one with --microvm", path.display())]
    BadMicrovm { path: PathBuf, source: VmmError },
    #[error("{} cannot be used as {name}; name another one with {option}, or leave that out", path.display())]
    BadVmm {
        path: PathBuf,
        name: &'static str,
        option: &'static str,
        source: Box<VmmError>,
    },
    /// What is missing was told before.
    #[error("no VM can run on this host")]
    NoVms,
    #[error("cannot open {}", data.display())]
    Open { data: PathBuf, source: Box<EngineError> },
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error(transparent)]
    Tokens(#[from] TokenError),
    #[error(
        "{address} takes tokens: name a file of them with --token-file, which is made if it is not there{}",
        if address.ip().is_loopback() { "; or let every user of this host do everything with --no-auth" } else { "" }
    )]
    NoToken { address: SocketAddr },
}

impl Failure {
    /// Tells it on standard error; for programs also what the API said, on standard output.
    pub(crate) fn report(&self, json: bool) {
        // A pipe that was closed by its reader, as by `head`, is not worth a word.
        if matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe) {
            return;
        }
        if matches!(self, Self::Ended { .. }) {
            return;
        }
        eprintln!("error: {}", printable(&self.sentence()));
        if json && let Self::Client(ClientError::Refused { body, .. }) = self {
            println!("{}", json!(body));
        }
    }

    /// The exit code. Of a command in a guest that could not be started it is a shell's.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Ended { code } => *code,
            Self::Client(ClientError::Refused { body, .. }) if body.code == "not_executed" => {
                match body.details.get("reason").and_then(|reason| reason.as_str()) {
                    Some("not_found") => 127,
                    Some("not_executable") => 126,
                    _ => 1,
                }
            }
            _ => 1,
        }
    }

    /// The error and its causes, its code, and a hint where the message has none.
    pub(crate) fn sentence(&self) -> String {
        let sentence = error_chain(self);
        match self {
            Self::Client(ClientError::Refused { body, .. }) => format!("{sentence} [{}]", body.code),
            Self::Client(ClientError::NoServer { .. }) => {
                format!(
                    "{sentence}\nstart one with `stencil serve`, or name its socket with --socket, or its address with --url"
                )
            }
            _ => sentence,
        }
    }
}
