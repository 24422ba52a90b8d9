//! Whether a file is a kernel that a VMM can boot: told before anything is started.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::fs::FileExt;

use elf::ElfStream;
use elf::abi::{EM_X86_64, PT_NOTE};
use elf::endian::LittleEndian;
use elf::note::Note;

/// What a bzImage has at [`BZIMAGE_MAGIC_OFFSET`] (Linux, Documentation/arch/x86/boot.rst, "header").
const BZIMAGE_MAGIC: &[u8; 4] = b"HdrS";
const BZIMAGE_MAGIC_OFFSET: u64 = 0x202;

/// Owner and type of the note that names the PVH entry point (Xen, public/elfnote.h, `XEN_ELFNOTE_PHYS32_ENTRY`).
const PVH_NOTE_NAME: &str = "Xen";
const PVH_NOTE_TYPE: u64 = 18;

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

pub(crate) fn check(file: &File) -> Result<(), NoKernel> {
    if is_bzimage(file) {
        return Ok(());
    }
    if !starts_with(file, &elf::abi::ELFMAGIC, 0) {
        return Err(NoKernel::OtherFormat);
    }
    check_elf(file)
}

/// Whether a file has the format of Linux's own.
pub(crate) fn is_bzimage(file: &File) -> bool {
    starts_with(file, BZIMAGE_MAGIC, BZIMAGE_MAGIC_OFFSET)
}

fn starts_with(file: &File, magic: &[u8; 4], offset: u64) -> bool {
    let mut found = [0; 4];
    file.read_exact_at(&mut found, offset).is_ok() && found == *magic
}

fn check_elf(file: impl Read + Seek) -> Result<(), NoKernel> {
    let mut elf = ElfStream::<LittleEndian, _>::open_stream(file).map_err(|_| NoKernel::Damaged)?;
    if elf.ehdr.e_machine != EM_X86_64 {
        return Err(NoKernel::OtherMachine);
    }
    let notes: Vec<_> = elf
        .segments()
        .iter()
        .copied()
        .filter(|segment| segment.p_type == PT_NOTE)
        .collect();
    for segment in notes {
        let mut notes = elf
            .segment_data_as_notes(&segment)
            .map_err(|_| NoKernel::Damaged)?;
        if notes.any(|note| is_pvh(&note)) {
            return Ok(());
        }
    }
    Err(NoKernel::NoPvhNote)
}

fn is_pvh(note: &Note<'_>) -> bool {
    matches!(note, Note::Unknown(any) if any.n_type == PVH_NOTE_TYPE && any.name_str().is_ok_and(|name| name == PVH_NOTE_NAME))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn check_bytes(bytes: &[u8]) -> Result<(), NoKernel> {
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
    fn a_bzimage_is_known_by_its_header() {
        let mut image = vec![0; 0x202];
        image.extend_from_slice(b"HdrS");
        assert_eq!(check_bytes(&image), Ok(()));
    }
}
