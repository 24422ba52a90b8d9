//! A VMM is brought up for an instance, watched, and ended: the hops in which a process comes or goes.

use std::path::Path;
use std::sync::Arc;

use stencil_core::{
    Durability, Epoch, EpochId, EpochKind, HypervisorName, InstanceDir, InstanceId, MemoryMode, Metadata,
    SnapshotDir, SnapshotFacts, SnapshotManifest, State, VmGeneration, VmmRecord, error_chain,
};
use stencil_vmm::{HotPages, Hypervisor, Restore, Restored, Start, VmmError, VmmProcess};
use tokio::net::UnixStream;

use crate::admission::check_boot_files;
use crate::agent::{AgentLink, Identity};
use crate::cpu::host_cpu;
use crate::disks;
use crate::hot_list::HotPagesUse;
use crate::instance::Stopwatch;
use crate::registry::Slot;
use crate::running::RunningVmm;
use crate::{Engine, EngineError};

impl Engine {
    /// Boots the VM on a VMM of its own; one that is there with the guest down is replaced. Its new record is written with this
    /// durability.
    pub(crate) async fn boot(
        &self,
        slot: &Arc<Slot>,
        metadata: Metadata,
        durability: Durability,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        let spec = metadata.spec.clone();
        self.with_files(move |_| check_boot_files(&spec)).await?;
        let metadata = self.end_vmm(slot, metadata, Durability::Renamed).await?;
        let dir = self.dir(&slot.id);
        if disks::are_written(&metadata.spec) {
            let (id, dir, spec) = (slot.id, dir.clone(), metadata.spec.clone());
            self.with_files(move |store| {
                // A standby that a power loss has interrupted left the guest's memory.
                store.discard_snapshot(&id)?;
                disks::make_own(&dir, &spec)
            })
            .await?;
        }
        let hypervisor = self.hypervisor(&metadata.spec.hypervisor)?;
        let _permit = self.turn_to_bring_up().await;
        let console_offset = size_of(&dir.console_log());
        let start = Start::Boot {
            spec: &metadata.spec,
            generation: &metadata.generation,
        };
        let process = hypervisor
            .spawn(&dir, start)
            .await
            .map_err(EngineError::vmm(slot.id))?;
        stopwatch.lap("spawn");
        let booted = async {
            hypervisor
                .create(&dir, &metadata.spec, &metadata.generation)
                .await?;
            hypervisor.boot(&dir).await?;
            hypervisor.version().await
        };
        let version = self.or_stop(slot.id, &dir, hypervisor, &process, booted).await?;
        stopwatch.lap("boot");
        let record = vmm_record(&process, version, EpochKind::Boot, console_offset);
        let metadata = Metadata {
            memory_mode: None,
            memory_mode_reason: None,
            ..metadata
        };
        self.take_on(slot, process, record, metadata, durability).await?;
        stopwatch.lap("record");
        Ok(())
    }

    /// Ends the VM, or throws a snapshot away: whatever there is, the instance is stopped after it.
    pub(crate) async fn shut_down(
        &self,
        slot: &Arc<Slot>,
        metadata: Metadata,
        state: State,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        if state == State::Running && self.power_off(slot, &metadata).await {
            stopwatch.lap("power_off");
        }
        let metadata = self.end_vmm(slot, metadata, Durability::Renamed).await?;
        if metadata.is_template {
            self.demote_now(slot, &metadata, stopwatch).await?;
        }
        let id = slot.id;
        self.on_disk(move |store| store.discard_snapshot(&id)).await?;
        stopwatch.lap("stop");
        Ok(())
    }

    /// Brings a VMM up in `dir` with the snapshot's VM in it, paused, as this machine.
    pub(crate) async fn bring_back(
        &self,
        dir: &InstanceDir,
        machine: &Machine<'_>,
        source: &SnapshotSource,
        hot_pages: &HotPagesUse,
        stopwatch: &mut Stopwatch,
    ) -> Result<BroughtBack, EngineError> {
        let id = machine.id;
        let hypervisor = self.hypervisor(machine.hypervisor)?;
        if let Some(made_on) = &source.manifest.host_cpu
            && !made_on.can_go_on_on(host_cpu())
        {
            return Err(EngineError::OtherCpu {
                id,
                made_on: made_on.to_string(),
                here: host_cpu().to_string(),
            });
        }
        let here = hypervisor.version().await.map_err(EngineError::vmm(id))?;
        let made_by = &source.manifest.hypervisor_version;
        if here != *made_by {
            return Err(EngineError::OtherVersion {
                id,
                made_by: made_by.clone(),
                here,
            });
        }
        let console_offset = size_of(&dir.console_log());
        let (memory_mode, hot_pages) = match hot_pages {
            HotPagesUse::Nothing => (machine.memory_mode, HotPages::Unused),
            HotPagesUse::Prefetch(list) => (machine.memory_mode, HotPages::Prefetch(list)),
            // Only userfaultfd sees what a guest touches. It is this VMM's affair: the instance keeps its own mode.
            HotPagesUse::Record(_) => (MemoryMode::Uffd, HotPages::Record),
        };
        let restore = Restore {
            snapshot: &source.dir,
            memory_mode,
            // Also when it wakes by itself: a fork that began on standby has its source's identity in its snapshot.
            generation: machine.generation,
            memory_generation: &source.manifest.memory_generation,
            hot_pages,
        };
        let process = hypervisor
            .spawn(dir, Start::Restore(&restore))
            .await
            .map_err(EngineError::vmm(id))?;
        stopwatch.lap("spawn");
        // Whoever waits for it may go.
        let guard = process.clone().kill_on_drop();
        let restored = self
            .or_stop(id, dir, hypervisor, &process, hypervisor.restore(dir, &restore))
            .await?;
        guard.keep();
        stopwatch.lap("restore");
        if let Some(reason) = &restored.reason {
            tracing::warn!(instance = %id, asked = %memory_mode, done = %restored.memory_mode, reason, "not the memory mode that was asked for");
        }
        let memory = match restore.hot_pages {
            HotPages::Record => Restored::as_asked(machine.memory_mode),
            _ => restored,
        };
        let record = vmm_record(&process, here, machine.began, console_offset);
        Ok(BroughtBack {
            process,
            record,
            memory,
        })
    }

    /// Does the first calls to a new VMM; if one fails, the VMM does not stay.
    async fn or_stop<T>(
        &self,
        id: InstanceId,
        dir: &InstanceDir,
        hypervisor: &Arc<dyn Hypervisor>,
        process: &VmmProcess,
        calls: impl Future<Output = Result<T, VmmError>>,
    ) -> Result<T, EngineError> {
        match process.during(calls).await {
            Ok(done) => Ok(done),
            Err(source) => {
                self.stop_failed(id, dir, hypervisor, process).await;
                Err(EngineError::Vmm { id, source })
            }
        }
    }

    /// Stops the VMM of an operation that failed; the operation's error is the one to tell.
    pub(crate) async fn stop_failed(
        &self,
        id: InstanceId,
        dir: &InstanceDir,
        hypervisor: &Arc<dyn Hypervisor>,
        process: &VmmProcess,
    ) {
        if let Err(error) = hypervisor.stop(dir, process).await {
            self.inner.registry.lose_vmm();
            tracing::error!(instance = %id, error = error_chain(&error), "a VMM that failed could not be stopped");
        }
    }

    /// Asks something of the instance's VMM; if the VMM dies over it, the error says how.
    pub(crate) async fn ask<T>(
        &self,
        slot: &Slot,
        call: impl Future<Output = Result<T, VmmError>>,
    ) -> Result<T, EngineError> {
        let answer = match slot.vmm() {
            Some(running) => running.process.during(call).await,
            None => call.await,
        };
        answer.map_err(EngineError::vmm(slot.id))
    }

    /// Gives the instance its new VMM, also on disk. One that cannot be recorded does not stay: nobody would find it again.
    pub(crate) async fn take_on(
        &self,
        slot: &Arc<Slot>,
        process: VmmProcess,
        record: VmmRecord,
        metadata: Metadata,
        durability: Durability,
    ) -> Result<Metadata, EngineError> {
        self.adopt(slot, process.clone(), &record, &metadata, false, None);
        let metadata = Metadata {
            vmm: Some(record),
            ..metadata
        };
        if let Err(failed) = self.rewrite(&metadata, durability).await {
            slot.set_vmm(None);
            let hypervisor = self.hypervisor(&metadata.spec.hypervisor)?;
            self.stop_failed(slot.id, &self.dir(&slot.id), hypervisor, &process)
                .await;
            return Err(failed);
        }
        Ok(metadata)
    }

    /// The VMM belongs to the instance from now on: its guest's agent is told who the guest is, and its end will be noticed
    /// and told. A guest that `is_new` runs, and has not been told who it is; the time that it is told is right for a guest that
    /// runs only. `agent` leads to its agent, if somebody has connected already.
    pub(crate) fn adopt(
        &self,
        slot: &Arc<Slot>,
        process: VmmProcess,
        record: &VmmRecord,
        metadata: &Metadata,
        is_new: bool,
        agent: Option<UnixStream>,
    ) {
        let spec = &metadata.spec;
        // VMs of a hypervisor that this server does not offer go on running without it.
        let hypervisor = self.hypervisor(&spec.hypervisor).ok();
        let has_port = hypervisor.filter(|hypervisor| hypervisor.capabilities().agent);
        let agent = has_port.map(|hypervisor| {
            let identity = Identity {
                epoch: record.epoch.id,
                host_name: metadata.name.to_string(),
                generation: metadata.generation,
            };
            let dir = self.dir(&slot.id);
            AgentLink::begin(
                slot,
                Arc::clone(hypervisor),
                dir,
                process.clone(),
                identity,
                is_new,
                agent,
            )
        });
        slot.set_vmm(Some(Arc::new(RunningVmm::new(
            process.clone(),
            agent,
            &spec.readiness,
            record.epoch.console_offset,
        ))));
        let slot = Arc::downgrade(slot);
        tokio::spawn(async move {
            let exit = process.exited().await;
            let Some(slot) = slot.upgrade() else { return };
            let asked_for = slot
                .vmm()
                .is_none_or(|vmm| vmm.process.identity() != process.identity());
            if !asked_for {
                tracing::warn!(instance = %slot.id, pid = process.identity().pid, %exit, "a VMM ended by itself");
            }
            slot.tell();
        });
    }

    /// Ends the VMM, if there is one. It is first taken out of the record: a crash in between leaves a VMM that no
    /// record names, which the next server stops, and never an instance whose VMM seems to have failed.
    pub(crate) async fn end_vmm(
        &self,
        slot: &Slot,
        metadata: Metadata,
        durability: Durability,
    ) -> Result<Metadata, EngineError> {
        if metadata.vmm.is_none() {
            return Ok(metadata);
        }
        let metadata = Metadata {
            vmm: None,
            ..metadata
        };
        if let Err(failed) = self.rewrite(&metadata, durability).await {
            // Where only a sync failed, the record names no VMM any more, and there must be none.
            if !self.read(&slot.id).is_ok_and(|found| found.vmm.is_none()) {
                return Err(failed);
            }
            tracing::error!(instance = %slot.id, error = error_chain(&failed), "its record may not survive a power loss");
        }
        self.stop_vmm(slot, &metadata).await?;
        Ok(metadata)
    }

    /// Ends the VMM, if this server knows one.
    pub(crate) async fn stop_vmm(&self, slot: &Slot, metadata: &Metadata) -> Result<(), EngineError> {
        self.stop_vmm_in(slot, metadata, &self.dir(&slot.id)).await
    }

    /// The same, where the instance's files are in `dir` now.
    pub(crate) async fn stop_vmm_in(
        &self,
        slot: &Slot,
        metadata: &Metadata,
        dir: &InstanceDir,
    ) -> Result<(), EngineError> {
        let running = slot.vmm();
        slot.set_vmm(None);
        if let Some(running) = running {
            let stopped = match self.hypervisor(&metadata.spec.hypervisor) {
                Ok(hypervisor) => hypervisor.stop(dir, &running.process).await,
                // This server was started without it, so nobody can ask the VMM; it can be ended all the same.
                Err(_unknown) => running.process.terminate().await.map_err(VmmError::from),
            };
            stopped
                .inspect_err(|_| self.inner.registry.lose_vmm())
                .map_err(EngineError::vmm(slot.id))?;
        }
        Ok(())
    }
}

/// A complete snapshot that a VM can be brought back from.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotSource {
    pub(crate) dir: SnapshotDir,
    pub(crate) manifest: SnapshotManifest,
}

impl SnapshotSource {
    pub(crate) fn of(dir: &InstanceDir, snapshot: &SnapshotFacts) -> Option<Self> {
        match snapshot {
            SnapshotFacts::Complete(manifest) => Some(Self {
                dir: dir.snapshot(),
                manifest: manifest.clone(),
            }),
            SnapshotFacts::Absent | SnapshotFacts::Prepared | SnapshotFacts::Broken { .. } => None,
        }
    }
}

/// A VMM with a snapshot's VM in it, paused.
#[derive(Debug)]
pub(crate) struct BroughtBack {
    pub(crate) process: VmmProcess,
    pub(crate) record: VmmRecord,
    /// How the instance's memory came back.
    pub(crate) memory: Restored,
}

/// Which machine a snapshot becomes, and how.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) id: InstanceId,
    pub(crate) hypervisor: &'a HypervisorName,
    pub(crate) generation: &'a VmGeneration,
    pub(crate) memory_mode: MemoryMode,
    pub(crate) began: EpochKind,
}

/// What the metadata say of a VMM that was just brought up.
fn vmm_record(process: &VmmProcess, version: String, began: EpochKind, console_offset: u64) -> VmmRecord {
    VmmRecord {
        process: process.identity().clone(),
        version,
        started_at: jiff::Timestamp::now(),
        epoch: Epoch {
            id: EpochId::random(),
            began,
            console_offset,
        },
        other: serde_json::Map::new(),
    }
}

/// A file's size in bytes; 0 if it is not there.
fn size_of(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}
