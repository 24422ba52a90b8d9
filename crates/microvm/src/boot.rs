//! Putting a kernel, its command line and its initial RAM disk into guest memory.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::PathBuf;

use stencil_vmm_api::{GENERATION_GPA, PayloadConfig};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::kernel::{CMDLINE_MAX, LoadError, MapEntry, MapKind, Parameters};
use crate::memory::{GuestRam, MemoryRange, PAGE};
use crate::mptable;
use crate::registers::Entry;
use crate::{bzimage, pvh};

/// Where the command line lies, up to [`CMDLINE_MAX`] bytes.
const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Where the legacy video and BIOS areas begin: the end of the memory below 1 MiB.
const LEGACY: u64 = 0xa_0000;
const HIGH_MEMORY: u64 = 0x10_0000;

/// Loads all of it; says where the first vCPU begins.
pub(crate) fn load(ram: &GuestRam, payload: &PayloadConfig, vcpus: u8) -> Result<Entry, LoadError> {
    let path = PathBuf::from(payload.kernel.as_ref().ok_or(LoadError::NoKernel)?);
    let unreadable = |source| LoadError::Read {
        field: "kernel",
        path: path.clone(),
        source,
    };
    let mut file = File::open(&path).map_err(unreadable)?;
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err(unreadable(io::ErrorKind::IsADirectory.into()));
    }
    let memory = &ram.mmap;
    write_cmdline(memory, payload.cmdline.as_deref().unwrap_or(""))?;
    mptable::write(memory, vcpus).map_err(LoadError::MpTable)?;
    let mut parameters = Parameters {
        cmdline: CMDLINE,
        initrd: None,
        map: memory_map(ram),
    };
    match format_of(&mut file).map_err(unreadable)? {
        Some(Format::Elf) => {
            let kernel = pvh::load(memory, file, &path)?;
            parameters.initrd = load_initrd(ram, payload, kernel.end, u64::MAX)?;
            pvh::start(memory, kernel.entry, &parameters)
        }
        Some(Format::BzImage) => {
            let kernel = bzimage::load(memory, file, &path)?;
            parameters.initrd = load_initrd(ram, payload, kernel.end, kernel.initrd_end())?;
            bzimage::start(memory, &kernel, &parameters)
        }
        None => Err(LoadError::UnknownFormat(path)),
    }
}

enum Format {
    Elf,
    BzImage,
}

fn format_of(file: &mut File) -> io::Result<Option<Format>> {
    // "HdrS" at 0x202 is the magic of the Linux boot protocol.
    let mut head = [0; 0x206];
    let mut filled = 0;
    while filled < head.len() {
        match file.read(&mut head[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    file.rewind()?;
    Ok(match &head[..filled] {
        head if head.starts_with(b"\x7fELF") => Some(Format::Elf),
        head if head.ends_with(b"HdrS") => Some(Format::BzImage),
        _ => None,
    })
}

fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), LoadError> {
    if cmdline.len() >= CMDLINE_MAX {
        return Err(LoadError::Cmdline(cmdline.len()));
    }
    memory.write_slice(cmdline.as_bytes(), CMDLINE)?;
    Ok(memory.write_obj(0_u8, GuestAddress(CMDLINE.0 + cmdline.len() as u64))?)
}

/// Puts the initial RAM disk as high as `limit` and the memory below 3 GiB allow, above `kernel_end`.
fn load_initrd(
    ram: &GuestRam,
    payload: &PayloadConfig,
    kernel_end: u64,
    limit: u64,
) -> Result<Option<MemoryRange>, LoadError> {
    let Some(path) = payload.initramfs.as_ref().map(PathBuf::from) else {
        return Ok(None);
    };
    let unreadable = |source| LoadError::Read {
        field: "initramfs",
        path: path.clone(),
        source,
    };
    let mut file = File::open(&path).map_err(unreadable)?;
    let length = file.metadata().map_err(unreadable)?.len();
    let gpa = low_memory(ram)
        .min(limit)
        .checked_sub(length)
        .map(|start| start / PAGE * PAGE)
        .filter(|start| *start >= kernel_end)
        .ok_or_else(|| LoadError::NoRoom {
            path: path.clone(),
            size: length,
        })?;
    let size = usize::try_from(length).map_err(|_| LoadError::NoRoom {
        path: path.clone(),
        size: length,
    })?;
    ram.mmap
        .read_exact_volatile_from(GuestAddress(gpa), &mut file, size)?;
    Ok(Some(MemoryRange { gpa, length }))
}

/// Bytes of memory below the hole.
fn low_memory(ram: &GuestRam) -> u64 {
    ram.ranges().next().map_or(0, |low| low.range.length)
}

/// RAM, less the pages that are the VMM's, and less the legacy area below 1 MiB.
fn memory_map(ram: &GuestRam) -> Vec<MapEntry> {
    let entry = |kind, start, end| MapEntry {
        kind,
        range: MemoryRange {
            gpa: start,
            length: end - start,
        },
    };
    let mut map = vec![
        entry(MapKind::Ram, 0, GENERATION_GPA),
        // The generation page and the vmclock page.
        entry(MapKind::Reserved, GENERATION_GPA, LEGACY),
        entry(MapKind::Reserved, mptable::START, HIGH_MEMORY),
        entry(MapKind::Ram, HIGH_MEMORY, low_memory(ram)),
    ];
    map.extend(ram.ranges().skip(1).map(|high| MapEntry {
        kind: MapKind::Ram,
        range: high.range,
    }));
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout;

    #[test]
    fn the_map_hides_the_pages_of_the_vmm_and_the_hole() {
        let ram = GuestRam::anonymous(&layout(4 << 30)).unwrap();
        let map = memory_map(&ram);
        let ram_only: Vec<_> = map
            .iter()
            .filter(|entry| entry.kind == MapKind::Ram)
            .map(|entry| entry.range)
            .collect();
        assert_eq!(
            ram_only,
            [
                MemoryRange {
                    gpa: 0,
                    length: 0x9_e000
                },
                MemoryRange {
                    gpa: 0x10_0000,
                    length: (3 << 30) - 0x10_0000
                },
                MemoryRange {
                    gpa: 4 << 30,
                    length: 1 << 30
                },
            ]
        );
        assert!(map.iter().any(|entry| entry.range
            == MemoryRange {
                gpa: 0x9_e000,
                length: 0x2000
            }));
    }
}
