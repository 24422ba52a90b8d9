//! The directory that a VM is restored from: the snapshot's files as the VM's own directory needs them.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use stencil_core::{InstanceDir, MemoryMode, SnapshotDir};

use super::fork_plan::{ForkPlan, Memory, NotMapped};
use crate::VmmError;
use crate::rest::absolute;

/// Name of the directory in the instance's. It is there while the VM is restored, and no longer.
pub(super) const NAME: &str = "restoring";

/// The directory; removed when this is dropped.
#[derive(Debug)]
pub(super) struct RestoreDir(PathBuf);

impl RestoreDir {
    /// Makes it: `config.json` first, then the memory by reference, `state.json` last. Also says why the memory is read
    /// although it was to be mapped or served. This blocks.
    pub(super) fn make(
        dir: &InstanceDir,
        snapshot: &SnapshotDir,
        mode: MemoryMode,
    ) -> Result<(Self, Option<NotMapped>), VmmError> {
        let memory = absolute(&snapshot.memory_ranges());
        let memory_bytes = fs::metadata(&memory).map_err(unreadable(&memory))?.len();
        let memory_path = crate::rest::utf8(&memory)?;
        let plan = ForkPlan {
            memory: match mode {
                MemoryMode::Copy | MemoryMode::OnDemand => Memory::Read,
                MemoryMode::Cow => Memory::Map(&memory_path),
                MemoryMode::Uffd => Memory::Serve,
            },
            memory_bytes,
            vsock_socket: InstanceDir::VSOCK_SOCKET,
            taps: [].into(),
        };
        let config = read(&snapshot.config())?;
        let state = read(&snapshot.state())?;
        let rewritten = plan.apply(&config, &state).map_err(|source| VmmError::Snapshot {
            path: snapshot.path().to_owned(),
            source,
        })?;

        let made = Self(dir.path().join(NAME));
        made.remove().map_err(not_ready(&made.0))?;
        fs::create_dir(&made.0).map_err(not_ready(&made.0))?;
        let files = SnapshotDir::new(&made.0);
        write(&files.config(), &rewritten.config)?;
        let link = files.memory_ranges();
        symlink(&memory, &link).map_err(not_ready(&link))?;
        write(&files.state(), &rewritten.state)?;
        Ok((made, rewritten.not_mapped))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Removes it, also what a server that was killed has left of one.
    fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl Drop for RestoreDir {
    fn drop(&mut self) {
        // What cannot be removed now goes with the next restore, or with the instance.
        let _ = self.remove();
    }
}

fn read(path: &Path) -> Result<Vec<u8>, VmmError> {
    fs::read(path).map_err(unreadable(path))
}

fn write(path: &Path, content: &[u8]) -> Result<(), VmmError> {
    fs::write(path, content).map_err(not_ready(path))
}

fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> VmmError {
    move |source| VmmError::SnapshotFile {
        path: path.to_owned(),
        source,
    }
}

fn not_ready(path: &Path) -> impl FnOnce(io::Error) -> VmmError {
    move |source| VmmError::Prepare {
        path: path.to_owned(),
        source,
    }
}
