//! Input for the guest's serial port, by the way on which a VMM takes it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use stencil_core::InstanceDir;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

use crate::{VmmError, VmmProcess};

/// How long a VMM may take to read a little more of the input; each time that it did, the time begins anew.
const STALLED: Duration = Duration::from_secs(5);

/// To a VMM that listens on the instance's `console.sock`.
pub(crate) async fn write_to_socket(dir: &InstanceDir, input: &[u8]) -> Result<(), VmmError> {
    let path = dir.console_socket();
    let socket = match UnixStream::connect(&path).await {
        Ok(socket) => socket.into_std().map(OwnedFd::from),
        Err(error) => Err(error),
    };
    write(path, socket, input).await
}

/// To a VMM that reads the terminal to which the instance's `console.tty` leads.
pub(crate) async fn write_to_terminal(
    dir: &InstanceDir,
    vmm: &VmmProcess,
    input: &[u8],
) -> Result<(), VmmError> {
    let path = dir.console_terminal();
    let flags = OFlags::WRONLY | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = open(&path, flags, Mode::empty()).map_err(io::Error::from);
    // A terminal's number is somebody else's when its VMM is gone. A VMM that lives now had it when it was opened.
    let terminal = match vmm.has_exited() {
        Some(_) => Err(io::ErrorKind::NotFound.into()),
        None => opened,
    };
    write(path, terminal, input).await
}

/// Writes all of `input` to what was opened, which does not block, for as long as the VMM takes it.
async fn write(path: PathBuf, opened: io::Result<OwnedFd>, input: &[u8]) -> Result<(), VmmError> {
    // SAFETY: an `OwnedFd` is open and the same descriptor until it is dropped, and nothing takes it out of the `AsyncFd`.
    let register = |file| unsafe { AsyncFd::register_with_interest(file, Interest::WRITABLE) };
    let console = match opened.and_then(|file| register(file).map_err(io::Error::from)) {
        Ok(console) => console,
        Err(source) => return Err(VmmError::Console { path, source }),
    };
    let mut rest = input;
    while !rest.is_empty() {
        let attempt = |console: &OwnedFd| rustix::io::write(console, rest).map_err(io::Error::from);
        match tokio::time::timeout(STALLED, console.async_io(Interest::WRITABLE, attempt)).await {
            Ok(Ok(written)) => rest = &rest[written..],
            Ok(Err(source)) => return Err(VmmError::Console { path, source }),
            Err(_elapsed) => {
                return Err(VmmError::ConsoleFull {
                    taken: input.len() - rest.len(),
                    given: input.len(),
                    after: STALLED,
                });
            }
        }
    }
    Ok(())
}
