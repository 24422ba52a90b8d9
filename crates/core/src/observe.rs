//! Facts in, state out: what the metadata, the snapshot on disk and the VMM process say becomes one [`State`].
//!
//! [`derive()`] is a pure function. Who gathers the facts decides nothing, and who decides reads no disk.

use crate::manifest::SnapshotManifest;
use crate::metadata::Metadata;
use crate::state::State;

/// What is on disk of an instance's snapshot.
#[derive(Clone, Debug, PartialEq)]
pub enum SnapshotFacts {
    /// No manifest, so no snapshot, whatever else lies there.
    Absent,
    /// It is to come into being when the VMM has closed the disks that go with it.
    Prepared,
    /// Its manifest is understood, and every file that it lists is there with its size.
    Complete(SnapshotManifest),
    /// There is a manifest, and what it promises is not there.
    Broken {
        /// What is wrong, as part of a sentence.
        reason: String,
    },
}

/// Where a VMM says that its VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmPhase {
    /// The VMM knows no VM.
    Undefined,
    /// Defined, not booted.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are stopped.
    Paused,
    /// Its guest is down.
    Shutdown,
}

/// How a guest came to its end, or to stand still although nobody asked for that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestEnd {
    /// It did not end of its own will: a triple fault, an error of the VMM, a disk of the host that is full.
    pub failed: bool,
    /// What happened, as part of a sentence.
    pub reason: String,
}

/// What is known of an instance's VMM process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmmFacts {
    /// None is recorded.
    None,
    /// One is recorded, and its process is gone without having been asked to go.
    Ended {
        /// How, as part of a sentence: "killed by signal 9 (SIGKILL)".
        reason: String,
    },
    /// One is recorded, and its process works in another directory: this record is a copy, and the VMM is the original's.
    Elsewhere {
        /// The process.
        pid: u32,
    },
    /// Its process lives, and does not answer.
    Silent {
        /// What was tried and what came of it, as part of a sentence.
        reason: String,
    },
    /// It answers.
    Up {
        /// Where its VM is.
        phase: VmPhase,
        /// The guest has said in this epoch that it is ready, or it is not asked.
        ready: bool,
        /// How the guest came to its end, or why its VMM stopped it unasked.
        end: Option<GuestEnd>,
    },
}

/// The state of an instance, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Its state.
    pub state: State,
    /// What is wrong, as a sentence without its full stop. Always there where the state is [`State::Unknown`].
    pub error: Option<String>,
    /// How the guest came to its end; only where the state is [`State::Shutdown`], and only where its VMM tells.
    pub guest_end: Option<String>,
}

impl Observed {
    const fn sound(state: State) -> Self {
        Self {
            state,
            error: None,
            guest_end: None,
        }
    }

    const fn unknown(error: String) -> Self {
        Self {
            state: State::Unknown,
            error: Some(error),
            guest_end: None,
        }
    }
}

/// Derives the state of an instance from the facts.
#[must_use]
pub fn derive(metadata: &Metadata, snapshot: &SnapshotFacts, vmm: &VmmFacts) -> Observed {
    match vmm {
        VmmFacts::None => asleep(metadata, snapshot),
        VmmFacts::Ended { reason } => without_vmm(metadata, snapshot, format!("its VMM ended: {reason}")),
        VmmFacts::Elsewhere { pid } => {
            let why =
                format!("its VMM, process {pid}, belongs to the data directory that this one is a copy of");
            without_vmm(metadata, snapshot, why)
        }
        VmmFacts::Silent { reason } => Observed::unknown(format!("its VMM does not answer: {reason}")),
        // No operation leads here. Were it shown as Running, a standby could overwrite memory that forks rely on.
        VmmFacts::Up { .. } if metadata.is_template => {
            Observed::unknown("it is a template, which cannot wake, and yet it has a VMM".to_owned())
        }
        VmmFacts::Up { phase, ready, end } => {
            let state = match (phase, ready) {
                (VmPhase::Undefined | VmPhase::Shutdown, _) => State::Shutdown,
                (VmPhase::Created, _) => State::Created,
                (VmPhase::Running, true) => State::Running,
                (VmPhase::Running, false) => State::Initializing,
                (VmPhase::Paused, _) => State::Paused,
            };
            let failed = end.as_ref().filter(|end| end.failed).and_then(|end| match state {
                State::Shutdown => Some(format!("its guest ended: {}", end.reason)),
                State::Paused => Some(format!("its VMM stopped it: {}", end.reason)),
                _ => None,
            });
            Observed {
                state,
                error: failed,
                guest_end: end
                    .as_ref()
                    .filter(|_| state == State::Shutdown)
                    .map(|end| end.reason.clone()),
            }
        }
    }
}

/// The state of an instance that has no VMM, although its record names one.
fn without_vmm(metadata: &Metadata, snapshot: &SnapshotFacts, why: String) -> Observed {
    let Observed { state, error, .. } = asleep(metadata, snapshot);
    Observed {
        state,
        guest_end: None,
        error: Some(match error {
            Some(error) => format!("{error}; {why}"),
            None => why,
        }),
    }
}

/// The state of an instance that has no VMM.
fn asleep(metadata: &Metadata, snapshot: &SnapshotFacts) -> Observed {
    match (snapshot, metadata.is_template) {
        (SnapshotFacts::Absent, false) => Observed::sound(State::Stopped),
        (SnapshotFacts::Absent, true) => {
            Observed::unknown("it is a template, and its snapshot is missing".to_owned())
        }
        // Its memory would be lost if it were started, and its disks are not known to be what the memory goes with.
        (SnapshotFacts::Prepared, _) => Observed::unknown(
            "its standby has not ended; if it stays so, start the server anew, which ends it".to_owned(),
        ),
        (SnapshotFacts::Complete(_), false) => Observed::sound(State::Standby),
        (SnapshotFacts::Complete(_), true) => Observed::sound(State::Template),
        (SnapshotFacts::Broken { reason }, _) => {
            Observed::unknown(format!("its snapshot is broken: {reason}"))
        }
    }
}
