//! What a vCPU's registers are at its first instruction, for each boot protocol; and how they are told when it fails.

use std::fmt;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Error as KvmError, VcpuFd};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// The global descriptor table of a guest that has not made its own yet.
const GDT: GuestAddress = GuestAddress(0x500);
const IDT: u64 = 0x520;
/// Page tables of the 64-bit protocol: a PML4, a PDPT, and four page directories, which map 4 GiB.
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
/// Below the page tables.
const STACK: u64 = 0x8ff0;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

/// Where the first vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 32-bit protected mode without paging, EBX points to `hvm_start_info` (Xen, docs/misc/pvh.pandoc).
    Pvh { entry: u64, start_info: u64 },
    /// Long mode with the low 4 GiB mapped, RSI points to the zero page (Linux, Documentation/arch/x86/boot.rst).
    Linux64 { entry: u64, zero_page: u64 },
}

/// The first registers cannot be set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EntryError {
    #[error("the tables that the guest starts with do not fit its memory")]
    Memory(#[source] GuestMemoryError),
    #[error("{0} failed")]
    Ioctl(&'static str, #[source] KvmError),
}

impl Entry {
    /// Writes the tables that it needs below 64 KiB, and sets the registers of `vcpu`, the first one.
    pub(crate) fn apply(self, vcpu: &VcpuFd, memory: &GuestMemoryMmap) -> Result<(), EntryError> {
        let mut sregs = vcpu
            .get_sregs()
            .map_err(|error| EntryError::Ioctl("KVM_GET_SREGS", error))?;
        let regs = match self {
            Self::Pvh { entry, start_info } => {
                // Selectors as in Firecracker and Cloud Hypervisor; PVH leaves them open.
                let table = [0, CODE32, DATA, TASK];
                set_segments(&mut sregs, memory, &table, [1, 2, 3])?;
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                kvm_regs {
                    rip: entry,
                    rbx: start_info,
                    rflags: 2,
                    ..Default::default()
                }
            }
            Self::Linux64 { entry, zero_page } => {
                // The protocol wants the code at selector 0x10 and the data at 0x18.
                let table = [0, 0, CODE64, DATA, TASK];
                set_segments(&mut sregs, memory, &table, [2, 3, 4])?;
                map_low_4_gib(memory).map_err(EntryError::Memory)?;
                sregs.cr3 = PML4;
                sregs.cr4 |= CR4_PAE;
                sregs.cr0 |= CR0_PE | CR0_PG;
                sregs.efer |= EFER_LME | EFER_LMA;
                kvm_regs {
                    rip: entry,
                    rsi: zero_page,
                    rsp: STACK,
                    rbp: STACK,
                    rflags: 2,
                    ..Default::default()
                }
            }
        };
        vcpu.set_sregs(&sregs)
            .map_err(|error| EntryError::Ioctl("KVM_SET_SREGS", error))?;
        vcpu.set_regs(&regs)
            .map_err(|error| EntryError::Ioctl("KVM_SET_REGS", error))
    }
}

// Descriptors: base 0, limit 4 GiB less one; the task state segment has a limit of 0x67.
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const CODE64: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TASK: u64 = 0x0000_8b00_0000_0067;

/// Writes the descriptor table, and points `sregs` at it; `code`, `data` and `task` are indices into it.
fn set_segments(
    sregs: &mut kvm_sregs,
    memory: &GuestMemoryMmap,
    table: &[u64],
    [code, data, task]: [u16; 3],
) -> Result<(), EntryError> {
    let bytes: Vec<u8> = table
        .iter()
        .flat_map(|descriptor| descriptor.to_le_bytes())
        .collect();
    memory.write_slice(&bytes, GDT).map_err(EntryError::Memory)?;
    memory
        .write_slice(&[0; 8], GuestAddress(IDT))
        .map_err(EntryError::Memory)?;
    let limit = u16::try_from(bytes.len()).map_or(u16::MAX, |length| length - 1);
    sregs.gdt = kvm_dtable {
        base: GDT.0,
        limit,
        ..Default::default()
    };
    sregs.idt = kvm_dtable {
        base: IDT,
        limit: 7,
        ..Default::default()
    };
    sregs.cs = segment(table[usize::from(code)], code);
    let data = segment(table[usize::from(data)], data);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(table[usize::from(task)], task);
    Ok(())
}

/// The hidden part of a segment register, from its descriptor (Intel SDM, volume 3, 3.4.5).
fn segment(descriptor: u64, index: u16) -> kvm_segment {
    let bits = |from: u32, count: u32| (descriptor >> from) & ((1 << count) - 1);
    let byte = |from, count| bits(from, count).to_le_bytes()[0];
    let limit = u32::try_from(bits(0, 16) | bits(48, 4) << 16).unwrap_or(u32::MAX);
    let granular = byte(55, 1);
    kvm_segment {
        base: bits(16, 24) | bits(56, 8) << 24,
        limit: if granular == 1 { limit << 12 | 0xfff } else { limit },
        selector: index * 8,
        type_: byte(40, 4),
        s: byte(44, 1),
        dpl: byte(45, 2),
        present: byte(47, 1),
        avl: byte(52, 1),
        l: byte(53, 1),
        db: byte(54, 1),
        g: granular,
        unusable: 0,
        padding: 0,
    }
}

fn map_low_4_gib(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    for gib in 0..4 {
        let directory = PAGE_DIRECTORIES + gib * 0x1000;
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(PDPT + gib * 8))?;
        for entry in 0..512 {
            let page = (gib << 30 | entry << 21) | PRESENT_WRITABLE | LARGE;
            memory.write_obj(page, GuestAddress(directory + entry * 8))?;
        }
    }
    Ok(())
}

/// The registers of a vCPU that failed, for the person who wants to know where.
pub(crate) struct Dump<'a>(pub(crate) &'a VcpuFd);

impl fmt::Display for Dump<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.get_regs(), self.0.get_sregs()) {
            (Ok(regs), Ok(sregs)) => {
                let kvm_regs {
                    rip,
                    rsp,
                    rflags,
                    rax,
                    rbx,
                    rcx,
                    rdx,
                    rsi,
                    rdi,
                    rbp,
                    ..
                } = regs;
                let kvm_sregs {
                    cr0,
                    cr2,
                    cr3,
                    cr4,
                    efer,
                    cs,
                    ..
                } = sregs;
                write!(
                    f,
                    "rip={rip:#x} rsp={rsp:#x} rflags={rflags:#x} rax={rax:#x} rbx={rbx:#x} rcx={rcx:#x} rdx={rdx:#x} \
                     rsi={rsi:#x} rdi={rdi:#x} rbp={rbp:#x} cs={:#x} cr0={cr0:#x} cr2={cr2:#x} cr3={cr3:#x} \
                     cr4={cr4:#x} efer={efer:#x}",
                    cs.selector
                )
            }
            (Err(error), _) | (_, Err(error)) => write!(f, "the registers cannot be read: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_descriptor_covers_4_gib() {
        let code = segment(CODE64, 2);
        assert_eq!((code.base, code.limit, code.selector), (0, 0xffff_ffff, 0x10));
        assert_eq!(
            (code.l, code.db, code.g, code.s, code.present, code.type_),
            (1, 0, 1, 1, 1, 0xb)
        );
        let task = segment(TASK, 3);
        assert_eq!((task.limit, task.s, task.type_, task.g), (0x67, 0, 0xb, 0));
    }
}
