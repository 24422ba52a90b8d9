//! What the engine says of an instance.

use std::time::{Duration, Instant};

use stencil_core::rules::{LiveFork, Operation};
use stencil_core::{InstanceId, InstanceName, Metadata, State};
use stencil_vmm::{Accelerator, MemoryUse, PageCounters};

use crate::agent::AgentState;

/// An instance as it was observed.
#[derive(Clone, Debug)]
pub struct Instance {
    /// Its id.
    pub id: InstanceId,
    /// Its name; absent only where its metadata could not be read when the server started.
    pub name: Option<InstanceName>,
    /// Its metadata; absent where they cannot be read, and then the state is [`State::Unknown`].
    pub metadata: Option<Metadata>,
    /// Its derived state.
    pub state: State,
    /// Why the state is unknown, or what went wrong on the way to it.
    pub state_error: Option<String>,
    /// How its guest came to its end; only where it is [`State::Shutdown`], and only where its VMM tells.
    pub guest_end: Option<String>,
    /// Of a template: its live forks.
    pub forks: Option<Vec<LiveFork>>,
    /// Of a template: its armed forks.
    pub armed: Option<Armed>,
    /// What is known of the agent in its guest; only of a VM that is up on a hypervisor that has a port for one.
    pub agent: Option<AgentState>,
    /// What its VMM process holds in memory; only where it was asked for and there is a process.
    pub memory_use: Option<MemoryUse>,
    /// What executes its guest's instructions; only where it was asked for and its hypervisor has a choice in that.
    pub accelerator: Option<Accelerator>,
    /// How its guest's pages came to it; only where it was asked for and the VMM counts them.
    pub pages: Option<PageCounters>,
    /// How long its last operation took, by phase; forgotten when the server restarts.
    pub timings: Option<Timings>,
}

/// The armed forks of a template: prepared before anybody asks for them. They are no instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Armed {
    /// How many are to be kept.
    pub target: usize,
    /// How many can be taken now.
    pub ready: usize,
}

/// How long an operation took, phase after phase; the phases add up to the whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timings {
    /// Which operation.
    pub operation: Operation,
    /// Phases in order.
    pub phases: Vec<(&'static str, Duration)>,
}

impl Timings {
    /// From the request to the end of the last phase.
    pub fn total(&self) -> Duration {
        self.phases.iter().map(|(_, took)| *took).sum()
    }
}

/// Takes the time of each phase of an operation.
#[derive(Clone, Debug)]
pub(crate) struct Stopwatch {
    timings: Timings,
    last: Instant,
}

impl Stopwatch {
    pub(crate) fn start(operation: Operation) -> Self {
        Self {
            timings: Timings {
                operation,
                phases: Vec::with_capacity(8),
            },
            last: Instant::now(),
        }
    }

    /// Ends a phase: the time since the last one ended goes to `name`.
    pub(crate) fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.timings.phases.push((name, now - self.last));
        self.last = now;
    }

    pub(crate) fn timings(self) -> Timings {
        self.timings
    }
}
