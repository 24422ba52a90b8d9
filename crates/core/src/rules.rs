//! What may be done in which state. Every function decides and touches nothing: a state goes in, and out comes
//! [`Decision::Act`], [`Decision::AlreadyThere`] (nothing needs to be done), or a [`Refusal`] for the person who must act.
//!
//! | operation | acts in | acts without live forks in | does nothing in |
//! |---|---|---|---|
//! | start | Stopped, Created, Shutdown |  | Initializing, Running |
//! | stop | Created, Initializing, Running, Paused, Shutdown, Standby | Template | Stopped |
//! | pause | Running |  | Paused |
//! | resume | Paused |  | Initializing, Running |
//! | standby | Running, Paused |  | Standby |
//! | restore | Standby |  | Initializing, Running |
//! | promote-template | Standby |  |  |
//! | demote-template |  | Template |  |
//! | record-hot-pages | Template |  |  |
//! | arm | Template |  |  |
//! | exec | Running |  |  |
//! | delete |  | every state |  |
//!
//! Everything else is refused. [`fork()`] has a table of its own, and [`check_frozen`] says which snapshots forks are made of.

mod fork;
mod refusal;

use std::fmt;
use std::path::PathBuf;

use crate::id::InstanceId;
use crate::metadata::Metadata;
use crate::name::InstanceName;
use crate::state::State;

pub use fork::{ForkFrom, ForkPlan, ForkRequest, check_frozen, fork, fork_metadata};
pub use refusal::Refusal;
pub(crate) use refusal::some_of;

/// What can be asked of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Boot it.
    Start,
    /// Take it down, and discard its snapshot.
    Stop,
    /// Stop its vCPUs.
    Pause,
    /// Let its vCPUs go on.
    Resume,
    /// Write a snapshot, and end its VMM.
    Standby,
    /// Go on from the snapshot.
    Restore,
    /// Make it a template.
    Promote,
    /// Make it a plain instance on standby again.
    Demote,
    /// Have its next fork record anew which pages forks touch first.
    RecordHotPages,
    /// Change how many of its forks are kept prepared.
    Arm,
    /// Run a command in its guest.
    Exec,
    /// Make another instance of it.
    Fork,
    /// Remove it and everything of it.
    Delete,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 13] = [
        Self::Start,
        Self::Stop,
        Self::Pause,
        Self::Resume,
        Self::Standby,
        Self::Restore,
        Self::Promote,
        Self::Demote,
        Self::RecordHotPages,
        Self::Arm,
        Self::Exec,
        Self::Fork,
        Self::Delete,
    ];

    /// Whether live forks keep it from being done in this state. In every state for delete: that of a damaged template is
    /// Unknown.
    #[must_use]
    pub const fn minds_live_forks(self, state: State) -> bool {
        match self {
            Self::Stop | Self::Demote => matches!(state, State::Template),
            Self::Delete => true,
            _ => false,
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Standby => "standby",
            Self::Restore => "restore",
            Self::Promote => "promote-template",
            Self::Demote => "demote-template",
            Self::RecordHotPages => "record-hot-pages",
            Self::Arm => "arm",
            Self::Exec => "exec",
            Self::Fork => "fork",
            Self::Delete => "delete",
        })
    }
}

/// What is to be done about an operation that is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Do it.
    Act,
    /// Nothing: what was asked for is so.
    AlreadyThere,
}

/// A fork that was made of a template and still exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveFork {
    /// Its id.
    pub id: InstanceId,
    /// Its name.
    pub name: InstanceName,
}

/// Decides whether to do `operation` to an instance in `state` of which `live_forks` live, as the module's table says. A fork of a
/// running instance, and what a fork begins as, is decided by [`fork()`].
///
/// # Errors
/// [`Refusal::InvalidState`] in a state that the table does not have for it; [`Refusal::TemplateInUse`] where live forks
/// [keep it from being done](Operation::minds_live_forks).
pub fn decide(operation: Operation, state: State, live_forks: &[LiveFork]) -> Result<Decision, Refusal> {
    use State::{Created, Initializing, Paused, Running, Shutdown, Standby, Stopped, Template};
    let (acts, already): (&[State], &[State]) = match operation {
        Operation::Start => (&[Stopped, Created, Shutdown], &[Initializing, Running]),
        Operation::Stop => (
            &[
                Created,
                Initializing,
                Running,
                Paused,
                Shutdown,
                Standby,
                Template,
            ],
            &[Stopped],
        ),
        Operation::Pause => (&[Running], &[Paused]),
        Operation::Resume => (&[Paused], &[Initializing, Running]),
        Operation::Standby => (&[Running, Paused], &[Standby]),
        Operation::Restore => (&[Standby], &[Initializing, Running]),
        Operation::Promote => (&[Standby], &[]),
        Operation::Demote | Operation::RecordHotPages | Operation::Arm => (&[Template], &[]),
        Operation::Exec => (&[Running], &[]),
        Operation::Fork => (&[Stopped, Standby, Template], &[]),
        Operation::Delete => (&State::ALL, &[]),
    };
    if already.contains(&state) {
        return Ok(Decision::AlreadyThere);
    }
    if !acts.contains(&state) {
        return Err(Refusal::invalid_state(operation, state));
    }
    if operation.minds_live_forks(state) && !live_forks.is_empty() {
        return Err(Refusal::TemplateInUse {
            operation,
            forks: live_forks.to_vec(),
        });
    }
    Ok(Decision::Act)
}

/// The record of a template of which `armed` forks are kept prepared, or as many as the server does by default.
#[must_use]
pub fn with_armed(metadata: &Metadata, armed: Option<u32>) -> Metadata {
    Metadata {
        armed,
        ..metadata.clone()
    }
}

/// The record of a template whose hot pages are kept at `path`, or are not known.
#[must_use]
pub fn with_hot_pages(metadata: &Metadata, path: Option<PathBuf>) -> Metadata {
    Metadata {
        hot_pages_path: path,
        ..metadata.clone()
    }
}

/// The record of an instance that becomes a template. It is on standby, so a VMM that is still recorded has ended: that
/// is forgotten, for a template cannot wake and would show it for ever.
#[must_use]
pub fn promoted(metadata: &Metadata) -> Metadata {
    Metadata {
        is_template: true,
        vmm: None,
        // Who makes a template of a fork keeps it.
        delete_after: false,
        ..metadata.clone()
    }
}

/// The record of a template that is one no longer, by demote or by stop.
#[must_use]
pub fn demoted(metadata: &Metadata) -> Metadata {
    Metadata {
        is_template: false,
        hot_pages_path: None,
        armed: None,
        ..metadata.clone()
    }
}
