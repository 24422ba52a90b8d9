//! Forking: new machines that go on where a source stopped.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stencil_core::rules::{self, ForkFrom, ForkPlan, Operation};
use stencil_core::{
    Durability, InstanceId, InstanceName, MemoryMode, Metadata, SnapshotFacts, State, VmGeneration,
    error_chain,
};
use stencil_vmm::{Call, ProcessError, VmmError};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard};
use tokio::time::timeout;

use crate::armed::{ArmedFork, end_all};
use crate::hot_pages::HotPagesUse;
use crate::instance::Stopwatch;
use crate::lifecycle::detached;
use crate::limits::Promise;
use crate::prepare::PreparedFork;
use crate::registry::{Reservation, Slot};
use crate::suspend::SnapshotSource;
use crate::{Engine, EngineError, ForkRequest, ForksRequest, Instance};

/// The most forks that one call makes.
pub const MAX_FORKS_PER_CALL: u32 = 1024;

/// How long an armed fork may take to run before another is taken: it takes less than a millisecond.
const ARMED_LIMIT: Duration = Duration::from_secs(1);
/// The same of one that was just prepared, on a host that may be busy.
const NEW_LIMIT: Duration = Duration::from_secs(10);

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
    /// [`EngineError::NoRoom`], [`EngineError::Invalid`], [`EngineError::Vmm`]; then there is no fork.
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
            let base = engine.fork_base(&source, request, 1).await?;
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
    /// [`EngineError::Refused`], [`EngineError::NoRoom`] and [`EngineError::Invalid`] if no fork could be tried.
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
            let base = Arc::new(engine.fork_base(&source, request.fork, request.count).await?);
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
            armed: Mutex::new(armed),
            promise,
        })
    }

    /// The forks are made: a source that ran before runs again, and a template's armed forks are made up for.
    async fn release(&self, base: ForkBase, forks: Vec<InstanceName>) -> Result<(), EngineError> {
        let unneeded = base.armed.into_inner().unwrap_or_else(PoisonError::into_inner);
        put_back(&base.source, unneeded).await;
        if base.plan.fork_of_template.is_some() && self.is_too_few_armed(&base.source, &base.metadata) {
            self.refill(&base.source);
        }
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
        if let (State::Running | State::Paused, Some(snapshot)) = (base.plan.target, &base.snapshot) {
            stopwatch.lap("decide");
            return self.fork_awake(base, snapshot, reservation, stopwatch).await;
        }
        let id = InstanceId::generate();
        let name = reservation.name().clone();
        let metadata = fork_metadata(base, id, name, VmGeneration::random());
        let snapshot = base
            .snapshot
            .clone()
            .filter(|_| base.plan.target == State::Standby);
        stopwatch.lap("decide");
        let made = metadata.clone();
        self.on_disk(move |store| {
            let new = store.begin(made.id)?;
            if let Some(snapshot) = snapshot {
                new.link_snapshot(&snapshot.dir, &snapshot.manifest)?;
            }
            new.commit(&made, Durability::Synced)
        })
        .await?;
        let (slot, _guard) = reservation.commit(&metadata);
        stopwatch.lap("create");
        if base.plan.target == State::Running
            && let Err(failed) = self.boot(&slot, metadata, &mut stopwatch).await
        {
            self.discard(&slot).await?;
            return Err(failed);
        }
        slot.finished(stopwatch.timings());
        self.show(&slot).await
    }

    /// A fork of a snapshot: an armed one, or else one that is prepared now.
    async fn fork_awake(
        &self,
        base: &ForkBase,
        snapshot: &SnapshotSource,
        mut reservation: Reservation,
        mut stopwatch: Stopwatch,
    ) -> Result<Instance, EngineError> {
        let id = InstanceId::generate();
        let hot_pages = self.use_of_hot_pages(base, snapshot, id)?;
        // One that records sees its guest's first touches, for which nothing may be there yet.
        while !matches!(hot_pages, HotPagesUse::Record(_))
            && let Some(armed) = base.next_armed()
        {
            stopwatch.lap("take");
            match self
                .begin(base, snapshot, armed, reservation, ARMED_LIMIT, stopwatch.clone())
                .await
            {
                Ok(fork) => return Ok(fork),
                Err(NotBegun {
                    error: EngineError::Vmm { id, source },
                    reservation: Some(again),
                }) => {
                    tracing::warn!(fork = %id, error = error_chain(&source), "an armed fork failed; another is taken");
                    reservation = again;
                    // What hangs on this host makes others hang: a new process is waited for longer.
                    if matches!(source, VmmError::Timeout { .. }) {
                        break;
                    }
                }
                Err(NotBegun { error, .. }) => return Err(error),
            }
        }
        let permit = self.turn(&self.inner.bring_up).await;
        stopwatch.lap("queue");
        let prepared = self
            .prepare(base, snapshot, id, hot_pages, &mut stopwatch)
            .await?;
        drop(permit);
        if let Some(promise) = &base.promise {
            promise.keep_one();
        }
        self.begin(base, snapshot, prepared, reservation, NEW_LIMIT, stopwatch)
            .await
            .map_err(|not_begun| not_begun.error)
    }

    /// Lets a prepared fork run, and names it. Until its directory is renamed into place it does not exist for anybody else,
    /// and a crash leaves nothing of it; from then on it is counted as a live fork. `limit` is how long its VMM may take to
    /// let it run.
    async fn begin(
        &self,
        base: &ForkBase,
        snapshot: &SnapshotSource,
        prepared: PreparedFork,
        reservation: Reservation,
        limit: Duration,
        mut stopwatch: Stopwatch,
    ) -> Result<Instance, NotBegun> {
        let hypervisor = self.hypervisor(&base.metadata.spec.hypervisor)?;
        let is_to_run = base.plan.target == State::Running;
        let dir = prepared.new.dir();
        let first = async {
            if is_to_run {
                hypervisor.resume(dir).await
            } else {
                // It is paused, and is asked whether it answers.
                hypervisor.info(dir).await.map(drop)
            }
        };
        let answer = match timeout(limit, prepared.process.during(first)).await {
            Ok(answer) => answer,
            Err(_elapsed) => Err(VmmError::Timeout {
                call: Call::Resume,
                after: limit,
            }),
        };
        if let Err(source) = answer {
            let error = EngineError::Vmm {
                id: prepared.id,
                source,
            };
            prepared.end().await;
            return Err(NotBegun {
                error,
                reservation: Some(reservation),
            });
        }
        if is_to_run {
            stopwatch.lap("resume");
        }
        let PreparedFork {
            id,
            generation,
            record,
            recording,
            process,
            new,
        } = prepared;
        let metadata = Metadata {
            vmm: Some(record.clone()),
            ..fork_metadata(base, id, reservation.name().clone(), generation)
        };
        new.commit(&metadata, Durability::Renamed)?;
        let (slot, guard) = reservation.commit(&metadata);
        let process = process.keep();
        self.adopt(&slot, process.clone(), &record, &metadata.spec);
        if let Some(claim) = recording {
            let memory = snapshot.manifest.memory_generation;
            if let Err(failed) = self.keep_recording(&base.source, claim, &slot, memory) {
                tracing::warn!(instance = %id, error = error_chain(&failed), "the recording of hot pages is not waited for");
            }
        }
        stopwatch.lap("record");
        if !is_to_run {
            slot.finished(stopwatch.timings());
            return Ok(self.show(&slot).await?);
        }
        let awake = async {
            // What its guest has printed by now is looked at first.
            let changes = self.changes(&slot)?;
            let is_ready = self.until_ready(&slot, changes).await?;
            match process.has_exited() {
                // A guest that is down can be looked at; of a VMM that has gone nothing is left.
                Some(exit) if !is_ready => Err(EngineError::vmm(id)(VmmError::from(ProcessError::Gone {
                    pid: process.identity().pid,
                    exit,
                }))),
                _ => Ok(is_ready),
            }
        };
        let is_ready = match awake.await {
            Ok(is_ready) => is_ready,
            Err(error) => {
                let reservation = self.discard_but_name(&slot).await?;
                return Err(NotBegun { error, reservation });
            }
        };
        stopwatch.lap("ready");
        slot.finished(stopwatch.timings());
        drop(guard);
        if is_ready {
            // All facts were seen a moment ago.
            Ok(self.show_running(&slot, metadata))
        } else {
            Ok(self.show(&slot).await?)
        }
    }
}

/// Nothing has come of a prepared fork, and nothing is left of it but, where it can be tried again, its name.
#[derive(Debug)]
struct NotBegun {
    error: EngineError,
    reservation: Option<Reservation>,
}

impl<E: Into<EngineError>> From<E> for NotBegun {
    fn from(error: E) -> Self {
        Self {
            error: error.into(),
            reservation: None,
        }
    }
}

/// Armed forks are of a template, and restored as forks that do not ask for a mode.
fn is_armed_for(plan: &ForkPlan) -> bool {
    plan.fork_of_template.is_some()
        && plan.memory_mode == MemoryMode::default()
        && matches!(plan.target, State::Running | State::Paused)
}

/// Gives back to the pool what was not needed.
async fn put_back(source: &Slot, armed: Vec<ArmedFork>) {
    end_all(
        armed
            .into_iter()
            .filter_map(|armed| source.pool.put(armed))
            .collect(),
    )
    .await;
}

fn fork_metadata(base: &ForkBase, id: InstanceId, name: InstanceName, generation: VmGeneration) -> Metadata {
    let now = jiff::Timestamp::now();
    rules::fork_metadata(&base.metadata, &base.plan, id, name, generation, now)
}

/// What forks are made from: the source as it was observed, under its lock.
#[derive(Debug)]
pub(crate) struct ForkBase {
    pub(crate) source: Arc<Slot>,
    lock: SourceLock,
    pub(crate) metadata: Metadata,
    pub(crate) plan: ForkPlan,
    pub(crate) snapshot: Option<SnapshotSource>,
    /// Taken from the source's pool for these forks.
    armed: Mutex<Vec<ArmedFork>>,
    promise: Option<Promise>,
}

impl ForkBase {
    /// One of those that were taken, or one that came into the pool since.
    fn next_armed(&self) -> Option<PreparedFork> {
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
enum SourceLock {
    Shared(OwnedRwLockReadGuard<()>),
    Exclusive(OwnedRwLockWriteGuard<()>),
}
