//! Begins a command: in a session of its own, in its cgroup, with pipes or a terminal.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::fs::{Access, access};
use rustix::process::Pid;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use stencil_agent::{Exec, ExecError, TtySize};

use crate::{cgroups, error_chain, signals};

/// What a command has that names no other.
const ENVIRONMENT: [(&str, &str); 2] = [("PATH", PATH), ("HOME", "/root")];
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The most characters of a reason.
const LONGEST_WHY: usize = 1000;

/// Why no command was begun.
#[derive(Debug)]
pub(crate) struct NotBegun {
    pub(crate) error: ExecError,
    pub(crate) why: String,
}

impl NotBegun {
    pub(crate) fn new(error: ExecError, why: impl Into<String>) -> Self {
        // It may say what was asked for, and has to fit into a frame whatever that was.
        let why = why.into().chars().take(LONGEST_WHY).collect();
        Self { error, why }
    }
}

impl From<io::Error> for NotBegun {
    fn from(error: io::Error) -> Self {
        Self::new(ExecError::Failed, error.to_string())
    }
}

impl From<rustix::io::Errno> for NotBegun {
    fn from(error: rustix::io::Errno) -> Self {
        io::Error::from(error).into()
    }
}

/// A command that was begun, and this side of its streams; they do not block.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) pid: Pid,
    pub(crate) started: Instant,
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    /// They are a terminal.
    pub(crate) is_tty: bool,
}

/// Begins it; its process is the leader of a session and a process group.
pub(crate) fn begin(exec: &Exec, cgroup: Option<&Path>) -> Result<Begun, NotBegun> {
    let mut command = to_command(exec)?;
    let entrance = cgroup.map(cgroups::open_entrance).transpose();
    let entrance = entrance.map_err(|error| NotBegun::new(ExecError::Failed, error_chain(&error)))?;
    let terminal = exec
        .tty
        .map(|size| give_terminal(&mut command, size))
        .transpose()?;
    if terminal.is_none() {
        let stdin = if exec.stdin { Stdio::piped() } else { Stdio::null() };
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    let is_tty = terminal.is_some();
    // SAFETY: the closure makes system calls only, on what was opened before the fork.
    unsafe { command.pre_exec(move || enter(entrance.as_ref(), is_tty)) };
    let started = Instant::now();
    let terminal = terminal.map(|master| Ok::<_, io::Error>((master.try_clone()?, master)));
    let terminal = terminal.transpose()?;
    let mut child = command.spawn().map_err(|error| not_spawned(exec, &error))?;
    let pid = Pid::from_child(&child);
    let begun = match terminal {
        Some((stdin, stdout)) => Begun {
            pid,
            started,
            stdin: Some(stdin),
            stdout: Some(stdout),
            stderr: None,
            is_tty,
        },
        None => Begun {
            pid,
            started,
            stdin: child.stdin.take().map(OwnedFd::from),
            stdout: child.stdout.take().map(OwnedFd::from),
            stderr: child.stderr.take().map(OwnedFd::from),
            is_tty,
        },
    };
    for stream in [&begun.stdin, &begun.stdout, &begun.stderr].into_iter().flatten() {
        rustix::io::ioctl_fionbio(stream, true)?;
    }
    Ok(begun)
}

fn to_command(exec: &Exec) -> Result<Command, NotBegun> {
    let [program, arguments @ ..] = &exec.argv[..] else {
        return Err(NotBegun::new(ExecError::BadRequest, "there is no program to run"));
    };
    let cwd = exec.cwd.as_deref().unwrap_or("/");
    if !Path::new(cwd).is_dir() {
        return Err(NotBegun::new(
            ExecError::BadDirectory,
            format!("{cwd:?} is no directory"),
        ));
    }
    if let Some((name, _)) = exec
        .env
        .iter()
        .find(|(name, _)| name.is_empty() || name.contains('='))
    {
        return Err(NotBegun::new(
            ExecError::BadRequest,
            format!("{name:?} is no name of a variable"),
        ));
    }
    let own_path = exec.env.iter().rev().find(|(name, _)| name == "PATH");
    let path = own_path.map_or(PATH, |(_, path)| path);
    let found = find(program, path);
    let mut command = Command::new(found.as_deref().unwrap_or(Path::new(program)));
    command
        .arg0(program)
        .args(arguments)
        .current_dir(cwd)
        .env_clear()
        .envs(ENVIRONMENT);
    if exec.tty.is_some() {
        command.env("TERM", "xterm");
    }
    command.envs(exec.env.iter().map(|(name, value)| (name, value)));
    Ok(command)
}

/// Where a program is that is called by its name alone: an attempt to execute it in each directory of `path`, as execvp(3) makes it,
/// takes ten times as long as a look. What is not found here is left to such attempts, which tell why.
fn find(program: &str, path: &str) -> Option<PathBuf> {
    let directories = path.split(':').take_while(|directory| directory.starts_with('/'));
    let mut files = directories.map(|directory| Path::new(directory).join(program));
    let is_program = |file: &PathBuf| access(file, Access::EXEC_OK).is_ok() && file.is_file();
    let is_name = !program.is_empty() && !program.contains('/');
    is_name.then(|| files.find(is_program)).flatten()
}

/// Opens a terminal for the command; this side of it.
fn give_terminal(command: &mut Command, size: TtySize) -> Result<OwnedFd, NotBegun> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    resize(&master, size)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let terminal = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    command
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal);
    Ok(master)
}

/// Tells a terminal its size.
pub(crate) fn resize(terminal: &OwnedFd, size: TtySize) -> rustix::io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(terminal, size)
}

/// What the new process does before it becomes the command.
fn enter(mut entrance: Option<&File>, is_tty: bool) -> io::Result<()> {
    if let Some(entrance) = &mut entrance {
        entrance.write_all(b"0")?;
    }
    rustix::process::setsid()?;
    if is_tty {
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
    }
    // What whoever started the agent had open is nothing for a command.
    // SAFETY: it only marks open files to be closed when the command begins.
    let marked = unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    if marked != 0 {
        return Err(io::Error::last_os_error());
    }
    signals::unblock()
}

fn not_spawned(exec: &Exec, error: &io::Error) -> NotBegun {
    let kind = match (error.kind(), error.raw_os_error()) {
        (ErrorKind::NotFound, _) => ExecError::NotFound,
        (ErrorKind::PermissionDenied, _) | (_, Some(libc::ENOEXEC)) => ExecError::NotExecutable,
        // A NUL byte, or more arguments than the kernel takes.
        (ErrorKind::InvalidInput | ErrorKind::ArgumentListTooLong, _) => ExecError::BadRequest,
        _ => ExecError::Failed,
    };
    NotBegun::new(kind, format!("could not run it: {error}: {:?}", exec.argv[0]))
}
