//! A pseudoterminal for the standard input of a VMM that reads input only from a terminal.
//!
//! The VMM reads the end that a terminal emulator would have; Linux counts it as a terminal too. The other end has a path,
//! so that any server can open it and write, also one that was started after the VMM. No such path leads to the end that
//! the VMM has: opening `/dev/ptmx` makes another terminal each time. The VMM inherits both ends, so that they live exactly
//! as long as it does, and reading never meets a hangup when a writer goes.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, OutputModes, tcgetattr, tcsetattr};

/// A new terminal.
#[derive(Debug)]
pub(super) struct Terminal {
    /// What the VMM reads.
    pub(super) reader: OwnedFd,
    /// What is written to; the VMM only keeps it open.
    pub(super) writer: OwnedFd,
    /// Where the writing end can be opened.
    path: PathBuf,
}

impl Terminal {
    /// Makes one that passes bytes on as they are.
    pub(super) fn open() -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let reader = openpt(flags)?;
        grantpt(&reader)?;
        unlockpt(&reader)?;
        let path = OsStr::from_bytes(ptsname(&reader, Vec::new())?.as_bytes()).into();
        let writer = ioctl_tiocgptpeer(&reader, flags)?;
        let mut modes = tcgetattr(&writer)?;
        modes.make_raw();
        // `make_raw` turns the processing of what is written off as a whole, and leaves what it would do (a carriage return before
        // each newline). QEMU turns it on again for the terminal that it reads (chardev/char-stdio.c, as of 7.2).
        modes.output_modes = OutputModes::empty();
        tcsetattr(&writer, OptionalActions::Now, &modes)?;
        // Else the group `tty` could write to it too.
        fchmod(&writer, Mode::RUSR | Mode::WUSR)?;
        Ok(Self { reader, writer, path })
    }

    /// Makes `link` lead to the writing end, whatever it was before.
    pub(super) fn link(&self, link: &Path) -> io::Result<()> {
        match fs::remove_file(link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => symlink(&self.path, link),
        }
    }
}
