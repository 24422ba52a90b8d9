//! The VM: everything that makes it up, in one value.

use std::io;
use std::mem;
use std::sync::Arc;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::Error as KvmError;
use stencil_core::error_chain;
use stencil_uffd::Fatal;
use stencil_vmm_api::{SerialMode, VmEnd, VmEndKind};
use tokio::runtime::Handle;

use crate::boot;
use crate::console::{Console, ConsoleError, OpeningPlaces, Places};
use crate::counters::Counters;
use crate::cpuid;
use crate::definition::Definition;
use crate::events::Events;
use crate::identity::Identity;
use crate::kernel::LoadError;
use crate::machine::{EmptyMachine, Machine, MachineError};
use crate::memory::{GuestRam, MemoryError, layout};
use crate::ports::Ports;
use crate::registers::EntryError;
use crate::serial::{GSI as SERIAL_GSI, Serial, SerialError, SerialState};
use crate::start::{IntroduceError, Saved, StartError, introduce};
use crate::vcpu::{Run, Vcpu, VcpuThread, WaitingThread, stop_all};

/// IA32_MTRR_DEF_TYPE: MTRRs on, write-back. Firmware would have set it, and Linux wants it.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// What a VM needs of the process that it lives in.
#[derive(Clone)]
pub(crate) struct Surroundings {
    /// To who owns the VM.
    pub(crate) events: Events,
    /// Serves the console socket.
    pub(crate) runtime: Handle,
}

/// A part of a VM cannot be made, at a boot or at a restore.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error("guest memory cannot be had")]
    Memory(#[from] MemoryError),
    #[error("KVM cannot make the VM")]
    Machine(#[from] MachineError),
    #[error("the serial port has nowhere to go")]
    Console(#[from] ConsoleError),
    #[error("the serial port cannot be made")]
    Serial(#[from] SerialError),
}

/// The VM cannot boot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error(transparent)]
    Build(BuildError),
    #[error("the kernel cannot be loaded")]
    Load(#[from] LoadError),
    #[error("KVM_GET_SUPPORTED_CPUID failed")]
    Cpuid(#[source] KvmError),
    #[error("KVM_SET_MSRS failed")]
    Mtrr(#[source] KvmError),
    #[error("the first vCPU cannot be made ready")]
    Entry(#[from] EntryError),
    #[error(transparent)]
    Introduce(#[from] IntroduceError),
    #[error(transparent)]
    Run(#[from] RunError),
}

impl<E: Into<BuildError>> From<E> for BootError {
    fn from(error: E) -> Self {
        Self::Build(error.into())
    }
}

/// The guest cannot run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// It may be tried again.
    #[error("a thread for a vCPU cannot be started")]
    Thread(#[source] io::Error),
    /// It may be tried again.
    #[error("the restored VM cannot start")]
    Start(#[source] StartError),
    /// The guest is over.
    #[error("the guest's memory is lost")]
    MemoryLost(#[source] Arc<Fatal>),
}

/// A VM, running or paused. Fields are dropped from the top: the memory is unmapped when KVM has let go of it.
pub(crate) struct MicroVm {
    pub(crate) definition: Definition,
    pub(crate) vcpus: Vcpus,
    /// Of a paused VM that is to be resumed soon.
    waiting: Vec<WaitingThread>,
    _console: Option<Console>,
    pub(crate) ports: Arc<Ports>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) identity: Identity,
    pub(crate) machine: Machine,
    pub(crate) ram: GuestRam,
    /// What a restored VM still needs before it runs for the first time.
    pub(crate) unstarted: Option<Saved>,
    surroundings: Surroundings,
}

/// The vCPUs: here while the VM is paused, else each in its thread.
pub(crate) enum Vcpus {
    Paused(Vec<Vcpu>),
    Running { run: Arc<Run>, threads: Vec<VcpuThread> },
}

impl MicroVm {
    /// Loads the kernel; leaves the VM paused before its first instruction.
    pub(crate) fn boot(
        definition: Definition,
        empty: EmptyMachine,
        surroundings: Surroundings,
    ) -> Result<Self, BootError> {
        let ram = GuestRam::anonymous(&layout(definition.memory_bytes))?;
        let entry = boot::load(&ram, &definition.payload(), definition.vcpus)?;
        let machine = Machine::new(empty, &ram)?;
        let supported = cpuid::supported(&machine.kvm).map_err(BootError::Cpuid)?;
        let mut vcpus = Vec::with_capacity(usize::from(definition.vcpus));
        for index in 0..definition.vcpus {
            let mut cpuid = supported.clone();
            cpuid::fit(&mut cpuid, index, definition.vcpus);
            let fd = machine.create_vcpu(index, &cpuid)?;
            let msr = kvm_msr_entry {
                index: MSR_MTRR_DEF_TYPE,
                data: MTRR_ON_WRITE_BACK,
                ..Default::default()
            };
            // A host without MTRRs sets none, which is fine.
            if let Ok(msrs) = Msrs::from_entries(&[msr]) {
                fd.set_msrs(&msrs).map_err(BootError::Mtrr)?;
            }
            if index == 0 {
                // The others wait for its INIT and SIPI.
                entry.apply(&fd, &ram.mmap)?;
            }
            vcpus.push(Vcpu { index, fd, cpuid });
        }
        let counters = Arc::new(Counters::new(u32::from(definition.vcpus)));
        let identity = Identity::at_boot(definition.generation);
        introduce(&identity, &vcpus, &ram)?;
        let parts = Parts {
            places: places(&definition, &counters, &surroundings),
            definition,
            ram,
            machine,
            vcpus,
            identity,
            counters,
        };
        Ok(parts.assemble(None, None, surroundings)?)
    }

    /// Whether the vCPUs run.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.vcpus, Vcpus::Running { .. })
    }

    /// Whether it has ended: by a vCPU that runs, or because its memory is lost.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(&self.vcpus, Vcpus::Running { run, .. } if run.has_ended()) || self.ram.lost().is_some()
    }

    /// Lets the vCPUs run; nothing where they do.
    pub(crate) fn resume(&mut self) -> Result<(), RunError> {
        self.start_threads().map_err(RunError::Thread)?;
        self.start()?;
        self.ram.resume().map_err(RunError::MemoryLost)?;
        let vcpus = match mem::replace(&mut self.vcpus, Vcpus::Paused(Vec::new())) {
            Vcpus::Paused(vcpus) => vcpus,
            running @ Vcpus::Running { .. } => {
                self.vcpus = running;
                return Ok(());
            }
        };
        let run = Run::new(
            Arc::clone(&self.ports),
            Arc::clone(&self.counters),
            self.ram.ranges().map(|mapped| mapped.range).collect(),
            self.surroundings.events.clone(),
        );
        let threads = mem::take(&mut self.waiting).into_iter().zip(vcpus);
        let threads = threads
            .map(|(thread, vcpu)| thread.run(vcpu, Arc::clone(&run)))
            .collect();
        self.vcpus = Vcpus::Running { run, threads };
        Ok(())
    }

    /// Starts the threads that a paused VM needs to run.
    pub(crate) fn start_threads(&mut self) -> io::Result<()> {
        let Vcpus::Paused(vcpus) = &self.vcpus else {
            return Ok(());
        };
        for index in self.waiting.len()..vcpus.len() {
            self.waiting.push(WaitingThread::start(index)?);
        }
        Ok(())
    }

    /// Makes a restored VM ready for its first run; nothing where it has run.
    fn start(&mut self) -> Result<(), RunError> {
        let (Some(saved), Vcpus::Paused(vcpus)) = (&self.unstarted, &self.vcpus) else {
            return Ok(());
        };
        match saved.start(&self.machine, vcpus, &self.ports, &self.identity, &self.ram) {
            Ok(()) => {
                self.unstarted = None;
                Ok(())
            }
            // A page that is lost fails one step or another, and none of them knows why.
            Err(error) => Err(match self.ram.lost() {
                Some(fatal) => RunError::MemoryLost(fatal),
                None => RunError::Start(error),
            }),
        }
    }

    /// Stops the vCPUs. `Some`: the guest has ended meanwhile, and why.
    pub(crate) fn pause(&mut self) -> Option<VmEnd> {
        let (vcpus, end) = match mem::replace(&mut self.vcpus, Vcpus::Paused(Vec::new())) {
            Vcpus::Paused(vcpus) => (vcpus, None),
            Vcpus::Running { run, threads } => stop_all(&run, threads),
        };
        self.vcpus = Vcpus::Paused(vcpus);
        match self.ram.lost() {
            // Whatever a vCPU made of it, this is the reason.
            Some(fatal) if end.as_ref().is_none_or(|end| end.kind.is_failure()) => Some(VmEnd {
                kind: VmEndKind::MemoryLost,
                reason: format!("the guest's memory is lost: {}", error_chain(&fatal)),
            }),
            _ => end,
        }
    }
}

impl Drop for MicroVm {
    fn drop(&mut self) {
        // The threads use the ports and, through KVM, the memory.
        self.pause();
    }
}

/// Begins to open where the serial port goes, if there is one.
pub(crate) fn places(
    definition: &Definition,
    counters: &Arc<Counters>,
    surroundings: &Surroundings,
) -> Option<OpeningPlaces> {
    let config = &definition.config.serial;
    (config.mode != SerialMode::Off).then(|| Places::begin(config, counters, &surroundings.runtime))
}

/// What a boot and a restore have made before the devices.
pub(crate) struct Parts {
    pub(crate) definition: Definition,
    /// `None` without a serial port.
    pub(crate) places: Option<OpeningPlaces>,
    pub(crate) ram: GuestRam,
    pub(crate) machine: Machine,
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) identity: Identity,
    pub(crate) counters: Arc<Counters>,
}

impl Parts {
    /// Adds the devices, new or as saved.
    pub(crate) fn assemble(
        self,
        serial: Option<&SerialState>,
        unstarted: Option<Saved>,
        surroundings: Surroundings,
    ) -> Result<MicroVm, BuildError> {
        let Self {
            definition,
            places,
            ram,
            machine,
            vcpus,
            identity,
            counters,
        } = self;
        let (serial, console) = if let Some(places) = places {
            let places = places.wait()?;
            let line = machine.interrupt_line(SERIAL_GSI)?;
            let port = match serial {
                Some(state) => Serial::restore(state, line, places.output, Arc::clone(&counters))?,
                None => Serial::new(line, places.output, Arc::clone(&counters))?,
            };
            let port = Arc::new(port);
            let console = places
                .socket
                .map(|socket| socket.serve(&port, &surroundings.runtime));
            (Some(port), console)
        } else {
            (None, None)
        };
        Ok(MicroVm {
            definition,
            vcpus: Vcpus::Paused(vcpus),
            waiting: Vec::new(),
            _console: console,
            ports: Arc::new(Ports { serial }),
            counters,
            identity,
            machine,
            ram,
            unstarted,
            surroundings,
        })
    }
}
