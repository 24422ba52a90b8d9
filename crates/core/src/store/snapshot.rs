//! Snapshots on disk: complete with their manifest, which is put in place last and removed first.
//!
//! Where disks go with the memory, the manifest is prepared first, under a name that has the host's boot in it, and put in place
//! by one rename when the disks are closed and synced. A snapshot that is prepared is kept for that, also over a crash of the
//! server, and is no snapshot yet. After a power loss it is none for ever: what the disks hold then is not known.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::error_chain;
use crate::id::InstanceId;
use crate::layout::SnapshotDir;
use crate::manifest::SnapshotManifest;
use crate::observe::SnapshotFacts;
use crate::store::error::{IoContext, StoreError};
use crate::store::{Durability, Store, atomic, is_missing};

impl Store {
    /// What is on disk of an instance's snapshot. Everything but a missing or prepared manifest and a snapshot that is all
    /// there is [`SnapshotFacts::Broken`], with the reason.
    #[must_use]
    pub fn snapshot(&self, id: &InstanceId) -> SnapshotFacts {
        let dir = self.data.instance(id).snapshot();
        let broken = |reason| SnapshotFacts::Broken { reason };
        let manifest = match atomic::read(&dir.manifest()) {
            Ok(bytes) => SnapshotManifest::from_json(&bytes),
            Err(error) if error.kind() == ErrorKind::NotFound && self.is_snapshot_prepared(id) => {
                return SnapshotFacts::Prepared;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => return SnapshotFacts::Absent,
            Err(error) => return broken(format!("its manifest cannot be read: {error}")),
        };
        match manifest {
            Ok(manifest) => match fault(&dir, &manifest) {
                None => SnapshotFacts::Complete(manifest),
                Some(reason) => broken(reason),
            },
            Err(error) => broken(format!("its manifest cannot be read: {}", error_chain(&error))),
        }
    }

    /// Makes a snapshot exist whose files lie in `dir`: they are synced, its memory becomes read-only (0400), and the
    /// manifest is written last. When this returns, it survives a power loss.
    ///
    /// # Errors
    /// [`StoreError::BrokenSnapshot`] if the files are not what `manifest` says; [`StoreError::Io`]. The snapshot
    /// then does not exist, except where only the last sync failed.
    pub fn complete_snapshot(
        &self,
        dir: &SnapshotDir,
        manifest: &SnapshotManifest,
    ) -> Result<(), StoreError> {
        verify(dir, manifest)?;
        complete(dir, manifest, &dir.manifest())?;
        self.sync_above(dir)
    }

    /// Does all of [`Store::complete_snapshot`] but to let the snapshot exist, which is left to
    /// [`Store::finish_snapshot`]: it can be asked for until the host boots anew.
    ///
    /// # Errors
    /// As [`Store::complete_snapshot`]; the snapshot is then not prepared, except where only the last sync failed.
    pub fn prepare_snapshot(&self, dir: &SnapshotDir, manifest: &SnapshotManifest) -> Result<(), StoreError> {
        verify(dir, manifest)?;
        complete(dir, manifest, &dir.prepared_manifest(self.boot.id()))
    }

    /// Whether an instance's snapshot was prepared since the host booted, and is neither finished nor discarded.
    #[must_use]
    pub fn is_snapshot_prepared(&self, id: &InstanceId) -> bool {
        let dir = self.data.instance(id).snapshot();
        fs::symlink_metadata(dir.prepared_manifest(self.boot.id())).is_ok()
    }

    /// Lets a snapshot exist that was prepared. When this returns, it survives a power loss.
    ///
    /// # Errors
    /// [`StoreError::Io`]. It then is prepared as before, except where only the last sync failed.
    pub fn finish_snapshot(&self, id: &InstanceId) -> Result<(), StoreError> {
        let dir = self.data.instance(id).snapshot();
        fs::rename(dir.prepared_manifest(self.boot.id()), dir.manifest())
            .while_trying("put in place", &dir.manifest())?;
        atomic::sync_dir(dir.path())?;
        self.sync_above(&dir)
    }

    /// Makes the names survive a power loss of the directories in which a snapshot lies.
    fn sync_above(&self, dir: &SnapshotDir) -> Result<(), StoreError> {
        dir.path().parent().map_or(Ok(()), atomic::sync_dir)?;
        atomic::sync_dir(&self.data.instances())
    }

    /// Sets an instance's snapshot aside: it does not exist any more, and can be brought back as long as it is not
    /// discarded. For the moment in which a VM that was restored from it begins to run. One that was only prepared is gone, and
    /// so is one that was set aside before: its VM may have run since.
    ///
    /// # Errors
    /// [`StoreError::Io`]; then it exists, except where only the sync failed.
    pub fn spend_snapshot(&self, id: &InstanceId, durability: Durability) -> Result<(), StoreError> {
        let dir = self.data.instance(id).snapshot();
        if is_missing(dir.path()) {
            return Ok(());
        }
        forget(&dir.prepared_manifest(self.boot.id()))?;
        match fs::rename(dir.manifest(), dir.spent_manifest()) {
            Err(error) if error.kind() == ErrorKind::NotFound => forget(&dir.spent_manifest()),
            Err(error) => Err(error).while_trying("set aside", &dir.manifest()),
            Ok(()) if durability == Durability::Synced => atomic::sync_dir(dir.path()),
            Ok(()) => Ok(()),
        }
    }

    /// Brings a snapshot back that was set aside: the VM did not begin to run.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn regain_snapshot(&self, id: &InstanceId) -> Result<(), StoreError> {
        let dir = self.data.instance(id).snapshot();
        match fs::rename(dir.spent_manifest(), dir.manifest()) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).while_trying("bring back", &dir.spent_manifest())
            }
            _ => Ok(()),
        }
    }

    /// Removes an instance's snapshot with its directory; nothing there is fine.
    ///
    /// # Errors
    /// [`StoreError::Io`]. If it fails half-way, there is no snapshot any more.
    pub fn discard_snapshot(&self, id: &InstanceId) -> Result<(), StoreError> {
        let dir = self.data.instance(id).snapshot();
        if is_missing(dir.path()) {
            return Ok(());
        }
        forget(&dir.prepared_manifest(self.boot.id()))?;
        match fs::remove_file(dir.manifest()) {
            Ok(()) => atomic::sync_dir(dir.path())?,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).while_trying("remove", &dir.manifest()),
        }
        atomic::remove_all(dir.path())
    }
}

/// Removes a manifest of no snapshot, if it is there. No sync: after a power loss it is of none anyway.
fn forget(manifest: &Path) -> Result<(), StoreError> {
    match fs::remove_file(manifest) {
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Err(error).while_trying("remove", manifest)
        }
        _ => Ok(()),
    }
}

/// Refuses a snapshot whose files are not what its manifest says.
pub(super) fn verify(dir: &SnapshotDir, manifest: &SnapshotManifest) -> Result<(), StoreError> {
    fault(dir, manifest).map_or(Ok(()), |reason| {
        Err(StoreError::BrokenSnapshot {
            path: dir.path().to_owned(),
            reason,
        })
    })
}

/// Syncs the files of a snapshot and writes its manifest, as the file at `path` in it.
pub(super) fn complete(
    dir: &SnapshotDir,
    manifest: &SnapshotManifest,
    path: &Path,
) -> Result<(), StoreError> {
    let memory = dir.memory_ranges();
    fs::set_permissions(&memory, Permissions::from_mode(0o400)).while_trying("make read-only", &memory)?;
    for name in manifest.files.keys() {
        atomic::sync_file(&dir.path().join(name))?;
    }
    let bytes = manifest.to_json().map_err(|error| StoreError::BrokenSnapshot {
        path: dir.path().to_owned(),
        reason: format!("its manifest cannot be written: {}", error_chain(&error)),
    })?;
    // The names of the files, before the manifest says that they are there.
    atomic::sync_dir(dir.path())?;
    atomic::replace(path, &bytes, Durability::Synced)
}

/// What is wrong with a snapshot, if anything.
fn fault(dir: &SnapshotDir, manifest: &SnapshotManifest) -> Option<String> {
    if let Some(fault) = manifest.fault() {
        return Some(fault);
    }
    let mut files = manifest.files.iter();
    files.find_map(|(name, &size)| file_fault(dir.path(), name, size, "manifest"))
}

/// What is wrong with the file `name` in `dir`, which should have `size` bytes as its `record` says, if anything.
pub(super) fn file_fault(dir: &Path, name: &str, size: u64, record: &str) -> Option<String> {
    match fs::symlink_metadata(dir.join(name)) {
        Ok(metadata) if !metadata.is_file() => Some(format!("{name} is no file")),
        Ok(metadata) if metadata.len() != size => Some(format!(
            "{name} has {} bytes, and its {record} says {size}",
            metadata.len()
        )),
        Ok(_) => None,
        Err(error) if error.kind() == ErrorKind::NotFound => Some(format!("{name} is missing")),
        Err(error) => Some(format!("{name} cannot be looked at: {error}")),
    }
}
