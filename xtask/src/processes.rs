//! Processes: which ones work below a directory, and proof that one has ended.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// How long a killed process may take to be gone: it gives back a VM's memory first.
const KILL_WAIT: Duration = Duration::from_secs(20);

/// What is among the arguments of each VMM: how it is told of its socket, for REST or for QMP.
const ARGUMENTS: [&str; 2] = ["--api-socket", "chardev=stencil,mode=control"];

/// A process that was found.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) pid: Pid,
    /// Its arguments, for the reader.
    pub(crate) command: String,
}

/// The processes whose working directory is `directory` or below it: each VMM works in its instance's directory.
pub(crate) fn working_below(directory: &Path) -> Vec<Found> {
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .flatten()
        .filter_map(|entry| {
            let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
            // One that has just ended has no working directory.
            let cwd = fs::read_link(entry.path().join("cwd")).ok()?;
            if !cwd.starts_with(directory) {
                return None;
            }
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command)
                .replace('\0', " ")
                .trim()
                .to_owned();
            Some(Found { pid, command })
        })
        .collect()
}

/// Those of them that are VMMs, and not what serves a VMM's memory.
pub(crate) fn vmms_below(directory: &Path) -> Vec<Found> {
    let mut found = working_below(directory);
    found.retain(|process| ARGUMENTS.iter().any(|own| process.command.contains(own)));
    found
}

/// Kills the processes that [work below](working_below) `root`, and waits until they have ended.
pub(crate) fn end_all_below(root: &Path) {
    let mut found = working_below(root);
    // A server works in the root itself, and its VMMs further below.
    found.sort_by_key(|process| fs::read_link(format!("/proc/{}/cwd", process.pid.as_raw_nonzero())).ok());
    for process in found {
        if let Err(error) = kill(process.pid) {
            eprintln!(
                "process {} ({}) could not be killed: {error}",
                process.pid.as_raw_nonzero(),
                process.command
            );
        }
    }
}

/// Whether a process lives; one that has ended and was not reaped yet does not.
pub(crate) fn lives(pid: Pid) -> bool {
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => !ends_by(process, Instant::now()).unwrap_or(true),
        Err(_) => false,
    }
}

/// Kills a process and waits until it has ended; whether it has.
pub(crate) fn kill(pid: Pid) -> rustix::io::Result<bool> {
    match kill_process(pid, Signal::KILL) {
        Ok(()) => wait_for_end(pid, KILL_WAIT),
        Err(Errno::SRCH) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Waits until a process has ended, for a bounded time; whether it has. It need not be a child.
pub(crate) fn wait_for_end(pid: Pid, limit: Duration) -> rustix::io::Result<bool> {
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => ends_by(process, Instant::now() + limit),
        Err(Errno::SRCH) => Ok(true),
        Err(error) => Err(error),
    }
}

fn ends_by(process: impl AsFd, deadline: Instant) -> rustix::io::Result<bool> {
    readable_by(process, deadline)
}

/// Waits until a file has something to read, or a pidfd's process has ended; whether it came to that.
pub(crate) fn readable_by(file: impl AsFd, deadline: Instant) -> rustix::io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // A time limit too long for the kernel is as good as none.
        let left = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&file, PollFlags::IN)], left.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
