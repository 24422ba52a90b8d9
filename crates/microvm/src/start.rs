//! The first run of a restored VM: all that time passes through is set when it is about to run, however long that is
//! after the restore. So the guest's own time goes on where the snapshot stopped, and no timer fires while it waits.

use std::io;
use std::time::SystemTime;

use stencil_vmm_api::RESTORE_GSI;

use crate::identity::{ClockReading, Identity};
use crate::machine::{Machine, MachineError, MachineState};
use crate::memory::GuestRam;
use crate::ports::Ports;
use crate::serial::SerialError;
use crate::vcpu::Vcpu;
use crate::vcpu_state::{VcpuState, VcpuStateError, read_tsc};

/// The state that a restored VM was saved with. It is kept until the VM runs: a snapshot of a VM that has not run is of
/// this, as KVM does not have all of it yet.
pub(crate) struct Saved {
    pub(crate) machine: MachineState,
    /// By rising index.
    pub(crate) vcpus: Vec<VcpuState>,
}

/// The VM cannot be made ready for its first run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("the clock and the timers of vCPU {index} cannot be set")]
    Vcpu { index: u8, source: VcpuStateError },
    #[error("the clock, the timer and the interrupt controllers cannot be set")]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Introduce(#[from] IntroduceError),
    #[error(transparent)]
    Serial(#[from] SerialError),
}

impl Saved {
    /// Lets the guest's time go on, tells the guest who it is, and raises [`RESTORE_GSI`]. The vCPUs run next.
    pub(crate) fn start(
        &self,
        machine: &Machine,
        vcpus: &[Vcpu],
        ports: &Ports,
        identity: &Identity,
        ram: &GuestRam,
    ) -> Result<(), StartError> {
        // Before the vCPUs' own clocks: KVM makes out the wall clock by it.
        machine.start_clock(&self.machine)?;
        for (vcpu, saved) in vcpus.iter().zip(&self.vcpus) {
            let index = vcpu.index;
            let failed = |source| StartError::Vcpu { index, source };
            if index == 0 {
                saved.detach_tsc(&vcpu.fd).map_err(failed)?;
            }
            saved.start(&vcpu.fd).map_err(failed)?;
        }
        machine.start_chips(&self.machine)?;
        introduce(identity, vcpus, ram)?;
        // Input may have come while the controllers were not there.
        if let Some(serial) = &ports.serial {
            serial.raise_again()?;
        }
        Ok(machine.pulse(RESTORE_GSI)?)
    }
}

/// The guest cannot be told who it is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IntroduceError {
    #[error("the guest's clock cannot be read")]
    Clock(#[source] VcpuStateError),
    #[error("the generation page and the vmclock page cannot be written")]
    Write(#[source] io::Error),
}

/// Tells the guest, which runs next, who it is and what time it is.
pub(crate) fn introduce(identity: &Identity, vcpus: &[Vcpu], ram: &GuestRam) -> Result<(), IntroduceError> {
    let Some(first) = vcpus.first() else {
        return Ok(());
    };
    let tsc = read_tsc(&first.fd).map_err(IntroduceError::Clock)?;
    let utc = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let clock = ClockReading {
        tsc,
        utc,
        tsc_khz: first.fd.get_tsc_khz().ok(),
    };
    identity.write(ram, clock).map_err(IntroduceError::Write)
}
