//! A vCPU's state: saved from, and restored to, a vCPU that does not run. What time passes through is restored apart
//! from the rest, when the vCPU is about to run.

use kvm_bindings::{
    CpuId, KVM_MAX_MSR_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Error as KvmError, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::raw::Raw;

/// IA32_TIME_STAMP_COUNTER.
const MSR_TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: it means nothing before the TSC and the LAPIC's timer mode are there.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// MSR_KVM_WALL_CLOCK and MSR_KVM_WALL_CLOCK_NEW: being set, KVM writes to guest memory when its clock was 0.
const MSR_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// Everything of a vCPU.
#[derive(Serialize, Deserialize)]
pub(crate) struct VcpuState {
    cpuid: Vec<Raw<kvm_cpuid_entry2>>,
    /// `None` where KVM does not know it.
    tsc_khz: Option<u32>,
    sregs: Raw<kvm_sregs>,
    xcrs: Raw<kvm_xcrs>,
    // These two in boxes: moved about on the stack, they would leave every fork with 60 KiB of used stack.
    xsave: Box<Raw<kvm_xsave>>,
    regs: Raw<kvm_regs>,
    debug_regs: Raw<kvm_debugregs>,
    events: Raw<kvm_vcpu_events>,
    lapic: Box<Raw<kvm_lapic_state>>,
    msrs: Vec<Msr>,
    mp_state: Raw<kvm_mp_state>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Msr {
    index: u32,
    data: u64,
}

impl Msr {
    /// Whether what it says, or what setting it does, depends on when it is set.
    fn is_time(&self) -> bool {
        matches!(self.index, MSR_TSC | MSR_TSC_DEADLINE) || MSR_WALL_CLOCK.contains(&self.index)
    }
}

/// A vCPU's state cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VcpuStateError {
    #[error("{0} failed")]
    Ioctl(&'static str, #[source] KvmError),
    #[error("the vCPU's extended state has {0} bytes; up to 4096 can be saved")]
    LargeXsave(i32),
    #[error("MSR {index:#x} cannot be set to {data:#x} on this host")]
    Msr { index: u32, data: u64 },
    #[error("there are more {0} than KVM takes")]
    TooMany(&'static str),
}

/// Names the ioctl in its error.
fn ioctl(name: &'static str) -> impl FnOnce(KvmError) -> VcpuStateError {
    move |error| VcpuStateError::Ioctl(name, error)
}

impl VcpuState {
    /// Saves `vcpu`, whose CPUID is `cpuid`; `msrs` are the candidates of [`msr_candidates`].
    pub(crate) fn save(
        vm: &VmFd,
        vcpu: &VcpuFd,
        cpuid: &CpuId,
        msrs: &[u32],
    ) -> Result<Self, VcpuStateError> {
        // 0 where the capability is unknown: then it is the classic 4096.
        let xsave_bytes = vm.check_extension_int(Cap::Xsave2);
        if xsave_bytes > 4096 {
            return Err(VcpuStateError::LargeXsave(xsave_bytes));
        }
        Ok(Self {
            cpuid: cpuid.as_slice().iter().copied().map(Raw).collect(),
            tsc_khz: vcpu.get_tsc_khz().ok(),
            // Reading it first makes KVM settle a pending INIT or SIPI (KVM_GET_MP_STATE, Linux arch/x86/kvm/x86.c).
            mp_state: Raw(vcpu.get_mp_state().map_err(ioctl("KVM_GET_MP_STATE"))?),
            sregs: Raw(vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?),
            xcrs: Raw(vcpu.get_xcrs().map_err(ioctl("KVM_GET_XCRS"))?),
            xsave: Box::new(Raw(vcpu.get_xsave().map_err(ioctl("KVM_GET_XSAVE"))?)),
            regs: Raw(vcpu.get_regs().map_err(ioctl("KVM_GET_REGS"))?),
            debug_regs: Raw(vcpu.get_debug_regs().map_err(ioctl("KVM_GET_DEBUGREGS"))?),
            events: Raw(vcpu.get_vcpu_events().map_err(ioctl("KVM_GET_VCPU_EVENTS"))?),
            lapic: Box::new(Raw(vcpu.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?)),
            msrs: read_msrs(vcpu, msrs)?,
        })
    }

    /// The vCPU's CPUID, which has to be set before anything else.
    pub(crate) fn cpuid(&self) -> Result<CpuId, VcpuStateError> {
        let entries: Vec<_> = self.cpuid.iter().map(|entry| entry.0).collect();
        CpuId::from_entries(&entries).map_err(|_| VcpuStateError::TooMany("CPUID entries"))
    }

    /// Restores to `vcpu`, a new one whose CPUID is set, all that does not change while it waits to run.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        self.restore_tsc_khz(vcpu)?;
        vcpu.set_sregs(&self.sregs.0).map_err(ioctl("KVM_SET_SREGS"))?;
        vcpu.set_xcrs(&self.xcrs.0).map_err(ioctl("KVM_SET_XCRS"))?;
        // SAFETY: KVM reads 4096 bytes, the size of the structure, as no feature with a larger state is enabled: that
        // takes a permission by arch_prctl, which this process never asks for.
        unsafe { vcpu.set_xsave(&self.xsave.0) }.map_err(ioctl("KVM_SET_XSAVE"))?;
        vcpu.set_regs(&self.regs.0).map_err(ioctl("KVM_SET_REGS"))?;
        vcpu.set_debug_regs(&self.debug_regs.0)
            .map_err(ioctl("KVM_SET_DEBUGREGS"))?;
        vcpu.set_vcpu_events(&self.events.0)
            .map_err(ioctl("KVM_SET_VCPU_EVENTS"))?;
        let timeless: Vec<_> = self.msrs.iter().copied().filter(|msr| !msr.is_time()).collect();
        write_msrs(vcpu, &timeless)?;
        vcpu.set_mp_state(self.mp_state.0)
            .map_err(ioctl("KVM_SET_MP_STATE"))
    }

    /// To be called for the first of the vCPUs, before any is started.
    ///
    /// A counter that is set to within a second of what it would be by the last that was set in this VM, KVM takes for
    /// an attempt to make the two agree, and lets it go on as the last (`kvm_synchronize_tsc`, Linux arch/x86/kvm/x86.c).
    /// That is how the others agree with the first; but the last before the first was 0, when the vCPU was made. A
    /// counter that is far away from either breaks it off.
    pub(crate) fn detach_tsc(&self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        let saved = self.msrs.iter().find(|msr| msr.index == MSR_TSC);
        let far = saved.map(|msr| Msr {
            data: msr.data.wrapping_add(1 << 62),
            ..*msr
        });
        write_msrs(vcpu, far.as_slice())
    }

    /// Restores the rest to `vcpu`, which runs next: from now on its counter counts, and its timers are set.
    pub(crate) fn start(&self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        vcpu.set_lapic(&self.lapic.0).map_err(ioctl("KVM_SET_LAPIC"))?;
        let time: Vec<_> = self.msrs.iter().copied().filter(Msr::is_time).collect();
        write_msrs(vcpu, &time)
    }

    /// Scales the counter where this host's runs at another frequency.
    fn restore_tsc_khz(&self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        match self.tsc_khz {
            Some(khz) if vcpu.get_tsc_khz().ok() != Some(khz) => {
                vcpu.set_tsc_khz(khz).map_err(ioctl("KVM_SET_TSC_KHZ"))
            }
            _ => Ok(()),
        }
    }
}

/// The MSRs that hold a guest's state, in the order in which they can be set.
pub(crate) fn msr_candidates(kvm: &Kvm) -> Result<Vec<u32>, VcpuStateError> {
    let list = kvm
        .get_msr_index_list()
        .map_err(ioctl("KVM_GET_MSR_INDEX_LIST"))?;
    let mut indices = list.as_slice().to_vec();
    indices.sort_by_key(|index| *index == MSR_TSC_DEADLINE);
    Ok(indices)
}

/// The guest's time stamp counter, now.
pub(crate) fn read_tsc(vcpu: &VcpuFd) -> Result<u64, VcpuStateError> {
    let msrs = read_msrs(vcpu, &[MSR_TSC])?;
    Ok(msrs.first().map_or(0, |msr| msr.data))
}

/// Reads those of `indices` that can be read: KVM lists more than a vCPU with this CPUID has.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, VcpuStateError> {
    let mut read = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let batch = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> = batch
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| VcpuStateError::TooMany("MSRs"))?;
        // It stops at the first that it cannot read.
        let count = vcpu.get_msrs(&mut msrs).map_err(ioctl("KVM_GET_MSRS"))?;
        let done = &msrs.as_slice()[..count];
        read.extend(done.iter().map(|entry| Msr {
            index: entry.index,
            data: entry.data,
        }));
        let skipped = usize::from(count < batch.len());
        left = &left[count + skipped..];
    }
    Ok(read)
}

/// Writes all of them. One that KVM refuses is fine where the vCPU has that value already: some can only be read.
fn write_msrs(vcpu: &VcpuFd, all: &[Msr]) -> Result<(), VcpuStateError> {
    let mut left = all;
    while !left.is_empty() {
        let batch = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> = batch
            .iter()
            .map(|msr| kvm_msr_entry {
                index: msr.index,
                data: msr.data,
                ..Default::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| VcpuStateError::TooMany("MSRs"))?;
        let count = vcpu.set_msrs(&msrs).map_err(ioctl("KVM_SET_MSRS"))?;
        left = &left[count..];
        if let (true, Some((refused, rest))) = (count < batch.len(), left.split_first()) {
            let has = read_msrs(vcpu, &[refused.index])?;
            if has.first().map(|msr| msr.data) != Some(refused.data) {
                return Err(VcpuStateError::Msr {
                    index: refused.index,
                    data: refused.data,
                });
            }
            left = rest;
        }
    }
    Ok(())
}
