//! Hot pages: the pages that a template's forks touch first. One fork records them; they are there before the first
//! instruction of each later one.
//!
//! The list on disk is the truth. One that is damaged, or of another memory, counts as none: that is said, and the next
//! fork records anew. A recording that this host does not let a VMM make never costs a fork.

use std::sync::Arc;

use futures_util::future::join_all;
use stencil_core::rules::{self, ForkPlan};
use stencil_core::{Durability, InstanceId, MemoryGeneration, MemoryMode, SnapshotFacts, error_chain};

use crate::bring_up::SnapshotSource;
use crate::fork_base::ForkBase;
use crate::hot_list::{Claim, HotPagesUse};
use crate::lifecycle::Change;
use crate::registry::Slot;
use crate::{Engine, EngineError, Instance};

impl Engine {
    /// Forgets which pages the forks of a template touch first, so that its next fork records them anew.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`] if it is no template.
    pub async fn record_hot_pages(&self, reference: &str) -> Result<Instance, EngineError> {
        self.change(reference, Change::RecordHotPages).await
    }

    /// Decides for one fork. Of several that begin together one records.
    pub(crate) fn use_of_hot_pages(
        &self,
        base: &ForkBase,
        snapshot: &SnapshotSource,
        fork: InstanceId,
    ) -> Result<HotPagesUse, EngineError> {
        let known = self.known_hot_pages(base, snapshot);
        let hypervisor = self.hypervisor(&base.metadata.spec.hypervisor)?;
        // Only a VMM that serves pages sees which are touched.
        let can_record = hypervisor.capabilities().memory_modes.contains(&MemoryMode::Uffd);
        let is_asked = matches!(known, HotPagesUse::Nothing) && uses_hot_pages(&base.plan);
        let claim = (is_asked && can_record)
            .then(|| base.source.hot_list.claim(fork))
            .flatten();
        Ok(claim.map_or(known, HotPagesUse::Record))
    }

    /// What can be done without recording.
    pub(crate) fn known_hot_pages(&self, base: &ForkBase, snapshot: &SnapshotSource) -> HotPagesUse {
        let path = self.inner.store.data().hot_pages(&base.source.id);
        let memory = &snapshot.manifest.memory_generation;
        if uses_hot_pages(&base.plan) && base.source.hot_list.is_usable(&path, memory) {
            HotPagesUse::Prefetch(path)
        } else {
            HotPagesUse::Nothing
        }
    }

    /// Takes the recording of a fork as its template's when it closes. It is called before the fork runs, and does not wait.
    pub(crate) fn keep_recording(
        &self,
        template: &Arc<Slot>,
        claim: Claim,
        fork: &Arc<Slot>,
        memory: MemoryGeneration,
    ) -> Result<(), EngineError> {
        let dir = self.dir(&fork.id);
        let mut changes = self.changes(fork)?;
        let (template, fork) = (Arc::clone(template), Arc::clone(fork));
        // A task that waits does not keep the data directory in use.
        let engine = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            // Given back when the recording is taken, or its fork is gone.
            let _claim = claim;
            let recorded = loop {
                // Asked before the file is looked for: what a VMM left as it ended is still found.
                let ended = fork
                    .vmm()
                    .is_none_or(|running| running.process.has_exited().is_some());
                if dir.recorded_hot_pages().exists() {
                    break true;
                }
                if ended {
                    break false;
                }
                changes.next().await;
            };
            if let (true, Some(inner)) = (recorded, engine.upgrade())
                && let Err(error) = (Engine { inner })
                    .take_recording(&template, fork.id, memory)
                    .await
            {
                tracing::warn!(instance = %template.id, fork = %fork.id, error = error_chain(&error), "recorded hot pages could not be kept");
            }
        });
        Ok(())
    }

    /// Waits again for the recording that an earlier server waited for: of a fork that still records, or that has left
    /// its list meanwhile.
    pub(crate) async fn find_recording(&self, template: &Arc<Slot>) {
        let SnapshotFacts::Complete(manifest) = self.inner.store.snapshot(&template.id) else {
            return;
        };
        let memory = manifest.memory_generation;
        let list = self.inner.store.data().hot_pages(&template.id);
        if template.hot_list.is_usable(&list, &memory) {
            return;
        }
        // Side by side: a VMM that does not answer takes half a second.
        let forks = self.inner.registry.perhaps_forks(&template.id);
        let recording = join_all(forks.iter().map(|fork| self.records(fork))).await;
        let Some((fork, _)) = forks.iter().zip(recording).find(|(_, records)| *records) else {
            return;
        };
        if let Some(claim) = template.hot_list.claim(fork.id)
            && let Err(failed) = self.keep_recording(template, claim, fork, memory)
        {
            tracing::warn!(instance = %fork.id, error = error_chain(&failed), "the recording of hot pages is not waited for");
        }
    }

    async fn records(&self, fork: &Slot) -> bool {
        let dir = self.dir(&fork.id);
        let Ok(metadata) = self.read(&fork.id) else {
            return false;
        };
        let Ok(hypervisor) = self.hypervisor(&metadata.spec.hypervisor) else {
            return false;
        };
        dir.recorded_hot_pages().exists()
            || fork.vmm().is_some()
                && hypervisor
                    .page_counters(&dir)
                    .await
                    .is_ok_and(|pages| pages.get("recording") == Some(&1))
    }

    async fn take_recording(
        &self,
        template: &Arc<Slot>,
        fork: InstanceId,
        memory: MemoryGeneration,
    ) -> Result<(), EngineError> {
        let _guard = self.exclusive(template).await?;
        let metadata = self.read(&template.id)?;
        let same_memory = matches!(
            self.inner.store.snapshot(&template.id),
            SnapshotFacts::Complete(manifest) if manifest.memory_generation == memory
        );
        if !metadata.is_template || !same_memory {
            return Ok(());
        }
        let (id, dir) = (template.id, self.dir(&fork));
        self.on_disk(move |store| {
            let path = store.keep_hot_pages(&id, &dir)?;
            store.write(&rules::with_hot_pages(&metadata, Some(path)), Durability::Synced)
        })
        .await?;
        tracing::info!(instance = %template.id, %fork, "hot pages recorded");
        self.rearm(template).await;
        template.tell();
        Ok(())
    }
}

/// Whether such a fork has to do with hot pages: in `copy` every page is there in any case, and `ondemand` takes none.
fn uses_hot_pages(plan: &ForkPlan) -> bool {
    plan.fork_of_template.is_some() && matches!(plan.memory_mode, MemoryMode::Cow | MemoryMode::Uffd)
}
