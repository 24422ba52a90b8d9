//! Armed forks: forks of a template that are prepared before anybody asks for them. Taking one is naming it and letting
//! it run.
//!
//! An armed fork has its id and its generation already, which nobody else ever had: nothing of it is left to be made
//! different. It lies in `.new-<id>`, so it is no instance: it is in no list, no live fork, and what a crash leaves of it is
//! swept like every other operation that did not end.
//!
//! A pool is filled behind the request that made room in it: one fork at a time on the whole server, none while the
//! host is short of memory; then it is looked at again later. Nothing looks at a pool that is full.

use std::sync::Arc;
use std::time::Duration;

use stencil_core::rules::{self, Operation};
use stencil_core::{Durability, InstanceId, Metadata, State, error_chain};
use tokio::time::timeout;

use crate::hot_list::HotPagesUse;
use crate::instance::{Armed, Stopwatch};
use crate::lifecycle::Change;
use crate::pool::{ArmedFork, end_all};
use crate::registry::Slot;
use crate::{Engine, EngineError, ForkRequest, Instance};

/// The most forks of one template that are kept prepared.
pub const MAX_ARMED: u32 = 1024;

/// How long a pool waits before it is filled: the answer to who made room in it goes first.
const BEHIND: Duration = Duration::from_millis(2);

/// How long a server that ends waits for the fork that is being armed; later than that it goes with the server.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// How long it may take to arm a fork.
const ARM_LIMIT: Duration = Duration::from_secs(10);
/// When a pool is looked at again that the host has no memory for.
const WHEN_SHORT: Duration = Duration::from_secs(10);
/// When it is tried again to arm a fork after an error.
const AFTER_ERROR: Duration = Duration::from_secs(60);

/// What came of the attempt to arm one more fork.
#[derive(Debug, PartialEq, Eq)]
enum ArmOne {
    Done,
    /// There are enough, or there are to be none.
    Enough,
    /// Not now.
    Later(Duration),
}

impl Engine {
    /// Changes how many forks of a template are kept prepared: `armed`, at most [`MAX_ARMED`], or as many as the server
    /// does by default. They are made, or go, behind the answer.
    ///
    /// # Errors
    ///
    /// [`EngineError::Invalid`] for more; [`EngineError::Refused`] if it is no template.
    pub async fn arm(&self, reference: &str, armed: Option<u32>) -> Result<Instance, EngineError> {
        check(armed)?;
        self.change(reference, Change::Arm(armed)).await
    }

    pub(crate) async fn arm_now(
        &self,
        slot: &Arc<Slot>,
        metadata: &Metadata,
        armed: Option<u32>,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        let metadata = rules::with_armed(metadata, armed);
        let target = self.target(&metadata);
        self.on_disk(move |store| store.write(&metadata, Durability::Synced))
            .await?;
        stopwatch.lap("record");
        end_all(slot.pool.remove(|index, _| index >= target)).await;
        stopwatch.lap("disarm");
        self.refill(slot);
        Ok(())
    }

    /// How many forks of a template are to be kept prepared, and how many are.
    pub(crate) fn armed(&self, slot: &Slot, metadata: &Metadata) -> Armed {
        Armed {
            target: self.target(metadata),
            ready: slot.pool.ready(),
        }
    }

    /// Whether there is room for one more armed fork.
    pub(crate) fn is_too_few_armed(&self, slot: &Slot, metadata: &Metadata) -> bool {
        slot.pool.len() < self.target(metadata)
    }

    fn target(&self, metadata: &Metadata) -> usize {
        metadata.armed.unwrap_or(self.inner.armed_by_default) as usize
    }

    /// Fills the pool of a template behind the caller, if there is room in it.
    pub(crate) fn refill(&self, slot: &Arc<Slot>) {
        if !slot.pool.begin_refill() {
            return;
        }
        let slot = Arc::clone(slot);
        // A task that waits does not keep the data directory in use.
        let engine = Arc::downgrade(&self.inner);
        let arming = Arc::clone(&self.inner.arming);
        tokio::spawn(async move {
            tokio::time::sleep(BEHIND).await;
            loop {
                // Given up after `inner`: when all turns are over, nobody who was arming has the engine any more.
                let Ok(turn) = arming.acquire().await else { return };
                let Some(inner) = engine.upgrade() else { return };
                let one = (Self { inner }).arm_one(&slot).await.unwrap_or_else(|error| {
                    tracing::warn!(instance = %slot.id, error = error_chain(&error), "no fork could be armed");
                    ArmOne::Later(AFTER_ERROR)
                });
                drop(turn);
                match one {
                    ArmOne::Done => slot.tell(),
                    ArmOne::Enough if slot.pool.end_refill() => return,
                    ArmOne::Enough => {}
                    ArmOne::Later(after) => tokio::time::sleep(after).await,
                }
            }
        });
    }

    /// The caller has the turn.
    async fn arm_one(&self, slot: &Arc<Slot>) -> Result<ArmOne, EngineError> {
        // Held until the fork is in the pool: who has the lock for itself finds all of them there.
        // It waits paused: whether it may run is asked of who takes it.
        let paused = ForkRequest {
            target_state: Some(State::Paused),
            ..ForkRequest::default()
        };
        let base = self.fork_base(slot, paused, 0).await;
        let base = match base {
            Ok(base) if base.plan.fork_of_template.is_some() => base,
            // It was demoted or deleted meanwhile.
            Ok(_) | Err(EngineError::Refused(_) | EngineError::NotFound(_)) => return Ok(ArmOne::Enough),
            Err(failed) => return Err(failed),
        };
        // Those that died make room.
        drop(slot.pool.remove(|_, armed| !armed.fork.is_alive()));
        if slot.pool.is_closed() || !self.is_too_few_armed(slot, &base.metadata) {
            return Ok(ArmOne::Enough);
        }
        if self.inner.pressure.is_short() {
            tracing::debug!(instance = %slot.id, "no fork is armed while the host is short of memory");
            return Ok(ArmOne::Later(WHEN_SHORT));
        }
        let Some(snapshot) = &base.snapshot else {
            return Ok(ArmOne::Enough);
        };
        let _promise = match self.admit_forks(slot, &base.metadata.spec, &base.plan, 1, 0) {
            Err(EngineError::NoRoom(shortage)) => {
                tracing::debug!(instance = %slot.id, %shortage, "no fork is armed");
                return Ok(ArmOne::Later(WHEN_SHORT));
            }
            admitted => admitted?,
        };
        let hot_pages = self.known_hot_pages(&base, snapshot);
        let has_hot_pages = matches!(hot_pages, HotPagesUse::Prefetch(_));
        let _permit = self.turn_to_bring_up().await;
        let mut stopwatch = Stopwatch::start(Operation::Fork);
        let fork = async {
            let id = InstanceId::generate();
            let mut fork = self
                .prepare(&base, snapshot, id, hot_pages, &mut stopwatch)
                .await?;
            match self.greet(&base, &mut fork).await {
                Ok(()) => Ok(fork),
                Err(failed) => {
                    fork.end().await;
                    Err(failed)
                }
            }
        };
        // Others wait for this one: for the template, and to arm forks of theirs.
        let Ok(fork) = timeout(ARM_LIMIT, fork).await else {
            tracing::warn!(instance = %slot.id, after = ?ARM_LIMIT, "a fork takes too long to be armed, and is given up");
            return Ok(ArmOne::Later(AFTER_ERROR));
        };
        let fork = fork?;
        match slot.pool.put(ArmedFork { fork, has_hot_pages }) {
            None => Ok(ArmOne::Done),
            Some(fork) => {
                fork.end().await;
                Ok(ArmOne::Enough)
            }
        }
    }

    /// Arms anew what was armed without hot pages that are known now. The caller has the template's lock.
    pub(crate) async fn rearm(&self, slot: &Arc<Slot>) {
        end_all(slot.pool.remove(|_, armed| !armed.has_hot_pages)).await;
        self.refill(slot);
    }

    /// Ends the armed forks of an instance, and returns when nothing of them is left. The caller has its lock.
    pub(crate) async fn disarm(&self, slot: &Slot) {
        end_all(slot.pool.empty()).await;
    }

    /// Ends the armed forks of all templates; whether there were any.
    pub(crate) async fn disarm_all(&self) -> bool {
        let (mut forks, mut emptied) = (Vec::new(), Vec::new());
        for slot in self.inner.registry.all() {
            let gone = slot.pool.empty();
            if !gone.is_empty() {
                forks.extend(gone);
                emptied.push(slot);
            }
        }
        if forks.is_empty() {
            return false;
        }
        tracing::warn!(
            armed = forks.len(),
            "the host is short of something: armed forks go"
        );
        end_all(forks).await;
        // Only now: sooner it would take the room again that they make. Where there is none, it is looked at again later.
        for slot in &emptied {
            self.refill(slot);
        }
        true
    }

    /// Ends what only a server keeps: armed forks. VMs of instances go on running.
    pub async fn close(&self) {
        let slots = self.inner.registry.all();
        let forks = slots.iter().flat_map(|slot| slot.pool.close()).collect();
        // The one that is being armed is ended by who arms it.
        let _turn = timeout(CLOSE_LIMIT, self.inner.arming.acquire()).await;
        self.inner.arming.close();
        end_all(forks).await;
    }
}

/// Refuses more than can be kept.
pub(crate) fn check(armed: Option<u32>) -> Result<(), EngineError> {
    match armed {
        Some(armed) if armed > MAX_ARMED => Err(EngineError::Invalid(format!(
            "armed is {armed}; a template keeps 0 to {MAX_ARMED} forks prepared"
        ))),
        _ => Ok(()),
    }
}
