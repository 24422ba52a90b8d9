//! Forking: new machines that go on where a source stopped.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use stencil_core::rules::{ForkFrom, Operation};
use stencil_core::{Durability, InstanceId, InstanceName, SnapshotFacts, State, VmGeneration, error_chain};
use stencil_vmm::VmmError;

use crate::begin::{NotBegun, fork_metadata};
use crate::bring_up::SnapshotSource;
use crate::create::until_booted;
use crate::disks;
use crate::fork_base::{ForkBase, put_back};
use crate::hot_list::HotPagesUse;
use crate::instance::Stopwatch;
use crate::lifecycle::detached;
use crate::registry::{Reservation, Slot};
use crate::{Engine, EngineError, ExecOutput, ExecRequest, ForkRequest, ForksRequest, Instance};

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
    /// What came of the command that was to be run in it; absent where none was, or there is no fork.
    pub work: Option<Work>,
}

/// What came of the command in a fork.
#[derive(Debug)]
pub struct Work {
    /// Its result, or why there is none.
    pub exec: Result<ExecOutput, EngineError>,
    /// The fork was deleted after it.
    pub deleted: bool,
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

    /// Forks an instance many times, all at once, and runs a command in each fork if it is asked to. Those that worked stay,
    /// whatever became of the others.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`], [`EngineError::NoRoom`], [`EngineError::NoAgent`] and [`EngineError::Invalid`] if no fork
    /// could be tried.
    pub async fn forks(&self, source: &str, request: ForksRequest) -> Result<Vec<ForkOutcome>, EngineError> {
        if request.count == 0 || request.count > MAX_FORKS_PER_CALL {
            return Err(EngineError::Invalid(format!(
                "count is {}; one call makes 1 to {MAX_FORKS_PER_CALL} forks",
                request.count
            )));
        }
        let source = self.inner.registry.find(source)?;
        self.admit_work(&source, &request)?;
        let engine = self.clone();
        detached(async move {
            let stopwatch = Stopwatch::start(Operation::Fork);
            let reservations = engine.reserve_forks(&source, request.name_prefix.as_ref(), request.count)?;
            let asked = ForkRequest {
                // In which something is run, whatever its source begins its forks as.
                target_state: match request.exec {
                    Some(_) => Some(State::Running),
                    None => request.fork.target_state,
                },
                ..request.fork
            };
            let mut base = engine.fork_base(&source, asked, request.count).await?;
            base.delete_after = request.delete_after;
            let base = Arc::new(base);
            let forks = reservations.into_iter().map(|reservation| {
                let (engine, base, stopwatch) = (engine.clone(), Arc::clone(&base), stopwatch.clone());
                let exec = request.exec.clone();
                tokio::spawn(async move {
                    let name = reservation.name().clone();
                    let result = engine.make_fork(&base, reservation, stopwatch).await;
                    // A source that ran waits for its forks, and not for what is run in them.
                    let working = match (&result, exec) {
                        (Ok(fork), Some(exec)) => Some(tokio::spawn(engine.work(
                            fork.id,
                            exec,
                            request.count,
                            request.delete_after,
                        ))),
                        _ => None,
                    };
                    let work = None;
                    (ForkOutcome { name, result, work }, working)
                })
            });
            let (mut outcomes, mut all_working, mut panicked) = (Vec::new(), Vec::new(), None);
            for fork in forks.collect::<Vec<_>>() {
                match fork.await {
                    Ok((outcome, working)) => {
                        outcomes.push(outcome);
                        all_working.push(working);
                    }
                    Err(failed) => panicked = Some(failed.into_panic()),
                }
            }
            if let Some(base) = Arc::into_inner(base) {
                let made = outcomes.iter().filter(|outcome| outcome.result.is_ok());
                engine
                    .release(base, made.map(|outcome| outcome.name.clone()).collect())
                    .await?;
            }
            for (outcome, working) in outcomes.iter_mut().zip(all_working) {
                let Some(working) = working else { continue };
                match working.await {
                    Ok(work) => outcome.work = Some(work),
                    Err(failed) => panicked = Some(failed.into_panic()),
                }
            }
            match panicked {
                None => Ok(outcomes),
                // Only now: a running source goes on all the same.
                Some(panic) => std::panic::resume_unwind(panic),
            }
        })
        .await
    }

    /// Refuses a command that could be run in no fork, before anything is made.
    fn admit_work(&self, source: &Slot, request: &ForksRequest) -> Result<(), EngineError> {
        if request.exec.is_none() {
            return if request.delete_after {
                Err(EngineError::Invalid(
                    "delete_after is for forks in which something is run; it takes an exec".to_owned(),
                ))
            } else {
                Ok(())
            };
        }
        if let Some(target) = request
            .fork
            .target_state
            .filter(|target| *target != State::Running)
        {
            return Err(EngineError::Invalid(format!(
                "target_state is {target}; forks in which something is run are to be Running"
            )));
        }
        let name = self.read(&source.id)?.spec.hypervisor;
        self.check_agent_port(source.id, &name)
    }

    /// Runs a command in a fork, and deletes the fork afterwards if that is asked for.
    fn work(
        &self,
        fork: InstanceId,
        request: ExecRequest,
        count: u32,
        delete_after: bool,
    ) -> impl Future<Output = Work> + Send + 'static {
        let engine = self.clone();
        async move {
            let exec = engine.exec_in_fork(fork, count as usize, request).await;
            let deleted = delete_after
                && engine
                    .delete(&fork.to_string())
                    .await
                    .inspect_err(|error| {
                        tracing::error!(%fork, error = error_chain(error), "a fork could not be deleted after its work");
                    })
                    .is_ok();
            Work { exec, deleted }
        }
    }

    fn reserve_forks(
        &self,
        source: &Slot,
        prefix: Option<&InstanceName>,
        count: u32,
    ) -> Result<Vec<Reservation>, EngineError> {
        let prefix = match prefix.or(source.name()) {
            Some(name) => name.to_string(),
            None => source.id.to_string(),
        };
        self.inner.registry.reserve_numbered(&prefix, count)
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
        let is_to_run = base.plan.target == State::Running;
        let made = until_booted(&metadata, is_to_run);
        let (from, keeps_disks) = (self.dir(&base.source.id), base.plan.keeps_disks);
        self.with_files(move |store| {
            let new = store.begin(made.id)?;
            if keeps_disks {
                disks::fork(&from, new.dir(), &made.spec)?;
            } else {
                disks::make_first(new.dir(), &made.spec)?;
            }
            disks::sync(new.dir(), &made.spec)?;
            if let Some(snapshot) = snapshot {
                new.link_snapshot(&snapshot.dir, &snapshot.manifest)?;
            }
            Ok(new.commit(&made, Durability::Synced)?)
        })
        .await?;
        self.boot_first(reservation, metadata, is_to_run, stopwatch).await
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
        let permit = self.turn_to_bring_up().await;
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
}
