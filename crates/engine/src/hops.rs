//! The hops that operations are made of: a VMM is brought up, its VM written to disk, its process ended, and the metadata
//! rewritten in the order that a crash forgives.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use stencil_core::{
    Durability, Epoch, EpochKind, InstanceDir, InstanceId, MemoryGeneration, MemoryMode, Metadata,
    SnapshotDir, SnapshotFacts, SnapshotManifest, State, VmGeneration, VmSpec, VmmRecord,
};
use stencil_vmm::{Hypervisor, Restore, VmmError, VmmProcess};
use tokio::sync::{OwnedRwLockWriteGuard, SemaphorePermit};

use crate::admission::check_boot_files;
use crate::changes::Changes;
use crate::console::ReadyScan;
use crate::instance::Stopwatch;
use crate::observe::chain;
use crate::registry::{RunningVmm, Slot};
use crate::{Engine, EngineError};

/// How long restore and fork wait for the guest to say that it is ready before they answer with `Initializing`.
const READY_WAIT: Duration = Duration::from_secs(10);

/// How the memory of an instance that wakes from its own standby comes back.
const OWN_RESTORE_MODE: MemoryMode = MemoryMode::Cow;

impl Engine {
    /// Takes the instance's lock for a change; fails if it was deleted while waiting for it.
    pub(crate) async fn exclusive(&self, slot: &Arc<Slot>) -> Result<OwnedRwLockWriteGuard<()>, EngineError> {
        let guard = Arc::clone(&slot.lock).write_owned().await;
        if self.inner.registry.holds(slot) {
            Ok(guard)
        } else {
            Err(EngineError::NotFound(slot.id.to_string()))
        }
    }

    /// Boots the VM on a VMM of its own; one that is there with the guest down is replaced.
    pub(crate) async fn boot(
        &self,
        slot: &Arc<Slot>,
        metadata: Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        check_boot_files(&metadata.spec)?;
        let metadata = self.end_vmm(slot, metadata).await?;
        let dir = self.dir(&slot.id);
        let hypervisor = self.hypervisor(&metadata.spec.hypervisor)?;
        let _permit = self.bring_up_permit().await;
        let console_offset = size_of(&dir.console_log());
        let process = hypervisor.spawn(&dir).await.map_err(EngineError::vmm(slot.id))?;
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
        self.adopt(slot, process, &record, &metadata.spec);
        self.rewrite(
            &Metadata {
                vmm: Some(record),
                memory_mode: None,
                ..metadata
            },
            Durability::Renamed,
        )?;
        stopwatch.lap("record");
        Ok(())
    }

    /// Ends the VM, or throws a snapshot away: whatever there is, the instance is stopped after it.
    pub(crate) async fn shut_down(
        &self,
        slot: &Arc<Slot>,
        metadata: Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        let metadata = self.end_vmm(slot, metadata).await?;
        if metadata.is_template {
            self.demote_now(&metadata, stopwatch).await?;
        }
        let id = slot.id;
        self.on_disk(move |store| store.discard_snapshot(&id)).await?;
        stopwatch.lap("stop");
        Ok(())
    }

    pub(crate) async fn pause_vm(
        &self,
        slot: &Slot,
        metadata: &Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        let hypervisor = self.hypervisor(&metadata.spec.hypervisor)?;
        hypervisor
            .pause(&self.dir(&slot.id))
            .await
            .map_err(EngineError::vmm(slot.id))?;
        stopwatch.lap("pause");
        Ok(())
    }

    /// Lets the vCPUs go on. A snapshot that was taken before is out of date from here on and goes first: the VM's
    /// disks and connections move on without it.
    pub(crate) async fn resume_vm(
        &self,
        slot: &Slot,
        metadata: &Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        self.inner.store.discard_snapshot(&slot.id)?;
        let hypervisor = self.hypervisor(&metadata.spec.hypervisor)?;
        hypervisor
            .resume(&self.dir(&slot.id))
            .await
            .map_err(EngineError::vmm(slot.id))?;
        stopwatch.lap("resume");
        Ok(())
    }

    /// Writes a running or paused VM to disk and ends its VMM. If the snapshot fails, the VM is as it was.
    pub(crate) async fn suspend(
        &self,
        slot: &Arc<Slot>,
        metadata: Metadata,
        state: State,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        if state == State::Running {
            self.pause_vm(slot, &metadata, stopwatch).await?;
        }
        if let Err(failed) = self.write_snapshot(slot, &metadata, stopwatch).await {
            if state == State::Running {
                self.resume_vm(slot, &metadata, stopwatch).await?;
            }
            return Err(failed);
        }
        self.end_vmm(slot, metadata).await?;
        stopwatch.lap("stop");
        Ok(())
    }

    async fn write_snapshot(
        &self,
        slot: &Slot,
        metadata: &Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        let hypervisor = self.hypervisor(&metadata.spec.hypervisor)?;
        let hypervisor_version = hypervisor.version().await.map_err(EngineError::vmm(slot.id))?;
        let dir = self.dir(&slot.id);
        let snapshot = dir.snapshot();
        // What an earlier attempt left is in the way: a snapshot is written into an empty directory.
        self.inner.store.discard_snapshot(&slot.id)?;
        std::fs::create_dir(snapshot.path()).map_err(EngineError::io("make", snapshot.path()))?;
        hypervisor
            .snapshot(&dir, &snapshot)
            .await
            .map_err(EngineError::vmm(slot.id))?;
        stopwatch.lap("snapshot");
        let manifest = SnapshotManifest {
            schema: SnapshotManifest::SCHEMA,
            created_at: jiff::Timestamp::now(),
            hypervisor: metadata.spec.hypervisor.clone(),
            hypervisor_version,
            memory_generation: MemoryGeneration::random(),
            memory_bytes: metadata.spec.memory_bytes,
            files: SnapshotManifest::REQUIRED
                .iter()
                .map(|name| Ok(((*name).to_owned(), file_size(&snapshot.path().join(name))?)))
                .collect::<Result<_, EngineError>>()?,
            other: serde_json::Map::new(),
        };
        self.on_disk(move |store| store.complete_snapshot(&snapshot, &manifest))
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
        let permit = self.bring_up_permit().await;
        let console_offset = size_of(&dir.console_log());
        let (process, version) = self
            .bring_back(
                slot.id,
                &dir,
                &metadata.spec,
                &source,
                OWN_RESTORE_MODE,
                None,
                stopwatch,
            )
            .await?;
        let record = vmm_record(&process, version, EpochKind::Restore, console_offset);
        self.adopt(slot, process, &record, &metadata.spec);
        let metadata = Metadata {
            vmm: Some(record),
            memory_mode: Some(OWN_RESTORE_MODE),
            ..metadata
        };
        self.rewrite(&metadata, Durability::Renamed)?;
        stopwatch.lap("record");
        let changes = Changes::of(slot, &dir)?;
        self.resume_vm(slot, &metadata, stopwatch).await?;
        drop(permit);
        self.until_ready(slot, changes).await?;
        stopwatch.lap("ready");
        Ok(())
    }

    /// Brings a VMM up in `dir` with the snapshot's VM in it, paused. `generation` makes it another machine: a fork.
    #[expect(
        clippy::too_many_arguments,
        reason = "what a restore is made of; each is used here"
    )]
    pub(crate) async fn bring_back(
        &self,
        id: InstanceId,
        dir: &InstanceDir,
        spec: &VmSpec,
        source: &SnapshotSource,
        memory_mode: MemoryMode,
        generation: Option<&VmGeneration>,
        stopwatch: &mut Stopwatch,
    ) -> Result<(VmmProcess, String), EngineError> {
        let hypervisor = self.hypervisor(&spec.hypervisor)?;
        let version = hypervisor.version().await.map_err(EngineError::vmm(id))?;
        if version != source.manifest.hypervisor_version {
            return Err(EngineError::OtherVersion {
                id,
                made_by: source.manifest.hypervisor_version.clone(),
                here: version,
            });
        }
        let process = hypervisor.spawn(dir).await.map_err(EngineError::vmm(id))?;
        stopwatch.lap("spawn");
        let restore = Restore {
            snapshot: &source.dir,
            memory_mode,
            generation,
        };
        self.or_stop(id, dir, hypervisor, &process, hypervisor.restore(dir, &restore))
            .await?;
        stopwatch.lap("restore");
        Ok((process, version))
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
            tracing::error!(instance = %id, error = chain(&error), "a VMM that failed could not be stopped");
        }
    }

    /// The VMM belongs to the instance from now on: its end will be noticed and told.
    pub(crate) fn adopt(&self, slot: &Arc<Slot>, process: VmmProcess, record: &VmmRecord, spec: &VmSpec) {
        let ready = ReadyScan::new(&spec.readiness, record.epoch.console_offset);
        slot.set_vmm(Some(Arc::new(RunningVmm {
            process: process.clone(),
            ready: Mutex::new(ready),
        })));
        let slot = Arc::clone(slot);
        tokio::spawn(async move {
            let exit = process.exited().await;
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
    pub(crate) async fn end_vmm(&self, slot: &Slot, metadata: Metadata) -> Result<Metadata, EngineError> {
        if metadata.vmm.is_none() {
            return Ok(metadata);
        }
        let metadata = Metadata {
            vmm: None,
            ..metadata
        };
        let running = slot.vmm();
        self.rewrite(&metadata, Durability::Renamed)?;
        slot.set_vmm(None);
        if let Some(running) = running {
            let hypervisor = self.hypervisor(&metadata.spec.hypervisor)?;
            hypervisor
                .stop(&self.dir(&slot.id), &running.process)
                .await
                .map_err(EngineError::vmm(slot.id))?;
        }
        Ok(metadata)
    }

    /// Waits until the guest has said that it is ready, its VM is down, or [`READY_WAIT`] has passed.
    pub(crate) async fn until_ready(&self, slot: &Slot, mut changes: Changes) -> Result<(), EngineError> {
        let log = self.dir(&slot.id).console_log();
        let deadline = tokio::time::Instant::now() + READY_WAIT;
        while slot.vmm().is_some_and(|running| !running.is_ready(&log))
            && self.observe(slot).await?.state() == State::Initializing
            && tokio::time::timeout_at(deadline, changes.next()).await.is_ok()
        {}
        Ok(())
    }

    pub(crate) fn rewrite(&self, metadata: &Metadata, durability: Durability) -> Result<(), EngineError> {
        Ok(self.inner.store.write(metadata, durability)?)
    }

    /// Waits for a turn to bring a VMM up.
    pub(crate) async fn bring_up_permit(&self) -> SemaphorePermit<'_> {
        // The semaphore is never closed.
        #[expect(clippy::expect_used, reason = "only a closed semaphore refuses")]
        self.inner
            .bring_up
            .acquire()
            .await
            .expect("the semaphore is open")
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
            SnapshotFacts::Absent | SnapshotFacts::Broken { .. } => None,
        }
    }
}

/// What the metadata say of a VMM that was just brought up.
pub(crate) fn vmm_record(
    process: &VmmProcess,
    version: String,
    began: EpochKind,
    console_offset: u64,
) -> VmmRecord {
    VmmRecord {
        process: process.identity().clone(),
        version,
        started_at: jiff::Timestamp::now(),
        epoch: Epoch {
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

/// The size in bytes of a file that must be there.
fn file_size(path: &Path) -> Result<u64, EngineError> {
    Ok(std::fs::metadata(path)
        .map_err(EngineError::io("read", path))?
        .len())
}
