//! The VM in KVM: its memory slots, its interrupt controllers, its timer and its vCPUs.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
    kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_pit_state2, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Error as KvmError, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::raw::Raw;

/// Three pages in the hole below 4 GiB that KVM on Intel needs for a task state segment; any that the guest does not
/// use (KVM_SET_TSS_ADDR, Linux, Documentation/virt/kvm/api.rst).
const TSS_ADDRESS: usize = 0xfffb_d000;

/// KVM refuses to make the machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    #[error("/dev/kvm cannot be opened")]
    Open(#[source] KvmError),
    #[error("{0} failed")]
    Ioctl(&'static str, #[source] KvmError),
    #[error("an event file descriptor cannot be had")]
    EventFd(#[source] std::io::Error),
}

/// Names the ioctl in its error.
fn ioctl(name: &'static str) -> impl FnOnce(KvmError) -> MachineError {
    move |error| MachineError::Ioctl(name, error)
}

/// A VM in KVM that has nothing yet. To make it takes KVM some 0.25 ms.
pub(crate) struct EmptyMachine {
    kvm: Kvm,
    vm: VmFd,
}

impl EmptyMachine {
    pub(crate) fn new() -> Result<Self, MachineError> {
        let kvm = Kvm::new().map_err(MachineError::Open)?;
        let vm = kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
        Ok(Self { kvm, vm })
    }
}

/// The VM in KVM, without its vCPUs.
pub(crate) struct Machine {
    pub(crate) kvm: Kvm,
    pub(crate) vm: VmFd,
}

impl Machine {
    /// Gives `empty` its `ram` and the rest.
    ///
    /// The memory slots come first: set after the interrupt controllers are there, each waits for a grace period of
    /// the kernel, some 7 ms.
    pub(crate) fn new(empty: EmptyMachine, ram: &GuestRam) -> Result<Self, MachineError> {
        let EmptyMachine { kvm, vm } = empty;
        for (slot, mapped) in (0..).zip(ram.ranges()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: mapped.range.gpa,
                memory_size: mapped.range.length,
                userspace_addr: mapped.host_address(),
            };
            // SAFETY: the mapping belongs to `ram`, which the VM's owner drops after the VM.
            unsafe { vm.set_user_memory_region(region) }.map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        }
        vm.set_tss_address(TSS_ADDRESS)
            .map_err(ioctl("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(ioctl("KVM_CREATE_IRQCHIP"))?;
        // The port of the PC speaker, which Linux uses to calibrate the TSC against the PIT.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(pit).map_err(ioctl("KVM_CREATE_PIT2"))?;
        Ok(Self { kvm, vm })
    }

    pub(crate) fn create_vcpu(&self, index: u8, cpuid: &CpuId) -> Result<VcpuFd, MachineError> {
        let vcpu = self
            .vm
            .create_vcpu(u64::from(index))
            .map_err(ioctl("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
        Ok(vcpu)
    }

    /// An event that raises `gsi`, edge-triggered, each time it is written.
    pub(crate) fn interrupt_line(&self, gsi: u32) -> Result<EventFd, MachineError> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(MachineError::EventFd)?;
        self.vm.register_irqfd(&event, gsi).map_err(ioctl("KVM_IRQFD"))?;
        Ok(event)
    }

    /// Raises and lowers `gsi`: one edge.
    pub(crate) fn pulse(&self, gsi: u32) -> Result<(), MachineError> {
        self.vm.set_irq_line(gsi, true).map_err(ioctl("KVM_IRQ_LINE"))?;
        self.vm.set_irq_line(gsi, false).map_err(ioctl("KVM_IRQ_LINE"))
    }

    pub(crate) fn save(&self) -> Result<MachineState, MachineError> {
        let clock = if self.vm.check_extension(Cap::AdjustClock) {
            Some(Raw(self.vm.get_clock().map_err(ioctl("KVM_GET_CLOCK"))?))
        } else {
            None
        };
        Ok(MachineState {
            pic_master: self.save_irqchip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: self.save_irqchip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: self.save_irqchip(KVM_IRQCHIP_IOAPIC)?,
            pit: Raw(self.vm.get_pit2().map_err(ioctl("KVM_GET_PIT2"))?),
            clock,
        })
    }

    /// Restores the interrupt controllers and the timer, which counts from now on; when the vCPUs have their state, as
    /// the IOAPIC looks at their LAPICs.
    pub(crate) fn start_chips(&self, state: &MachineState) -> Result<(), MachineError> {
        for chip in [&state.pic_master, &state.pic_slave, &state.ioapic] {
            self.vm.set_irqchip(&chip.0).map_err(ioctl("KVM_SET_IRQCHIP"))?;
        }
        self.vm.set_pit2(&state.pit.0).map_err(ioctl("KVM_SET_PIT2"))
    }

    /// Lets the guest's own time go on, from now, where it stopped.
    pub(crate) fn start_clock(&self, state: &MachineState) -> Result<(), MachineError> {
        if let Some(clock) = &state.clock {
            // Only the guest's own time. The flags that KVM_GET_CLOCK sets are no input.
            let clock = kvm_clock_data {
                clock: clock.0.clock,
                ..Default::default()
            };
            self.vm.set_clock(&clock).map_err(ioctl("KVM_SET_CLOCK"))?;
        }
        Ok(())
    }

    fn save_irqchip(&self, chip_id: u32) -> Result<Raw<kvm_irqchip>, MachineError> {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        self.vm.get_irqchip(&mut chip).map_err(ioctl("KVM_GET_IRQCHIP"))?;
        Ok(Raw(chip))
    }
}

/// The state of what the vCPUs share in KVM.
#[derive(Serialize, Deserialize)]
pub(crate) struct MachineState {
    pic_master: Raw<kvm_irqchip>,
    pic_slave: Raw<kvm_irqchip>,
    ioapic: Raw<kvm_irqchip>,
    pit: Raw<kvm_pit_state2>,
    /// `None` where KVM has no clock that can be set.
    clock: Option<Raw<kvm_clock_data>>,
}
