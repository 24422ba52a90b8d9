//! Building a VM from a snapshot, paused.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stencil_vmm_api::{MemoryRestoreMode, RESTORE_GSI, RestoreRequest, VmConfig};

use crate::counters::Counters;
use crate::definition::{Definition, DefinitionError};
use crate::identity::{Generation, GenerationError};
use crate::machine::Machine;
use crate::memory::{GuestRam, MemoryRange, layout};
use crate::pagemap;
use crate::state::{CONFIG, MEMORY, STATE, STATE_VERSION, StateHeader, VmState};
use crate::vcpu::Vcpu;
use crate::vcpu_state::VcpuStateError;
use crate::vm::{BuildError, MicroVm, Parts, Surroundings};

/// The snapshot cannot be restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    #[error("{0:?} is not the URL of a directory; right is file:// and an absolute path")]
    Url(String),
    #[error("Destination is not a directory: {0:?}")]
    NotADirectory(PathBuf),
    #[error("memory_restore_mode is OnDemand; right is Copy or Cow")]
    Mode,
    #[error("generation is wrong")]
    Generation(#[from] GenerationError),
    #[error("{0:?} cannot be read")]
    Read(PathBuf, #[source] io::Error),
    #[error("{0:?} is damaged")]
    Json(PathBuf, #[source] serde_json::Error),
    #[error("{path:?} has version {found}; this VMM reads version {STATE_VERSION}")]
    Version { path: PathBuf, found: u32 },
    #[error("{0:?} defines a VM that cannot be made")]
    Definition(PathBuf, #[source] DefinitionError),
    #[error("state.json has memory at {found:?}; {bytes} bytes of memory lie at {right:?}")]
    Ranges {
        found: Vec<MemoryRange>,
        bytes: u64,
        right: Vec<MemoryRange>,
    },
    #[error("state.json has {found} vCPUs, config.json {defined}")]
    Vcpus { found: usize, defined: u8 },
    #[error("{path:?} has {found} bytes; its ranges have {expected}")]
    MemorySize {
        path: PathBuf,
        found: u64,
        expected: u64,
    },
    #[error(transparent)]
    Build(BuildError),
    #[error("vCPU {index} cannot be restored")]
    Vcpu { index: u8, source: VcpuStateError },
}

impl<E: Into<BuildError>> From<E> for RestoreError {
    fn from(error: E) -> Self {
        Self::Build(error.into())
    }
}

/// How long each phase took; see `vm.counters`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RestoreTimes {
    /// Reading config.json and state.json.
    read: Duration,
    /// Mapping the memory, and reading it in `copy`.
    memory: Duration,
    /// Making the VM in KVM, without vCPUs.
    machine: Duration,
    /// Making the vCPUs and giving them their state.
    vcpus: Duration,
    /// Interrupt controllers, serial port, identity.
    devices: Duration,
    total: Duration,
}

impl RestoreTimes {
    pub(crate) fn microseconds(&self) -> [(&'static str, u64); 6] {
        [
            ("read_us", self.read),
            ("memory_us", self.memory),
            ("machine_us", self.machine),
            ("vcpus_us", self.vcpus),
            ("devices_us", self.devices),
            ("total_us", self.total),
        ]
        .map(|(name, time)| (name, u64::try_from(time.as_micros()).unwrap_or(u64::MAX)))
    }
}

/// Builds the VM of the snapshot in `directory`.
pub(crate) fn restore(
    directory: &Path,
    request: &RestoreRequest,
    surroundings: Surroundings,
) -> Result<MicroVm, RestoreError> {
    let began = Instant::now();
    let mut times = RestoreTimes::default();
    if !directory.is_dir() {
        return Err(RestoreError::NotADirectory(directory.to_owned()));
    }
    let machine_id = request
        .generation
        .as_deref()
        .map(str::parse::<Generation>)
        .transpose()?;
    let (mut definition, state) = read(directory)?;
    if let Some(generation) = machine_id {
        definition.set_generation(generation);
    }
    times.read = began.elapsed();

    let phase = Instant::now();
    let ram = memory(
        &directory.join(MEMORY),
        &state.memory_ranges,
        request.memory_restore_mode,
    )?;
    if request.prefault {
        ram.populate()?;
    }
    times.memory = phase.elapsed();

    let phase = Instant::now();
    let machine = Machine::new(&ram)?;
    times.machine = phase.elapsed();

    let phase = Instant::now();
    let vcpus = vcpus(&machine, &state)?;
    times.vcpus = phase.elapsed();

    let phase = Instant::now();
    machine.restore(&state.machine)?;
    let counters = Arc::new(Counters::new(u32::from(definition.vcpus)));
    let identity = state.identity.clone().restored(machine_id);
    let parts = Parts {
        definition,
        ram,
        machine,
        vcpus,
        identity,
        counters,
    };
    let vm = parts.assemble(state.devices.serial.as_ref(), surroundings)?;
    vm.machine.pulse(RESTORE_GSI)?;
    times.devices = phase.elapsed();

    times.total = began.elapsed();
    tracing::info!(directory = %directory.display(), ?times, "restored");
    // The counters are new, so there is nothing in the way.
    let _ = vm.counters.restore.set(times);
    Ok(vm)
}

/// Reads and checks the two small files.
fn read(directory: &Path) -> Result<(Definition, VmState), RestoreError> {
    let path = directory.join(CONFIG);
    let text = fs::read(&path).map_err(|error| RestoreError::Read(path.clone(), error))?;
    let config: VmConfig =
        serde_json::from_slice(&text).map_err(|error| RestoreError::Json(path.clone(), error))?;
    let definition = Definition::new(config).map_err(|error| RestoreError::Definition(path, error))?;

    let path = directory.join(STATE);
    let text = fs::read(&path).map_err(|error| RestoreError::Read(path.clone(), error))?;
    let state = parse_state(&path, &text)?;
    let right = layout(definition.memory_bytes);
    if state.memory_ranges != right {
        let bytes = definition.memory_bytes;
        return Err(RestoreError::Ranges {
            found: state.memory_ranges,
            bytes,
            right,
        });
    }
    if state.vcpus.len() != usize::from(definition.vcpus) {
        return Err(RestoreError::Vcpus {
            found: state.vcpus.len(),
            defined: definition.vcpus,
        });
    }
    Ok((definition, state))
}

/// Another version is told as such, whether or not the rest can be read.
fn parse_state(path: &Path, text: &[u8]) -> Result<VmState, RestoreError> {
    let parsed = serde_json::from_slice::<VmState>(text);
    let version = match &parsed {
        Ok(state) => state.version,
        Err(_) => serde_json::from_slice::<StateHeader>(text).map_or(STATE_VERSION, |header| header.version),
    };
    if version != STATE_VERSION {
        return Err(RestoreError::Version {
            path: path.to_owned(),
            found: version,
        });
    }
    parsed.map_err(|error| RestoreError::Json(path.to_owned(), error))
}

fn memory(path: &Path, ranges: &[MemoryRange], mode: MemoryRestoreMode) -> Result<GuestRam, RestoreError> {
    let unreadable = |error| RestoreError::Read(path.to_owned(), error);
    // Read-only: a private mapping can still be written, and the file cannot.
    let file = File::open(path).map_err(unreadable)?;
    let found = file.metadata().map_err(unreadable)?.len();
    let expected = ranges.iter().map(|range| range.length).sum();
    if found != expected {
        return Err(RestoreError::MemorySize {
            path: path.to_owned(),
            found,
            expected,
        });
    }
    match mode {
        MemoryRestoreMode::Cow => Ok(GuestRam::private_of(file, ranges)?),
        MemoryRestoreMode::Copy => {
            let ram = GuestRam::anonymous(ranges)?;
            copy(&file, &ram).map_err(unreadable)?;
            Ok(ram)
        }
        _ => Err(RestoreError::Mode),
    }
}

/// Reads the file's data into new memory, which is zero where the file has holes.
fn copy(file: &File, ram: &GuestRam) -> io::Result<()> {
    let mut offset = 0;
    for mapped in ram.ranges() {
        // SAFETY: the VM is not made yet; nobody else knows this memory.
        let bytes = unsafe { mapped.bytes_mut() };
        for extent in pagemap::file_data(file, &(offset..offset + mapped.range.length))?.iter() {
            let invalid = |_| io::Error::from(io::ErrorKind::InvalidData);
            let start = usize::try_from(extent.start).map_err(invalid)?;
            let end = usize::try_from(extent.end).map_err(invalid)?;
            file.read_exact_at(&mut bytes[start..end], offset + extent.start)?;
        }
        offset += mapped.range.length;
    }
    Ok(())
}

fn vcpus(machine: &Machine, state: &VmState) -> Result<Vec<Vcpu>, RestoreError> {
    let mut vcpus = Vec::with_capacity(state.vcpus.len());
    for (index, saved) in (0..).zip(&state.vcpus) {
        let failed = |source| RestoreError::Vcpu { index, source };
        let cpuid = saved.cpuid().map_err(failed)?;
        let fd = machine.create_vcpu(index, &cpuid)?;
        vcpus.push(Vcpu { index, fd, cpuid });
    }
    // All exist before the first has its state: a LAPIC's messages may go to any.
    for (vcpu, saved) in vcpus.iter().zip(&state.vcpus) {
        saved.restore(&vcpu.fd).map_err(|source| RestoreError::Vcpu {
            index: vcpu.index,
            source,
        })?;
    }
    Ok(vcpus)
}
