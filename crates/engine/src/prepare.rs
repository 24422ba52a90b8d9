//! A fork up to its first instruction: the VM of a snapshot, paused in a VMM of its own, in a directory that is no instance
//! yet. What is left is to name it and to let it run.

use stencil_core::{EpochKind, InstanceId, VmGeneration, error_chain};

use crate::bring_up::{Machine, SnapshotSource};
use crate::disks;
use crate::fork_base::ForkBase;
use crate::hot_list::HotPagesUse;
use crate::instance::Stopwatch;
use crate::pool::PreparedFork;
use crate::{Engine, EngineError};

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
        let spec = &base.metadata.spec;
        // Without disks it is one mkdir, which is sooner done than given to another thread.
        let new = if disks::are_written(spec) {
            let (from, spec) = (self.dir(&base.source.id), spec.clone());
            self.with_files(move |store| {
                let new = store.begin(id)?;
                disks::fork(&from, new.dir(), &spec)?;
                Ok(new)
            })
            .await?
        } else {
            self.inner.store.begin(id)?
        };
        let generation = VmGeneration::random();
        let machine = Machine {
            id,
            hypervisor: &spec.hypervisor,
            generation: &generation,
            memory_mode: base.plan.memory_mode,
            began: EpochKind::Fork,
        };
        let back = self
            .bring_back(new.dir(), &machine, snapshot, hot_pages, stopwatch)
            .await?;
        Ok(PreparedFork {
            id,
            generation,
            record: back.record,
            memory: back.memory,
            recording: None,
            agent: None,
            process: back.process.kill_on_drop(),
            new,
        })
    }
}
