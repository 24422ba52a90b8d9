//! The lock on a data directory: an exclusive flock(2) on a file that names its holder.
//!
//! The kernel releases it when its holder is gone, however it went. The file stays, so that all lock the same one.
//!
//! The lock belongs to the open file, which a child process shares from fork to exec, where it is closed. So an orderly
//! end unlocks by name instead of only closing the file: a child that is just being started cannot prolong it. After a
//! holder that was killed, such a child is waited for.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::layout::DataDir;
use crate::store::error::{IoContext, StoreError};

/// How long a child may need from fork to exec on a busy host.
const CHILD_EXECS: Duration = Duration::from_secs(2);

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
        let deadline = Instant::now() + CHILD_EXECS;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => {}
                locked => break locked.while_trying("lock", &path)?,
            }
            // A holder that has not written its pid yet is a holder all the same.
            let pid = fs::read_to_string(&path)
                .ok()
                .and_then(|text| text.trim().parse().ok());
            if !pid.is_some_and(is_gone) || Instant::now() > deadline {
                return Err(StoreError::InUse {
                    data: data.path().to_owned(),
                    pid,
                });
            }
            // Nobody tells when a child has closed the file.
            thread::sleep(Duration::from_millis(1));
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

/// Whether the process has ended; a zombie has, whoever does not wait for it.
fn is_gone(pid: u32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        // The state comes after the name, which is in parentheses and may have any character (proc_pid_stat(5)).
        Ok(stat) => stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])),
        Err(error) => error.kind() == ErrorKind::NotFound,
    }
}
