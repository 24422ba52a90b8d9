//! Prepared forks, and the pool in which a template's are kept: a value that starts nothing. Who fills it is in `armed`.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stencil_core::{InstanceId, NewInstance, VmGeneration, VmmRecord};
use stencil_vmm::{KillGuard, Restored, VmmProcess};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::hot_list::Claim;

/// How long a killed VMM may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A fork in which nothing of its users' has run. Dropped, it leaves no process and no directory.
#[derive(Debug)]
pub(crate) struct PreparedFork {
    pub(crate) id: InstanceId,
    pub(crate) generation: VmGeneration,
    pub(crate) record: VmmRecord,
    /// How its memory came back.
    pub(crate) memory: Restored,
    /// The right to record hot pages, where it does.
    pub(crate) recording: Option<Claim>,
    /// Leads to its guest's agent, where that was greeted.
    pub(crate) agent: Option<UnixStream>,
    /// Before the directory, which goes when nobody works in it any more.
    pub(crate) process: KillGuard,
    pub(crate) new: NewInstance,
}

impl PreparedFork {
    /// Its process lives.
    pub(crate) fn is_alive(&self) -> bool {
        self.process.has_exited().is_none()
    }

    /// Ends it, and returns when nothing of it is left.
    pub(crate) async fn end(self) {
        let process: VmmProcess = self.process.clone();
        // Killed: there is nothing in it to be saved.
        drop(self.process);
        if timeout(END_LIMIT, process.exited()).await.is_err() {
            tracing::error!(fork = %self.id, "a prepared fork was killed, and is still there");
        }
    }
}

/// The armed forks of one template.
#[derive(Debug, Default)]
pub(crate) struct Pool(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    ready: VecDeque<ArmedFork>,
    refill: Refill,
    /// The server ends: nothing is kept any more.
    closed: bool,
}

/// A fork that is kept prepared.
#[derive(Debug)]
pub(crate) struct ArmedFork {
    pub(crate) fork: PreparedFork,
    pub(crate) has_hot_pages: bool,
}

impl ArmedFork {
    /// It, if it lives.
    pub(crate) fn alive(self) -> Option<PreparedFork> {
        let lives = self.fork.is_alive();
        if !lives {
            tracing::warn!(fork = %self.fork.id, "an armed fork has died; another is taken");
        }
        lives.then_some(self.fork)
    }
}

/// Whether a task fills the pool.
#[derive(Debug, Default, PartialEq, Eq)]
enum Refill {
    #[default]
    Idle,
    Busy,
    /// It is to look once more before it ends.
    Again,
}

impl Pool {
    /// So many armed forks that live, or as many as there are; those that have died go.
    pub(crate) fn take(&self, count: u32) -> Vec<ArmedFork> {
        let mut kept = self.kept();
        let mut taken = Vec::new();
        while taken.len() < count as usize
            && let Some(armed) = kept.ready.pop_front()
        {
            if armed.fork.is_alive() {
                taken.push(armed);
            }
        }
        taken
    }

    /// How many can be taken.
    pub(crate) fn ready(&self) -> usize {
        self.kept()
            .ready
            .iter()
            .filter(|armed| armed.fork.is_alive())
            .count()
    }

    /// How many there are, with those that have died unnoticed.
    pub(crate) fn len(&self) -> usize {
        self.kept().ready.len()
    }

    /// Takes those out that `goes` is true of.
    pub(crate) fn remove(&self, goes: impl Fn(usize, &ArmedFork) -> bool) -> Vec<PreparedFork> {
        let mut kept = self.kept();
        let (mut gone, mut stay) = (Vec::new(), VecDeque::new());
        for (index, armed) in std::mem::take(&mut kept.ready).into_iter().enumerate() {
            if goes(index, &armed) {
                gone.push(armed.fork);
            } else {
                stay.push_back(armed);
            }
        }
        kept.ready = stay;
        gone
    }

    /// Takes all of them out.
    pub(crate) fn empty(&self) -> Vec<PreparedFork> {
        self.remove(|_, _| true)
    }

    /// Keeps nothing from now on; takes all of them out.
    pub(crate) fn close(&self) -> Vec<PreparedFork> {
        self.kept().closed = true;
        self.empty()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.kept().closed
    }

    /// Gives it back where nothing is kept any more.
    pub(crate) fn put(&self, armed: ArmedFork) -> Option<PreparedFork> {
        let mut kept = self.kept();
        if kept.closed {
            return Some(armed.fork);
        }
        kept.ready.push_back(armed);
        None
    }

    /// Whether the caller is to fill the pool; else someone does, and will look once more.
    pub(crate) fn begin_refill(&self) -> bool {
        let mut kept = self.kept();
        let begins = kept.refill == Refill::Idle;
        kept.refill = if begins { Refill::Busy } else { Refill::Again };
        begins
    }

    /// Whether the caller is done; else it was asked to look once more.
    pub(crate) fn end_refill(&self) -> bool {
        let mut kept = self.kept();
        let ends = kept.refill == Refill::Busy;
        kept.refill = if ends { Refill::Idle } else { Refill::Busy };
        ends
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Nothing panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends them side by side: each takes the kernel some 20 ms, which it mostly waits.
pub(crate) async fn end_all(forks: Vec<PreparedFork>) {
    futures_util::future::join_all(forks.into_iter().map(PreparedFork::end)).await;
}
