//! Starting a VMM, so that it listens before it runs.
//!
//! The socket is bound and listening here, and the child inherits it: who connects waits in its
//! backlog until the VMM accepts. So there is no wait for a socket to appear. The child has it alone: when the
//! child dies nobody listens any more, and every connection breaks at once.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};
use stencil_core::InstanceDir;
use stencil_core::layout::MAX_SOCKET_PATH;

use super::terminal::Terminal;
use super::{KillGuard, VmmProcess};
use crate::VmmError;

/// What is started, and how.
#[derive(Debug)]
pub(crate) struct Launch {
    /// The VMM's binary, by its absolute path.
    pub(crate) binary: PathBuf,
    /// What it is told beside that.
    pub(crate) arguments: Vec<OsString>,
    /// How it is told of the socket that it accepts on.
    pub(crate) listens: Listens,
    /// What its standard input and output are. Its standard error goes to the instance's `vmm.log` in any case.
    pub(crate) streams: Streams,
    /// Which session it begins in.
    pub(crate) session: Session,
}

/// How a VMM is told of the socket that it accepts on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Listens {
    /// `--api-socket fd=N`, for REST.
    Rest,
    /// `-mon` on a socket of QEMU's, for QMP.
    Monitor,
}

impl Listens {
    /// The arguments for a listening socket with this descriptor. VMMs are known by them: see [`is_vmm`].
    fn arguments(self, descriptor: RawFd) -> Vec<String> {
        match self {
            Self::Rest => vec![API_SOCKET.to_owned(), format!("fd={descriptor}")],
            Self::Monitor => vec![
                "-mon".to_owned(),
                MONITOR.to_owned(),
                "-chardev".to_owned(),
                format!("socket,id=stencil,fd={descriptor},server=on,wait=off"),
            ],
        }
    }
}

const API_SOCKET: &str = "--api-socket";
const MONITOR: &str = "chardev=stencil,mode=control";

/// Whether the arguments of a process, each ended by a NUL, are those of a VMM. A zombie has none.
pub(super) fn is_vmm(cmdline: &[u8]) -> bool {
    cmdline
        .split(|&byte| byte == 0)
        .any(|argument| argument == API_SOCKET.as_bytes() || argument == MONITOR.as_bytes())
}

/// What a VMM's standard input and output are; what is in their files already is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Streams {
    /// The VMM's own: it accepts on its input, and speaks of itself into `vmm.log`.
    Own,
    /// The guest's serial port: input is from the terminal behind `console.tty`, output goes to `console.log`. The VMM
    /// accepts on a descriptor of another number.
    Console,
}

/// The session that a VMM begins in. In the server's it would end with the server's terminal.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Session {
    /// The server's, which the VMM then leaves by itself.
    OfTheServer,
    /// One of its own. This takes code between fork and exec, and so a copy of the server's page tables.
    OfItsOwn,
}

/// Starts the VMM in `dir`.
///
/// This blocks until the child has begun to execute: some 0.6 ms. std starts it by `posix_spawn`, which shares the
/// parent's memory instead of copying its page tables, unless the session asks for code between fork and exec.
/// All descriptors but the three standard ones and those of a console are closed on exec, as everything that std and rustix
/// open is.
pub(crate) fn spawn(launch: &Launch, dir: &InstanceDir) -> Result<KillGuard, VmmError> {
    let socket = dir.vmm_socket();
    let length = socket.as_os_str().as_bytes().len();
    if length > MAX_SOCKET_PATH {
        return Err(VmmError::SocketPath { path: socket, length });
    }
    let started = start(launch, dir, &socket);
    if started.is_err() {
        // Best effort: a socket without a listener refuses, and the next start removes both.
        let _ = fs::remove_file(&socket);
        let _ = fs::remove_file(dir.console_terminal());
    }
    started
}

fn start(launch: &Launch, dir: &InstanceDir, socket: &Path) -> Result<KillGuard, VmmError> {
    let listener = listen(socket).map_err(|source| VmmError::Prepare {
        path: socket.to_owned(),
        source,
    })?;
    let stderr = append_to(dir.vmm_log())?;
    let mut command = Command::new(&launch.binary);
    command.current_dir(dir.path()).stderr(stderr);
    match launch.streams {
        Streams::Own => {
            command
                .args(launch.listens.arguments(0))
                .stdin(Stdio::from(OwnedFd::from(listener)))
                .stdout(append_to(dir.vmm_log())?);
        }
        Streams::Console => {
            let link = dir.console_terminal();
            let terminal = Terminal::open().and_then(|terminal| {
                terminal.link(&link)?;
                Ok(terminal)
            });
            let terminal = terminal.map_err(|source| VmmError::Prepare { path: link, source })?;
            command
                .args(launch.listens.arguments(listener.as_raw_fd()))
                .stdin(Stdio::from(terminal.reader))
                .stdout(append_to(dir.console_log())?);
            inherit(&mut command, [OwnedFd::from(listener), terminal.writer]);
        }
    }
    command.args(&launch.arguments);
    if let Session::OfItsOwn = launch.session {
        // SAFETY: what runs between fork and exec is one system call: it takes no lock and allocates nothing.
        unsafe { command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from)) };
    }
    spawn_watched(command)
}

/// How much sooner a VMM is ended than the server where memory runs out, of 1000.
const SOONER_THAN_THE_SERVER: &str = "500";

/// Starts a process beside a VMM. The same as for a VMM is true of it, but that it has no socket.
pub(crate) fn spawn_watched(mut command: Command) -> Result<KillGuard, VmmError> {
    let mut child = command.spawn().map_err(|source| VmmError::Spawn {
        binary: command.get_program().into(),
        source,
    })?;
    // Where memory runs out the kernel is to end a VM, and not the server. Anybody may raise it (proc_pid_oom_score_adj(5)); without
    // /proc the kernel chooses by size alone.
    let _ = std::fs::write(
        format!("/proc/{}/oom_score_adj", child.id()),
        SOONER_THAN_THE_SERVER,
    );
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

/// Lets the child have the descriptors, under the numbers that they have here.
fn inherit(command: &mut Command, descriptors: [OwnedFd; 2]) {
    let keep_open = move || {
        descriptors
            .iter()
            .try_for_each(|descriptor| fcntl_setfd(descriptor, FdFlags::empty()))
            .map_err(io::Error::from)
    };
    // SAFETY: what runs between fork and exec are system calls on the child's own table of descriptors: it takes no lock and
    // allocates nothing.
    unsafe { command.pre_exec(keep_open) };
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

/// Opens a log for a process to write to; what is there already is kept.
pub(crate) fn append_to(path: PathBuf) -> Result<Stdio, VmmError> {
    let opened = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path);
    opened
        .map(Stdio::from)
        .map_err(|source| VmmError::Prepare { path, source })
}
