//! What a power loss takes, and what keeps it from that.
//!
//! A fork's record is renamed into place and not synced: its request does not wait for the disk. What a power loss would take
//! with such a record is synced behind the request, many at once ([`sync_records`]). Of a fork that has no disks nothing would
//! be left anyway: it is swept when the host has booted anew ([`Store::lost_with_the_host`]).

use std::fs;
use std::io::ErrorKind;

use crate::id::InstanceId;
use crate::layout::DataDir;
use crate::observe::SnapshotFacts;
use crate::store::error::{StoreError, UnreadableCause};
use crate::store::{Scanned, Store, atomic, name_of};

/// Makes the records of these instances survive a power loss. One that was removed meanwhile is passed over.
///
/// # Errors
/// The first failure; the others are synced all the same.
pub fn sync_records(data: &DataDir, ids: &[InstanceId]) -> Result<(), StoreError> {
    let sync_one = |id: &InstanceId| {
        let dir = data.instance(id);
        atomic::sync_file(&dir.metadata())?;
        atomic::sync_dir(dir.path())
    };
    let failures = ids.iter().filter_map(|id| match sync_one(id) {
        Err(StoreError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => None,
        synced => synced.err(),
    });
    let failed = failures.fold(None, |first: Option<StoreError>, next| first.or(Some(next)));
    atomic::sync_dir(&data.instances())?;
    failed.map_or(Ok(()), Err)
}

impl Store {
    /// Those of which the last boot of the host left nothing that could be used: forks of templates without disks that ran when
    /// it ended, and directories whose record was lost and that hold neither a snapshot nor a disk.
    #[must_use]
    pub fn lost_with_the_host(&self, scanned: &[Scanned]) -> Vec<InstanceId> {
        let is_lost = |found: &&Scanned| match &found.metadata {
            Ok(metadata) => {
                metadata.dies_with(|boot| boot != self.boot.id())
                    && matches!(self.snapshot(&found.id), SnapshotFacts::Absent)
            }
            Err(StoreError::Unreadable {
                source: UnreadableCause::Lost,
                ..
            }) => self.is_first_of_boot() && self.holds_nothing(&found.id),
            Err(_) => false,
        };
        scanned.iter().filter(is_lost).map(|found| found.id).collect()
    }

    /// Whether there is certainly neither a snapshot nor a disk in an instance's directory.
    fn holds_nothing(&self, id: &InstanceId) -> bool {
        let dir = self.data.instance(id);
        let is_of_value = |name: &str| name == "snapshot" || name.starts_with("disk");
        fs::symlink_metadata(dir.path()).is_ok_and(|found| found.is_dir())
            && atomic::list(dir.path())
                .is_ok_and(|inside| !inside.iter().any(|path| name_of(path).is_none_or(is_of_value)))
    }
}
