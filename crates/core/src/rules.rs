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
//! | delete |  | every state |  |
//!
//! Everything else is refused. [`fork()`] has a table of its own.

mod fork;
mod refusal;

use std::fmt;
use std::path::PathBuf;

use crate::id::InstanceId;
use crate::metadata::Metadata;
use crate::name::InstanceName;
use crate::state::State;

pub use fork::{ForkFrom, ForkPlan, ForkRequest, fork, fork_metadata};
pub use refusal::Refusal;

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
    /// Make another instance of it.
    Fork,
    /// Remove it and everything of it.
    Delete,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 12] = [
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
        Self::Fork,
        Self::Delete,
    ];
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

fn decide(operation: Operation, state: State, act: &[State], already: &[State]) -> Result<Decision, Refusal> {
    if act.contains(&state) {
        Ok(Decision::Act)
    } else if already.contains(&state) {
        Ok(Decision::AlreadyThere)
    } else {
        Err(Refusal::invalid_state(operation, state))
    }
}

fn unless_in_use(
    operation: Operation,
    decision: Decision,
    live_forks: &[LiveFork],
) -> Result<Decision, Refusal> {
    if decision == Decision::Act && !live_forks.is_empty() {
        return Err(Refusal::TemplateInUse {
            operation,
            forks: live_forks.to_vec(),
        });
    }
    Ok(decision)
}

/// Whether to boot an instance.
///
/// # Errors
/// [`Refusal::InvalidState`] where it has to wake in another way, or cannot.
pub fn start(state: State) -> Result<Decision, Refusal> {
    use State::{Created, Initializing, Running, Shutdown, Stopped};
    decide(
        Operation::Start,
        state,
        &[Stopped, Created, Shutdown],
        &[Initializing, Running],
    )
}

/// Whether to take an instance down; that of a Standby or a Template discards its snapshot.
///
/// # Errors
/// [`Refusal::InvalidState`] of an Unknown one; [`Refusal::TemplateInUse`] of a template with live forks.
pub fn stop(state: State, live_forks: &[LiveFork]) -> Result<Decision, Refusal> {
    use State::{Created, Initializing, Paused, Running, Shutdown, Standby, Stopped, Template};
    let act = [
        Created,
        Initializing,
        Running,
        Paused,
        Shutdown,
        Standby,
        Template,
    ];
    let decision = decide(Operation::Stop, state, &act, &[Stopped])?;
    if state == Template {
        unless_in_use(Operation::Stop, decision, live_forks)
    } else {
        Ok(decision)
    }
}

/// Whether to stop an instance's vCPUs.
///
/// # Errors
/// [`Refusal::InvalidState`] where they do not run, or its guest is not ready yet.
pub fn pause(state: State) -> Result<Decision, Refusal> {
    decide(Operation::Pause, state, &[State::Running], &[State::Paused])
}

/// Whether to let an instance's vCPUs go on.
///
/// # Errors
/// [`Refusal::InvalidState`] where they were not paused.
pub fn resume(state: State) -> Result<Decision, Refusal> {
    decide(
        Operation::Resume,
        state,
        &[State::Paused],
        &[State::Running, State::Initializing],
    )
}

/// Whether to put an instance on standby.
///
/// # Errors
/// [`Refusal::InvalidState`] where there is nothing to snapshot, its guest is not ready yet, or it is a template.
pub fn standby(state: State) -> Result<Decision, Refusal> {
    decide(
        Operation::Standby,
        state,
        &[State::Running, State::Paused],
        &[State::Standby],
    )
}

/// Whether to let an instance go on from its snapshot.
///
/// # Errors
/// [`Refusal::InvalidState`] where there is none, or it is a template's.
pub fn restore(state: State) -> Result<Decision, Refusal> {
    decide(
        Operation::Restore,
        state,
        &[State::Standby],
        &[State::Running, State::Initializing],
    )
}

/// Whether to make an instance a template.
///
/// # Errors
/// [`Refusal::InvalidState`] where it is not on standby.
pub fn promote(state: State) -> Result<Decision, Refusal> {
    decide(Operation::Promote, state, &[State::Standby], &[])
}

/// Whether to make a template a plain instance on standby again.
///
/// # Errors
/// [`Refusal::InvalidState`] where it is none; [`Refusal::TemplateInUse`] while a fork of it lives.
pub fn demote(state: State, live_forks: &[LiveFork]) -> Result<Decision, Refusal> {
    let decision = decide(Operation::Demote, state, &[State::Template], &[])?;
    unless_in_use(Operation::Demote, decision, live_forks)
}

/// Whether to remove an instance. `live_forks` count in every state, for that of a damaged template is Unknown.
///
/// # Errors
/// [`Refusal::TemplateInUse`] while a fork of it lives.
pub fn delete(state: State, live_forks: &[LiveFork]) -> Result<Decision, Refusal> {
    let decision = decide(Operation::Delete, state, &State::ALL, &[])?;
    unless_in_use(Operation::Delete, decision, live_forks)
}

/// Whether to forget which pages the forks of a template touch first, so that the next one records them anew.
///
/// # Errors
/// [`Refusal::InvalidState`] where it is no template.
pub fn record_hot_pages(state: State) -> Result<Decision, Refusal> {
    decide(Operation::RecordHotPages, state, &[State::Template], &[])
}

/// Whether to change how many forks of an instance are kept prepared.
///
/// # Errors
/// [`Refusal::InvalidState`] where it is no template.
pub fn arm(state: State) -> Result<Decision, Refusal> {
    decide(Operation::Arm, state, &[State::Template], &[])
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
