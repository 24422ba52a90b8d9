//! What can go wrong between the engine and a VMM.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use stencil_core::layout::MAX_SOCKET_PATH;
use stencil_core::{HypervisorName, MemoryMode};
use stencil_vmm_api::ErrorBody;

use crate::client::Call;
use crate::cloud_hypervisor::SnapshotError;
use crate::process::{Exit, ProcessError};

/// Why a backend could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// There is no binary of the VMM beside the running executable nor in a directory of `PATH`.
    #[error("the VMM {name} is neither in {} nor in a directory of PATH; build or install it there", beside.display())]
    NotFound {
        /// File name of the binary.
        name: &'static str,
        /// The directory of the running executable.
        beside: PathBuf,
    },

    /// The instance's directory could not be made ready for a VMM: its socket or its log.
    #[error("cannot make {} ready for a VMM", path.display())]
    Prepare {
        /// The socket or the log.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The path of the VMM's socket is longer than the system takes.
    #[error(
        "the path of the socket {} has {length} bytes and at most {MAX_SOCKET_PATH} fit; choose a shorter data directory",
        path.display()
    )]
    SocketPath {
        /// The socket.
        path: PathBuf,
        /// How long its path is, in bytes.
        length: usize,
    },

    /// The binary of the VMM could not be run.
    #[error("cannot start the VMM {}", binary.display())]
    Spawn {
        /// The binary.
        binary: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The binary ran and did not say its version.
    #[error("{} --version does not tell a version; it said: {said:?}", binary.display())]
    Version {
        /// The binary.
        binary: PathBuf,
        /// The beginning of what it wrote.
        said: String,
    },

    /// The binary is of a version that this backend does not know.
    #[error("{} is version {version}; this takes version {first} to {last}", binary.display())]
    UnknownVersion {
        /// The binary.
        binary: PathBuf,
        /// Its version.
        version: String,
        /// The first release that is known.
        first: u32,
        /// The last release that is known.
        last: u32,
    },

    /// The binary is older than any that this backend knows.
    #[error("{} is version {version}; this takes version {}.{} and later", binary.display(), first.0, first.1)]
    OldVersion {
        /// The binary.
        binary: PathBuf,
        /// Its version.
        version: String,
        /// The first release that is known: its major and minor number.
        first: (u32, u32),
    },

    /// The VMM that was started is another version than its binary was when the server asked it.
    #[error(
        "{} was version {expected} and is version {running} now; start the server anew to use it",
        binary.display()
    )]
    Replaced {
        /// The binary.
        binary: PathBuf,
        /// What the server knows.
        expected: String,
        /// What the VMM says.
        running: String,
    },

    /// The backend cannot bring memory back in this way.
    #[error("{name} has no memory mode {mode}; ask for another one")]
    MemoryMode {
        /// The backend.
        name: HypervisorName,
        /// The mode.
        mode: MemoryMode,
    },

    /// The backend's guests have no port for an agent.
    #[error("{name} gives its guests no port for an agent; run the instance on a hypervisor that does")]
    NoAgentPort {
        /// The backend.
        name: HypervisorName,
    },

    /// The way to the agent in the guest could not be opened.
    #[error("cannot reach the guest's agent through {}", socket.display())]
    Agent {
        /// The socket of the VMM that leads there.
        socket: PathBuf,
        /// What the system said, or what the VMM answered.
        source: io::Error,
    },

    /// Which pages the guest touches cannot be seen, because its memory cannot be served.
    #[error("the VM's memory cannot be served: {why}")]
    NotServed {
        /// Why not.
        why: String,
    },

    /// A file of a snapshot cannot be read.
    #[error("cannot read {}, which is of a snapshot", path.display())]
    SnapshotFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The snapshot is not one that this backend can bring back.
    #[error("the snapshot {} cannot be used", path.display())]
    Snapshot {
        /// The snapshot's directory.
        path: PathBuf,
        /// Why not.
        source: SnapshotError,
    },

    /// What is kept of a VM's machine cannot be read.
    #[error("cannot read {}, which says what machine a VM is", path.display())]
    Machine {
        /// The file.
        path: PathBuf,
        /// What the system said, or where the JSON is wrong.
        source: io::Error,
    },

    /// The guest's memory could not be copied between the VMM's process and a file.
    #[error("cannot copy the guest's memory between the VMM and {}", path.display())]
    GuestMemory {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// A path that must go into a request is not UTF-8, which JSON cannot carry.
    #[error("the path {} is not UTF-8 and cannot be given to a VMM; move it", path.display())]
    PathNotUtf8 {
        /// The path.
        path: PathBuf,
    },

    /// Nobody accepts connections on the VMM's socket.
    #[error("{call}: cannot connect to the VMM at {}", socket.display())]
    Connect {
        /// What was asked.
        call: Call,
        /// The VMM's socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The VMM did not answer in time; the call may still have its effect.
    #[error("{call}: no answer from the VMM within {after:?}")]
    Timeout {
        /// What was asked.
        call: Call,
        /// The deadline of this call.
        after: Duration,
    },

    /// The connection broke, or the reply was no HTTP, before the head of the reply was there.
    #[error("{call}: the VMM closed the connection without a reply")]
    NoReply {
        /// What was asked.
        call: Call,
        /// What hyper saw.
        source: hyper::Error,
    },

    /// The connection broke in the middle of the reply's body.
    #[error("{call}: the VMM closed the connection in the middle of its reply")]
    CutShort {
        /// What was asked.
        call: Call,
        /// What hyper saw.
        source: hyper::Error,
    },

    /// The connection to the VMM's monitor broke before the call was done.
    #[error("{call}: the VMM closed its monitor before it was done")]
    HungUp {
        /// What was asked.
        call: Call,
        /// What the system said.
        source: io::Error,
    },

    /// The VMM's process ended instead of answering. Its own words are in the instance's `vmm.log`.
    #[error("the VMM ended ({exit}) instead of answering")]
    Ended {
        /// How it ended.
        exit: Exit,
        /// How the call failed.
        source: Box<VmmError>,
    },

    /// The VMM understood and refused.
    #[error("{call} was refused with status {status}: {body}")]
    Rejected {
        /// What was asked.
        call: Call,
        /// The HTTP status.
        status: u16,
        /// The VMM's reasons, outermost first; never empty.
        body: ErrorBody,
    },

    /// The host's KVM lacks what Cloud Hypervisor puts into every snapshot.
    #[error(
        "Cloud Hypervisor cannot snapshot VMs on this host: it saves the state of nested virtualisation of each vCPU, and \
         this host's KVM has none to give (kvm-pvm has not); standby and forks take another hypervisor here, such as \
         microvm, or a host with VT-x or AMD-V"
    )]
    NestedState {
        /// How it refused.
        source: Box<VmmError>,
    },

    /// The VMM's monitor refused, or the VM is not in a state for it.
    #[error("{call} was refused: {reason}")]
    Refused {
        /// What was asked.
        call: Call,
        /// Why, in the VMM's words or ours.
        reason: String,
    },

    /// The reply's body is larger than any reply of a VMM.
    #[error("{call}: the VMM's reply is larger than {limit} bytes")]
    TooLarge {
        /// What was asked.
        call: Call,
        /// The most that is read, in bytes.
        limit: usize,
    },

    /// The reply is not what the contract promises: not JSON, or JSON of another shape.
    #[error("{call}: the VMM's reply is not what its API promises; is it another version?")]
    Protocol {
        /// What was asked.
        call: Call,
        /// Where the JSON is wrong.
        source: serde_json::Error,
    },

    /// The way to the guest's console is not there, or broke.
    #[error("cannot write to the guest's console at {}", path.display())]
    Console {
        /// The console's socket or terminal.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The guest's console takes no more input.
    #[error(
        "the guest's console took {taken} of {given} bytes of input and no more within {after:?}; the guest does not read it, \
         or its VM is paused"
    )]
    ConsoleFull {
        /// How many bytes it took.
        taken: usize,
        /// How many it was given.
        given: usize,
        /// How long was waited for it to take more.
        after: Duration,
    },

    /// The pager that was to give the VMM its memory failed.
    #[error("the VM's pager failed: {said}")]
    Pager {
        /// What it said, or how it ended.
        said: String,
        /// How the call to the VMM failed then.
        source: Option<Box<VmmError>>,
    },

    /// The process could not be observed or ended.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

impl VmmError {
    /// Whether the VMM went away instead of answering: its socket is closed, or was closed during the call.
    #[must_use]
    pub fn lost_connection(&self) -> bool {
        match self {
            Self::Connect { .. }
            | Self::NoReply { .. }
            | Self::CutShort { .. }
            | Self::HungUp { .. }
            | Self::Console { .. } => true,
            Self::Pager { source, .. } => source.as_ref().is_some_and(|source| source.lost_connection()),
            _ => false,
        }
    }

    /// Whether the VMM was asked and has certainly not done it.
    #[must_use]
    pub fn was_refused(&self) -> bool {
        matches!(
            self,
            Self::Rejected { .. } | Self::Refused { .. } | Self::Connect { .. }
        )
    }
}
