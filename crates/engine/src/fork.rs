//! Forking: new machines that go on where a source stopped.

use std::sync::Arc;

use stencil_core::rules::{self, ForkFrom, ForkPlan, Operation};
use stencil_core::{
    Durability, EpochKind, InstanceId, InstanceName, MemoryMode, Metadata, SnapshotFacts, State,
    VmGeneration, error_chain,
};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard};

use crate::hot_pages::HotPagesUse;
use crate::instance::Stopwatch;
use crate::lifecycle::detached;
use crate::registry::{Reservation, Slot};
use crate::suspend::SnapshotSource;
use crate::{Engine, EngineError, ForkRequest, ForksRequest, Instance};

/// The most forks that one call makes.
pub const MAX_FORKS_PER_CALL: u32 = 1024;

/// What came of one fork of many.
#[derive(Debug)]
pub struct ForkOutcome {
    /// The name that it has or would have had.
    pub name: InstanceName,
    /// The fork, or why there is none.
    pub result: Result<Instance, EngineError>,
}

impl Engine {
    /// Forks an instance; the fork is called `name`, or `<source>-<number>`. A fork that is to run is waited for until
    /// its guest is ready, for a bounded time.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`] where the rules do not allow it, [`EngineError::NameConflict`],
    /// [`EngineError::Invalid`], [`EngineError::Vmm`]; then there is no fork.
    pub async fn fork(
        &self,
        source: &str,
        name: Option<InstanceName>,
        request: ForkRequest,
    ) -> Result<Instance, EngineError> {
        let source = self.inner.registry.find(source)?;
        let engine = self.clone();
        detached(async move {
            let stopwatch = Stopwatch::start(Operation::Fork);
            let reservation = match name {
                Some(name) => engine.inner.registry.reserve(name)?,
                None => engine.reserve_forks(&source, None, 1)?.remove(0),
            };
            let base = engine.fork_base(&source, request).await?;
            let made = engine.make_fork(&base, reservation, stopwatch).await;
            engine
                .release(base, made.iter().filter_map(|fork| fork.name.clone()).collect())
                .await?;
            made
        })
        .await
    }

    /// Forks an instance many times, all at once. Those that worked stay, whatever became of the others.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`] and [`EngineError::Invalid`] if no fork could be tried.
    pub async fn forks(&self, source: &str, request: ForksRequest) -> Result<Vec<ForkOutcome>, EngineError> {
        if request.count == 0 || request.count > MAX_FORKS_PER_CALL {
            return Err(EngineError::Invalid(format!(
                "count is {}; one call makes 1 to {MAX_FORKS_PER_CALL} forks",
                request.count
            )));
        }
        let source = self.inner.registry.find(source)?;
        let engine = self.clone();
        detached(async move {
            let stopwatch = Stopwatch::start(Operation::Fork);
            let reservations = engine.reserve_forks(&source, request.name_prefix.as_ref(), request.count)?;
            let base = Arc::new(engine.fork_base(&source, request.fork).await?);
            let forks = reservations.into_iter().map(|reservation| {
                let (engine, base, stopwatch) = (engine.clone(), Arc::clone(&base), stopwatch.clone());
                tokio::spawn(async move {
                    let name = reservation.name().clone();
                    let result = engine.make_fork(&base, reservation, stopwatch).await;
                    ForkOutcome { name, result }
                })
            });
            let (mut outcomes, mut panicked) = (Vec::new(), None);
            for fork in forks.collect::<Vec<_>>() {
                match fork.await {
                    Ok(outcome) => outcomes.push(outcome),
                    Err(failed) => panicked = Some(failed.into_panic()),
                }
            }
            if let Some(base) = Arc::into_inner(base) {
                let made = outcomes.iter().filter(|outcome| outcome.result.is_ok());
                engine
                    .release(base, made.map(|outcome| outcome.name.clone()).collect())
                    .await?;
            }
            match panicked {
                None => Ok(outcomes),
                // Only now: a running source goes on all the same.
                Some(panic) => std::panic::resume_unwind(panic),
            }
        })
        .await
    }

    fn reserve_forks(
        &self,
        source: &Slot,
        prefix: Option<&InstanceName>,
        count: u32,
    ) -> Result<Vec<Reservation>, EngineError> {
        let prefix = match prefix.or(source.name.as_ref()) {
            Some(name) => name.to_string(),
            None => source.id.to_string(),
        };
        self.inner.registry.reserve_numbered(&prefix, count)
    }

    /// Observes the source and decides; puts a running source on standby. The base keeps the source's lock, so that
    /// nothing can demote, wake or delete it before its forks are on disk.
    async fn fork_base(&self, source: &Arc<Slot>, request: ForkRequest) -> Result<ForkBase, EngineError> {
        let lock = if request.from_running {
            SourceLock::Exclusive(self.exclusive(source).await?)
        } else {
            SourceLock::Shared(self.shared(source).await?)
        };
        let seen = self.observe(source).await?;
        let plan = rules::fork(&seen.metadata, seen.state(), &request, MemoryMode::default())?;
        let dir = self.dir(&source.id);
        let snapshot = match plan.from {
            ForkFrom::Config => None,
            ForkFrom::Snapshot => Some(seen.snapshot.clone()),
            ForkFrom::Running => {
                let mut standby = Stopwatch::start(Operation::Standby);
                self.suspend(source, seen.metadata.clone(), seen.state(), &mut standby)
                    .await?;
                Some(self.inner.store.snapshot(&source.id))
            }
        };
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
        })
    }

    /// The forks are made: a source that ran before runs again.
    async fn release(&self, base: ForkBase, forks: Vec<InstanceName>) -> Result<(), EngineError> {
        if let (ForkFrom::Running, Some(snapshot)) = (base.plan.from, base.snapshot) {
            let id = base.source.id;
            let facts = SnapshotFacts::Complete(snapshot.manifest);
            let mut stopwatch = Stopwatch::start(Operation::Restore);
            let metadata = self.read(&id)?;
            self.wake(&base.source, metadata, &facts, &mut stopwatch)
                .await
                .map_err(|failed| EngineError::SourceNotRestored {
                    id,
                    forks,
                    source: Box::new(failed),
                })?;
            base.source.finished(stopwatch.timings());
        }
        drop(base.lock);
        Ok(())
    }

    async fn make_fork(
        &self,
        base: &ForkBase,
        reservation: Reservation,
        mut stopwatch: Stopwatch,
    ) -> Result<Instance, EngineError> {
        let id = InstanceId::generate();
        let generation = VmGeneration::random();
        let metadata = rules::fork_metadata(
            &base.metadata,
            &base.plan,
            id,
            reservation.name().clone(),
            generation,
            jiff::Timestamp::now(),
        );
        stopwatch.lap("decide");
        let slot = match (base.plan.target, &base.snapshot) {
            (State::Running | State::Paused, Some(snapshot)) => {
                self.fork_awake(base, snapshot, metadata, reservation, &mut stopwatch)
                    .await?
            }
            (target, snapshot) => {
                let snapshot = snapshot.clone().filter(|_| target == State::Standby);
                let made = metadata.clone();
                self.on_disk(move |store| {
                    let new = store.begin(made.id)?;
                    if let Some(snapshot) = snapshot {
                        new.link_snapshot(&snapshot.dir, &snapshot.manifest)?;
                    }
                    new.commit(&made, Durability::Synced)
                })
                .await?;
                let (slot, _guard) = reservation.commit(id);
                stopwatch.lap("create");
                if target == State::Running
                    && let Err(failed) = self.boot(&slot, metadata, &mut stopwatch).await
                {
                    self.discard(&slot).await?;
                    return Err(failed);
                }
                slot
            }
        };
        slot.finished(stopwatch.timings());
        self.show(&slot).await
    }

    /// Brings a fork up from the source's snapshot. Until its directory is renamed into place it does not exist for
    /// anybody else; from then on it is counted as a live fork.
    async fn fork_awake(
        &self,
        base: &ForkBase,
        snapshot: &SnapshotSource,
        metadata: Metadata,
        reservation: Reservation,
        stopwatch: &mut Stopwatch,
    ) -> Result<Arc<Slot>, EngineError> {
        let id = metadata.id;
        let permit = self.bring_up_permit().await;
        stopwatch.lap("queue");
        let new = self.inner.store.begin(id)?;
        let modes = self
            .hypervisor(&metadata.spec.hypervisor)?
            .capabilities()
            .memory_modes;
        let memory = snapshot.manifest.memory_generation;
        let mut hot_pages = self.use_of_hot_pages(&base.source, &base.plan, &memory, id, &modes);
        let mut back = self
            .bring_back(
                new.dir(),
                &metadata,
                snapshot,
                EpochKind::Fork,
                &hot_pages,
                stopwatch,
            )
            .await;
        if let (HotPagesUse::Record(_), Err(failed)) = (&hot_pages, &back) {
            tracing::warn!(instance = %base.source.id, error = error_chain(failed), "hot pages cannot be recorded");
            let recording = std::mem::replace(&mut hot_pages, HotPagesUse::Nothing);
            back = self
                .bring_back(
                    new.dir(),
                    &metadata,
                    snapshot,
                    EpochKind::Fork,
                    &hot_pages,
                    stopwatch,
                )
                .await;
            if let (HotPagesUse::Record(claim), Ok(_)) = (recording, &back) {
                // It was the recording that did not work.
                claim.give_up();
            }
        }
        let (process, record) = back?;
        let metadata = Metadata {
            vmm: Some(record.clone()),
            ..metadata
        };
        let unborn = new.dir().clone();
        if let Err(failed) = new.commit(&metadata, Durability::Renamed) {
            self.stop_failed(id, &unborn, self.hypervisor(&metadata.spec.hypervisor)?, &process)
                .await;
            return Err(failed.into());
        }
        let (slot, guard) = reservation.commit(id);
        self.adopt(&slot, process, &record, &metadata.spec);
        if let HotPagesUse::Record(claim) = hot_pages
            && let Err(failed) = self.keep_recording(&base.source, claim, &slot, memory)
        {
            tracing::warn!(instance = %id, error = error_chain(&failed), "the recording of hot pages is not waited for");
        }
        stopwatch.lap("record");
        if base.plan.target == State::Paused {
            return Ok(slot);
        }
        let awake = async {
            let changes = self.changes(&slot)?;
            self.resume_vm(&slot, &metadata, stopwatch).await?;
            drop(permit);
            self.until_ready(&slot, changes).await?;
            stopwatch.lap("ready");
            Ok(())
        };
        if let Err(failed) = awake.await {
            self.discard(&slot).await?;
            return Err(failed);
        }
        drop(guard);
        Ok(slot)
    }
}

/// What forks are made from: the source as it was observed, under its lock.
#[derive(Debug)]
struct ForkBase {
    source: Arc<Slot>,
    lock: SourceLock,
    metadata: Metadata,
    plan: ForkPlan,
    snapshot: Option<SnapshotSource>,
}

/// Forks of something at rest are taken side by side; a running source is changed by being forked.
#[derive(Debug)]
#[expect(dead_code, reason = "a guard is held, not read")]
enum SourceLock {
    Shared(OwnedRwLockReadGuard<()>),
    Exclusive(OwnedRwLockWriteGuard<()>),
}
