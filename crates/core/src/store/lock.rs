//! The lock on a data directory: an exclusive flock(2) on a file that names its holder.
//!
//! The kernel releases it when its holder is gone, however it went. The file stays, so that all lock the same one.
//!
//! The lock belongs to the open file, which a child process shares from fork to exec, where it is closed. So an orderly
//! end unlocks by name instead of only closing the file: a child that is just being started cannot prolong it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::layout::DataDir;
use crate::store::error::{IoContext, StoreError};

/// Held as long as this value lives.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
}

impl Lock {
    pub(super) fn take(data: &DataDir) -> Result<Self, StoreError> {
        let path = data.lock();
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            // Until the lock is ours, the content is its holder's.
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .while_trying("open", &path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                // A holder that has not written its pid yet is a holder all the same.
                let pid = fs::read_to_string(&path)
                    .ok()
                    .and_then(|text| text.trim().parse().ok());
                return Err(StoreError::InUse {
                    data: data.path().to_owned(),
                    pid,
                });
            }
            locked => locked.while_trying("lock", &path)?,
        }
        file.set_len(0).while_trying("write", &path)?;
        writeln!(file, "{}", std::process::id()).while_trying("write", &path)?;
        Ok(Self { file })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // If it failed, closing the file, which comes next, would still release the lock.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}
