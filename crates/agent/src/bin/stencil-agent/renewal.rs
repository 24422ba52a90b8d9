//! What the kernel cannot renew for a fork is renewed by who owns it: programs of the guest's administrator run in each new epoch,
//! and processes that have asked for it are told. Both is done before the users' processes go on.
//!
//! ```text
//! /etc/stencil/fork.d/*         programs, run one after the other in the order of their names
//! /run/stencil/fork.d.log       what they wrote in this epoch
//! /run/stencil/notify.d/<pid>   a process that wants a signal; what is in the file is its name: USR1 (also if empty), USR2, HUP, WINCH
//! /run/stencil/epoch            the epoch; replaced in each new one, for inotify(7)
//! ```

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};
use stencil_agent::Epoch;

use crate::log;

const PROGRAMS: &str = "/etc/stencil/fork.d";
const RUN: &str = "/run/stencil";
/// How long all programs together may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Of what a program wrote so much of the end is told where it failed, in bytes.
const TOLD: usize = 400;

/// Why a guest does not go on as another machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RenewalError {
    #[error("could not use {}", .0.display())]
    File(PathBuf, #[source] io::Error),
    #[error("could not run {}", .0.display())]
    Run(PathBuf, #[source] io::Error),
    #[error("{} ended with {status}: {wrote}", program.display())]
    Failed {
        program: PathBuf,
        status: ExitStatus,
        wrote: String,
    },
    #[error("{} did not end in time; all programs of {PROGRAMS} together have {} s", .0.display(), LIMIT.as_secs())]
    TooLong(PathBuf),
}

/// Runs the programs, tells the processes, and says which epoch it is.
///
/// # Errors
/// The first program that fails: then nobody is told.
pub(crate) fn renew(epoch: &Epoch) -> Result<(), RenewalError> {
    let run = Path::new(RUN);
    let notify = run.join("notify.d");
    // Like /tmp: everybody can ask, and nobody for another's process.
    let made = fs::create_dir_all(&notify)
        .and_then(|()| fs::set_permissions(&notify, Permissions::from_mode(0o1777)));
    run_programs(epoch, &run.join("fork.d.log"))?;
    let said = made.and_then(|()| {
        tell(&notify);
        let (name, new) = (run.join("epoch"), run.join(".epoch"));
        fs::write(&new, format!("{}\n", id(epoch)))?;
        fs::rename(&new, &name)
    });
    // Where nobody can write there, nobody has asked to be told.
    if let Err(error) = said {
        log(&format!("cannot tell of the epoch in {RUN}: {error}"));
    }
    Ok(())
}

fn id(epoch: &Epoch) -> String {
    epoch.id.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn run_programs(epoch: &Epoch, log: &Path) -> Result<(), RenewalError> {
    let programs = programs().map_err(|error| RenewalError::File(PROGRAMS.into(), error))?;
    if programs.is_empty() {
        return Ok(());
    }
    let until = Instant::now() + LIMIT;
    let failed = |error| RenewalError::File(log.to_owned(), error);
    File::create(log).map_err(failed)?;
    for program in programs {
        let begin = fs::metadata(log).map_err(failed)?.len();
        let output = OpenOptions::new().append(true).open(log).map_err(failed)?;
        let errors = output.try_clone().map_err(failed)?;
        let could_not_run = |error| RenewalError::Run(program.clone(), error);
        let mut child = Command::new(&program)
            .env("STENCIL_EPOCH", id(epoch))
            .env("STENCIL_NAME", &epoch.host_name)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            // What it leaves in time goes on; what takes too long is ended with all of it.
            .process_group(0)
            .spawn()
            .map_err(could_not_run)?;
        let Some(status) = ended_by(&mut child, until).map_err(could_not_run)? else {
            return Err(RenewalError::TooLong(program));
        };
        if !status.success() {
            let wrote = fs::read(log).unwrap_or_default();
            let wrote = wrote
                .get(usize::try_from(begin).unwrap_or(usize::MAX)..)
                .unwrap_or_default();
            let wrote = &wrote[wrote.len().saturating_sub(TOLD)..];
            return Err(RenewalError::Failed {
                wrote: String::from_utf8_lossy(wrote).trim().to_owned(),
                program,
                status,
            });
        }
    }
    Ok(())
}

/// The programs there are, in the order of their names. As run-parts(8) does, it leaves out hidden files and those that an editor or a
/// package manager left.
fn programs() -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(PROGRAMS) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut programs = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_meant = !name.starts_with('.') && !name.ends_with('~') && !name.contains(".dpkg-");
        // What a link leads to counts.
        let found = fs::metadata(&path)?;
        if is_meant && found.is_file() && found.mode() & 0o111 != 0 {
            programs.push(path);
        }
    }
    programs.sort_unstable();
    Ok(programs)
}

/// How a child ended; `None` if it had to be killed because its time was over.
fn ended_by(child: &mut Child, until: Instant) -> io::Result<Option<ExitStatus>> {
    let pid = Pid::from_child(child);
    let ends = pidfd_open(pid, PidfdFlags::empty())?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // One that has just ended has nobody to be killed.
            let _ = kill_process_group(pid, Signal::KILL);
            child.wait()?;
            return Ok(None);
        }
        let left = rustix::time::Timespec::try_from(left).map_err(|_| ErrorKind::InvalidInput)?;
        match poll(&mut [PollFd::new(&ends, PollFlags::IN)], Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends each process that has asked for it its signal. They get it when they go on, before they do anything else.
fn tell(notify: &Path) {
    let Ok(entries) = fs::read_dir(notify) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if !matches!(tell_one(&path), Ok(true)) {
            // Of a process that has gone, or of none that may ask so.
            let _ = fs::remove_file(&path);
        }
    }
}

/// Whether there is a process that is told, of whoever made the file.
fn tell_one(path: &Path) -> io::Result<bool> {
    let pid = path
        .file_name()
        .and_then(OsStr::to_str)
        .and_then(|name| name.parse().ok());
    let Some(pid) = pid.and_then(Pid::from_raw) else {
        return Ok(false);
    };
    let asked_by = fs::symlink_metadata(path)?;
    let owner = fs::metadata(format!("/proc/{}", pid.as_raw_nonzero()))?.uid();
    if !asked_by.is_file() || (asked_by.uid() != 0 && asked_by.uid() != owner) {
        return Ok(false);
    }
    let signal = match fs::read_to_string(path)?.trim() {
        "" | "USR1" => Signal::USR1,
        "USR2" => Signal::USR2,
        "HUP" => Signal::HUP,
        "WINCH" => Signal::WINCH,
        _ => return Ok(false),
    };
    Ok(kill_process(pid, signal).is_ok())
}
