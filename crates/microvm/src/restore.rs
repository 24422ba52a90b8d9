//! Building a VM from a snapshot, paused. What time passes through follows when it runs first: see [`crate::start`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use stencil_vmm_api::{RestoreRequest, VmConfig};

use crate::counters::{Counters, RestoreTimes};
use crate::definition::{Definition, DefinitionError};
use crate::identity::{Generation, GenerationError};
use crate::machine::{EmptyMachine, Machine, MachineError};
use crate::memory::{GuestRam, MemoryRange, layout};
use crate::restored_memory::{MemoryPlan, RestoredMemoryError};
use crate::start::{IntroduceError, Saved, introduce};
use crate::state::{CONFIG, MEMORY, STATE, STATE_VERSION, StateHeader, VmState};
use crate::vcpu::Vcpu;
use crate::vcpu_state::{VcpuState, VcpuStateError};
use crate::vm::{BuildError, MicroVm, Parts, Surroundings, places};

/// The snapshot cannot be restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    #[error("{0:?} is not the URL of a directory; right is file:// and an absolute path")]
    Url(String),
    #[error("Destination is not a directory: {0:?}")]
    NotADirectory(PathBuf),
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
    #[error(transparent)]
    Memory(#[from] RestoredMemoryError),
    #[error(transparent)]
    Build(BuildError),
    #[error(transparent)]
    Introduce(#[from] IntroduceError),
    #[error("vCPU {index} cannot be restored")]
    Vcpu { index: u8, source: VcpuStateError },
}

impl From<BuildError> for RestoreError {
    fn from(error: BuildError) -> Self {
        Self::Build(error)
    }
}

impl From<MachineError> for RestoreError {
    fn from(error: MachineError) -> Self {
        Self::Build(error.into())
    }
}

/// Builds the VM of the snapshot in `directory`.
pub(crate) fn restore(
    directory: &Path,
    request: &RestoreRequest,
    empty: EmptyMachine,
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
    let plan = MemoryPlan::of(request)?;
    let (mut definition, mut state) = read(directory)?;
    state.identity = state.identity.restored(machine_id);
    if let Some(generation) = machine_id {
        definition.set_generation(generation);
    }
    times.read = began.elapsed();

    let counters = Arc::new(Counters::new(u32::from(definition.vcpus)));
    let figures = Arc::clone(counters.of_pages());

    let phase = Instant::now();
    let (path, ranges) = (directory.join(MEMORY), &state.memory_ranges);
    let ram = plan.restore(&path, ranges, &figures, &surroundings.events)?;
    times.memory = phase.elapsed();

    let vm = build(definition, state, ram, empty, counters, surroundings, &mut times);
    // A page that is lost fails one step or another, and none of them knows why.
    let vm = match figures.lost() {
        Some(fatal) => return Err(RestoredMemoryError::Lost(fatal).into()),
        None => vm?,
    };
    times.total = began.elapsed();
    tracing::debug!(directory = %directory.display(), ?times, "restored");
    // The counters are new, so there is nothing in the way.
    let _ = vm.counters.restore.set(times);
    Ok(vm)
}

/// Builds it around its memory, of which what the guest needs first is there when this returns.
fn build(
    definition: Definition,
    state: VmState,
    ram: GuestRam,
    empty: EmptyMachine,
    counters: Arc<Counters>,
    surroundings: Surroundings,
    times: &mut RestoreTimes,
) -> Result<MicroVm, RestoreError> {
    let phase = Instant::now();
    let places = places(&definition, &counters, &surroundings);
    let machine = Machine::new(empty, &ram)?;
    times.machine = phase.elapsed();

    let phase = Instant::now();
    let vcpus = vcpus(&machine, &state.vcpus)?;
    times.vcpus = phase.elapsed();

    let phase = Instant::now();
    // The time follows when it runs. But its pages are the VM's own from now on, and need not be copied then.
    introduce(&state.identity, &vcpus, &ram)?;
    let parts = Parts {
        definition,
        places,
        ram,
        machine,
        vcpus,
        identity: state.identity,
        counters,
    };
    let saved = Saved {
        machine: state.machine,
        vcpus: state.vcpus,
    };
    let vm = parts.assemble(state.devices.serial.as_ref(), Some(saved), surroundings)?;
    times.devices = phase.elapsed();

    let phase = Instant::now();
    vm.ram.make_ready().map_err(RestoredMemoryError::Lost)?;
    times.pages = phase.elapsed();
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

fn vcpus(machine: &Machine, states: &[VcpuState]) -> Result<Vec<Vcpu>, RestoreError> {
    let mut vcpus = Vec::with_capacity(states.len());
    for (index, saved) in (0..).zip(states) {
        let failed = |source| RestoreError::Vcpu { index, source };
        let cpuid = saved.cpuid().map_err(failed)?;
        let fd = machine.create_vcpu(index, &cpuid)?;
        vcpus.push(Vcpu { index, fd, cpuid });
    }
    for (vcpu, saved) in vcpus.iter().zip(states) {
        saved.restore(&vcpu.fd).map_err(|source| RestoreError::Vcpu {
            index: vcpu.index,
            source,
        })?;
    }
    Ok(vcpus)
}
