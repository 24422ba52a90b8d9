//! Hot pages: the pages that a template's forks touch first. One fork records them; they are there before the first
//! instruction of each later one.
//!
//! The list on disk is the truth. One that is damaged, or of another memory, counts as none: that is said, and the next
//! fork records anew. A recording that this host does not let a VMM make never costs a fork.

use std::path::PathBuf;
use std::sync::Arc;

use stencil_core::rules::{self, ForkPlan};
use stencil_core::{Durability, InstanceId, MemoryGeneration, MemoryMode, SnapshotFacts, error_chain};

use crate::hot_list::Claim;
use crate::lifecycle::Change;
use crate::registry::Slot;
use crate::{Engine, EngineError, Instance};

/// What a fork does about hot pages.
#[derive(Debug)]
pub(crate) enum HotPagesUse {
    Nothing,
    Prefetch(PathBuf),
    Record(Claim),
}

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
        source: &Slot,
        plan: &ForkPlan,
        memory: &MemoryGeneration,
        fork: InstanceId,
        modes: &[MemoryMode],
    ) -> HotPagesUse {
        let Some(template) = plan.fork_of_template else {
            return HotPagesUse::Nothing;
        };
        if plan.memory_mode == MemoryMode::Copy {
            return HotPagesUse::Nothing;
        }
        let path = self.inner.store.data().hot_pages(&template);
        if source.hot_list.is_usable(&path, memory) {
            return HotPagesUse::Prefetch(path);
        }
        // Only a VMM that serves pages sees which are touched.
        let claim = modes
            .contains(&MemoryMode::Uffd)
            .then(|| source.hot_list.claim(fork))
            .flatten();
        claim.map_or(HotPagesUse::Nothing, HotPagesUse::Record)
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
        template.tell();
        Ok(())
    }
}
