//! A bzImage, entered by the 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst).

use std::fs::File;
use std::path::Path;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator as _, BootParams};
use linux_loader::loader::KernelLoader as _;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::kernel::{LoadError, Parameters, check_room};
use crate::registers::Entry;

const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// The 64-bit entry point, from the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
/// `xloadflags`: the entry point is there.
const XLF_KERNEL_64: u16 = 1;
/// `type_of_loader`: one without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// A kernel in guest memory.
pub(crate) struct Kernel {
    start: u64,
    /// The first address after it and after what it needs to unpack itself.
    pub(crate) end: u64,
    header: setup_header,
}

impl Kernel {
    /// The first address that an initial RAM disk must not reach.
    pub(crate) fn initrd_end(&self) -> u64 {
        u64::from(self.header.initrd_addr_max).saturating_add(1)
    }
}

pub(crate) fn load(memory: &GuestMemoryMmap, mut file: File, path: &Path) -> Result<Kernel, LoadError> {
    let failed = |source| LoadError::Kernel {
        path: path.to_owned(),
        source,
    };
    let loaded = BzImage::load(memory, None, &mut file, None).map_err(failed)?;
    let header = loaded
        .setup_header
        .ok_or_else(|| LoadError::UnknownFormat(path.to_owned()))?;
    let flags = header.xloadflags;
    if flags & XLF_KERNEL_64 == 0 {
        return Err(LoadError::No64BitEntry(path.to_owned()));
    }
    let start = loaded.kernel_load.0;
    // It unpacks itself to where it prefers to run, or to where it lies if that is higher.
    let preferred = header.pref_address.max(start);
    let end = loaded
        .kernel_end
        .max(preferred.saturating_add(u64::from(header.init_size)));
    check_room(memory, end)?;
    Ok(Kernel { start, end, header })
}

/// Writes the zero page.
pub(crate) fn start(
    memory: &GuestMemoryMmap,
    kernel: &Kernel,
    parameters: &Parameters,
) -> Result<Entry, LoadError> {
    let mut page = boot_params {
        hdr: kernel.header,
        ..Default::default()
    };
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = low_address(parameters.cmdline.0);
    if let Some(initrd) = parameters.initrd {
        page.hdr.ramdisk_image = low_address(initrd.gpa);
        page.hdr.ramdisk_size = low_address(initrd.length);
    }
    for (slot, entry) in page.e820_table.iter_mut().zip(&parameters.map) {
        *slot = boot_e820_entry {
            addr: entry.range.gpa,
            size: entry.range.length,
            r#type: entry.kind as u32,
        };
        page.e820_entries += 1;
    }
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&page, ZERO_PAGE), memory)?;
    Ok(Entry::Linux64 {
        entry: kernel.start + ENTRY_64,
        zero_page: ZERO_PAGE.0,
    })
}

/// Addresses and sizes below 3 GiB, where all of these are.
fn low_address(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
