//! A VM is stopped and goes on: pause and resume, to disk (standby) and back (restore).

use std::fs;
use std::path::Path;
use std::sync::Arc;

use stencil_core::rules::{self, Operation};
use stencil_core::{
    Durability, EpochKind, InstanceId, MemoryGeneration, Metadata, Readiness, SnapshotFacts,
    SnapshotManifest, State, VmSpec, error_chain,
};

use crate::admission::check_bases;
use crate::agent::AgentLink;
use crate::bring_up::{Machine, SnapshotSource};
use crate::cpu::host_cpu;
use crate::disks;
use crate::hot_list::HotPagesUse;
use crate::instance::Stopwatch;
use crate::registry::Slot;
use crate::{Engine, EngineError};

impl Engine {
    /// Stops the vCPUs, and before that the users' processes: they go on when the guest has the right time again.
    pub(crate) async fn stand_still(
        &self,
        slot: &Slot,
        metadata: &Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        self.freeze_and_pause(slot, metadata, Purpose::Pause, stopwatch)
            .await
            .map(drop)
    }

    /// Lets a VM go on that stood still: its guest's clock is set, and then its users' processes go on.
    pub(crate) async fn go_on(
        &self,
        slot: &Slot,
        metadata: &Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        self.resume_vm(slot, metadata, stopwatch).await?;
        thaw(slot);
        Ok(())
    }

    async fn pause_vm(
        &self,
        slot: &Slot,
        metadata: &Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        let hypervisor = self.hypervisor(&metadata.spec.hypervisor)?;
        self.ask(slot, hypervisor.pause(&self.dir(&slot.id))).await?;
        stopwatch.lap("pause");
        Ok(())
    }

    /// Lets the vCPUs go on. A snapshot that was taken before is out of date from here on: the VM's disks and connections
    /// move on without it. It is set aside first, and comes back if the VM has certainly not run.
    pub(crate) async fn resume_vm(
        &self,
        slot: &Slot,
        metadata: &Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        let id = slot.id;
        // What the guest writes to its disks may survive a power loss: the snapshot must not come back beside that.
        let durability = if disks::are_written(&metadata.spec) {
            Durability::Synced
        } else {
            Durability::Renamed
        };
        self.on_disk(move |store| store.spend_snapshot(&id, durability))
            .await?;
        let hypervisor = self.hypervisor(&metadata.spec.hypervisor)?;
        if let Err(failed) = self.ask(slot, hypervisor.resume(&self.dir(&id))).await {
            if failed.was_refused() {
                self.on_disk(move |store| store.regain_snapshot(&id)).await?;
            }
            return Err(failed);
        }
        // A guest that did not run could not take the connection.
        if let Some(link) = slot.vmm().as_ref().and_then(|running| running.agent.as_ref()) {
            link.hurry();
        }
        self.on_disk(move |store| store.discard_snapshot(&id)).await?;
        stopwatch.lap("resume");
        Ok(())
    }

    /// Writes a running or paused VM to disk and ends its VMM. If the snapshot fails, the VM is as it was.
    ///
    /// Without disks the snapshot is there before the VMM is ended. With disks it is prepared then, and is there when the VMM has
    /// closed them and what they hold is synced: a power loss never leaves a snapshot beside older disks.
    pub(crate) async fn suspend(
        &self,
        slot: &Arc<Slot>,
        metadata: Metadata,
        state: State,
        purpose: Purpose,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        let frozen = if state == State::Running {
            self.freeze_and_pause(slot, &metadata, purpose, stopwatch).await?
        } else {
            has_agent(slot, &metadata).then(|| is_frozen(slot))
        };
        if let Err(failed) = self.write_snapshot(slot, &metadata, frozen, stopwatch).await {
            if state == State::Running
                && let Err(error) = self.go_on(slot, &metadata, stopwatch).await
            {
                tracing::error!(instance = %slot.id, error = error_chain(&error), "a VM does not go on after a failed standby");
                thaw(slot);
            }
            return Err(failed);
        }
        let metadata = match self.end_vmm(slot, metadata, Durability::Synced).await {
            Ok(metadata) => metadata,
            Err(failed) => {
                thaw(slot);
                return Err(failed);
            }
        };
        stopwatch.lap("stop");
        if disks::are_written(&metadata.spec) {
            self.finish_standby(slot.id, metadata.spec).await?;
            stopwatch.lap("disks");
        }
        Ok(())
    }

    /// Lets a snapshot exist that was prepared, now that its VMM has closed the disks that go with it. One whose disks are not what
    /// it goes with is thrown away; after any other error it stays prepared, and the next server tries again.
    pub(crate) async fn finish_standby(&self, id: InstanceId, spec: VmSpec) -> Result<(), EngineError> {
        let dir = self.dir(&id);
        self.with_files(move |store| match disks::close(&dir, &spec) {
            Ok(()) => Ok(store.finish_snapshot(&id)?),
            Err(lost @ EngineError::DiskLost(_)) => {
                store.discard_snapshot(&id)?;
                Err(lost)
            }
            Err(failed) => Err(failed),
        })
        .await
    }

    /// Stops the users' processes first, so that none of them runs in a fork before the fork is a machine of its own; whether
    /// they are, where there is an agent to do it. For a standby they need not be: it makes no other machine.
    async fn freeze_and_pause(
        &self,
        slot: &Slot,
        metadata: &Metadata,
        purpose: Purpose,
        stopwatch: &mut Stopwatch,
    ) -> Result<Option<bool>, EngineError> {
        let running = slot.vmm();
        let link = running.as_ref().and_then(|running| running.agent.as_ref());
        let frozen = match link {
            Some(link) if link.freeze(slot.id).await => {
                stopwatch.lap("freeze");
                Some(true)
            }
            _ => has_agent(slot, metadata).then_some(false),
        };
        let paused = async {
            if purpose == Purpose::Forks {
                rules::check_frozen(Operation::Fork, metadata, State::Running, frozen)?;
            }
            self.pause_vm(slot, metadata, stopwatch).await
        };
        if let Err(failed) = paused.await {
            thaw(slot);
            return Err(failed);
        }
        Ok(frozen)
    }

    async fn write_snapshot(
        &self,
        slot: &Slot,
        metadata: &Metadata,
        frozen: Option<bool>,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        let hypervisor = self.hypervisor(&metadata.spec.hypervisor)?;
        // Of the VMM that runs: the binary may be another one since.
        let hypervisor_version = match &metadata.vmm {
            Some(record) => record.version.clone(),
            None => hypervisor.version().await.map_err(EngineError::vmm(slot.id))?,
        };
        let dir = self.dir(&slot.id);
        let snapshot = dir.snapshot();
        let (id, path) = (slot.id, snapshot.path().to_owned());
        self.with_files(move |store| {
            // What an earlier attempt left is in the way: a snapshot is written into an empty directory.
            store.discard_snapshot(&id)?;
            fs::create_dir(&path).map_err(EngineError::io("make", path))
        })
        .await?;
        self.ask(slot, hypervisor.snapshot(&dir, &snapshot)).await?;
        stopwatch.lap("snapshot");
        let manifest = SnapshotManifest {
            schema: SnapshotManifest::SCHEMA,
            created_at: jiff::Timestamp::now(),
            hypervisor: metadata.spec.hypervisor.clone(),
            hypervisor_version,
            host_cpu: hypervisor
                .capabilities()
                .host_cpu
                .then(|| Box::new(host_cpu().clone())),
            memory_generation: MemoryGeneration::random(),
            memory_bytes: metadata.spec.memory_bytes,
            frozen,
            files: SnapshotManifest::REQUIRED
                .iter()
                .map(|name| Ok(((*name).to_owned(), file_size(&snapshot.path().join(name))?)))
                .collect::<Result<_, EngineError>>()?,
            other: serde_json::Map::new(),
        };
        let spec = metadata.spec.clone();
        self.with_files(move |store| {
            if !disks::are_written(&spec) {
                return Ok(store.complete_snapshot(&snapshot, &manifest)?);
            }
            // Once more when they are closed; but most of it now, and what is in the way of it shows while the VM can go on.
            disks::sync(&dir, &spec)?;
            Ok(store.prepare_snapshot(&snapshot, &manifest)?)
        })
        .await?;
        stopwatch.lap("sync");
        Ok(())
    }

    /// Wakes an instance from its own snapshot and waits for its guest.
    pub(crate) async fn wake(
        &self,
        slot: &Arc<Slot>,
        metadata: Metadata,
        snapshot: &SnapshotFacts,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        let dir = self.dir(&slot.id);
        let source = SnapshotSource::of(&dir, snapshot).ok_or(EngineError::NoSnapshot(slot.id))?;
        if !metadata.spec.disks.is_empty() {
            let (dir, spec) = (dir.clone(), metadata.spec.clone());
            self.with_files(move |_| {
                check_bases(&spec.disks)?;
                disks::check_closed(&dir, &spec)?;
                disks::make_own(&dir, &spec)
            })
            .await?;
        }
        let permit = self.turn_to_bring_up().await;
        let machine = Machine {
            id: slot.id,
            hypervisor: &metadata.spec.hypervisor,
            generation: &metadata.generation,
            memory_mode: metadata.memory_mode.unwrap_or_default(),
            began: EpochKind::Restore,
        };
        let back = self
            .bring_back(&dir, &machine, &source, &HotPagesUse::Nothing, stopwatch)
            .await?;
        // It was asked for the mode in which its memory came back the last time, and the reason for that one still holds.
        let kept = metadata
            .memory_mode_reason
            .clone()
            .filter(|_| metadata.memory_mode == Some(back.memory.memory_mode));
        let metadata = Metadata {
            memory_mode: Some(back.memory.memory_mode),
            memory_mode_reason: back.memory.reason.or(kept),
            ..metadata
        };
        let metadata = self
            .take_on(slot, back.process, back.record, metadata, Durability::Renamed)
            .await?;
        stopwatch.lap("record");
        let changes = self.changes(slot)?;
        self.resume_vm(slot, &metadata, stopwatch).await?;
        drop(permit);
        self.until_ready(slot, changes).await?;
        stopwatch.lap("ready");
        Ok(())
    }
}

/// What a VM is stopped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To stand still in memory.
    Pause,
    /// To go on later as the same machine.
    Standby,
    /// To be forked now.
    Forks,
}

/// Whether there is an agent in the guest, or is to be, which stops the users' processes for a snapshot.
fn has_agent(slot: &Slot, metadata: &Metadata) -> bool {
    let running = slot.vmm();
    let link = running.as_ref().and_then(|running| running.agent.as_ref());
    metadata.spec.readiness == Readiness::Agent || link.is_some_and(AgentLink::was_heard)
}

/// Whether the users' processes were stopped before the VM was.
fn is_frozen(slot: &Slot) -> bool {
    let running = slot.vmm();
    let link = running.as_ref().and_then(|running| running.agent.as_ref());
    link.is_some_and(AgentLink::is_frozen)
}

/// Lets the users' processes go on in a guest that was to be snapshotted, when it runs; also where it does not go on now.
fn thaw(slot: &Slot) {
    if let Some(link) = slot.vmm().as_ref().and_then(|running| running.agent.as_ref()) {
        link.thaw();
    }
}

/// The size in bytes of a file that must be there.
fn file_size(path: &Path) -> Result<u64, EngineError> {
    Ok(fs::metadata(path).map_err(EngineError::io("read", path))?.len())
}
