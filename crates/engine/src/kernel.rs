//! Whether a file is a kernel that a VMM can boot, and what it needs: told before anything is started.

mod bzimage;

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::fs::FileExt;

use elf::ElfStream;
use elf::abi::{EM_X86_64, PT_LOAD, PT_NOTE};
use elf::endian::LittleEndian;
use elf::note::Note;

/// What a bzImage has at [`BZIMAGE_MAGIC_OFFSET`] (Linux, Documentation/arch/x86/boot.rst, "header").
const BZIMAGE_MAGIC: &[u8; 4] = b"HdrS";
const BZIMAGE_MAGIC_OFFSET: u64 = 0x202;

/// Owner of the notes that Xen has defined, and their types (Xen, public/elfnote.h): `XEN_ELFNOTE_PHYS32_ENTRY` names the PVH entry
/// point, `XEN_ELFNOTE_GUEST_OS` the system.
const XEN: &str = "Xen";
const PVH_TYPE: u64 = 18;
const GUEST_OS_TYPE: u64 = 6;

/// More notes than any kernel has, in bytes. What a file says of its own parts is not read into memory without a bound; it is read,
/// and not mapped, for whoever cuts it off meanwhile would end the server.
const MOST_NOTES: u64 = 1 << 20;
/// The size of an ELF header, and where in it the counts of program headers and section headers are (elf(5)).
const HEADER: usize = 64;
const PROGRAM_HEADERS: usize = 0x38;
const SECTION_HEADERS: usize = 0x3c;
/// The count of program headers that stands for another one elsewhere, which may be billions.
const PN_XNUM: u16 = 0xffff;

/// The longest command line of a Linux on x86, in bytes without the NUL (Linux, arch/x86/include/asm/setup.h, `COMMAND_LINE_SIZE`).
const LINUX_CMDLINE: usize = 2047;
/// The longest that every VMM takes, in bytes: the microVM and Cloud Hypervisor have 64 KiB for it, with the NUL.
const VMM_CMDLINE: usize = 0xffff;

/// Why a file cannot be booted; each reads on after the file's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoKernel {
    #[error("is neither an ELF file nor a bzImage")]
    OtherFormat,
    #[error("is a damaged ELF file")]
    Damaged,
    #[error("is an ELF file for another machine than x86-64")]
    OtherMachine,
    #[error("is an ELF file without a PVH note")]
    NoPvhNote,
}

/// What is known of a kernel that can be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// It is a Linux.
    pub(crate) is_linux: bool,
    /// The longest command line that it takes, in bytes.
    pub(crate) longest_cmdline: usize,
    /// The first address of the memory that it does not need to begin.
    pub(crate) end: u64,
}

pub(crate) fn check(file: &File) -> Result<Kernel, NoKernel> {
    if is_bzimage(file) {
        return Ok(bzimage::look_at(file));
    }
    if !starts_with(file, &elf::abi::ELFMAGIC, 0) {
        return Err(NoKernel::OtherFormat);
    }
    if !has_bounded_headers(file) {
        return Err(NoKernel::Damaged);
    }
    check_elf(file)
}

/// Whether the header itself says how many headers there are: up to 65,534 of each kind.
fn has_bounded_headers(file: &File) -> bool {
    let mut header = [0; HEADER];
    if file.read_exact_at(&mut header, 0).is_err() {
        return false;
    }
    let count = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let has_sections = header[0x28..0x30] != [0; 8];
    count(PROGRAM_HEADERS) != PN_XNUM && (count(SECTION_HEADERS) != 0 || !has_sections)
}

/// Whether a file has the format of Linux's own.
pub(crate) fn is_bzimage(file: &File) -> bool {
    starts_with(file, BZIMAGE_MAGIC, BZIMAGE_MAGIC_OFFSET)
}

fn starts_with(file: &File, magic: &[u8; 4], offset: u64) -> bool {
    let mut found = [0; 4];
    file.read_exact_at(&mut found, offset).is_ok() && found == *magic
}

fn check_elf(file: impl Read + Seek) -> Result<Kernel, NoKernel> {
    let mut elf = ElfStream::<LittleEndian, _>::open_stream(file).map_err(|_| NoKernel::Damaged)?;
    if elf.ehdr.e_machine != EM_X86_64 {
        return Err(NoKernel::OtherMachine);
    }
    let segments = elf.segments().clone();
    let (mut is_pvh, mut is_linux) = (false, false);
    for segment in segments.iter().filter(|segment| segment.p_type == PT_NOTE) {
        if segment.p_filesz > MOST_NOTES {
            return Err(NoKernel::Damaged);
        }
        let notes = elf
            .segment_data_as_notes(segment)
            .map_err(|_| NoKernel::Damaged)?;
        for note in notes {
            is_pvh |= is_a(&note, XEN, PVH_TYPE);
            is_linux |= is_of_linux(&note);
        }
    }
    if !is_pvh {
        return Err(NoKernel::NoPvhNote);
    }
    let loaded = segments.iter().filter(|segment| segment.p_type == PT_LOAD);
    Ok(Kernel {
        is_linux,
        longest_cmdline: if is_linux { LINUX_CMDLINE } else { VMM_CMDLINE },
        end: loaded
            .map(|segment| segment.p_paddr.saturating_add(segment.p_memsz))
            .max()
            .unwrap_or(0),
    })
}

fn is_a(note: &Note<'_>, owner: &str, kind: u64) -> bool {
    matches!(note, Note::Unknown(any) if any.n_type == kind && any.name_str().is_ok_and(|name| name == owner))
}

/// Whether only Linux has this note: one under its own name, which each has since 4.19, or Xen's note that names the system.
fn is_of_linux(note: &Note<'_>) -> bool {
    match note {
        Note::Unknown(any) if any.name_str().is_ok_and(|name| name == "Linux") => true,
        Note::Unknown(any) => is_a(note, XEN, GUEST_OS_TYPE) && any.desc.starts_with(b"linux"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn check_bytes(bytes: &[u8]) -> Result<Kernel, NoKernel> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        check(&file)
    }

    #[test]
    fn a_program_of_this_host_is_no_kernel() {
        let this = std::fs::read("/proc/self/exe").unwrap();
        assert_eq!(check_bytes(&this), Err(NoKernel::NoPvhNote));
    }

    #[test]
    fn an_elf_with_junk_behind_its_magic_is_damaged() {
        assert_eq!(check_bytes(b"\x7fELF and more"), Err(NoKernel::Damaged));
    }

    #[test]
    fn a_text_is_neither() {
        assert_eq!(check_bytes(b"#!/bin/sh\n"), Err(NoKernel::OtherFormat));
        assert_eq!(check_bytes(b""), Err(NoKernel::OtherFormat));
    }

    #[test]
    fn a_bzimage_is_known_by_its_header_and_says_what_it_takes() {
        let mut image = vec![0; 0x202];
        image.extend_from_slice(b"HdrS");
        let of_old = Kernel {
            is_linux: true,
            longest_cmdline: 255,
            end: 0,
        };
        assert_eq!(check_bytes(&image), Ok(of_old));
        image.resize(0x264, 0);
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x30_0000_u32.to_le_bytes());
        let of_now = Kernel {
            is_linux: true,
            longest_cmdline: 2047,
            end: 0x130_0000,
        };
        assert_eq!(check_bytes(&image), Ok(of_now));
    }

    /// A note of this owner, whose name ends with a NUL.
    fn note(owner: &[u8], kind: u32, content: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for number in [
            u32::try_from(owner.len()).unwrap(),
            u32::try_from(content.len()).unwrap(),
            kind,
        ] {
            note.extend(number.to_le_bytes());
        }
        for part in [owner, content] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    /// An ELF with these notes, that is loaded from 1 MiB on and takes 64 KiB there.
    fn elf(notes: &[Vec<u8>]) -> Vec<u8> {
        const HEADERS: u64 = 64 + 2 * 56;
        let notes = notes.concat();
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for word in [0, 64, 0] {
            elf.extend(u64::to_le_bytes(word));
        }
        elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
        let size = notes.len() as u64;
        for (kind, offset, address, in_file, in_memory) in
            [(4_u32, HEADERS, 0, size, size), (1, 0, 1 << 20, 0, 64 << 10)]
        {
            elf.extend(kind.to_le_bytes());
            elf.extend(0_u32.to_le_bytes());
            for word in [offset, address, address, in_file, in_memory, 4] {
                elf.extend(word.to_le_bytes());
            }
        }
        elf.extend(notes);
        elf
    }

    #[test]
    fn a_small_file_that_claims_to_have_much_is_damaged() {
        let claims = |at: usize, bytes: &[u8]| {
            let mut elf = elf(&[note(b"Xen\0", 18, &[0; 4])]);
            elf[at..at + bytes.len()].copy_from_slice(bytes);
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&elf).unwrap();
            // The rest is a hole.
            file.set_len(3 << 30).unwrap();
            check(&file)
        };
        // The size of its notes, in the first program header; the counts of headers.
        assert_eq!(
            claims(64 + 0x20, &(2_u64 << 30).to_le_bytes()),
            Err(NoKernel::Damaged)
        );
        assert_eq!(claims(PROGRAM_HEADERS, &[0xff, 0xff]), Err(NoKernel::Damaged));
        assert_eq!(claims(0x28, &64_u64.to_le_bytes()), Err(NoKernel::Damaged));
        assert!(claims(0, b"\x7f").is_ok());
    }

    #[test]
    fn a_linux_is_told_from_another_elf_by_its_notes() {
        let pvh = note(b"Xen\0", 18, &[0; 4]);
        let other = Kernel {
            is_linux: false,
            longest_cmdline: VMM_CMDLINE,
            end: (1 << 20) + (64 << 10),
        };
        let gnu = note(b"GNU\0", 3, &[7; 4]);
        assert_eq!(check_bytes(&elf(&[gnu.clone(), pvh.clone()])), Ok(other));
        let linux = Kernel {
            is_linux: true,
            longest_cmdline: LINUX_CMDLINE,
            ..other
        };
        // Its own note, and the one for Xen.
        for says_so in [note(b"Linux\0", 0x100, b"6.1.0\0"), note(b"Xen\0", 6, b"linux\0")] {
            assert_eq!(check_bytes(&elf(&[says_so, pvh.clone()])), Ok(linux));
        }
        let of_another = note(b"Xen\0", 6, b"FreeBSD\0");
        assert_eq!(check_bytes(&elf(&[of_another, pvh])), Ok(other));
        assert_eq!(check_bytes(&elf(&[gnu])), Err(NoKernel::NoPvhNote));
    }
}
