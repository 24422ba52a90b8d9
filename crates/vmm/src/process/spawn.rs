//! Starting a VMM, so that it listens before it runs.
//!
//! The socket is bound and listening here, and becomes the child's standard input: who connects waits in its
//! backlog until the VMM accepts. So there is no wait for a socket to appear. The child has it alone: when the
//! child dies nobody listens any more, and every connection breaks at once.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use stencil_core::InstanceDir;

use super::{KillGuard, VmmProcess};
use crate::VmmError;

/// Starts `binary` with `--api-socket fd=0` in `dir`.
///
/// This blocks until the child has begun to execute: some 0.6 ms. std starts it by `posix_spawn`, which shares the
/// parent's memory instead of copying its page tables, because nothing is asked that would need code between fork and exec.
/// All descriptors but the three standard ones are closed on exec, as everything that std and rustix open is.
pub(crate) fn spawn(binary: &Path, dir: &InstanceDir) -> Result<KillGuard, VmmError> {
    let socket = dir.vmm_socket();
    let started = start(binary, dir, &socket);
    if started.is_err() {
        // Best effort: a socket without a listener refuses, and the next start removes it.
        let _ = fs::remove_file(&socket);
    }
    started
}

fn start(binary: &Path, dir: &InstanceDir, socket: &Path) -> Result<KillGuard, VmmError> {
    let listener = listen(socket).map_err(|source| VmmError::Prepare {
        path: socket.to_owned(),
        source,
    })?;
    let log_path = dir.vmm_log();
    let (stdout, stderr) = open_log(&log_path).map_err(|source| VmmError::Prepare {
        path: log_path,
        source,
    })?;

    let mut child = Command::new(binary)
        .args(["--api-socket", "fd=0"])
        .current_dir(dir.path())
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .map_err(|source| VmmError::Spawn {
            binary: binary.to_owned(),
            source,
        })?;
    match VmmProcess::of_child(child.id()) {
        Ok(process) => Ok(process.kill_on_drop()),
        Err(error) => {
            // It cannot be watched, so it must not live. It is a child that nobody has waited for: the pid is its own.
            let _ = child.kill();
            let _ = child.wait();
            Err(error.into())
        }
    }
}

/// Binds and listens; a socket that an earlier VMM left is removed.
fn listen(socket: &Path) -> io::Result<UnixListener> {
    remove_socket(socket)?;
    UnixListener::bind(socket)
}

/// Removes a socket if it is there.
pub(crate) fn remove_socket(socket: &Path) -> io::Result<()> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn open_log(path: &Path) -> io::Result<(Stdio, Stdio)> {
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)?;
    Ok((log.try_clone()?.into(), log.into()))
}
