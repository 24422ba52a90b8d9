//! The operations of an instance's own life: start, stop, pause, resume, standby, restore; and the one shape that they
//! and the operations of templates have. The hops they are made of are in `bring_up` and `suspend`.

use std::sync::Arc;

use stencil_core::rules::{self, Decision, Operation};
use stencil_core::{Durability, State};

use crate::instance::Stopwatch;
use crate::observe::Seen;
use crate::registry::Slot;
use crate::suspend::Purpose;
use crate::{Engine, EngineError, Instance};

impl Engine {
    /// Boots an instance that is down. It does not wait for the guest to be ready.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`] in a state that it cannot be started from; [`EngineError::Invalid`] if its kernel is no
    /// longer there; [`EngineError::Vmm`].
    pub async fn start(&self, reference: &str) -> Result<Instance, EngineError> {
        self.change(reference, Change::Start).await
    }

    /// Ends the VM; on standby, throws the snapshot away. A guest that is Running is asked to power itself off before that, by
    /// its agent or its power button, and has some seconds for it.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`], also for a template with live forks; [`EngineError::Vmm`].
    pub async fn stop(&self, reference: &str) -> Result<Instance, EngineError> {
        self.change(reference, Change::Stop).await
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`], [`EngineError::Vmm`].
    pub async fn pause(&self, reference: &str) -> Result<Instance, EngineError> {
        self.change(reference, Change::Pause).await
    }

    /// Lets paused vCPUs go on.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`], [`EngineError::Vmm`].
    pub async fn resume(&self, reference: &str) -> Result<Instance, EngineError> {
        self.change(reference, Change::Resume).await
    }

    /// Writes the VM to disk and ends its VMM. If the snapshot fails, the VM goes on.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`], [`EngineError::Vmm`], [`EngineError::Store`].
    pub async fn standby(&self, reference: &str) -> Result<Instance, EngineError> {
        self.change(reference, Change::Standby).await
    }

    /// Lets an instance on standby go on, and waits for the guest to be ready, for a bounded time: it answers with the
    /// state that was reached.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`], also for a template; [`EngineError::Vmm`].
    pub async fn restore(&self, reference: &str) -> Result<Instance, EngineError> {
        self.change(reference, Change::Restore).await
    }

    /// The shape of every change of one instance: lock, observe, decide, act, show.
    pub(crate) async fn change(&self, reference: &str, change: Change) -> Result<Instance, EngineError> {
        let slot = self.inner.registry.find(reference)?;
        let engine = self.clone();
        detached(async move {
            let guard = engine.exclusive(&slot).await?;
            let mut stopwatch = Stopwatch::start(change.operation());
            let seen = engine.observe(&slot).await?;
            if engine.decide(&slot, seen.state(), change.operation()).await? == Decision::Act {
                if change.is_recorded() {
                    engine.check_writable(&slot).await?;
                }
                stopwatch.lap("decide");
                engine.act(&slot, seen, change, &mut stopwatch).await?;
                slot.finished(stopwatch.timings());
            }
            drop(guard);
            engine.show(&slot).await
        })
        .await
    }

    /// What cannot be recorded is not begun.
    pub(crate) async fn check_writable(&self, slot: &Slot) -> Result<(), EngineError> {
        let id = slot.id;
        self.on_disk(move |store| store.check_writable(&id)).await
    }

    async fn decide(&self, slot: &Slot, state: State, operation: Operation) -> Result<Decision, EngineError> {
        // Forks are counted only where they matter: it costs a scan.
        let forks = if operation.minds_live_forks(state) {
            self.live_forks(slot).await?
        } else {
            Vec::new()
        };
        Ok(rules::decide(operation, state, &forks)?)
    }

    async fn act(
        &self,
        slot: &Arc<Slot>,
        seen: Seen,
        change: Change,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        let Seen {
            metadata,
            snapshot,
            observed,
        } = seen;
        match change {
            Change::Start => self.boot(slot, metadata, Durability::Renamed, stopwatch).await,
            Change::Stop => self.shut_down(slot, metadata, observed.state, stopwatch).await,
            Change::Pause => self.stand_still(slot, &metadata, stopwatch).await,
            Change::Resume => self.go_on(slot, &metadata, stopwatch).await,
            Change::Standby => {
                self.suspend(slot, metadata, observed.state, Purpose::Standby, stopwatch)
                    .await
            }
            Change::Restore => self.wake(slot, metadata, &snapshot, stopwatch).await,
            Change::Promote(armed) => {
                self.promote_now(slot, &metadata, &snapshot, armed, stopwatch)
                    .await
            }
            Change::Demote => self.demote_now(slot, &metadata, stopwatch).await,
            Change::RecordHotPages => self.forget_hot_pages(slot, &metadata, stopwatch).await,
            Change::Arm(armed) => self.arm_now(slot, &metadata, armed, stopwatch).await,
        }
    }
}

/// What can be asked of one instance that stays the same instance.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    Start,
    Stop,
    Pause,
    Resume,
    Standby,
    Restore,
    /// With so many forks armed, or as many as the server keeps by default.
    Promote(Option<u32>),
    Demote,
    RecordHotPages,
    /// The same.
    Arm(Option<u32>),
}

impl Change {
    /// Whether it is to be found on disk.
    const fn is_recorded(self) -> bool {
        !matches!(self, Self::Pause | Self::Resume)
    }

    fn operation(self) -> Operation {
        match self {
            Self::Start => Operation::Start,
            Self::Stop => Operation::Stop,
            Self::Pause => Operation::Pause,
            Self::Resume => Operation::Resume,
            Self::Standby => Operation::Standby,
            Self::Restore => Operation::Restore,
            Self::Promote(_) => Operation::Promote,
            Self::Demote => Operation::Demote,
            Self::RecordHotPages => Operation::RecordHotPages,
            Self::Arm(_) => Operation::Arm,
        }
    }
}

/// Runs an operation to its end even if whoever asked for it goes away: a client that hangs up must not leave an
/// instance half-way.
pub(crate) async fn detached<T: Send + 'static>(operation: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(operation).await {
        Ok(done) => done,
        // Nobody aborts the task, so the join fails only by its panic, which goes on here.
        Err(failed) => std::panic::resume_unwind(failed.into_panic()),
    }
}
