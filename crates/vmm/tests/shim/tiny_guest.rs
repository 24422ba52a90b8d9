//! A guest of some hundred bytes for machines like a PC, assembled into this test binary and written to a file as an ELF with a
//! PVH note. It prints `ready`, and then does what each character on the serial port says:
//!
//! | character | what it does |
//! |---|---|
//! | `c` | adds one to a counter in memory and prints it, a digit |
//! | `o` | powers off |
//! | `r` | resets the machine |
//! | `p` | panics, as a Linux with the pvpanic driver tells it |
//! | others | prints it |

use std::arch::global_asm;
use std::fs;
use std::path::{Path, PathBuf};

/// Where the code lies in guest memory.
const LOAD: u32 = 0x10_0000;

/// Where the counter is.
pub(crate) const COUNTER: u64 = 16 << 20;

global_asm!(
    r#"
    .pushsection .rodata.tiny_guest, "a"
    .globl tiny_guest_start
tiny_guest_start:
    .code32
    movl $0x100800, %esp
    movl $((77f - tiny_guest_start) + 0x100000), %esi
10: lodsb
    testb %al, %al
    jz 20f
    call 70f
    jmp 10b
20: movw $0x3fd, %dx
    inb (%dx), %al
    testb $1, %al
    jz 20b
    movw $0x3f8, %dx
    inb (%dx), %al
    cmpb $'c', %al
    je 30f
    cmpb $'o', %al
    je 40f
    cmpb $'r', %al
    je 50f
    cmpb $'p', %al
    je 60f
    call 70f
    jmp 20b
30: incl 0x1000000
    movl 0x1000000, %eax
    addb $'0', %al
    call 70f
    jmp 20b
40: movw $0x604, %dx
    movw $0x2000, %ax
    outw %ax, (%dx)
    jmp 40b
50: movw $0xcf9, %dx
    movb $6, %al
    outb %al, (%dx)
    jmp 50b
60: movw $0x505, %dx
    movb $1, %al
    outb %al, (%dx)
    jmp 20b
70: movb %al, %bl
71: movw $0x3fd, %dx
    inb (%dx), %al
    testb $0x20, %al
    jz 71b
    movw $0x3f8, %dx
    movb %bl, %al
    outb %al, (%dx)
    ret
77: .asciz "ready\n"
    .globl tiny_guest_end
tiny_guest_end:
    .code64
    .popsection
"#,
    options(att_syntax)
);

unsafe extern "C" {
    static tiny_guest_start: u8;
    static tiny_guest_end: u8;
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const tiny_guest_start, &raw const tiny_guest_end);
    // SAFETY: both are labels in the section above, which is read-only and all between them.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Writes the guest into `directory`: an ELF file with two program headers, for the code and for the note that names the PVH
/// entry point (Xen, public/elfnote.h, `XEN_ELFNOTE_PHYS32_ENTRY`).
pub(crate) fn write(directory: &Path) -> PathBuf {
    const LOADED: u32 = 1;
    const NOTE: u32 = 4;
    const HEADERS: u64 = 64 + 2 * 56;
    let words = [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), LOAD];
    let note: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    let segment = |kind: u32, offset: u64, address: u64, size: usize| -> Vec<u8> {
        let size = size as u64;
        let words = [offset, address, address, size, size, 4];
        let flags = 7_u32;
        let head = [kind, flags].into_iter().flat_map(u32::to_le_bytes);
        head.chain(words.into_iter().flat_map(u64::to_le_bytes)).collect()
    };
    let elf = [
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec(),
        // An executable for x86-64, version 1.
        vec![2, 0, 62, 0, 1, 0, 0, 0],
        [u64::from(LOAD), 64, 0]
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .collect(),
        vec![0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0],
        segment(LOADED, HEADERS + note.len() as u64, LOAD.into(), code().len()),
        segment(NOTE, HEADERS, 0, note.len()),
        note,
        code().to_vec(),
    ];
    let path = directory.join("tiny,guest.elf");
    fs::write(&path, elf.concat()).unwrap();
    path
}
