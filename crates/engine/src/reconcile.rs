//! What the engine does when it opens: finds its instances and their VMMs again, and sweeps what a crash left behind.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::future::join_all;
use stencil_core::{InstanceId, Metadata, ProcessIdentity, VmSpec, error_chain};
use stencil_vmm::{VmmProcess, stray_processes};

use crate::registry::Slot;
use crate::{Engine, EngineError};

impl Engine {
    /// Returns the templates.
    pub(crate) async fn reconcile(&self) -> Result<Vec<Arc<Slot>>, EngineError> {
        let (mut recorded, mut templates) = (HashSet::new(), Vec::new());
        let (mut prepared, mut unneeded) = (Vec::new(), Vec::new());
        for found in self.on_disk(stencil_core::Store::scan).await? {
            match found.metadata {
                Ok(metadata) => {
                    recorded.extend(metadata.vmm.as_ref().map(|record| record.process.clone()));
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
        // A VMM that no record names belongs to an operation that did not end: the instance is as it was before it.
        let mut strays = stray_processes(&self.inner.store.data().instances());
        strays.retain(|process| !recorded.contains(process));
        if !strays.is_empty() {
            tracing::warn!(
                vmms = strays.len(),
                "stopping VMMs that interrupted operations left behind"
            );
        }
        join_all(strays.iter().map(|process| self.end_stray(process))).await;
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
        join_all(unneeded.into_iter().map(|fork| self.delete_unneeded(fork))).await;
        templates.retain(|template| self.inner.registry.holds(template));
        Ok(templates)
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
        let Some(record) = &metadata.vmm else { return slot };
        match VmmProcess::attach(&record.process) {
            Ok(Some(process)) => {
                tracing::info!(instance = %slot.id, pid = record.process.pid, "found a running VMM again");
                self.adopt(&slot, process, record, &metadata, false, None);
            }
            Ok(None) => {
                tracing::warn!(instance = %slot.id, pid = record.process.pid, "its VMM ended while no server watched it");
            }
            Err(error) => {
                self.inner.registry.lose_vmm();
                tracing::error!(instance = %slot.id, pid = record.process.pid, error = error_chain(&error), "cannot tell whether its VMM runs");
            }
        }
        slot
    }

    /// Ends a VMM that belongs to no instance any more.
    pub(crate) async fn end_stray(&self, identity: &ProcessIdentity) {
        let ended = match VmmProcess::attach(identity) {
            Ok(Some(process)) => process.terminate().await.map(drop),
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            self.inner.registry.lose_vmm();
            tracing::error!(
                pid = identity.pid,
                error = error_chain(&error),
                "a VMM that was left behind could not be ended"
            );
        }
    }
}
