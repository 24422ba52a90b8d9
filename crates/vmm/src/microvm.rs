//! The backend for Stencil's own VMM, `stencil-microvm`.

use std::env;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use stencil_core::{HypervisorName, InstanceDir, MemoryMode, SnapshotDir, VmGeneration, VmSpec};
use stencil_vmm_api::{
    MICROVM_MAX_VCPUS, MemoryConfig, MemoryRestoreMode, RestoreRequest, SerialConfig, SerialMode, VmConfig,
};
use tokio::net::UnixStream;
use tokio::sync::OnceCell;

use crate::process::{Launch, Listens, Session, Streams};
use crate::rest::{absolute, file_url, utf8};
use crate::{
    Capabilities, Client, Exit, HotPages, Hypervisor, PageCounters, Restore, Restored, Start, VmStatus,
    VmmError, VmmProcess, binary, console, rest,
};

/// The name under which instances ask for this backend.
const NAME: HypervisorName = HypervisorName::from_static("microvm");
/// File name of the binary.
const BINARY: &str = "stencil-microvm";

/// Stencil's own VMM: one process, one VM, on `/dev/kvm`.
#[derive(Debug)]
pub struct MicroVm {
    binary: PathBuf,
    version: OnceCell<String>,
}

impl MicroVm {
    /// With the binary at `binary`. Nothing is run yet.
    pub fn new(binary: PathBuf) -> Self {
        Self {
            binary: absolute(&binary),
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
        binary::find_in(BINARY, beside.as_deref(), &path).ok_or_else(|| VmmError::NotFound {
            name: BINARY,
            beside: beside.unwrap_or_default(),
        })
    }
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
            host_cpu: true,
            firmware: false,
            console_input: true,
            tells_identity: true,
            max_disk_layers: 0,
            agent: false,
            outlives_guest: true,
        }
    }

    async fn version(&self) -> Result<String, VmmError> {
        self.version
            .get_or_try_init(|| binary::ask_version(&self.binary, 1))
            .await
            .cloned()
    }

    async fn spawn(&self, dir: &InstanceDir, _start: Start<'_>) -> Result<VmmProcess, VmmError> {
        let launch = Launch {
            binary: self.binary.clone(),
            arguments: Vec::new(),
            listens: Listens::Rest,
            streams: Streams::Own,
            // It makes one itself, which is faster: see `process::spawn`.
            session: Session::OfTheServer,
        };
        rest::spawn(launch, dir).await
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
        rest::snapshot(dir, destination).await
    }

    async fn restore(&self, dir: &InstanceDir, asked: &Restore<'_>) -> Result<Restored, VmmError> {
        let (hot_pages, record_hot_pages) = match asked.hot_pages {
            HotPages::Unused => (None, None),
            HotPages::Prefetch(list) => (Some(utf8(list)?), None),
            HotPages::Record => (None, Some(InstanceDir::RECORDED_HOT_PAGES.to_owned())),
        };
        let request = RestoreRequest {
            source_url: file_url(asked.snapshot.path())?,
            prefault: false,
            memory_restore_mode: match asked.memory_mode {
                MemoryMode::Copy => MemoryRestoreMode::Copy,
                MemoryMode::Cow => MemoryRestoreMode::Cow,
                MemoryMode::Uffd => MemoryRestoreMode::Uffd,
                mode @ MemoryMode::OnDemand => return Err(VmmError::MemoryMode { name: NAME, mode }),
            },
            resume: false,
            generation: Some(asked.generation.to_string()),
            memory_generation: Some(asked.memory_generation.to_string()),
            hot_pages,
            record_hot_pages,
        };
        Client::new(dir)?.restore(&request).await?;
        Ok(Restored::as_asked(asked.memory_mode))
    }

    async fn info(&self, dir: &InstanceDir) -> Result<VmStatus, VmmError> {
        Ok(rest::status(Client::new(dir)?.info().await?))
    }

    async fn console_input(
        &self,
        dir: &InstanceDir,
        _vmm: &VmmProcess,
        input: &[u8],
    ) -> Result<(), VmmError> {
        console::write_to_socket(dir, input).await
    }

    async fn page_counters(&self, dir: &InstanceDir) -> Result<PageCounters, VmmError> {
        Ok(Client::new(dir)?
            .counters()
            .await?
            .remove("pages")
            .unwrap_or_default())
    }

    async fn connect_agent(&self, _dir: &InstanceDir) -> Result<UnixStream, VmmError> {
        Err(VmmError::NoAgentPort { name: NAME })
    }

    fn last_words(&self, _dir: &InstanceDir) -> Option<String> {
        None
    }

    async fn stop(&self, dir: &InstanceDir, vmm: &VmmProcess) -> Result<Exit, VmmError> {
        rest::stop(dir, vmm).await
    }
}

/// The definition of the VM. Paths in it that belong to the instance are relative to the VMM's working directory, so
/// that a snapshot's `config.json` fits every fork.
fn vm_config(spec: &VmSpec, generation: &VmGeneration) -> Result<VmConfig, VmmError> {
    Ok(VmConfig {
        memory: MemoryConfig {
            size: spec.memory_bytes,
            zones: Vec::new(),
        },
        serial: SerialConfig {
            mode: SerialMode::Socket,
            file: Some(InstanceDir::CONSOLE_LOG.to_owned()),
            socket: Some(InstanceDir::CONSOLE_SOCKET.to_owned()),
        },
        generation: Some(generation.to_string()),
        ..rest::vm_config(spec)?
    })
}
