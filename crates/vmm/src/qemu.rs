//! The backend for QEMU, 7.2 and later, as distributions have it: `qemu-system-x86_64`, which runs Linux guests on any host.
//!
//! ```text
//!   <instance>/vmm.sock       its monitor (QMP): bound here and inherited
//!              machine.json   what it was started as, and its process: its command line is the VM
//!              console.log   its standard output: the guest's serial port, appended
//!              console.tty   leads to the terminal that is its standard input: what the serial port reads
//!              agent.sock    the guest's virtio-serial port `org.stencil.agent`
//!              vmm.log       its standard error: what it says of itself
//!   <snapshot>/config.json    the machine
//!              state.json     its vCPUs and devices, in QEMU's own binary form
//!              memory-ranges  its memory, from address 0 on, without the gap below 4 GiB
//! ```
//!
//! The serial port is QEMU's standard input and output, and not a socket of its own with a log: what is written while that
//! socket's client is slow comes into the log twice (7.2, `qemu_chr_write_buffer`).
//!
//! A VM runs under KVM where that runs Linux, else under TCG, QEMU's emulator, which needs nothing of the host; it stays with
//! what it was booted with.
//!
//! A snapshot is made of the state of the devices, which QEMU writes, and of the memory, which is read from its address space:
//! one way for a VM that was booted and for one that was restored from a mapped file. A VM is restored by an incoming migration of
//! that state, over memory that is there already: the snapshot's file, mapped privately ([`MemoryMode::Cow`]), or a copy of it
//! ([`MemoryMode::Copy`]). [`MemoryMode::Uffd`] would take QEMU's memory out of its hands, and it has no way for that.

mod accelerator;
mod link;
mod machine;
mod memory;
mod monitor;

use std::env;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use async_trait::async_trait;
use rustix::fs::{Access, access};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use stencil_core::{
    GuestEnd, HypervisorName, InstanceDir, MemoryMode, ProcessIdentity, SnapshotDir, VmGeneration, VmPhase,
    VmSpec,
};
use tokio::net::UnixStream;
use tokio::sync::OnceCell;

use crate::process::{Launch, Listens, Session, Streams};
use crate::rest::absolute;
use crate::{
    Call, Capabilities, Exit, Hypervisor, PageCounters, Restore, Restored, Start, VmStatus, VmmError,
    VmmProcess, binary, console, rest,
};
pub use accelerator::Accelerator;
use link::{DiskError, Links};
use machine::{Begin, Machine};
use memory::GuestMemory;
use monitor::{Monitor, RunState};

/// The name under which instances ask for this backend.
const NAME: HypervisorName = HypervisorName::from_static("qemu");
/// File name of the binary.
const BINARY: &str = "qemu-system-x86_64";
/// `--version` says `QEMU emulator version 7.2.22 (Debian ...)`.
const WORDS_BEFORE_VERSION: usize = 3;
/// The first release that is known to do all of this.
const FIRST_RELEASE: (u32, u32) = (7, 2);
/// The first release that maps a file privately which it may only read.
const READS_ONLY_SINCE: (u32, u32) = (8, 2);
/// Why memory is copied that was to be mapped.
const NOT_MAPPED: &str = "the memory could not be mapped: QEMU before 8.2 opens a file for writing to map it privately, which only root \
                          may do with a snapshot's";
/// APIC ids have 8 bits where there is no interrupt remapping, and the last means all of them.
const MAX_VCPUS: u32 = 254;
/// It has no limit itself; each layer takes memory, and time at the start.
const MAX_DISK_LAYERS: usize = 32;
/// For how long it is looked whether a disk fails again that failed before.
const TRIED_AGAIN: Duration = Duration::from_millis(500);
/// Name of the file that says what an instance's QEMU was started as.
const MACHINE: &str = "machine.json";

/// QEMU: one process, one VM, under KVM or TCG.
#[derive(Debug)]
pub struct Qemu {
    binary: PathBuf,
    version: OnceCell<String>,
    accelerator: OnceLock<Accelerator>,
    links: Links,
}

/// What an instance's QEMU was started as. Every later call finds it here, also that of another server.
#[derive(Debug, Serialize, Deserialize)]
struct Started {
    machine: Machine,
    process: ProcessIdentity,
    /// Whether its memory is a mapping of a snapshot's file.
    maps_file: bool,
}

impl Qemu {
    /// With the binary at `binary`. Nothing is run yet.
    pub fn new(binary: PathBuf) -> Self {
        Self {
            binary: absolute(&binary),
            version: OnceCell::new(),
            accelerator: OnceLock::new(),
            links: Links::default(),
        }
    }

    /// Where the binary is: in the first directory of `PATH` that has it.
    pub fn find() -> Option<PathBuf> {
        binary::find_in(BINARY, None, &env::var_os("PATH").unwrap_or_default())
    }

    /// What VMs are booted with on this host, which is asked once.
    pub fn host_accelerator(&self) -> Accelerator {
        *self.accelerator.get_or_init(Accelerator::of_host)
    }

    /// Starts it as what it is to be, and writes down what that was.
    async fn launch(&self, dir: &InstanceDir, start: Start<'_>) -> Result<VmmProcess, VmmError> {
        let memory;
        let (machine, generation, begin) = match start {
            Start::Boot { spec, generation } => (
                Machine::new(spec, self.host_accelerator()),
                generation,
                Begin::Boot(spec),
            ),
            Start::Restore(restore) => {
                memory = absolute(&restore.snapshot.memory_ranges());
                let machine = read_json::<Machine>(restore.snapshot.config())?;
                (
                    machine,
                    restore.generation,
                    self.begin(restore.memory_mode, &memory).await?,
                )
            }
        };
        let launch = Launch {
            binary: self.binary.clone(),
            arguments: machine.arguments(generation, begin),
            listens: Listens::Monitor,
            streams: Streams::Console,
            session: Session::OfItsOwn,
        };
        let process = rest::spawn(launch, dir).await?.kill_on_drop();
        let started = Started {
            machine,
            process: process.identity().clone(),
            maps_file: matches!(begin, Begin::Cow { .. }),
        };
        write_json(dir.path().join(MACHINE), &started)?;
        Ok(process.keep())
    }

    /// How a machine begins with the memory of a snapshot.
    async fn begin<'a>(&self, mode: MemoryMode, memory: &'a Path) -> Result<Begin<'a>, VmmError> {
        match mode {
            MemoryMode::Copy => return Ok(Begin::Copy),
            MemoryMode::Cow => {}
            mode => return Err(VmmError::MemoryMode { name: NAME, mode }),
        }
        let reads_only = release(&self.version().await?) >= Some(READS_ONLY_SINCE);
        // A snapshot's memory is not writable, which does not keep root from opening it so.
        if reads_only || access(memory, Access::WRITE_OK).is_ok() {
            Ok(Begin::Cow { memory, reads_only })
        } else {
            Ok(Begin::Copy)
        }
    }

    /// Opens a conversation with a QEMU that was just started. The binary may have been replaced since it was asked for its
    /// version, and a snapshot would then be recorded as another version's.
    async fn open_new(&self, dir: &InstanceDir, call: Call) -> Result<Monitor, VmmError> {
        let expected = self.version().await?;
        let monitor = Monitor::open(&self.links, dir, call).await?;
        let running = monitor.version().to_owned();
        if running == expected {
            Ok(monitor)
        } else {
            Err(VmmError::Replaced {
                binary: self.binary.clone(),
                expected,
                running,
            })
        }
    }
}

#[async_trait]
impl Hypervisor for Qemu {
    fn name(&self) -> HypervisorName {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            memory_modes: vec![MemoryMode::Copy, MemoryMode::Cow],
            max_vcpus: MAX_VCPUS,
            console_input: true,
            // It has a generation id, and next to no guest has a driver for that.
            tells_identity: false,
            max_disk_layers: MAX_DISK_LAYERS,
            agent: true,
            outlives_guest: true,
            firmware: false,
            host_cpu: self.host_accelerator() == Accelerator::Kvm,
        }
    }

    async fn version(&self) -> Result<String, VmmError> {
        let ask = async || {
            let version = binary::ask_version(&self.binary, WORDS_BEFORE_VERSION).await?;
            if release(&version) >= Some(FIRST_RELEASE) {
                Ok(version)
            } else {
                Err(VmmError::OldVersion {
                    binary: self.binary.clone(),
                    version,
                    first: FIRST_RELEASE,
                })
            }
        };
        self.version.get_or_try_init(ask).await.cloned()
    }

    async fn spawn(&self, dir: &InstanceDir, start: Start<'_>) -> Result<VmmProcess, VmmError> {
        self.launch(dir, start).await
    }

    async fn create(&self, dir: &InstanceDir, _: &VmSpec, _: &VmGeneration) -> Result<(), VmmError> {
        let monitor = self.open_new(dir, Call::Create).await?;
        monitor.expect(RunState::Prelaunch).await
    }

    async fn boot(&self, dir: &InstanceDir) -> Result<(), VmmError> {
        let monitor = Monitor::open(&self.links, dir, Call::Boot).await?;
        monitor.expect(RunState::Prelaunch).await?;
        monitor.cont().await
    }

    async fn pause(&self, dir: &InstanceDir) -> Result<(), VmmError> {
        let monitor = Monitor::open(&self.links, dir, Call::Pause).await?;
        monitor.expect(RunState::Running).await?;
        monitor.stop().await
    }

    async fn resume(&self, dir: &InstanceDir) -> Result<(), VmmError> {
        let monitor = Monitor::open(&self.links, dir, Call::Resume).await?;
        // The host had no room for what the guest wrote to a disk; the write is tried again.
        if monitor.status().await? == RunState::IoError {
            return monitor.try_disks_again(TRIED_AGAIN).await;
        }
        monitor.expect(RunState::Paused).await?;
        monitor.cont().await
    }

    async fn snapshot(&self, dir: &InstanceDir, destination: &SnapshotDir) -> Result<(), VmmError> {
        let Started {
            machine,
            process,
            maps_file,
        } = read_started(dir)?;
        let monitor = Monitor::open(&self.links, dir, Call::Snapshot).await?;
        if monitor.status().await? == RunState::IoError {
            // What the guest wants to write is in QEMU alone.
            return Err(monitor.refused(disk_reason(monitor.disk_error().as_ref())));
        }
        monitor.expect(RunState::Paused).await?;
        let address = monitor.memory_address().await?;
        let state = absolute(&destination.state());
        monitor.save_devices(&state).await?;
        let bytes = machine.memory_bytes;
        copy_memory(destination.memory_ranges(), move |memory| {
            GuestMemory::of(&process, address, bytes)?.save(memory, maps_file)
        })
        .await?;
        write_json(destination.config(), &machine)
    }

    async fn restore(&self, dir: &InstanceDir, request: &Restore<'_>) -> Result<Restored, VmmError> {
        let started = read_started(dir)?;
        let monitor = self.open_new(dir, Call::Restore).await?;
        monitor.expect(RunState::Inmigrate).await?;
        if !started.maps_file {
            let address = monitor.memory_address().await?;
            let (process, bytes) = (started.process, started.machine.memory_bytes);
            copy_memory(request.snapshot.memory_ranges(), move |memory| {
                GuestMemory::of(&process, address, bytes)?.load(memory)
            })
            .await?;
        }
        let path = request.snapshot.state();
        let state = File::open(&path).map_err(|source| VmmError::SnapshotFile { path, source })?;
        monitor.load_devices(state.as_fd()).await?;
        Ok(match (request.memory_mode, started.maps_file) {
            (MemoryMode::Cow, false) => Restored {
                memory_mode: MemoryMode::Copy,
                reason: Some(NOT_MAPPED.to_owned()),
            },
            (mode, _) => Restored::as_asked(mode),
        })
    }

    async fn info(&self, dir: &InstanceDir) -> Result<VmStatus, VmmError> {
        let monitor = Monitor::open(&self.links, dir, Call::Info).await?;
        let state = monitor.status().await?;
        let (disk_error, cause) = (monitor.disk_error(), monitor.shutdown_cause());
        Ok(status(state, disk_error.as_ref(), cause.as_deref()))
    }

    async fn console_input(&self, dir: &InstanceDir, vmm: &VmmProcess, input: &[u8]) -> Result<(), VmmError> {
        console::write_to_terminal(dir, vmm, input).await
    }

    async fn page_counters(&self, _dir: &InstanceDir) -> Result<PageCounters, VmmError> {
        // It serves no pages.
        Ok(PageCounters::new())
    }

    async fn connect_agent(&self, dir: &InstanceDir) -> Result<UnixStream, VmmError> {
        let socket = dir.agent_socket();
        UnixStream::connect(&socket)
            .await
            .map_err(|source| VmmError::Agent { socket, source })
    }

    fn last_words(&self, _dir: &InstanceDir) -> Option<String> {
        None
    }

    fn accelerator(&self, dir: &InstanceDir) -> Option<Accelerator> {
        Some(read_started(dir).ok()?.machine.accelerator)
    }

    async fn press_power_button(&self, dir: &InstanceDir) -> Result<bool, VmmError> {
        let monitor = Monitor::open(&self.links, dir, Call::PowerButton).await?;
        monitor.expect(RunState::Running).await?;
        monitor.press_power_button().await.map(|()| true)
    }

    async fn stop(&self, dir: &InstanceDir, vmm: &VmmProcess) -> Result<Exit, VmmError> {
        let quit = async {
            Monitor::open(&self.links, dir, Call::Shutdown)
                .await?
                .quit()
                .await
        };
        rest::end(dir, vmm, quit).await
    }
}

fn status(state: RunState, disk_error: Option<&DiskError>, cause: Option<&str>) -> VmStatus {
    let ended = |phase, failed, reason: &str| VmStatus {
        phase,
        end: Some(GuestEnd {
            failed,
            reason: reason.to_owned(),
        }),
    };
    let down = |failed, reason| ended(VmPhase::Shutdown, failed, reason);
    let stopped = |reason| ended(VmPhase::Paused, true, reason);
    let phase = match state {
        RunState::Prelaunch => VmPhase::Created,
        RunState::Inmigrate => VmPhase::Undefined,
        RunState::Running | RunState::Suspended => VmPhase::Running,
        RunState::Shutdown => {
            return match cause {
                Some("guest-shutdown") => down(false, "the guest powered off"),
                Some("guest-reset") => down(false, "the guest asked for a reset"),
                Some("guest-panic") => down(true, "the guest's kernel panicked"),
                // Another server heard it.
                _ => down(false, "the guest powered off or asked for a reset"),
            };
        }
        RunState::GuestPanicked => return down(true, "the guest's kernel panicked"),
        RunState::InternalError => return down(true, "QEMU could not go on with the guest"),
        RunState::IoError => return stopped(&disk_reason(disk_error)),
        RunState::Watchdog => return stopped("the guest's watchdog ran out"),
        _ => VmPhase::Paused,
    };
    VmStatus { phase, end: None }
}

/// Why a VM was stopped that a disk failed, and what would be right.
fn disk_reason(error: Option<&DiskError>) -> String {
    match error {
        Some(DiskError { nospace: true, .. }) => "the host has no room for what the guest writes to a disk (No space left on \
            device); make room there, then resume it"
            .to_owned(),
        Some(DiskError { reason, .. }) => {
            format!("the host could not read or write a disk of the guest ({reason}); mend that, then resume it")
        }
        // Another server heard it.
        None => "the host could not write a disk of the guest, most often because it has no room (No space left on device); make \
            room there, then resume it"
            .to_owned(),
    }
}

/// 7 and 2 of `7.2.22`.
fn release(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// What the QEMU in `dir` was started as.
fn read_started(dir: &InstanceDir) -> Result<Started, VmmError> {
    read_json(dir.path().join(MACHINE))
}

fn read_json<T: DeserializeOwned>(path: PathBuf) -> Result<T, VmmError> {
    let read = fs::read(&path).and_then(|json| Ok(serde_json::from_slice(&json)?));
    read.map_err(|source| VmmError::Machine { path, source })
}

fn write_json(path: PathBuf, value: &impl Serialize) -> Result<(), VmmError> {
    let new = path.with_extension("new");
    let written = serde_json::to_vec(value).map_err(io::Error::from);
    written
        .and_then(|json| fs::write(&new, json))
        .and_then(|()| fs::rename(&new, &path))
        .map_err(|source| VmmError::Prepare { path, source })
}

/// Copies the guest's memory from or to a file, on a thread on which that may block.
async fn copy_memory(
    file: PathBuf,
    copy: impl FnOnce(&Path) -> io::Result<()> + Send + 'static,
) -> Result<(), VmmError> {
    let path = file.clone();
    let copied = match tokio::task::spawn_blocking(move || copy(&file)).await {
        Ok(copied) => copied,
        Err(error) => Err(io::Error::other(error)),
    };
    copied.map_err(|source| VmmError::GuestMemory { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_their_numbers() {
        assert_eq!(release("7.2.22"), Some((7, 2)));
        assert!(release("10.0.2") > Some(FIRST_RELEASE));
        assert!(release("6.9.9") < Some(FIRST_RELEASE));
        assert!(release("next") < Some(FIRST_RELEASE));
    }
}
