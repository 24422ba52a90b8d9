//! A VMM's process: a handle that can never mean another process, how it ended, and how it is made to end.
//!
//! A pid is given to somebody else when its owner is gone, so a pid alone proves nothing. What is recorded is the
//! [`ProcessIdentity`]: pid, start time and boot id. What is held is a pidfd: it stays with its process, becomes
//! readable when all of its threads are dead, and a signal through it reaches that process or nobody.

mod exit;
mod memory;
mod procfs;
mod spawn;
mod stray;
mod terminal;

use std::io;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use stencil_core::ProcessIdentity;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::VmmError;
pub use exit::Exit;
pub use memory::MemoryUse;
pub(crate) use spawn::{Launch, Listens, Session, Streams, append_to, remove_socket, spawn, spawn_watched};
pub(crate) use stray::processes_below;
pub use stray::{StrayProcess, stray_processes};

/// How long a VMM has after SIGTERM. Its teardown takes some 25 ms for KVM's part, and longer for much memory.
const AFTER_SIGTERM: Duration = Duration::from_secs(3);
/// How long the kernel has after SIGKILL: it may have gigabytes to free, or to write to a slow disk.
const AFTER_SIGKILL: Duration = Duration::from_secs(30);
/// How long a process that closed its socket has to be dead, for an error to say how it ended. The kernel closes
/// the files of a dying process some time before it counts as dead: KVM's teardown lies between the two.
const AFTER_HANGUP: Duration = Duration::from_secs(2);

/// Why a process could not be observed or ended.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// A file of `/proc` could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },

    /// A file of `/proc` is not in the form that proc(5) documents.
    #[error("{path} is not in the form that proc(5) documents")]
    Malformed {
        /// The file.
        path: String,
    },

    /// The kernel gave no pidfd, or it could not be watched.
    #[error("cannot watch the process {pid}")]
    Watch {
        /// The process.
        pid: u32,
        /// What the system said.
        source: io::Error,
    },

    /// The signal could not be sent.
    #[error("cannot send a signal to the process {pid}")]
    Signal {
        /// The process.
        pid: u32,
        /// What the system said.
        source: io::Error,
    },

    /// The process has ended, so that there is nothing to observe.
    #[error("the process {pid} has ended: {exit}")]
    Gone {
        /// The process.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },

    /// The process is still there after SIGKILL: the kernel holds it, most likely in I/O that does not come back.
    #[error("the process {pid} is still there {after:?} after SIGKILL; look for I/O that hangs on this host")]
    StillAlive {
        /// The process.
        pid: u32,
        /// How long was waited.
        after: Duration,
    },
}

/// What became of a process that was recorded in an instance's directory.
#[derive(Debug)]
pub enum Attached {
    /// It lives, and that directory is its working directory.
    Here(VmmProcess),
    /// It lives and works in another directory: the record is a copy, and the process belongs to the original.
    Elsewhere,
    /// It ended, the host was booted again, or its pid is somebody else's now.
    Gone,
}

/// A VMM's process. Clones mean the same process; dropping all of them leaves it alone.
#[derive(Clone, Debug)]
pub struct VmmProcess(Arc<Watched>);

#[derive(Debug)]
struct Watched {
    identity: ProcessIdentity,
    pidfd: AsyncFd<OwnedFd>,
    /// Whether this handle's server started it and nobody else waits for it. Only then may it be reaped here.
    is_own_child: bool,
    /// Set once, by the first who sees the process dead: only one wait can have the status of a child.
    exit: OnceLock<Exit>,
}

impl VmmProcess {
    /// The process that was recorded as `identity`, or `None` when that is gone: it ended, it is a zombie, the host
    /// was booted again, or its pid is somebody else's now. It need not be a child of this process.
    ///
    /// # Errors
    /// [`ProcessError::Read`], [`ProcessError::Malformed`] or [`ProcessError::Watch`] when this cannot be told.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O enabled, as tokio's own types for files do.
    pub fn attach(identity: &ProcessIdentity) -> Result<Option<Self>, ProcessError> {
        if procfs::boot_id()? != identity.boot_id {
            return Ok(None);
        }
        let Some(pidfd) = open_pidfd(identity.pid)? else {
            return Ok(None);
        };
        // Read after the pidfd was opened: if it is the recorded process that has the pid now, it had it then too.
        if procfs::start_time(identity.pid)? != Some(identity.start_time) {
            return Ok(None);
        }
        let process = Self::watch(identity.clone(), pidfd, false)?;
        Ok(process.has_exited().is_none().then_some(process))
    }

    /// The same for a VMM that was recorded in the directory `dir`: a VMM belongs to the instance in whose directory it
    /// works. A copy of that directory names the same process, and must never touch it.
    ///
    /// # Errors
    /// Those of [`VmmProcess::attach`]; [`ProcessError::Read`] when a working directory cannot be read.
    ///
    /// # Panics
    /// As [`VmmProcess::attach`].
    pub fn attach_in(identity: &ProcessIdentity, dir: &Path) -> Result<Attached, ProcessError> {
        let Some(process) = Self::attach(identity)? else {
            return Ok(Attached::Gone);
        };
        let works_there = procfs::works_in(identity.pid, dir);
        // Looked at after the reading: a process that lives now had the pid all along.
        match (process.has_exited(), works_there?) {
            (Some(_), _) | (None, None) => Ok(Attached::Gone),
            (None, Some(true)) => Ok(Attached::Here(process)),
            (None, Some(false)) => Ok(Attached::Elsewhere),
        }
    }

    /// The process that has the pid now, which the caller has just heard of from itself. It need not be a child.
    pub(crate) fn of_pid(pid: u32) -> Result<Self, ProcessError> {
        let (identity, pidfd) = identify(pid)?;
        Self::watch(identity, pidfd, false)
    }

    /// A child that was just started and that nobody has waited for. A task reaps it when it ends, so that it does not
    /// stay as a zombie and that its status is known.
    fn of_child(pid: u32) -> Result<Self, ProcessError> {
        let (identity, pidfd) = identify(pid)?;
        let process = Self::watch(identity, pidfd, true)?;
        let reaper = process.clone();
        tokio::spawn(async move {
            let exit = reaper.exited().await;
            tracing::debug!(pid, %exit, "a VMM ended");
        });
        Ok(process)
    }

    fn watch(identity: ProcessIdentity, pidfd: OwnedFd, is_own_child: bool) -> Result<Self, ProcessError> {
        let pid = identity.pid;
        // SAFETY: an `OwnedFd` is open and the same descriptor until it is dropped, and nothing takes it out of the
        // `AsyncFd`, which is only ever lent out shared.
        let pidfd =
            unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.map_err(|error| {
                ProcessError::Watch {
                    pid,
                    source: error.into_parts().1,
                }
            })?;
        Ok(Self(Arc::new(Watched {
            identity,
            pidfd,
            is_own_child,
            exit: OnceLock::new(),
        })))
    }

    /// What identifies the process, to be recorded.
    pub fn identity(&self) -> &ProcessIdentity {
        &self.0.identity
    }

    /// A pidfd of it, for another process to watch it.
    pub(crate) fn pidfd(&self) -> io::Result<OwnedFd> {
        self.0.pidfd.get_ref().try_clone()
    }

    /// How the process ended; `None` while it lives.
    pub fn has_exited(&self) -> Option<Exit> {
        if let Some(exit) = self.0.exit.get() {
            return Some(*exit);
        }
        self.is_dead().then(|| *self.0.exit.get_or_init(|| self.status()))
    }

    fn is_dead(&self) -> bool {
        let mut pidfd = [PollFd::new(self.0.pidfd.get_ref(), PollFlags::IN)];
        loop {
            match poll(&mut pidfd, Some(&Timespec::default())) {
                Ok(ready) => return ready > 0,
                Err(Errno::INTR) => {}
                // ENOMEM, which says nothing about the process; the next look will tell.
                Err(_) => return false,
            }
        }
    }

    /// The status of the process, which is dead.
    fn status(&self) -> Exit {
        if self.0.is_own_child {
            Exit::reap(self.0.pidfd.get_ref())
        } else {
            Exit::Unseen
        }
    }

    /// Waits until the process has ended.
    pub async fn exited(&self) -> Exit {
        loop {
            let readable = self.0.pidfd.readable().await;
            if let Some(exit) = self.has_exited() {
                return exit;
            }
            match readable {
                Ok(mut spurious) => spurious.clear_ready(),
                // The runtime is shutting down: nothing will be reported any more, and this task is about to go.
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// Runs a call on the VMM. If the call fails because the VMM went away, the error says how it ended.
    ///
    /// # Errors
    /// Those of the call; [`VmmError::Ended`] instead when the process has ended.
    pub async fn during<T>(&self, call: impl Future<Output = Result<T, VmmError>>) -> Result<T, VmmError> {
        // A dead process has no open socket, so that the call fails at once by itself.
        let error = match pin!(call).await {
            Ok(answer) => return Ok(answer),
            Err(error) if error.lost_connection() => error,
            Err(error) => return Err(error),
        };
        match tokio::time::timeout(AFTER_HANGUP, self.exited()).await {
            Ok(exit) => Err(VmmError::Ended {
                exit,
                source: Box::new(error),
            }),
            Err(_elapsed) => Err(error),
        }
    }

    /// Ends the process without asking the VMM: SIGTERM, and SIGKILL if that does not do. Returns when the process is
    /// dead; its sockets are left. For a VMM that belongs to no instance; else [`Hypervisor::stop`](crate::Hypervisor::stop).
    ///
    /// # Errors
    /// [`ProcessError::StillAlive`], or [`ProcessError::Signal`] when the process is another user's.
    pub async fn terminate(&self) -> Result<Exit, ProcessError> {
        self.signal(Signal::TERM)?;
        if let Some(exit) = self.exited_within(AFTER_SIGTERM).await {
            return Ok(exit);
        }
        let pid = self.0.identity.pid;
        tracing::warn!(pid, after = ?AFTER_SIGTERM, "a VMM did not end after SIGTERM; sending SIGKILL");
        self.signal(Signal::KILL)?;
        self.exited_within(AFTER_SIGKILL)
            .await
            .ok_or(ProcessError::StillAlive {
                pid,
                after: AFTER_SIGKILL,
            })
    }

    /// Waits at most `limit` until the process has ended.
    pub(crate) async fn exited_within(&self, limit: Duration) -> Option<Exit> {
        tokio::time::timeout(limit, self.exited()).await.ok()
    }

    /// What the process's memory takes of the host's.
    ///
    /// The kernel walks the process's page tables for this: milliseconds for gigabytes.
    ///
    /// # Errors
    /// [`ProcessError::Gone`] when it has ended; [`ProcessError::Read`] or [`ProcessError::Malformed`].
    pub fn memory(&self) -> Result<MemoryUse, ProcessError> {
        let pid = self.0.identity.pid;
        let read = MemoryUse::of(pid);
        // Looked at after the reading: a process that lives now had the pid all along.
        match self.has_exited() {
            Some(exit) => Err(ProcessError::Gone { pid, exit }),
            None => read,
        }
    }

    /// Sends a signal; that the process has ended meanwhile is no error.
    fn signal(&self, signal: Signal) -> Result<(), ProcessError> {
        match pidfd_send_signal(self.0.pidfd.get_ref(), signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(source) => Err(ProcessError::Signal {
                pid: self.0.identity.pid,
                source: source.into(),
            }),
        }
    }

    /// A guard that kills the process when it is dropped, for as long as nobody else answers for the process.
    pub fn kill_on_drop(self) -> KillGuard {
        KillGuard {
            process: self,
            armed: true,
        }
    }
}

/// What identifies the process that has this pid now.
#[cfg(test)]
pub(crate) fn identity_of(pid: u32) -> Option<ProcessIdentity> {
    Some(ProcessIdentity {
        pid,
        start_time: procfs::start_time(pid).ok()??,
        boot_id: procfs::boot_id().ok()?,
    })
}

/// Kills its process when it is dropped: what is started and not yet recorded must not be left behind when a start
/// fails halfway or its future is dropped.
#[derive(Debug)]
#[must_use = "dropping the guard kills the process"]
pub struct KillGuard {
    process: VmmProcess,
    armed: bool,
}

impl KillGuard {
    /// Lets the process live.
    pub fn keep(mut self) -> VmmProcess {
        self.armed = false;
        self.process.clone()
    }
}

impl Deref for KillGuard {
    type Target = VmmProcess;

    fn deref(&self) -> &VmmProcess {
        &self.process
    }
}

impl Drop for KillGuard {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = self.process.signal(Signal::KILL)
        {
            tracing::error!(%error, "a VMM whose start was given up may still be there");
        }
    }
}

/// A process that lives.
fn identify(pid: u32) -> Result<(ProcessIdentity, OwnedFd), ProcessError> {
    let gone = || ProcessError::Watch {
        pid,
        source: Errno::SRCH.into(),
    };
    let pidfd = open_pidfd(pid)?.ok_or_else(gone)?;
    let identity = ProcessIdentity {
        pid,
        start_time: procfs::start_time(pid)?.ok_or_else(gone)?,
        boot_id: procfs::boot_id()?,
    };
    Ok((identity, pidfd))
}

/// A pidfd of the process that has the pid now, or `None` if none has.
fn open_pidfd(pid: u32) -> Result<Option<OwnedFd>, ProcessError> {
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Ok(None);
    };
    match pidfd_open(raw, PidfdFlags::empty()) {
        Ok(pidfd) => Ok(Some(pidfd)),
        // ESRCH: there is none. EINVAL, and ENOENT since Linux 6.15: the number is that of a mere thread.
        Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => Ok(None),
        Err(source) => Err(ProcessError::Watch {
            pid,
            source: source.into(),
        }),
    }
}
