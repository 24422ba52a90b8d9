//! What the server knows of a template's hot pages while it runs: whether the list on disk can be used, and which fork
//! records one.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use stencil_core::{InstanceId, MemoryGeneration, error_chain};
use stencil_uffd::HotPages;

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
    list: Arc<HotList>,
    fork: InstanceId,
}

impl Claim {
    /// It was tried, and cannot be done on this host: no fork tries again.
    pub(crate) fn give_up(self) {
        self.list.known().recorder = Recorder::Impossible;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut known = self.list.known();
        if matches!(known.recorder, Recorder::Fork(recorder) if recorder == self.fork) {
            known.recorder = Recorder::Nobody;
        }
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
    /// Whether the file at `path` is a list of this memory.
    pub(crate) fn is_usable(&self, path: &Path, memory: &MemoryGeneration) -> bool {
        let Ok(found) = fs::metadata(path) else {
            return false;
        };
        // A pipe would be waited for until somebody writes to it.
        if !found.is_file() {
            return false;
        }
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

    /// The right to record, if no other fork has it.
    pub(crate) fn claim(self: &Arc<Self>, fork: InstanceId) -> Option<Claim> {
        let mut known = self.known();
        if !matches!(known.recorder, Recorder::Nobody) {
            return None;
        }
        known.recorder = Recorder::Fork(fork);
        Some(Claim {
            list: Arc::clone(self),
            fork,
        })
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
