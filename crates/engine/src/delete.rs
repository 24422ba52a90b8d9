//! Deleting an instance.

use std::path::Path;
use std::sync::Arc;

use stencil_core::rules::{self, Decision, LiveFork, Operation};
use stencil_core::{InstanceDir, InstanceId, Metadata, State, StoreError, error_chain};
use stencil_vmm::{StrayProcess, stray_processes};

use crate::registry::{Reservation, Slot};
use crate::{Engine, EngineError};

impl Engine {
    /// Ends the VM and removes everything of the instance.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`] for a template with live forks; [`EngineError::Store`] if those of a template cannot be counted, or
    /// what is on disk cannot be removed.
    pub async fn delete(&self, reference: &str) -> Result<(), EngineError> {
        let slot = self.inner.registry.find(reference)?;
        let engine = self.clone();
        crate::lifecycle::detached(async move {
            let _guard = engine.exclusive(&slot).await?;
            let (state, forks) = match engine.observe(&slot).await {
                Ok(seen) => {
                    let forks = engine.forks_that_hold(&slot, seen.metadata.is_template).await?;
                    (seen.state(), forks)
                }
                // What it was cannot be read. Its own id suffices to delete it, unless a record that can be read needs it.
                Err(EngineError::Store(StoreError::Unreadable { .. })) => {
                    let id = slot.id;
                    let forks = engine.on_disk(move |store| store.known_forks(&id)).await?;
                    (State::Unknown, forks)
                }
                Err(error) => return Err(error),
            };
            match rules::decide(Operation::Delete, state, &forks)? {
                Decision::Act | Decision::AlreadyThere => engine.discard(&slot).await,
            }
        })
        .await
    }

    /// The forks that keep an instance from being deleted. A record that says that it is no template, and of which there are forks
    /// all the same, was changed by somebody else: the forks count.
    async fn forks_that_hold(&self, slot: &Slot, is_template: bool) -> Result<Vec<LiveFork>, EngineError> {
        if is_template || self.inner.registry.has_forks(&slot.id) {
            self.live_forks(slot).await
        } else {
            Ok(Vec::new())
        }
    }

    /// Ends the VM, if any, and removes the instance from disk and from the registry. The caller has its lock.
    pub(crate) async fn discard(&self, slot: &Arc<Slot>) -> Result<(), EngineError> {
        self.discard_but_name(slot).await.map(drop)
    }

    /// The same, but nobody else can take its name, if it has one, before the reservation is dropped.
    pub(crate) async fn discard_but_name(
        &self,
        slot: &Arc<Slot>,
    ) -> Result<Option<Reservation>, EngineError> {
        let id = slot.id;
        let record = self.read(&id);
        // That it goes is recorded first: where it cannot be, its VMM stays. If the server dies after it, the next one ends the VMM.
        let dir = self.on_disk(move |store| store.begin_removal(&id)).await?;
        self.disarm(slot).await;
        if let Err(failed) = self.end_vmms(slot, record.as_ref().ok(), &dir).await {
            if let Err(error) = self.on_disk(move |store| store.undo_removal(&id)).await {
                tracing::error!(instance = %id, error = error_chain(&error), "an instance cannot be brought back whose VMM cannot be ended");
            }
            self.refill(slot);
            return Err(failed);
        }
        if let Err(error) = self.on_disk(move |store| store.finish_removal(&id)).await {
            tracing::error!(instance = %id, error = error_chain(&error), "files of a deleted instance stay until the next start");
        }
        Ok(self.inner.registry.remove(slot))
    }

    /// Ends the VMM of an instance whose files lie in `dir` now, and any other that works there.
    async fn end_vmms(
        &self,
        slot: &Slot,
        record: Option<&Metadata>,
        dir: &InstanceDir,
    ) -> Result<(), EngineError> {
        // Where the record tells the VMM, its end is proved. Else only the host knows it, and asking the host costs a look
        // at each of its processes.
        let only_host_knows = record.is_none() || self.inner.registry.may_have_lost_vmm(slot);
        if let Some(metadata) = record {
            let running = slot.vmm();
            // One that cannot be ended is still its VMM.
            self.stop_vmm_in(slot, metadata, dir)
                .await
                .inspect_err(|_| slot.set_vmm(running))?;
        }
        slot.set_vmm(None);
        if only_host_knows {
            let (id, dir) = (slot.id, dir.clone());
            let strays = self.with_files(move |_| strays_below(&id, dir.path())).await?;
            for stray in &strays {
                self.end_stray(stray)
                    .await
                    .map_err(|error| EngineError::vmm(id)(error.into()))?;
            }
        }
        Ok(())
    }
}

/// The VMMs that work in an instance's directory. Nobody knows whether there are any where they cannot be looked for.
fn strays_below(id: &InstanceId, dir: &Path) -> Result<Vec<StrayProcess>, EngineError> {
    stray_processes(dir).map_err(|error| EngineError::vmm(*id)(error.into()))
}
