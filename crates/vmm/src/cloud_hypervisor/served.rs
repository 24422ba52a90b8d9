//! A VM whose memory is served by a pager: the pager is started, the VM received, and the VMM ended if the pager fails.

use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use stencil_core::InstanceDir;
use stencil_vmm_api::{MigrationMemoryMode, ReceiveMigrationRequest};
use tokio::net::UnixStream;

use super::pager::{SOCKET, TALLY, last_words as words, tally};
use crate::process::{append_to, processes_below, remove_socket, spawn_watched};
use crate::{Client, Exit, HotPages, KillGuard, PageCounters, Restore, VmmError, VmmProcess};

/// How long the one side of a migration has to notice that the other has failed.
const AFTER_FAILURE: Duration = Duration::from_secs(2);

/// An argument that each pager has.
const MEMORY_GENERATION: &str = "--memory-generation";

/// The program that is a pager: what is asked of it is appended to its arguments.
#[derive(Clone, Debug)]
pub struct PagerCommand {
    /// The program, by its absolute path.
    pub program: PathBuf,
    /// Its first arguments.
    pub arguments: Vec<OsString>,
}

/// Makes the VM of a VMM that has none from the files in its directory, paused.
pub(super) async fn restore(
    pager: &PagerCommand,
    dir: &InstanceDir,
    client: &Client,
    vmm: VmmProcess,
    request: &Restore<'_>,
) -> Result<(), VmmError> {
    let socket = dir.path().join(SOCKET);
    let not_ready = |source| VmmError::Prepare {
        path: dir.path().to_owned(),
        source,
    };
    // What a killed server left.
    remove_socket(&socket).map_err(not_ready)?;
    let directory = open_directory(dir).map_err(not_ready)?;
    let pager = start(pager, dir, &vmm, request).await?;
    let received = receive(dir, client, &pager).await;
    // Best effort: nobody listens there any more, and the next restore removes it.
    let _ = fs::remove_file(&socket);
    if let Err(error) = received {
        // It is gone when the failure is told. What does not end now is killed when the guard goes.
        let _ = pager.terminate().await;
        return Err(error);
    }
    tokio::spawn(end_with(vmm, pager.keep(), directory));
    Ok(())
}

/// Forgets what pagers of an earlier VMM left.
pub(super) fn forget(dir: &InstanceDir) {
    for name in [TALLY, words::NAME] {
        // They are not there as a rule.
        let _ = fs::remove_file(dir.path().join(name));
    }
}

/// Waits until the pager of a VMM that has ended has ended too, which it does by itself.
pub(super) async fn until_ended(dir: &InstanceDir) -> Result<(), VmmError> {
    // Only a VM that is served has counters, and only then is it worth a look at all processes.
    if !dir.path().join(TALLY).exists() {
        return Ok(());
    }
    let path = dir.path().to_owned();
    let found = match tokio::task::spawn_blocking(move || processes_below(&path, is_pager)).await {
        Ok(found) => found?,
        // The closure cannot be cancelled, so the join fails only by its panic, which goes on here.
        Err(failed) => std::panic::resume_unwind(failed.into_panic()),
    };
    for pager in found {
        if let Some(pager) = VmmProcess::attach(&pager.identity)?
            && pager.exited_within(AFTER_FAILURE).await.is_none()
        {
            pager.terminate().await?;
        }
    }
    Ok(())
}

/// Whether the arguments of a process, each ended by a NUL, are those of a pager.
fn is_pager(cmdline: &[u8]) -> bool {
    cmdline
        .split(|&byte| byte == 0)
        .any(|argument| argument == MEMORY_GENERATION.as_bytes())
}

/// What the pager counted; nothing if there was none.
pub(super) fn page_counters(dir: &InstanceDir) -> PageCounters {
    tally::read(&dir.path().join(TALLY))
}

/// Why the pager failed, if it did.
pub(super) fn last_words(dir: &InstanceDir) -> Option<String> {
    words::read(dir.path())
}

async fn start(
    pager: &PagerCommand,
    dir: &InstanceDir,
    vmm: &VmmProcess,
    request: &Restore<'_>,
) -> Result<KillGuard, VmmError> {
    let spawn_failed = |source| VmmError::Spawn {
        binary: pager.program.clone(),
        source,
    };
    let mut command = Command::new(&pager.program);
    command.args(&pager.arguments).current_dir(dir.path());
    command
        .arg(MEMORY_GENERATION)
        .arg(request.memory_generation.to_string());
    match request.hot_pages {
        HotPages::Unused => {}
        HotPages::Prefetch(list) => {
            command.arg("--hot-pages").arg(crate::rest::absolute(list));
        }
        HotPages::Record => {
            command.arg("--record");
        }
    }
    command
        .stdin(Stdio::from(vmm.pidfd().map_err(spawn_failed)?))
        .stdout(append_to(dir.vmm_log())?)
        .stderr(append_to(dir.vmm_log())?);
    // If this future is dropped, what the blocking task started is killed by the guard that it returns.
    let started = tokio::task::spawn_blocking(move || spawn_watched(command)).await;
    started.map_err(|error| spawn_failed(std::io::Error::other(error)))?
}

/// Lets Cloud Hypervisor receive the VM from the pager.
async fn receive(dir: &InstanceDir, client: &Client, pager: &VmmProcess) -> Result<(), VmmError> {
    let migration = ReceiveMigrationRequest {
        // In its working directory, whatever that is called by now.
        receiver_url: format!("unix:{SOCKET}"),
        memory_mode: MigrationMemoryMode::Postcopy,
    };
    let mut received = std::pin::pin!(client.receive_migration(&migration));
    let received = tokio::select! {
        received = &mut received => received,
        exit = pager.exited() => {
            if exit != Exit::Code(0) {
                // It may still wait for the pager to connect.
                drop(UnixStream::connect(dir.path().join(SOCKET)).await);
            }
            match tokio::time::timeout(AFTER_FAILURE, received).await {
                Ok(received) => received,
                Err(_elapsed) => return Err(failed(dir, exit, None)),
            }
        }
    };
    let Err(error) = received else {
        return Ok(());
    };
    match pager.exited_within(AFTER_FAILURE).await {
        Some(exit) if exit != Exit::Code(0) => Err(failed(dir, exit, Some(Box::new(error)))),
        _ => Err(error),
    }
}

fn failed(dir: &InstanceDir, exit: Exit, source: Option<Box<VmmError>>) -> VmmError {
    VmmError::Pager {
        said: last_words(dir).unwrap_or_else(|| exit.to_string()),
        source,
    }
}

/// Ends the VMM if its pager fails: its guest would go on until it touches a page that is not there.
async fn end_with(vmm: VmmProcess, pager: VmmProcess, directory: OwnedFd) {
    let exit = pager.exited().await;
    // It has nothing to complain of where the VMM ended first.
    if exit == Exit::Code(0) {
        return;
    }
    let (pid, pager) = (vmm.identity().pid, pager.identity().pid);
    tracing::error!(pid, pager, %exit, "a pager failed; its VMM is ended");
    // What cannot be said ends the VMM all the same.
    let _ = words::say_for_it(&directory, &format!("its pager ended: {exit}"));
    drop(vmm.kill_on_drop());
}

fn open_directory(dir: &InstanceDir) -> std::io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(dir.path(), flags, Mode::empty())?)
}
