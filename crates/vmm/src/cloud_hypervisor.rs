//! The backend for Cloud Hypervisor, v51 to v53, as it is released.
//!
//! ```text
//!   <instance>/vmm.sock      bound here and inherited: `--api-socket fd=N`, so it makes no `.lock`
//!              console.log   its standard output: the guest's serial port in mode `Tty`, appended
//!              console.tty   leads to the terminal that is its standard input: what the serial port reads
//!              vsock.sock    bound by it: leads to the vsock ports of the guest, one of which is the agent's
//!              vmm.log       its standard error: what it says of itself
//!              pages         what its pager counted, if it has one; pager-failed: why that failed, if it did
//!              restoring/    while a VM is restored: the snapshot's files, rewritten for this instance
//! ```
//!
//! A VM is created with one private memory zone, because only a zone can be given a file later: in
//! [`MemoryMode::Cow`] that is the snapshot's memory file, which is mapped privately and never copied.
//! The server has the kernel read the template's hot pages meanwhile. Where that does not apply, the memory is read as in
//! [`MemoryMode::Copy`], and the restore says why.
//! [`MemoryMode::OnDemand`] is its own lazy restore, since v52. In [`MemoryMode::Uffd`], since v53, its memory is served by a
//! [`pager`] of ours.
//!
//! Its guests are not told their generation: it has no device for that.

mod agent;
mod fork_plan;
mod lazy;
pub mod pager;
mod prefetch;
mod restore_dir;
mod served;
mod snapshot;

use std::env;
use std::path::PathBuf;

use async_trait::async_trait;
use stencil_core::{DiskFormat, HypervisorName, InstanceDir, MemoryMode, SnapshotDir, VmGeneration, VmSpec};
use stencil_vmm_api::{
    DiskConfig, ImageType, MemoryConfig, MemoryRestoreMode, MemoryZoneConfig, PingReply, RestoreRequest,
    SerialConfig, SerialMode, VmConfig,
};
use tokio::net::UnixStream;
use tokio::sync::OnceCell;

use crate::process::{Launch, Listens, Session, Streams, remove_socket};
use crate::rest::{absolute, file_url};
use crate::{
    Capabilities, Client, Exit, HotPages, Hypervisor, PageCounters, Restore, Restored, Start, VmStatus,
    VmmError, VmmProcess, binary, console, rest,
};
use prefetch::prefetch;
use restore_dir::RestoreDir;
pub use served::PagerCommand;
pub use snapshot::SnapshotError;

/// The name under which instances ask for this backend.
const NAME: HypervisorName = HypervisorName::from_static("cloud-hypervisor");
/// File name of the binary.
const BINARY: &str = "cloud-hypervisor";
/// The releases whose API and snapshots are known.
const KNOWN_RELEASES: std::ops::RangeInclusive<u32> = 51..=53;
/// The first release that restores memory lazily. Others ignore that it is asked for, and copy.
const ON_DEMAND_SINCE: u32 = 52;
/// The first release that asks the sender of a migration for pages. Others ignore that it is asked for, and would give
/// their guests zeros.
const POSTCOPY_SINCE: u32 = 53;
/// APIC ids have 8 bits where there is no interrupt remapping, and the last means all of them.
const MAX_VCPUS: u32 = 254;
/// What a refused snapshot says where KVM gives no nested state (v53, `hypervisor/src/cpu.rs`).
const NESTED_STATE: &str = "GetNestedState";
/// It follows 10 backing files from the one that it is given (`MAX_NESTING_DEPTH`, block/src/formats/qcow/util.rs in v53).
const MAX_DISK_LAYERS: usize = 11;
/// Name of the memory zone.
const ZONE: &str = "mem0";

/// Cloud Hypervisor: one process, one VM, on `/dev/kvm`.
#[derive(Debug)]
pub struct CloudHypervisor {
    binary: PathBuf,
    pager: Option<PagerCommand>,
    version: OnceCell<String>,
}

impl CloudHypervisor {
    /// With the binary at `binary`. Nothing is run yet.
    pub fn new(binary: PathBuf) -> Self {
        Self {
            binary: absolute(&binary),
            pager: None,
            version: OnceCell::new(),
        }
    }

    /// With this program as its pagers: memory can come in [`MemoryMode::Uffd`].
    #[must_use]
    pub fn with_pager(mut self, pager: PagerCommand) -> Self {
        self.pager = Some(pager);
        self
    }

    /// Where the binary is: in the first directory of `PATH` that has it.
    pub fn find() -> Option<PathBuf> {
        binary::find_in(BINARY, None, &env::var_os("PATH").unwrap_or_default())
    }

    /// The memory modes of its release; of the newest until the binary was asked for its version.
    fn memory_modes(&self) -> Vec<MemoryMode> {
        let release = self.version.get().and_then(|version| release(version));
        let has = |since| release.is_none_or(|release| release >= since);
        let mut modes = vec![MemoryMode::Copy, MemoryMode::Cow];
        if self.pager.is_some() && has(POSTCOPY_SINCE) {
            modes.push(MemoryMode::Uffd);
        }
        if has(ON_DEMAND_SINCE) {
            modes.push(MemoryMode::OnDemand);
        }
        modes
    }

    /// That the VMM which answers is the version that the binary said. The binary may have been replaced since, and a
    /// snapshot would then be recorded as another version's. Returns what it says of itself.
    async fn check_version(&self, client: &Client) -> Result<PingReply, VmmError> {
        let expected = self.version().await?;
        let said = client.ping().await?;
        let running = without_v(&said.build_version);
        if running == expected {
            Ok(said)
        } else {
            Err(VmmError::Replaced {
                binary: self.binary.clone(),
                expected,
                running: running.to_owned(),
            })
        }
    }
}

#[async_trait]
impl Hypervisor for CloudHypervisor {
    fn name(&self) -> HypervisorName {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            memory_modes: self.memory_modes(),
            max_vcpus: MAX_VCPUS,
            host_cpu: true,
            firmware: true,
            console_input: true,
            tells_identity: false,
            max_disk_layers: MAX_DISK_LAYERS,
            agent: true,
            outlives_guest: false,
        }
    }

    async fn version(&self) -> Result<String, VmmError> {
        let ask = async || {
            let said = binary::ask_version(&self.binary, 1).await?;
            let version = without_v(&said).to_owned();
            if release(&version).is_some_and(|release| KNOWN_RELEASES.contains(&release)) {
                Ok(version)
            } else {
                Err(VmmError::UnknownVersion {
                    binary: self.binary.clone(),
                    version,
                    first: *KNOWN_RELEASES.start(),
                    last: *KNOWN_RELEASES.end(),
                })
            }
        };
        self.version.get_or_try_init(ask).await.cloned()
    }

    async fn spawn(&self, dir: &InstanceDir, _start: Start<'_>) -> Result<VmmProcess, VmmError> {
        // It binds this one itself, and cannot where a VMM that was killed has left it.
        let stale = dir.vsock_socket();
        remove_socket(&stale).map_err(|source| VmmError::Prepare { path: stale, source })?;
        served::forget(dir);
        let launch = Launch {
            binary: self.binary.clone(),
            arguments: Vec::new(),
            listens: Listens::Rest,
            streams: Streams::Console,
            session: Session::OfItsOwn,
        };
        rest::spawn(launch, dir).await
    }

    async fn create(
        &self,
        dir: &InstanceDir,
        spec: &VmSpec,
        _generation: &VmGeneration,
    ) -> Result<(), VmmError> {
        let client = Client::new(dir)?;
        self.check_version(&client).await?;
        client.create(&vm_config(spec)?).await
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
        lazy::snapshot(dir, destination).await.map_err(nested_state)
    }

    async fn restore(&self, dir: &InstanceDir, asked: &Restore<'_>) -> Result<Restored, VmmError> {
        let client = Client::new(dir)?;
        let mode = asked.memory_mode;
        if !self.memory_modes().contains(&mode) {
            return Err(VmmError::MemoryMode { name: NAME, mode });
        }
        // Both go on while the VMM is asked for its version.
        let prefetched = match asked.hot_pages {
            HotPages::Prefetch(list) if mode == MemoryMode::Cow => {
                let (from, memory, list) =
                    (asked.snapshot.clone(), *asked.memory_generation, list.to_owned());
                Some(tokio::task::spawn_blocking(move || {
                    prefetch(&from, memory, &list);
                }))
            }
            _ => None,
        };
        let (to, from) = (dir.clone(), asked.snapshot.clone());
        let made = tokio::task::spawn_blocking(move || RestoreDir::make(&to, &from, mode));
        let (said, made) = tokio::join!(self.check_version(&client), made);
        let said = said?;
        let (files, not_mapped) = made.map_err(|error| VmmError::Prepare {
            path: dir.path().to_owned(),
            source: std::io::Error::other(error),
        })??;
        match (&not_mapped, &self.pager) {
            (None, Some(pager)) if mode == MemoryMode::Uffd => {
                // It has just answered, so that it has the pid.
                let vmm = VmmProcess::of_pid(u32::try_from(said.pid).unwrap_or_default())?;
                served::restore(pager, dir, &client, vmm, asked).await?;
                return Ok(Restored::as_asked(mode));
            }
            (Some(why), _) if matches!(asked.hot_pages, HotPages::Record) => {
                return Err(VmmError::NotServed { why: why.to_string() });
            }
            _ => {}
        }
        let request = RestoreRequest {
            source_url: file_url(files.path())?,
            memory_restore_mode: match mode {
                MemoryMode::OnDemand => MemoryRestoreMode::OnDemand,
                _ => MemoryRestoreMode::Copy,
            },
            ..RestoreRequest::default()
        };
        client.restore(&request).await?;
        if let Some(prefetched) = prefetched {
            // The guest runs all the same where they could not be had.
            let _ = prefetched.await;
        }
        Ok(match not_mapped {
            None => Restored::as_asked(asked.memory_mode),
            Some(why) => Restored {
                memory_mode: MemoryMode::Copy,
                reason: Some(match mode {
                    MemoryMode::Uffd => format!("the memory could not be served: {why}"),
                    _ => format!("the memory could not be mapped: {why}"),
                }),
            },
        })
    }

    async fn info(&self, dir: &InstanceDir) -> Result<VmStatus, VmmError> {
        Ok(rest::status(Client::new(dir)?.info().await?))
    }

    async fn console_input(&self, dir: &InstanceDir, vmm: &VmmProcess, input: &[u8]) -> Result<(), VmmError> {
        console::write_to_terminal(dir, vmm, input).await
    }

    async fn page_counters(&self, dir: &InstanceDir) -> Result<PageCounters, VmmError> {
        Ok(served::page_counters(dir))
    }

    fn last_words(&self, dir: &InstanceDir) -> Option<String> {
        served::last_words(dir)
    }

    async fn connect_agent(&self, dir: &InstanceDir) -> Result<UnixStream, VmmError> {
        agent::connect(dir).await
    }

    async fn press_power_button(&self, dir: &InstanceDir) -> Result<bool, VmmError> {
        Client::new(dir)?.press_power_button().await.map(|()| true)
    }

    async fn stop(&self, dir: &InstanceDir, vmm: &VmmProcess) -> Result<Exit, VmmError> {
        let exit = rest::stop(dir, vmm).await?;
        served::until_ended(dir).await?;
        Ok(exit)
    }
}

/// The definition of the VM.
fn vm_config(spec: &VmSpec) -> Result<VmConfig, VmmError> {
    Ok(VmConfig {
        memory: MemoryConfig {
            size: 0,
            zones: vec![MemoryZoneConfig {
                id: ZONE.to_owned(),
                size: spec.memory_bytes,
                ..MemoryZoneConfig::default()
            }],
        },
        disks: disks(spec)?,
        serial: SerialConfig {
            mode: SerialMode::Tty,
            ..SerialConfig::default()
        },
        vsock: Some(agent::vsock()),
        ..rest::vm_config(spec)?
    })
}

/// What a refused snapshot means where the host's KVM does not tell a vCPU's nested state (`KVM_GET_NESTED_STATE`).
fn nested_state(failed: VmmError) -> VmmError {
    match &failed {
        VmmError::Rejected { body, .. } if body.0.iter().any(|line| line.contains(NESTED_STATE)) => {
            VmmError::NestedState {
                source: Box::new(failed),
            }
        }
        _ => failed,
    }
}

/// Its disks: of those that the guest writes the instance's own layers, by names in the VMM's working directory.
fn disks(spec: &VmSpec) -> Result<Vec<DiskConfig>, VmmError> {
    let disks = spec.disks.iter().enumerate();
    disks
        .map(|(number, disk)| {
            let (path, format) = if disk.read_only {
                (rest::utf8(&disk.path)?, disk.format)
            } else {
                (InstanceDir::disk_name(number), DiskFormat::Qcow2)
            };
            Ok(DiskConfig {
                id: format!("disk{number}"),
                path,
                readonly: disk.read_only,
                image_type: match format {
                    DiskFormat::Raw => ImageType::Raw,
                    DiskFormat::Qcow2 => ImageType::Qcow2,
                },
                backing_files: !disk.read_only,
            })
        })
        .collect()
}

/// `--version` says `v53.0`.
fn without_v(version: &str) -> &str {
    version.strip_prefix('v').unwrap_or(version)
}

/// The number of the release: 53 of `53.0` and of `53.0-12-g0a1b2c3`.
fn release(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_the_number_before_the_first_dot() {
        assert_eq!(release("53.0"), Some(53));
        assert_eq!(release("51.2-12-g0a1b2c3-dirty"), Some(51));
        assert_eq!(release("next"), None);
    }
}
