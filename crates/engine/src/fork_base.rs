//! What forks are made from: the source as it was observed, under its lock.

use std::sync::{Arc, Mutex, PoisonError};

use stencil_core::rules::{self, ForkFrom, ForkPlan, Operation};
use stencil_core::{MemoryMode, Metadata, SnapshotFacts, State};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard};

use crate::admission::check_bases;
use crate::bring_up::SnapshotSource;
use crate::disks;
use crate::instance::Stopwatch;
use crate::limits::Promise;
use crate::pool::{ArmedFork, PreparedFork, end_all};
use crate::registry::Slot;
use crate::suspend::Purpose;
use crate::{Engine, EngineError, ForkRequest};

/// What forks are made from: the source as it was observed, under its lock.
#[derive(Debug)]
pub(crate) struct ForkBase {
    pub(crate) source: Arc<Slot>,
    pub(crate) lock: SourceLock,
    pub(crate) metadata: Metadata,
    pub(crate) plan: ForkPlan,
    pub(crate) snapshot: Option<SnapshotSource>,
    /// Taken from the source's pool for these forks.
    pub(crate) armed: Mutex<Vec<ArmedFork>>,
    pub(crate) promise: Option<Promise>,
    /// The forks are for one piece of work, and go with it.
    pub(crate) delete_after: bool,
}

impl ForkBase {
    /// One of those that were taken, or one that came into the pool since.
    pub(crate) fn next_armed(&self) -> Option<PreparedFork> {
        if !is_armed_for(&self.plan) {
            return None;
        }
        loop {
            // Nothing panics while it holds this lock.
            let taken = self.armed.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let armed = taken.or_else(|| self.source.pool.take(1).pop())?;
            if let Some(fork) = armed.alive() {
                return Some(fork);
            }
        }
    }
}

/// Forks of something at rest are taken side by side; a running source is changed by being forked.
#[derive(Debug)]
#[expect(dead_code, reason = "a guard is held, not read")]
pub(crate) enum SourceLock {
    Shared(OwnedRwLockReadGuard<()>),
    Exclusive(OwnedRwLockWriteGuard<()>),
}

impl Engine {
    /// Observes the source and decides; puts a running source on standby. The base keeps the source's lock, so that
    /// nothing can demote, wake or delete it before its forks are on disk. It has those of `count` forks that are armed, and
    /// promises what the others need.
    pub(crate) async fn fork_base(
        &self,
        source: &Arc<Slot>,
        request: ForkRequest,
        count: u32,
    ) -> Result<ForkBase, EngineError> {
        let lock = if request.from_running {
            SourceLock::Exclusive(self.exclusive(source).await?)
        } else {
            SourceLock::Shared(self.shared(source).await?)
        };
        let seen = self.observe(source).await?;
        let plan = rules::fork(&seen.metadata, seen.state(), &request, MemoryMode::default())?;
        if let (ForkFrom::Snapshot, SnapshotFacts::Complete(manifest)) = (plan.from, &seen.snapshot) {
            rules::check_frozen(Operation::Fork, &seen.metadata, seen.state(), manifest.frozen)?;
        }
        if !seen.metadata.spec.disks.is_empty() {
            let disks = seen.metadata.spec.disks.clone();
            self.with_files(move |_| check_bases(&disks)).await?;
        }
        if matches!(plan.from, ForkFrom::Running) {
            self.check_writable(source).await?;
        }
        let armed = if is_armed_for(&plan) {
            source.pool.take(count)
        } else {
            Vec::new()
        };
        let admit = || self.admit_forks(source, &seen.metadata.spec, &plan, count, armed.len());
        let mut promise = admit();
        // Forks that nobody has asked for yet give way to those that are asked for.
        if matches!(promise, Err(EngineError::NoRoom(_))) && self.disarm_all().await {
            promise = admit();
        }
        let promise = match promise {
            Ok(promise) => promise,
            Err(failed) => {
                put_back(source, armed).await;
                return Err(failed);
            }
        };
        let dir = self.dir(&source.id);
        let snapshot = match plan.from {
            ForkFrom::Config => None,
            ForkFrom::Snapshot => Some(seen.snapshot.clone()),
            ForkFrom::Running => {
                let mut standby = Stopwatch::start(Operation::Standby);
                let (metadata, state) = (seen.metadata.clone(), seen.state());
                self.suspend(source, metadata, state, Purpose::Forks, &mut standby)
                    .await?;
                Some(self.inner.store.snapshot(&source.id))
            }
        };
        if snapshot.is_some() && disks::are_written(&seen.metadata.spec) {
            let (dir, spec) = (dir.clone(), seen.metadata.spec.clone());
            self.with_files(move |_| disks::check_closed(&dir, &spec)).await?;
        }
        let snapshot = match snapshot {
            None => None,
            Some(facts) => Some(SnapshotSource::of(&dir, &facts).ok_or(EngineError::NoSnapshot(source.id))?),
        };
        Ok(ForkBase {
            source: Arc::clone(source),
            lock,
            metadata: seen.metadata,
            plan,
            snapshot,
            armed: Mutex::new(armed),
            promise,
            delete_after: false,
        })
    }
}

/// Armed forks are of a template, and restored as forks that do not ask for a mode.
fn is_armed_for(plan: &ForkPlan) -> bool {
    plan.fork_of_template.is_some()
        && plan.memory_mode == MemoryMode::default()
        && matches!(plan.target, State::Running | State::Paused)
}

/// Gives back to the pool what was not needed.
pub(crate) async fn put_back(source: &Slot, armed: Vec<ArmedFork>) {
    end_all(
        armed
            .into_iter()
            .filter_map(|armed| source.pool.put(armed))
            .collect(),
    )
    .await;
}
