//! Why a scenario does not pass, and the comparisons that find it out.

use std::fmt::Debug;
use std::path::PathBuf;

use serde_json::Value;

use crate::client::{ClientError, Reply};
use crate::command::CommandError;
use crate::guest_console::GuestError;
use crate::linux::LinuxError;
use crate::server::ServerError;

/// Why a scenario did not pass.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{what}: expected {expected}, found {found}")]
    Unexpected {
        what: String,
        expected: String,
        found: String,
    },
    /// This host cannot try it; the reason says why.
    #[error("{0}")]
    Skipped(String),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    Linux(#[from] LinuxError),
    #[error(transparent)]
    System(#[from] rustix::io::Errno),
    #[error("{}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl Failure {
    /// Turns an I/O error into one that names the file.
    pub(super) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::File {
            path: path.into(),
            source,
        }
    }
}

/// That something is as it should be.
pub(super) fn same<T: PartialEq + Debug>(
    what: impl Into<String>,
    expected: T,
    found: T,
) -> Result<(), Failure> {
    if expected == found {
        return Ok(());
    }
    Err(Failure::Unexpected {
        what: what.into(),
        expected: format!("{expected:?}"),
        found: format!("{found:?}"),
    })
}

/// That something holds; `found` says what is there instead.
pub(super) fn holds(
    condition: bool,
    what: impl Into<String>,
    expected: impl Into<String>,
    found: impl Debug,
) -> Result<(), Failure> {
    if condition {
        return Ok(());
    }
    Err(Failure::Unexpected {
        what: what.into(),
        expected: expected.into(),
        found: format!("{found:?}"),
    })
}

/// That a call was answered with this status; its body.
pub(super) fn answered(status: u16, reply: Reply) -> Result<Value, Failure> {
    holds(
        reply.status == status,
        &reply.call,
        status.to_string(),
        Shown(&reply),
    )?;
    Ok(reply.body)
}

/// That a call was refused with this status and code, in an error that people and programs can use.
pub(super) fn refused(status: u16, code: &str, reply: Reply) -> Result<Value, Failure> {
    let expected = format!("{status} {code}");
    holds(
        reply.status == status && reply.code() == code,
        &reply.call,
        expected,
        Shown(&reply),
    )?;
    let message = reply.body["message"].as_str().unwrap_or_default();
    holds(
        !message.is_empty(),
        format!("the error of {}", reply.call),
        "a message",
        Shown(&reply),
    )?;
    Ok(reply.body)
}

/// An answer as the reader of a failure needs it.
struct Shown<'a>(&'a Reply);

impl Debug for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.0.status, self.0.body)
    }
}
