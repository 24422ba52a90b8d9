//! Hot pages: the pages that a template's forks touch first. One fork records them; they are there before the first
//! instruction of each later one.
//!
//! The list on disk is the truth. One that is damaged, or of another memory, counts as none: that is said, and the next
//! fork records anew. A recording that this host does not let a VMM make never costs a fork.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use stencil_core::rules::{self, ForkPlan};
use stencil_core::{Durability, InstanceId, MemoryGeneration, MemoryMode, SnapshotFacts, error_chain};
use stencil_uffd::HotPages;

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

/// The right of one fork to record for its template; given back when dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    template: Arc<Slot>,
    fork: InstanceId,
}

impl Claim {
    /// It was tried, and cannot be done on this host: no fork tries again.
    pub(crate) fn give_up(self) {
        self.template.hot_list.known().recorder = Recorder::Impossible;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut known = self.template.hot_list.known();
        if matches!(known.recorder, Recorder::Fork(recorder) if recorder == self.fork) {
            known.recorder = Recorder::Nobody;
        }
    }
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
        source: &Arc<Slot>,
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
            HotPagesUse::Prefetch(path)
        } else if modes.contains(&MemoryMode::Uffd) && source.hot_list.claim(fork) {
            HotPagesUse::Record(Claim {
                template: Arc::clone(source),
                fork,
            })
        } else {
            HotPagesUse::Nothing
        }
    }

    /// Takes the recording of a fork as its template's when it closes. It is called before the fork runs, and does not wait.
    pub(crate) fn keep_recording(
        &self,
        claim: Claim,
        fork: &Arc<Slot>,
        memory: MemoryGeneration,
    ) -> Result<(), EngineError> {
        let dir = self.dir(&fork.id);
        let mut changes = self.changes(fork)?;
        let fork = Arc::clone(fork);
        // A task that waits does not keep the data directory in use.
        let engine = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
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
                && let Err(error) = (Engine { inner }).take_recording(&claim, memory).await
            {
                tracing::warn!(instance = %claim.template.id, fork = %fork.id, error = error_chain(&error), "recorded hot pages could not be kept");
            }
        });
        Ok(())
    }

    async fn take_recording(&self, claim: &Claim, memory: MemoryGeneration) -> Result<(), EngineError> {
        let Claim { template, fork } = claim;
        let _guard = self.exclusive(template).await?;
        let metadata = self.read(&template.id)?;
        let same_memory = matches!(
            self.inner.store.snapshot(&template.id),
            SnapshotFacts::Complete(manifest) if manifest.memory_generation == memory
        );
        if !metadata.is_template || !same_memory {
            return Ok(());
        }
        let (id, dir) = (template.id, self.dir(fork));
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

/// What the server knows of a template's list while it runs.
#[derive(Debug, Default)]
pub(crate) struct HotList(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// The file that was looked into last, and whether it can be used: it is looked into once.
    looked_into: Option<(Stamp, bool)>,
    recorder: Recorder,
}

#[derive(Debug, Default)]
enum Recorder {
    #[default]
    Nobody,
    Fork(InstanceId),
    /// This host does not let a VMM record.
    Impossible,
}

/// Tells one file from another of the same name.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    length: u64,
    modified: Option<SystemTime>,
}

impl HotList {
    fn is_usable(&self, path: &Path, memory: &MemoryGeneration) -> bool {
        let Ok(found) = fs::metadata(path) else {
            return false;
        };
        let stamp = Stamp {
            inode: found.ino(),
            length: found.len(),
            modified: found.modified().ok(),
        };
        let mut known = self.known();
        if let Some((looked_into, usable)) = &known.looked_into
            && *looked_into == stamp
        {
            return *usable;
        }
        let usable = match HotPages::load(path, *memory) {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!(path = %path.display(), error = error_chain(&error), "hot pages cannot be used; they are recorded anew");
                false
            }
        };
        known.looked_into = Some((stamp, usable));
        usable
    }

    /// Whether this fork is the one that records.
    fn claim(&self, fork: InstanceId) -> bool {
        let mut known = self.known();
        let free = matches!(known.recorder, Recorder::Nobody);
        if free {
            known.recorder = Recorder::Fork(fork);
        }
        free
    }

    /// The next fork may try.
    pub(crate) fn forget(&self) {
        *self.known() = Known::default();
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
