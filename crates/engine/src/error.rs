//! How an operation of the engine fails.

use std::path::PathBuf;

use stencil_agent::ExecError;
use stencil_core::rules::Refusal;
use stencil_core::{InstanceId, InstanceName, StoreError};
use stencil_vmm::VmmError;

use crate::Shortage;

/// An operation that was not done.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The request cannot be done on this host; the message says what would be right.
    #[error("{0}")]
    Invalid(String),
    /// No instance has this id or name; nor, where it is only read, does one id begin so.
    #[error(
        "there is no instance `{0}`; give its exact name or its whole id (for reading, the first {shortest} or more \
         characters of its id will do)",
        shortest = InstanceId::SHORTEST_PREFIX
    )]
    NotFound(String),
    /// Several ids begin with the prefix.
    #[error("`{reference}` is the beginning of {} ids; give more of it", candidates.len())]
    Ambiguous {
        /// What was asked for.
        reference: String,
        /// The ids that begin with it.
        candidates: Vec<InstanceId>,
    },
    /// The name is taken.
    #[error("the name `{name}` is taken by {}; choose another one", taken_by(holder.as_ref()))]
    NameConflict {
        /// The name.
        name: String,
        /// Who has it; `None` while that instance is being made.
        holder: Option<InstanceId>,
    },
    /// The rules do not allow it in the instance's present state.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The host has too little for the forks that were asked for; none was begun.
    #[error(transparent)]
    NoRoom(#[from] Shortage),
    /// The guest is not there to talk to.
    #[error("instance {0} has no console to write to while its VM is down; start or restore it first")]
    NoConsole(InstanceId),
    /// Nobody in the guest can be asked to do anything.
    #[error("instance {id} has no agent: {why}")]
    NoAgent {
        /// Whose guest.
        id: InstanceId,
        /// Why, and what would be right.
        why: String,
    },
    /// The agent is there, and the guest is not yet the machine that it is to be, or its processes are stopped.
    #[error("the agent of instance {id} is not ready: {why}")]
    AgentNotReady {
        /// Whose guest.
        id: InstanceId,
        /// Why.
        why: String,
    },
    /// The guest could not start the command.
    #[error("the command could not be run in instance {id}: {why}")]
    NotExecuted {
        /// Whose guest.
        id: InstanceId,
        /// Of which kind the reason is.
        error: ExecError,
        /// The reason, in the guest's words.
        why: String,
    },
    /// The link to the guest was lost while a command ran: what became of it is not known.
    #[error("the link to the agent of instance {id} was lost: {why}")]
    AgentLost {
        /// Whose guest.
        id: InstanceId,
        /// Why.
        why: String,
    },
    /// The snapshot that was there a moment ago is not there any more.
    #[error("instance {0} has no complete snapshot any more; start it anew, or delete it")]
    NoSnapshot(InstanceId),
    /// The snapshot was made by another version of the VMM, which need not read it the same way.
    #[error(
        "the snapshot of instance {id} was made by version {made_by} of its VMM and this is {here}; restore it with {made_by}, or stop the instance to throw the snapshot away"
    )]
    OtherVersion {
        /// Whose snapshot.
        id: InstanceId,
        /// The version that made it.
        made_by: String,
        /// The version that is here.
        here: String,
    },
    /// The snapshot was made on a CPU that can do what this host's cannot: its guest relies on that.
    #[error(
        "the snapshot of instance {id} was made on another CPU, {made_on}, with features that this host's has not, {here}; \
         restore it on a host whose CPU has them, or stop the instance to throw the snapshot away"
    )]
    OtherCpu {
        /// Whose snapshot.
        id: InstanceId,
        /// The name of the CPU on which it was made.
        made_on: String,
        /// The name of this host's.
        here: String,
    },
    /// The VMM ended without all that its guest had written being written down, so that a snapshot would not fit the disk.
    #[error(
        "disk {0} was not written down as a whole when the VMM ended, so a snapshot is of no use; stop the instance if it is on standby, and start it: its guest finds its disk as after a power loss"
    )]
    DiskLost(usize),
    /// The data directory could not be read or written.
    #[error("the data directory could not be used")]
    Store(#[from] StoreError),
    /// A VMM could not be started or did not do what it was asked to.
    #[error("the VMM of instance {id} failed")]
    Vmm {
        /// Whose VMM.
        id: InstanceId,
        /// What it said.
        #[source]
        source: VmmError,
    },
    /// A source that was put on standby to be forked could not be restored; its snapshot and its forks are kept.
    #[error(
        "instance {id} was put on standby to be forked and could not be restored: it is in Standby and nothing is lost; \
         forks that were made and stay: {}",
        names(forks)
    )]
    SourceNotRestored {
        /// The source.
        id: InstanceId,
        /// The forks that were made of it.
        forks: Vec<InstanceName>,
        /// Why.
        #[source]
        source: Box<EngineError>,
    },
    /// A file of an instance could not be used.
    #[error("could not {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

impl EngineError {
    /// Whether a VMM was asked and has certainly not done it.
    pub(crate) fn was_refused(&self) -> bool {
        matches!(self, Self::Vmm { source, .. } if source.was_refused())
    }

    /// Turns a VMM's error into one that names the instance.
    pub(crate) fn vmm(id: InstanceId) -> impl FnOnce(VmmError) -> Self {
        move |source| Self::Vmm { id, source }
    }

    /// Turns an I/O error into one that names the file.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io {
            what,
            path: path.into(),
            source,
        }
    }
}

fn names(forks: &[InstanceName]) -> String {
    if forks.is_empty() {
        return "none".to_owned();
    }
    forks
        .iter()
        .map(InstanceName::as_str)
        .collect::<Vec<_>>()
        .join(", ")
}

fn taken_by(holder: Option<&InstanceId>) -> String {
    holder.map_or_else(
        || "an instance that is being made".to_owned(),
        |id| format!("instance {id}"),
    )
}
