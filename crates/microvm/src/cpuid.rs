//! What the guest's CPUID says: what KVM supports on this host, fitted to each vCPU.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

// Leaf 1, ECX.
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
// Leaf 1, EDX: the count of logical processors in EBX is valid.
const HTT: u32 = 1 << 28;
// Leaf 0x8000_0001, ECX.
const SVM: u32 = 1 << 2;

/// The leaves that every vCPU of a VM shares.
pub(crate) fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ecx |= HYPERVISOR;
                entry.ecx &= !VMX;
                if tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
            }
            // No nested virtualisation: its state is not saved.
            0x8000_0001 => entry.ecx &= !SVM,
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    Ok(cpuid)
}

/// Makes `cpuid` that of vCPU `index` of `count`; its APIC id is its index.
pub(crate) fn fit(cpuid: &mut CpuId, index: u8, count: u8) {
    for entry in cpuid.as_mut_slice() {
        fit_entry(entry, u32::from(index), u32::from(count));
    }
}

fn fit_entry(entry: &mut kvm_cpuid_entry2, index: u32, count: u32) {
    match entry.function {
        1 => {
            // EBX: APIC id in 31..24, logical processors in 23..16.
            entry.ebx = entry.ebx & 0xffff | count << 16 | index << 24;
            entry.edx = if count > 1 {
                entry.edx | HTT
            } else {
                entry.edx & !HTT
            };
        }
        // Caches, Intel. EAX 31..26: cores in the package, less one; 25..14: threads that share it, less one.
        4 if entry.eax & 0x1f != 0 => entry.eax = entry.eax & 0x3fff | (count - 1) << 26,
        // Extended topology: the x2APIC id.
        0xb | 0x1f => entry.edx = index,
        // ECX 7..0: cores, less one; 15..12: bits of the APIC id that number them, 0 for "derive it".
        0x8000_0008 => entry.ecx = entry.ecx & 0xffff_0f00 | (count - 1),
        // Extended APIC id; one thread a core; one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index, 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_knows_its_number_and_how_many_there_are() {
        let mut entry = kvm_cpuid_entry2 {
            function: 1,
            ebx: 0xffff_1234,
            ..Default::default()
        };
        fit_entry(&mut entry, 1, 2);
        assert_eq!(entry.ebx, 0x0102_1234);
        assert_eq!(entry.edx & HTT, HTT);
        fit_entry(&mut entry, 0, 1);
        assert_eq!((entry.ebx, entry.edx & HTT), (0x0001_1234, 0));
    }
}
