//! The backend for Stencil's own VMM, `stencil-microvm`.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use stencil_core::{
    GuestEnd, HypervisorName, InstanceDir, MemoryMode, SnapshotDir, VmGeneration, VmPhase, VmSpec,
};
use stencil_vmm_api::{
    CpusConfig, MICROVM_MAX_VCPUS, MemoryConfig, MemoryRestoreMode, PayloadConfig, RestoreRequest,
    SerialConfig, SerialMode, SnapshotRequest, VmConfig, VmInfo, VmState,
};
use tokio::process::Command;
use tokio::sync::OnceCell;

use crate::{
    Capabilities, Client, Exit, HotPages, Hypervisor, KillGuard, PageCounters, Restore, VmStatus, VmmError,
    VmmProcess, process,
};

/// The name under which instances ask for this backend.
const NAME: HypervisorName = HypervisorName::from_static("microvm");
/// File name of the binary.
const BINARY: &str = "stencil-microvm";
/// How long `--version` may take: it prints and ends.
const VERSION_DEADLINE: Duration = Duration::from_secs(10);
/// How long a VMM has to end after it said that it would.
const AFTER_SHUTDOWN: Duration = Duration::from_secs(5);

/// Stencil's own VMM: one process, one VM, on `/dev/kvm`.
#[derive(Debug)]
pub struct MicroVm {
    binary: PathBuf,
    version: OnceCell<String>,
}

impl MicroVm {
    /// With the binary at `binary`. Nothing is run yet.
    pub fn new(binary: PathBuf) -> Self {
        // Made absolute, because the VMM is started in another working directory.
        let binary = std::path::absolute(&binary).unwrap_or(binary);
        Self {
            binary,
            version: OnceCell::new(),
        }
    }

    /// Where the binary is: beside the running executable, else in the first directory of `PATH` that has it.
    ///
    /// # Errors
    /// [`VmmError::NotFound`].
    pub fn find() -> Result<PathBuf, VmmError> {
        let beside = env::current_exe()
            .ok()
            .and_then(|executable| executable.parent().map(Path::to_owned));
        let path = env::var_os("PATH").unwrap_or_default();
        find_in(beside.as_deref(), &path).ok_or_else(|| VmmError::NotFound {
            name: BINARY,
            beside: beside.unwrap_or_default(),
        })
    }
}

fn find_in(beside: Option<&Path>, path: &OsStr) -> Option<PathBuf> {
    let is_executable = |file: &PathBuf| {
        fs::metadata(file).is_ok_and(|facts| facts.is_file() && facts.permissions().mode() & 0o111 != 0)
    };
    let directories = beside
        .map(Path::to_owned)
        .into_iter()
        .chain(env::split_paths(path));
    directories
        .map(|directory| directory.join(BINARY))
        .find(is_executable)
}

#[async_trait]
impl Hypervisor for MicroVm {
    fn name(&self) -> HypervisorName {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            memory_modes: vec![MemoryMode::Copy, MemoryMode::Cow, MemoryMode::Uffd],
            max_vcpus: MICROVM_MAX_VCPUS,
        }
    }

    async fn version(&self) -> Result<String, VmmError> {
        self.version
            .get_or_try_init(|| ask_version(&self.binary))
            .await
            .cloned()
    }

    async fn spawn(&self, dir: &InstanceDir) -> Result<VmmProcess, VmmError> {
        let (binary, owned_dir) = (self.binary.clone(), dir.clone());
        // If this future is dropped, what the blocking task started is killed by the guard that it returns.
        match tokio::task::spawn_blocking(move || process::spawn(&binary, &owned_dir)).await {
            Ok(started) => started.map(KillGuard::keep),
            Err(error) => Err(VmmError::Spawn {
                binary: self.binary.clone(),
                source: io::Error::other(error),
            }),
        }
    }

    async fn create(
        &self,
        dir: &InstanceDir,
        spec: &VmSpec,
        generation: &VmGeneration,
    ) -> Result<(), VmmError> {
        Client::new(dir)?.create(&vm_config(spec, generation)?).await
    }

    async fn boot(&self, dir: &InstanceDir) -> Result<(), VmmError> {
        Client::new(dir)?.boot().await
    }

    async fn pause(&self, dir: &InstanceDir) -> Result<(), VmmError> {
        Client::new(dir)?.pause().await
    }

    async fn resume(&self, dir: &InstanceDir) -> Result<(), VmmError> {
        Client::new(dir)?.resume().await
    }

    async fn snapshot(&self, dir: &InstanceDir, destination: &SnapshotDir) -> Result<(), VmmError> {
        let request = SnapshotRequest {
            destination_url: file_url(destination.path())?,
        };
        Client::new(dir)?.snapshot(&request).await
    }

    async fn restore(&self, dir: &InstanceDir, request: &Restore<'_>) -> Result<(), VmmError> {
        let (hot_pages, record_hot_pages) = match request.hot_pages {
            HotPages::Unused => (None, None),
            HotPages::Prefetch(list) => (Some(utf8(list)?), None),
            HotPages::Record => (None, Some(InstanceDir::RECORDED_HOT_PAGES.to_owned())),
        };
        let request = RestoreRequest {
            source_url: file_url(request.snapshot.path())?,
            prefault: false,
            memory_restore_mode: match request.memory_mode {
                MemoryMode::Copy => MemoryRestoreMode::Copy,
                MemoryMode::Cow => MemoryRestoreMode::Cow,
                MemoryMode::Uffd => MemoryRestoreMode::Uffd,
            },
            resume: false,
            generation: Some(request.generation.to_string()),
            memory_generation: Some(request.memory_generation.to_string()),
            hot_pages,
            record_hot_pages,
        };
        Client::new(dir)?.restore(&request).await
    }

    async fn info(&self, dir: &InstanceDir) -> Result<VmStatus, VmmError> {
        Ok(status(Client::new(dir)?.info().await?))
    }

    async fn page_counters(&self, dir: &InstanceDir) -> Result<PageCounters, VmmError> {
        Ok(Client::new(dir)?
            .counters()
            .await?
            .remove("pages")
            .unwrap_or_default())
    }

    async fn stop(&self, dir: &InstanceDir, vmm: &VmmProcess) -> Result<Exit, VmmError> {
        if vmm.has_exited().is_none() {
            match ask_to_end(dir).await {
                Ok(()) => drop(vmm.exited_within(AFTER_SHUTDOWN).await),
                // It may be busy, hung or deaf: no reason to let it live.
                Err(error) => tracing::debug!(%error, "a VMM cannot be asked to end"),
            }
        }
        let exit = match vmm.has_exited() {
            Some(exit) => exit,
            None => vmm.terminate().await?,
        };
        for socket in [dir.vmm_socket(), dir.console_socket()] {
            process::remove_socket(&socket).map_err(|source| VmmError::Prepare { path: socket, source })?;
        }
        Ok(exit)
    }
}

async fn ask_to_end(dir: &InstanceDir) -> Result<(), VmmError> {
    Client::new(dir)?.shutdown().await
}

/// The definition of the VM. Paths in it that belong to the instance are relative to the VMM's working directory, so
/// that a snapshot's `config.json` fits every fork.
fn vm_config(spec: &VmSpec, generation: &VmGeneration) -> Result<VmConfig, VmmError> {
    Ok(VmConfig {
        cpus: CpusConfig {
            boot_vcpus: spec.vcpus,
            max_vcpus: spec.vcpus,
        },
        memory: MemoryConfig {
            size: spec.memory_bytes,
            zones: Vec::new(),
        },
        payload: Some(PayloadConfig {
            kernel: Some(utf8(&spec.kernel)?),
            initramfs: spec.initrd.as_deref().map(utf8).transpose()?,
            cmdline: Some(spec.cmdline.clone()),
        }),
        serial: SerialConfig {
            mode: SerialMode::Socket,
            file: Some(InstanceDir::CONSOLE_LOG.to_owned()),
            socket: Some(InstanceDir::CONSOLE_SOCKET.to_owned()),
        },
        generation: Some(generation.to_string()),
        ..VmConfig::default()
    })
}

fn status(info: Option<VmInfo>) -> VmStatus {
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
fn file_url(path: &Path) -> Result<String, VmmError> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    Ok(format!("file://{}", utf8(&absolute)?))
}

fn utf8(path: &Path) -> Result<String, VmmError> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| VmmError::PathNotUtf8 {
            path: path.to_owned(),
        })
}

/// Runs `<binary> --version`, which prints `<name> <version>`.
async fn ask_version(binary: &Path) -> Result<String, VmmError> {
    let spawn = |source| VmmError::Spawn {
        binary: binary.to_owned(),
        source,
    };
    let asked = Command::new(binary)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match tokio::time::timeout(VERSION_DEADLINE, asked).await {
        Ok(output) => output.map_err(spawn)?,
        Err(_elapsed) => return Err(spawn(io::ErrorKind::TimedOut.into())),
    };
    let said = String::from_utf8_lossy(&output.stdout);
    let is_version = |word: &&str| {
        word.trim_start_matches('v')
            .starts_with(|first: char| first.is_ascii_digit())
    };
    match said.split_ascii_whitespace().nth(1).filter(is_version) {
        Some(version) if output.status.success() => Ok(version.to_owned()),
        _ => Err(VmmError::Version {
            binary: binary.to_owned(),
            said: said.chars().take(200).collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a file with the binary's name and these permissions in a new directory below `root`.
    fn place(root: &Path, directory: &str, mode: u32) -> PathBuf {
        let directory = root.join(directory);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join(BINARY), "").unwrap();
        fs::set_permissions(directory.join(BINARY), fs::Permissions::from_mode(mode)).unwrap();
        directory
    }

    #[test]
    fn the_binary_beside_the_executable_goes_before_those_of_path() {
        let root = tempfile::tempdir().unwrap();
        let beside = place(root.path(), "beside", 0o755);
        let first = place(root.path(), "first", 0o755);
        let path = env::join_paths([&first]).unwrap();
        assert_eq!(find_in(Some(&beside), &path), Some(beside.join(BINARY)));
        assert_eq!(find_in(Some(root.path()), &path), Some(first.join(BINARY)));
    }

    #[test]
    fn what_cannot_be_executed_is_passed_over() {
        let root = tempfile::tempdir().unwrap();
        let text = place(root.path(), "text", 0o644);
        let program = place(root.path(), "program", 0o755);
        let path = env::join_paths([Path::new("/nonexistent"), &text, &program]).unwrap();
        assert_eq!(find_in(None, &path), Some(program.join(BINARY)));
        assert_eq!(find_in(None, text.as_os_str()), None);
    }
}
