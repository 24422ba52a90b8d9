//! The steps of which the store is made: each is done as a whole, or not at all.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::OFlags;

use crate::layout::TEMPORARY_PREFIX;
use crate::store::Durability;
use crate::store::error::{IoContext, StoreError};

/// Makes the names of temporary files distinct. It begins anew in each process: what an earlier one left is written
/// over, and only one process at a time has the data directory.
static TEMPORARY: AtomicU64 = AtomicU64::new(0);

/// More than any record or manifest has, in bytes.
const MOST_READ: u64 = 16 << 20;

/// Reads a small regular file. Whatever else has its name neither holds the server up, as a pipe would, nor fills its
/// memory, as a device would.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)?;
    let found = file.metadata()?;
    // A directory refuses to be read by itself.
    if !found.is_file() && !found.is_dir() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is no regular file"));
    }
    if found.len() > MOST_READ {
        return Err(ErrorKind::FileTooLarge.into());
    }
    // Room for all of it and a byte more, with which the end is noticed: else it is read in small pieces.
    let mut content = Vec::with_capacity(usize::try_from(found.len()).unwrap_or(0) + 1);
    file.take(MOST_READ).read_to_end(&mut content)?;
    Ok(content)
}

/// Makes a file in a directory and removes it.
pub(super) fn try_to_write(dir: &Path) -> Result<(), StoreError> {
    let number = TEMPORARY.fetch_add(1, Ordering::Relaxed);
    let path = dir.join(format!("{TEMPORARY_PREFIX}{number}-trial"));
    write_new(&path, b"", Durability::Renamed)?;
    fs::remove_file(&path).while_trying("remove", &path)
}

/// Replaces the file at `path`, which is then its owner's alone (0600).
pub(super) fn replace(path: &Path, content: &[u8], durability: Durability) -> Result<(), StoreError> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(ErrorKind::InvalidFilename).while_trying("write", path);
    };
    let number = TEMPORARY.fetch_add(1, Ordering::Relaxed);
    let temporary = dir.join(format!("{TEMPORARY_PREFIX}{number}-{}", name.display()));
    let written = write_new(&temporary, content, durability)
        .and_then(|()| fs::rename(&temporary, path).while_trying("replace", path));
    if written.is_err() {
        // The first error is the one to tell; a file that stays is swept at the next start.
        let _ = fs::remove_file(&temporary);
    }
    written?;
    match durability {
        Durability::Renamed => Ok(()),
        Durability::Synced => sync_dir(dir),
    }
}

fn write_new(path: &Path, content: &[u8], durability: Durability) -> Result<(), StoreError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .while_trying("write", path)?;
    file.write_all(content).while_trying("write", path)?;
    match durability {
        Durability::Renamed => Ok(()),
        Durability::Synced => file.sync_all().while_trying("sync", path),
    }
}

/// Makes the content of a file survive a power loss.
pub(super) fn sync_file(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .while_trying("sync", path)
}

/// Makes the names in a directory survive a power loss.
pub(super) fn sync_dir(path: &Path) -> Result<(), StoreError> {
    sync_file(path)
}

/// Makes a directory for its owner alone (0700); it must not exist.
pub(super) fn create_dir(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .while_trying("create", path)
}

/// Makes a directory and those above it, where they are missing, for their owner alone (0700).
pub(super) fn create_dir_all(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(path)
        .while_trying("create", path)
}

/// The paths of what is in a directory, in no order.
pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .while_trying("list", dir)
}

/// Removes a file, or a directory with all that is in it; nothing there is fine.
pub(super) fn remove_all(path: &Path) -> Result<(), StoreError> {
    let is_dir = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        metadata => metadata.while_trying("remove", path)?.is_dir(),
    };
    if is_dir {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
    .while_trying("remove", path)
}
