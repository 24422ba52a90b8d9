//! A fork begins: it runs, is named, and its guest is waited for.

use std::time::Duration;

use stencil_core::{Durability, InstanceId, InstanceName, Metadata, State, VmGeneration, error_chain, rules};
use stencil_vmm::{Call, ProcessError, VmmError};
use tokio::time::timeout;

use crate::bring_up::SnapshotSource;
use crate::fork_base::ForkBase;
use crate::instance::Stopwatch;
use crate::pool::PreparedFork;
use crate::registry::Reservation;
use crate::{Engine, EngineError, Instance};

impl Engine {
    /// Lets a prepared fork run, and names it. Until its directory is renamed into place it does not exist for anybody else,
    /// and a crash leaves nothing of it; from then on it is counted as a live fork. `limit` is how long its VMM may take to
    /// let it run.
    pub(crate) async fn begin(
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
            memory,
            recording,
            agent,
            process,
            new,
        } = prepared;
        let metadata = Metadata {
            vmm: Some(record.clone()),
            memory_mode: Some(memory.memory_mode),
            memory_mode_reason: memory.reason,
            ..fork_metadata(base, id, reservation.name().clone(), generation)
        };
        new.commit(&metadata, Durability::Renamed)?;
        self.inner.write_behind.sync(&metadata);
        let (slot, guard) = reservation.commit(&metadata);
        let process = process.keep();
        self.adopt(&slot, process.clone(), &record, &metadata, is_to_run, agent);
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
pub(crate) struct NotBegun {
    pub(crate) error: EngineError,
    pub(crate) reservation: Option<Reservation>,
}

impl<E: Into<EngineError>> From<E> for NotBegun {
    fn from(error: E) -> Self {
        Self {
            error: error.into(),
            reservation: None,
        }
    }
}

pub(crate) fn fork_metadata(
    base: &ForkBase,
    id: InstanceId,
    name: InstanceName,
    generation: VmGeneration,
) -> Metadata {
    let now = jiff::Timestamp::now();
    Metadata {
        delete_after: base.delete_after,
        ..rules::fork_metadata(&base.metadata, &base.plan, id, name, generation, now)
    }
}
