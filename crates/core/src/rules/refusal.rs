//! Why an operation is refused, and what would be right.

use crate::rules::{LiveFork, Operation};
use crate::state::State;

/// How many instances a message names; the error has them all.
const NAMED: usize = 5;

/// An operation that is not allowed, said to the person who must act.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The state does not allow it.
    #[error("cannot {operation} in state {state}: {instead}")]
    InvalidState {
        /// What was asked.
        operation: Operation,
        /// The state in which it was asked.
        state: State,
        /// What would be right.
        instead: String,
    },
    /// Forks of the template live, and rely on it.
    #[error(
        "cannot {operation} while forks of the template live: delete {} first",
        some_of(forks.iter().map(|fork| &fork.name))
    )]
    TemplateInUse {
        /// What was asked.
        operation: Operation,
        /// All of them.
        forks: Vec<LiveFork>,
    },
    /// A fork cannot begin in the state that was asked for.
    #[error(
        "a fork of a {source_state} instance cannot begin as {target}: ask for one of {}",
        listed(allowed)
    )]
    InvalidTarget {
        /// The state of the instance that was to be forked.
        source_state: State,
        /// What was asked for.
        target: State,
        /// What can be asked for.
        allowed: &'static [State],
    },
    /// The guest's users' processes run in the snapshot that forks would be made of.
    #[error(
        "cannot {operation}: processes of its guest's users were not stopped for the snapshot, and would run in forks before those \
         are machines of their own; {}",
        until_frozen(*state)
    )]
    NotFrozen {
        /// What was asked.
        operation: Operation,
        /// The state in which it was asked.
        state: State,
    },
}

impl Refusal {
    /// A word for programs.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::InvalidState { .. } => "invalid_state",
            Self::TemplateInUse { .. } => "template_in_use",
            Self::InvalidTarget { .. } => "invalid_request",
            Self::NotFrozen { .. } => "guest_not_frozen",
        }
    }

    pub(super) fn invalid_state(operation: Operation, state: State) -> Self {
        Self::InvalidState {
            operation,
            state,
            instead: instead(operation, state).to_owned(),
        }
    }
}

/// The first names, and how many more there are.
pub(crate) fn some_of(names: impl ExactSizeIterator<Item = impl ToString>) -> String {
    let more = names.len().saturating_sub(NAMED);
    let mut said: Vec<String> = names.take(NAMED).map(|name| name.to_string()).collect();
    if more > 0 {
        said.push(format!("and {more} more"));
    }
    said.join(", ")
}

fn listed(states: &[State]) -> String {
    states.iter().map(State::to_string).collect::<Vec<_>>().join(", ")
}

/// How an instance in `state` comes to a snapshot in which its users' processes are stopped.
const fn until_frozen(state: State) -> &'static str {
    match state {
        State::Running => "it runs on; ask again when its agent answers",
        State::Template => {
            "demote it (demote-template), let it go on (restore), and put it on standby (standby) while it is Running and its \
             agent answers"
        }
        _ => {
            "let it go on (restore), and put it on standby (standby) while it is Running and its agent answers"
        }
    }
}

/// What would be right where `operation` is refused in `state`.
const fn instead(operation: Operation, state: State) -> &'static str {
    use Operation as O;
    use State as S;
    match (operation, state) {
        (_, S::Unknown) => "its state cannot be told, its state_error says why; only delete is allowed",

        (O::Start | O::Pause | O::Resume | O::Restore | O::Exec, S::Template) => {
            "a template cannot wake; fork it (fork), or demote it first (demote-template)"
        }
        (O::Standby, S::Template) => {
            "a template is on standby already; demote it (demote-template) to use it as an instance"
        }
        (O::Promote, S::Template) => "it is a template already; fork it (fork)",
        (O::Demote | O::RecordHotPages | O::Arm, _) => "it is no template",

        (O::Start | O::Restore | O::Exec, S::Paused) => "it is paused; let it go on (resume)",
        (O::Start, S::Standby) => {
            "it is on standby; let it go on (restore), or discard its snapshot first (stop)"
        }
        (O::Pause | O::Resume | O::Exec, S::Standby) => "it is on standby; let it go on first (restore)",

        (O::Restore, S::Stopped | S::Created | S::Shutdown) => "it is not on standby; start it (start)",
        (O::Resume, S::Stopped | S::Created | S::Shutdown) => "it is not paused; start it (start)",
        (O::Pause | O::Standby | O::Exec, S::Stopped | S::Created | S::Shutdown) => {
            "it does not run; start it first (start)"
        }
        (O::Promote, S::Stopped | S::Created | S::Shutdown) => {
            "start it (start), then put it on standby (standby) first"
        }
        (O::Promote, S::Running | S::Paused) => "put it on standby first (standby)",
        (O::Pause | O::Standby | O::Promote | O::Exec, S::Initializing) => {
            "its guest is not ready yet; wait until it is Running (wait)"
        }

        (O::Fork, S::Running) => {
            "ask for from_running, which interrupts it for a moment, or put it on standby first (standby)"
        }
        (O::Fork, S::Initializing) => "its guest is not ready yet; wait until it is Running (wait)",
        (O::Fork, S::Paused) => "put it on standby first (standby)",
        (O::Fork, S::Created | S::Shutdown) => "stop it first (stop)",

        // Allowed or already there; only `fork` comes here, with from_running on a source that does not run.
        (O::Fork, S::Stopped | S::Standby | S::Template) => {
            "from_running is for an instance that is Running; ask without it"
        }
        (O::Start, S::Stopped | S::Created | S::Initializing | S::Running | S::Shutdown)
        | (O::Stop | O::Delete, _)
        | (O::Pause, S::Running | S::Paused)
        | (O::Resume, S::Paused | S::Running | S::Initializing)
        | (O::Standby, S::Running | S::Paused | S::Standby)
        | (O::Restore, S::Standby | S::Running | S::Initializing)
        | (O::Promote, S::Standby)
        | (O::Exec, S::Running) => "it is allowed",
    }
}
