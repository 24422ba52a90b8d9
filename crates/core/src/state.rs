//! The states of an instance, and the one table of the edges between them.
//!
//! A state is derived from what is there (see [`observe`](crate::observe)) and never stored.
//!
//! The machine: a life from left to right, and two ways down.
//!
//! ```text
//!               +--------------------------+
//!               |                          v
//!  Stopped -> Created -> Initializing -> Running <-> Paused <-> Standby <-> Template
//!   ^  ^        |              |          |  ^         |           |           |
//!   |  |        v              v          v  |         v           |           |
//!   |  |     +-------------------------------+------------+        |           |
//!   |  +-----|                  Shutdown                  |        |           |
//!   |        +--------------------------------------------+        |           |
//!   |                                                              v           v
//!   +--------------------------------------------------------------+-----------+
//!                                                both edges of Template only without live forks
//! ```
//!
//! An instance begins at Stopped. An operation goes along one edge or several: standby of a Running one is
//! Running, Paused, Standby. Unknown has no edges: one finds oneself in it, and leaves by delete or by repair.
//!
//! The table says where operations lead. What is *observed* is finer in one place: a VM that was restored, or booted
//! again from Shutdown, shows as Initializing until its guest is ready, while it is on the edge to Running.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The state of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum State {
    /// No VMM, no snapshot.
    Stopped,
    /// A VMM is up and knows its VM, which is not booted.
    Created,
    /// The VM runs, and its guest has not said in this epoch that it is ready.
    Initializing,
    /// The VM runs, and its guest is ready, or is not asked.
    Running,
    /// The vCPUs are stopped.
    Paused,
    /// The guest is down, its VMM is up.
    Shutdown,
    /// No VMM, a complete snapshot.
    Standby,
    /// On standby as a template: it can be forked, and cannot wake.
    Template,
    /// It cannot be told; only delete is allowed.
    Unknown,
}

impl State {
    /// Every state, in the order of a life.
    pub const ALL: [Self; 9] = [
        Self::Stopped,
        Self::Created,
        Self::Initializing,
        Self::Running,
        Self::Paused,
        Self::Shutdown,
        Self::Standby,
        Self::Template,
        Self::Unknown,
    ];

    /// The states that this one can become in one step: the table.
    #[must_use]
    pub const fn edges(self) -> &'static [Self] {
        match self {
            Self::Stopped => &[Self::Created],
            Self::Created => &[Self::Initializing, Self::Running, Self::Shutdown],
            Self::Initializing => &[Self::Running, Self::Shutdown],
            Self::Running => &[Self::Paused, Self::Shutdown],
            Self::Paused => &[Self::Running, Self::Shutdown, Self::Standby],
            Self::Shutdown => &[Self::Running, Self::Stopped],
            Self::Standby => &[Self::Paused, Self::Stopped, Self::Template],
            Self::Template => &[Self::Standby, Self::Stopped],
            Self::Unknown => &[],
        }
    }

    /// Whether this state can become `next` in one step.
    #[must_use]
    pub fn can_become(self, next: Self) -> bool {
        self.edges().contains(&next)
    }

    /// What is true in this state, in a few words for the documentation.
    const fn meaning(self) -> &'static str {
        match self {
            Self::Stopped => "no VMM, no snapshot",
            Self::Created => "VMM up, VM defined, not booted",
            Self::Initializing => "VM runs, its guest has not said that it is ready in this epoch",
            Self::Running => "VM runs, guest ready (or the instance asks for no readiness)",
            Self::Paused => "vCPUs stopped",
            Self::Shutdown => "guest is down, VMM is up",
            Self::Standby => "no VMM, a complete snapshot",
            Self::Template => "Standby as a template: it can be forked, and cannot wake",
            Self::Unknown => "cannot be told; always with an error; only delete is allowed",
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Stopped => "Stopped",
            Self::Created => "Created",
            Self::Initializing => "Initializing",
            Self::Running => "Running",
            Self::Paused => "Paused",
            Self::Shutdown => "Shutdown",
            Self::Standby => "Standby",
            Self::Template => "Template",
            Self::Unknown => "Unknown",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What was to be a state is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a state is one of Stopped, Created, Initializing, Running, Paused, Shutdown, Standby, Template and Unknown, in upper or lower case"
)]
pub struct StateError;

impl FromStr for State {
    type Err = StateError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|state| state.name().eq_ignore_ascii_case(text))
            .ok_or(StateError)
    }
}

/// Renders the table of states and edges as Markdown, for the documentation.
#[must_use]
pub fn render_table() -> String {
    let mut table = String::from("| state | what is true | can become |\n|---|---|---|\n");
    for state in State::ALL {
        let edges: Vec<&str> = state.edges().iter().map(|next| next.name()).collect();
        let edges = if edges.is_empty() {
            "nothing".to_owned()
        } else {
            edges.join(", ")
        };
        let condition = if state == State::Template {
            " (both only without live forks)"
        } else {
            ""
        };
        table.push_str(&format!(
            "| {state} | {} | {edges}{condition} |\n",
            state.meaning()
        ));
    }
    table
}
