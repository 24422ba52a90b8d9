//! What all backends do alike that speak the contract of `stencil-vmm-api`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use stencil_core::{GuestEnd, InstanceDir, SnapshotDir, VmPhase, VmSpec};
use stencil_vmm_api::{CpusConfig, PayloadConfig, SnapshotRequest, VmConfig, VmInfo, VmState};

use crate::process::{self, Launch};
use crate::{Client, Exit, KillGuard, VmStatus, VmmError, VmmProcess};

/// How long a VMM has to end after it said that it would.
const AFTER_SHUTDOWN: Duration = Duration::from_secs(5);

/// Starts a VMM on a thread on which that may block. If this future is dropped, what was started is killed.
pub(crate) async fn spawn(launch: Launch, dir: &InstanceDir) -> Result<VmmProcess, VmmError> {
    let (binary, dir) = (launch.binary.clone(), dir.clone());
    // If this future is dropped, what the blocking task started is killed by the guard that it returns.
    match tokio::task::spawn_blocking(move || process::spawn(&launch, &dir)).await {
        Ok(started) => started.map(KillGuard::keep),
        Err(error) => Err(VmmError::Spawn {
            binary,
            source: io::Error::other(error),
        }),
    }
}

/// Writes a paused VM into `destination`.
pub(crate) async fn snapshot(dir: &InstanceDir, destination: &SnapshotDir) -> Result<(), VmmError> {
    let request = SnapshotRequest {
        destination_url: file_url(destination.path())?,
    };
    Client::new(dir)?.snapshot(&request).await
}

/// The part of a VM's definition that is the same for all: its vCPUs, and what it boots.
pub(crate) fn vm_config(spec: &VmSpec) -> Result<VmConfig, VmmError> {
    Ok(VmConfig {
        cpus: CpusConfig {
            boot_vcpus: spec.vcpus,
            max_vcpus: spec.vcpus,
        },
        payload: Some(PayloadConfig {
            kernel: spec.kernel.as_deref().map(utf8).transpose()?,
            firmware: spec.firmware.as_deref().map(utf8).transpose()?,
            initramfs: spec.initrd.as_deref().map(utf8).transpose()?,
            // To firmware it would be nothing that it knows.
            cmdline: spec.kernel.is_some().then(|| spec.cmdline.clone()),
        }),
        ..VmConfig::default()
    })
}

/// Ends a VMM: asks it, then SIGTERM, then SIGKILL; and removes its sockets.
pub(crate) async fn stop(dir: &InstanceDir, vmm: &VmmProcess) -> Result<Exit, VmmError> {
    end(dir, vmm, async { Client::new(dir)?.shutdown().await }).await
}

/// Ends a VMM: asks it in its own way, then SIGTERM, then SIGKILL; and removes its sockets.
pub(crate) async fn end(
    dir: &InstanceDir,
    vmm: &VmmProcess,
    ask: impl Future<Output = Result<(), VmmError>>,
) -> Result<Exit, VmmError> {
    if vmm.has_exited().is_none() {
        match ask.await {
            Ok(()) => drop(vmm.exited_within(AFTER_SHUTDOWN).await),
            // It may be busy, hung or deaf: no reason to let it live.
            Err(error) => tracing::debug!(%error, "a VMM cannot be asked to end"),
        }
    }
    let exit = match vmm.has_exited() {
        Some(exit) => exit,
        None => vmm.terminate().await?,
    };
    let sockets = [
        dir.vmm_socket(),
        dir.console_socket(),
        dir.console_terminal(),
        dir.agent_socket(),
        dir.vsock_socket(),
    ];
    for socket in sockets {
        process::remove_socket(&socket).map_err(|source| VmmError::Prepare { path: socket, source })?;
    }
    Ok(exit)
}

/// What `vm.info` says; `None` is that there is no VM.
pub(crate) fn status(info: Option<VmInfo>) -> VmStatus {
    let Some(info) = info else {
        return VmStatus {
            phase: VmPhase::Undefined,
            end: None,
        };
    };
    let phase = match info.state {
        VmState::Created => VmPhase::Created,
        VmState::Running => VmPhase::Running,
        VmState::Paused => VmPhase::Paused,
        VmState::Shutdown => VmPhase::Shutdown,
    };
    let end = info.end.map(|end| GuestEnd {
        failed: end.kind.is_failure(),
        reason: end.reason,
    });
    VmStatus { phase, end }
}

/// `file://` and the absolute path as it is: VMMs take what follows the prefix without decoding it.
pub(crate) fn file_url(path: &Path) -> Result<String, VmmError> {
    Ok(format!("file://{}", utf8(&absolute(path))?))
}

/// VMMs run in another working directory.
pub(crate) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// A path as it can go into a request.
pub(crate) fn utf8(path: &Path) -> Result<String, VmmError> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| VmmError::PathNotUtf8 {
            path: path.to_owned(),
        })
}
