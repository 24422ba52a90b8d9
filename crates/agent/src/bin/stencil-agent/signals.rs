//! Signals as something to read: the ends of child processes, and requests to end.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// What was asked for by signals since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    /// A child process has ended.
    pub(crate) children: bool,
    /// The agent is to end.
    pub(crate) end: bool,
}

/// The signals that the agent takes. They are blocked, and lie here.
#[derive(Debug)]
pub(crate) struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals and opens the queue of those that come. SIGUSR2 is how busybox asks init to power off.
    pub(crate) fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set; the others take what it initialised. The mask is the one thread's own, and
        // a file descriptor that signalfd made belongs to nobody else.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGUSR2] {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            if libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            let queue = libc::signalfd(-1, set.as_ptr(), libc::SFD_NONBLOCK | libc::SFD_CLOEXEC);
            if queue < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self(OwnedFd::from_raw_fd(queue)))
        }
    }

    /// What to poll for reading.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Empties the queue.
    pub(crate) fn take(&self) -> Asked {
        let mut asked = Asked::default();
        // Its first field is the signal's number, 4 bytes (signalfd(2)).
        let mut signal = [0; size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(&self.0, &mut signal).is_ok_and(|length| length == signal.len()) {
            if signal.first_chunk() == Some(&libc::SIGCHLD.to_ne_bytes()) {
                asked.children = true;
            } else {
                asked.end = true;
            }
        }
        asked
    }
}

/// Blocks no signal, in a process that is to become a command: it would inherit what the agent blocks.
pub(crate) fn unblock() -> io::Result<()> {
    let mut none = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, which sigprocmask reads; both may be called between fork and exec.
    let done = unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut())
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
