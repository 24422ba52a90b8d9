//! What the engine does when it opens: finds its instances and their VMMs again, and sweeps what a crash left behind.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;

use futures_util::future::join_all;
use stencil_core::{InstanceId, Metadata, ProcessIdentity, Scanned, VmSpec, error_chain};
use stencil_vmm::{Attached, ProcessError, StrayProcess, VmmProcess, stray_processes};

use crate::registry::Slot;
use crate::{Engine, EngineError};

impl Engine {
    /// Returns the templates.
    pub(crate) async fn reconcile(&self) -> Result<Vec<Arc<Slot>>, EngineError> {
        let (mut owners, mut templates) = (Owners::default(), Vec::new());
        let (mut prepared, mut unneeded) = (Vec::new(), Vec::new());
        for found in self.sweep_lost().await? {
            match found.metadata {
                Ok(metadata) => {
                    let vmm = metadata.vmm.as_ref().map(|record| record.process.clone());
                    owners.readable.insert(metadata.id);
                    owners.recorded.extend(vmm.map(|vmm| (metadata.id, vmm)));
                    let is_template = metadata.is_template;
                    unneeded.extend(metadata.delete_after.then_some(metadata.id));
                    let spec = metadata.spec.clone();
                    let slot = self.reattach(metadata);
                    if slot.vmm().is_none() && self.inner.store.is_snapshot_prepared(&slot.id) {
                        prepared.push((slot.id, spec));
                    }
                    templates.extend(is_template.then_some(slot));
                }
                Err(error) => {
                    tracing::error!(instance = %found.id, error = error_chain(&error), "metadata cannot be read");
                    self.inner.registry.add(Slot::unread(found.id));
                }
            }
        }
        for stranger in self.on_disk(stencil_core::Store::strangers).await? {
            tracing::error!(path = %stranger.display(), "this is no instance: forks cannot be counted while it is there");
            self.inner.registry.add_stranger();
        }
        self.sweep_vmms(&owners).await;
        for (id, spec) in prepared {
            self.end_standby(id, spec).await;
        }
        let swept = self
            .on_disk(|store| {
                let leftovers = store.leftovers()?;
                leftovers.iter().try_for_each(|leftover| store.sweep(leftover))?;
                Ok(leftovers.len())
            })
            .await?;
        if swept > 0 {
            tracing::warn!(
                directories = swept,
                "swept what interrupted operations left behind"
            );
        }
        self.on_disk(stencil_core::Store::remember_boot).await?;
        join_all(unneeded.into_iter().map(|fork| self.delete_unneeded(fork))).await;
        templates.retain(|template| self.inner.registry.holds(template));
        Ok(templates)
    }

    /// Finds all instances, and removes those of which the last boot of the host left nothing.
    async fn sweep_lost(&self) -> Result<Vec<Scanned>, EngineError> {
        self.on_disk(|store| {
            let mut scanned = store.scan()?;
            let lost: BTreeSet<InstanceId> = store.lost_with_the_host(&scanned).into_iter().collect();
            for id in &lost {
                store.remove(id)?;
            }
            if !lost.is_empty() {
                tracing::warn!(
                    forks = lost.len(),
                    "removed forks that ran when the host went down: nothing was left of them but their names"
                );
            }
            scanned.retain(|found| !lost.contains(&found.id));
            Ok(scanned)
        })
        .await
    }

    /// Ends the VMMs of operations that did not end: their instances are as they were before.
    async fn sweep_vmms(&self, owners: &Owners) {
        let instances = self.inner.store.data().instances();
        let found = match stray_processes(&instances) {
            Ok(found) => found,
            Err(error) => {
                self.inner.registry.lose_vmm();
                tracing::error!(
                    error = error_chain(&error),
                    "cannot look for VMMs that were left behind"
                );
                return;
            }
        };
        let mut left_behind = Vec::new();
        for process in found {
            match owners.of(&process) {
                Owner::Recorded => {}
                Owner::Nobody => left_behind.push(process),
                Owner::CannotTell => tracing::warn!(
                    pid = process.identity.pid,
                    directory = %process.directory.display(),
                    "leaving a VMM alone, because the record of its instance cannot be read; deleting the instance ends it"
                ),
            }
        }
        if !left_behind.is_empty() {
            tracing::warn!(
                vmms = left_behind.len(),
                "stopping VMMs that interrupted operations left behind"
            );
        }
        let ended = left_behind.iter().map(|process| self.end_stray(process));
        for (process, ended) in left_behind.iter().zip(join_all(ended).await) {
            if let Err(error) = ended {
                tracing::error!(
                    pid = process.identity.pid,
                    error = error_chain(&error),
                    "a VMM that was left behind could not be ended"
                );
            }
        }
    }

    /// Deletes a fork that was to go after its work, which ended with the server that it was for.
    async fn delete_unneeded(&self, fork: InstanceId) {
        match self.delete(&fork.to_string()).await {
            Ok(()) => {
                tracing::warn!(instance = %fork, "deleted a fork whose work ended with the server before");
            }
            // As one that became a template meanwhile, and has forks of its own.
            Err(error) => {
                tracing::error!(instance = %fork, error = error_chain(&error), "a fork could not be deleted whose work ended with the server before");
            }
        }
    }

    /// Ends a standby that was interrupted when nothing was left to do but to close its disks: its VM has not run since, and the
    /// host has not booted anew.
    async fn end_standby(&self, id: InstanceId, spec: VmSpec) {
        if self.inner.registry.has_lost_a_vmm() {
            tracing::error!(instance = %id, "its standby cannot be ended: it is not certain that its VMM has closed its disks");
            return;
        }
        match self.finish_standby(id, spec).await {
            Ok(()) => tracing::warn!(instance = %id, "ended its standby, which was interrupted"),
            Err(error) => {
                tracing::error!(instance = %id, error = error_chain(&error), "its standby was interrupted and could not be ended");
            }
        }
    }

    fn reattach(&self, metadata: Metadata) -> Arc<Slot> {
        let slot = self.inner.registry.add(Slot::of(&metadata));
        self.take_up(&slot, &metadata);
        slot
    }

    /// Watches the VMM that the record names, if that runs in the instance's directory.
    fn take_up(&self, slot: &Arc<Slot>, metadata: &Metadata) {
        let Some(record) = &metadata.vmm else { return };
        let pid = record.process.pid;
        match VmmProcess::attach_in(&record.process, self.dir(&slot.id).path()) {
            Ok(Attached::Here(process)) => {
                tracing::info!(instance = %slot.id, pid, "found a running VMM again");
                self.adopt(slot, process, record, metadata, false, None);
            }
            Ok(Attached::Gone) => {
                tracing::warn!(instance = %slot.id, pid, "its VMM ended while no server watched it");
            }
            Ok(Attached::Elsewhere) => {
                tracing::warn!(instance = %slot.id, pid, "its VMM runs for the data directory that this one is a copy of");
            }
            Err(error) => {
                self.inner.registry.lose_vmm();
                tracing::error!(instance = %slot.id, pid, error = error_chain(&error), "cannot tell whether its VMM runs");
            }
        }
    }

    /// Takes an instance up again whose record could not be read before and now can, with the VMM that ran on meanwhile.
    pub(crate) fn mend(&self, slot: &Slot, metadata: &Metadata) -> Result<(), EngineError> {
        if slot.name().is_some() {
            return Ok(());
        }
        let take_up = |slot: Arc<Slot>| self.take_up(&slot, metadata);
        self.inner.registry.mend(slot, metadata, take_up)
    }

    /// Ends a VMM that belongs to no instance any more.
    pub(crate) async fn end_stray(&self, stray: &StrayProcess) -> Result<(), ProcessError> {
        let ended = match VmmProcess::attach(&stray.identity) {
            Ok(Some(process)) => process.terminate().await.map(drop),
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        ended.inspect_err(|_| self.inner.registry.lose_vmm())
    }
}

/// Which instances' records could be read, and which VMMs they name.
#[derive(Debug, Default)]
struct Owners {
    readable: HashSet<InstanceId>,
    recorded: HashSet<(InstanceId, ProcessIdentity)>,
}

/// Whose a VMM is that was found by its working directory.
#[derive(Debug, PartialEq, Eq)]
enum Owner {
    /// The instance's in whose directory it works, whose record names it.
    Recorded,
    /// Nobody's: no instance has that directory, or the instance's record names no such VMM.
    Nobody,
    /// The record of the instance in whose directory it works could not be read.
    CannotTell,
}

impl Owners {
    fn of(&self, process: &StrayProcess) -> Owner {
        let name = process.directory.file_name();
        let id = name.and_then(|name| name.to_str()?.parse::<InstanceId>().ok());
        match id {
            Some(id) if self.recorded.contains(&(id, process.identity.clone())) => Owner::Recorded,
            Some(id) if self.readable.contains(&id) => Owner::Nobody,
            Some(_) => Owner::CannotTell,
            None if is_abandoned(&process.directory) => Owner::Nobody,
            None => Owner::CannotTell,
        }
    }
}

/// Whether a directory is one that an interrupted operation left, or is gone.
fn is_abandoned(directory: &Path) -> bool {
    let is_leftover = directory
        .file_name()
        .and_then(|name| name.to_str())
        .is_some_and(stencil_core::layout::is_leftover_name);
    is_leftover || !directory.exists()
}
