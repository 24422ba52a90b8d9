//! A fork up to its first instruction: the VM of a snapshot, paused in a VMM of its own, in a directory that is no instance
//! yet. What is left is to name it and to let it run.

use std::time::Duration;

use stencil_core::{EpochKind, InstanceId, NewInstance, VmGeneration, VmmRecord, error_chain};
use stencil_vmm::{KillGuard, VmmProcess};
use tokio::time::timeout;

use crate::bring_up::Machine;
use crate::fork::ForkBase;
use crate::hot_list::Claim;
use crate::hot_pages::HotPagesUse;
use crate::instance::Stopwatch;
use crate::suspend::SnapshotSource;
use crate::{Engine, EngineError};

/// How long a killed VMM may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A fork that has not run. Dropped, it leaves no process and no directory.
#[derive(Debug)]
pub(crate) struct PreparedFork {
    pub(crate) id: InstanceId,
    pub(crate) generation: VmGeneration,
    pub(crate) record: VmmRecord,
    /// The right to record hot pages, where it does.
    pub(crate) recording: Option<Claim>,
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

impl Engine {
    /// Prepares a fork with this id; its phases are `spawn` and `restore`. If its hot pages cannot be recorded, it is
    /// prepared without.
    pub(crate) async fn prepare(
        &self,
        base: &ForkBase,
        snapshot: &SnapshotSource,
        id: InstanceId,
        hot_pages: HotPagesUse,
        stopwatch: &mut Stopwatch,
    ) -> Result<PreparedFork, EngineError> {
        let prepared = self.prepare_once(base, snapshot, id, &hot_pages, stopwatch).await;
        match (prepared, hot_pages) {
            (Ok(prepared), HotPagesUse::Record(claim)) => Ok(PreparedFork {
                recording: Some(claim),
                ..prepared
            }),
            (Err(failed), HotPagesUse::Record(claim)) => {
                tracing::warn!(instance = %base.source.id, error = error_chain(&failed), "hot pages cannot be recorded");
                let prepared = self
                    .prepare_once(base, snapshot, id, &HotPagesUse::Nothing, stopwatch)
                    .await?;
                // It was the recording that did not work.
                claim.give_up();
                Ok(prepared)
            }
            (prepared, _) => prepared,
        }
    }

    async fn prepare_once(
        &self,
        base: &ForkBase,
        snapshot: &SnapshotSource,
        id: InstanceId,
        hot_pages: &HotPagesUse,
        stopwatch: &mut Stopwatch,
    ) -> Result<PreparedFork, EngineError> {
        let new = self.inner.store.begin(id)?;
        let generation = VmGeneration::random();
        let machine = Machine {
            id,
            hypervisor: &base.metadata.spec.hypervisor,
            generation: &generation,
            memory_mode: base.plan.memory_mode,
            began: EpochKind::Fork,
        };
        let (process, record) = self
            .bring_back(new.dir(), &machine, snapshot, hot_pages, stopwatch)
            .await?;
        Ok(PreparedFork {
            id,
            generation,
            record,
            recording: None,
            process: process.kill_on_drop(),
            new,
        })
    }
}
