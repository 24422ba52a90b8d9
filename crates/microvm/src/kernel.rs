//! What loading a kernel has in common for both boot protocols.

use std::io;
use std::path::PathBuf;

use linux_loader::configurator::Error as ConfiguratorError;
use linux_loader::loader::Error as LoaderError;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryError, GuestMemoryMmap};

use crate::memory::{HOLE, MemoryRange};

/// The command line: up to 64 KiB, with the zero at its end.
pub(crate) const CMDLINE_MAX: usize = 0x1_0000;

/// What the payload names cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error("payload.kernel is missing; right is the path of an ELF with a PVH note, or of a bzImage")]
    NoKernel,
    #[error("payload.{field} cannot be read: {path:?}")]
    Read {
        field: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("payload.kernel {0:?} is neither an ELF nor a bzImage")]
    UnknownFormat(PathBuf),
    #[error("payload.kernel {0:?} is an ELF without a PVH note (XEN_ELFNOTE_PHYS32_ENTRY)")]
    NoPvhNote(PathBuf),
    #[error("payload.kernel {0:?} is a bzImage without a 64-bit entry point")]
    No64BitEntry(PathBuf),
    #[error("payload.kernel {path:?} cannot be loaded")]
    Kernel { path: PathBuf, source: LoaderError },
    #[error("payload.cmdline has {0} bytes; up to {max} fit", max = CMDLINE_MAX - 1)]
    Cmdline(usize),
    #[error(
        "payload.initramfs {path:?} of {size} bytes does not fit between the kernel and the end of memory"
    )]
    NoRoom { path: PathBuf, size: u64 },
    #[error("the kernel needs memory up to {needed:#x}; below 3 GiB the VM has {has:#x} bytes")]
    TooSmall { needed: u64, has: u64 },
    #[error("what the kernel is told does not fit guest memory")]
    Parameters(#[from] ConfiguratorError),
    #[error("guest memory cannot be written")]
    Memory(#[from] GuestMemoryError),
    #[error("the MP table cannot be written")]
    MpTable(#[source] GuestMemoryError),
}

/// What a boot protocol tells the kernel.
pub(crate) struct Parameters {
    pub(crate) cmdline: GuestAddress,
    pub(crate) initrd: Option<MemoryRange>,
    pub(crate) map: Vec<MapEntry>,
}

/// An entry of the memory map that the guest is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapEntry {
    pub(crate) range: MemoryRange,
    pub(crate) kind: MapKind,
}

/// Numbers as in E820, which PVH shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MapKind {
    Ram = 1,
    Reserved = 2,
}

/// Checks that the kernel's memory, up to `end`, is there.
pub(crate) fn check_room(memory: &GuestMemoryMmap, end: u64) -> Result<(), LoadError> {
    let has = memory
        .iter()
        .next()
        .map_or(0, vm_memory::GuestMemoryRegion::len)
        .min(HOLE.start);
    if end > has {
        Err(LoadError::TooSmall { needed: end, has })
    } else {
        Ok(())
    }
}
