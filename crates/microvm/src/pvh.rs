//! An ELF with a PVH note (Xen, docs/misc/pvh.pandoc).

use std::fs::File;
use std::path::Path;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator as _, BootParams};
use linux_loader::loader::KernelLoader as _;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::kernel::{LoadError, Parameters, check_room};
use crate::registers::Entry;

const START_INFO: GuestAddress = GuestAddress(0x6000);
const MODULES: GuestAddress = GuestAddress(0x6040);
const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
const MAGIC: u32 = 0x336e_c578;

/// A kernel in guest memory.
pub(crate) struct Kernel {
    pub(crate) entry: u64,
    /// The first address after it.
    pub(crate) end: u64,
}

pub(crate) fn load(memory: &GuestMemoryMmap, mut file: File, path: &Path) -> Result<Kernel, LoadError> {
    let loaded = Elf::load(memory, None, &mut file, None).map_err(|source| LoadError::Kernel {
        path: path.to_owned(),
        source,
    })?;
    check_room(memory, loaded.kernel_end)?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Ok(Kernel {
            entry: entry.0,
            end: loaded.kernel_end,
        }),
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            Err(LoadError::NoPvhNote(path.to_owned()))
        }
    }
}

/// Writes what the kernel is told.
pub(crate) fn start(
    memory: &GuestMemoryMmap,
    entry: u64,
    parameters: &Parameters,
) -> Result<Entry, LoadError> {
    let map: Vec<_> = parameters
        .map
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.range.gpa,
            size: entry.range.length,
            type_: entry.kind as u32,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = parameters
        .initrd
        .iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: initrd.gpa,
            size: initrd.length,
            ..Default::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        cmdline_paddr: parameters.cmdline.0,
        nr_modules: u32::from(!modules.is_empty()),
        modlist_paddr: if modules.is_empty() { 0 } else { MODULES.0 },
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: u32::try_from(map.len()).unwrap_or(u32::MAX),
        ..Default::default()
    };
    let mut boot = BootParams::new(&info, START_INFO);
    boot.set_sections(&map, MEMORY_MAP);
    if !modules.is_empty() {
        boot.set_modules(&modules, MODULES);
    }
    PvhBootConfigurator::write_bootparams(&boot, memory)?;
    Ok(Entry::Pvh {
        entry,
        start_info: START_INFO.0,
    })
}
