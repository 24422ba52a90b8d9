//! A small guest, assembled into this test binary and written to a file: as an ELF with a PVH note, or as a bzImage.
//!
//! It enters long mode, maps the low 6 GiB, takes COM1's interrupt (IRQ 4) and the restore interrupt (IRQ 5) through
//! the PIC, prints `ready`, and then does what each character on the serial port says; what it does not know it echoes.

use std::arch::global_asm;
use std::fs;
use std::path::{Path, PathBuf};

/// Where the code lies in guest memory.
const LOAD: u64 = 0x10_0000;

/// Where `s` stores a character, and the first of the pages that `w` writes: one each MiB, 16 of them.
pub(crate) const SCRATCH: u64 = 16 << 20;

global_asm!(
    r#"
    .pushsection .rodata.test_guest, "a"
    .balign 16
    .set LOAD, 0x100000
    .set PML4, 0x200000
    .set PDPT, 0x201000
    .set DIRECTORIES, 0x202000
    .set IDT, 0x210000
    .set SCRATCH, 0x1000000
    .set TRAMPOLINE, 0x8000
    .set PVCLOCK, 0x211000

    .globl test_guest_start
test_guest_start:
    .code32
    cld
    movl %ebx, %ebp
    movl $0x1ff000, %esp
    movl $(PDPT + 3), PML4
    movl $PDPT, %edi
    movl $(DIRECTORIES + 3), %eax
    movl $6, %ecx
20: movl %eax, (%edi)
    addl $8, %edi
    addl $0x1000, %eax
    decl %ecx
    jnz 20b
    movl $DIRECTORIES, %edi
    movl $0x83, %eax
    xorl %edx, %edx
    movl $(6 * 512), %ecx
21: movl %eax, (%edi)
    movl %edx, 4(%edi)
    addl $8, %edi
    addl $0x200000, %eax
    adcl $0, %edx
    decl %ecx
    jnz 21b
    movl %cr4, %eax
    orl $0x20, %eax
    movl %eax, %cr4
    movl $PML4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0
    lgdt LOAD + tg_gdt_pointer - test_guest_start
    pushl $8
    pushl $(LOAD + tg_pvh64 - test_guest_start)
    lretl

    # Where a bzImage is entered: in long mode, %rsi is the zero page.
    .org test_guest_start + 0x200
    .code64
    cmpl $0x53726448, 0x202(%rsi)
    jne tg_triple
    movl 0x228(%rsi), %r12d
    movl 0x218(%rsi), %r13d
    lgdt tg_gdt_pointer(%rip)
    pushq $8
    leaq tg_long(%rip), %rax
    pushq %rax
    lretq

    .balign 8
tg_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
tg_gdt_pointer:
    .word 23
    .quad LOAD + tg_gdt - test_guest_start
tg_idt_pointer:
    .word 0xfff
    .quad IDT
tg_no_idt:
    .word 0
    .quad 0

    .code64
# %rbp is hvm_start_info. From here on %r12 is the command line, %r13 the initial RAM disk or 0.
tg_pvh64:
    movl %ebp, %ebp
    movq 0x18(%rbp), %r12
    xorl %r13d, %r13d
    cmpl $0, 0xc(%rbp)
    je tg_long
    movq 0x10(%rbp), %rax
    movq (%rax), %r13
tg_long:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    leaq tg_irq4(%rip), %rax
    movq $(IDT + 0x24 * 16), %rdi
    call tg_gate
    leaq tg_irq5(%rip), %rax
    movq $(IDT + 0x25 * 16), %rdi
    call tg_gate
    lidt tg_idt_pointer(%rip)
    # The PICs at vectors 0x20 and 0x28, IRQ 4 and 5 unmasked.
    movb $0x11, %al
    outb %al, $0x20
    outb %al, $0xa0
    movb $0x20, %al
    outb %al, $0x21
    movb $0x28, %al
    outb %al, $0xa1
    movb $4, %al
    outb %al, $0x21
    movb $2, %al
    outb %al, $0xa1
    movb $1, %al
    outb %al, $0x21
    outb %al, $0xa1
    movb $0xcf, %al
    outb %al, $0x21
    movb $0xff, %al
    outb %al, $0xa1
    movw $0x3fc, %dx
    movb $0x0b, %al
    outb %al, %dx
    movw $0x3f9, %dx
    movb $1, %al
    outb %al, %dx
    leaq tg_ready(%rip), %rsi
    call tg_print

tg_loop:
    cli
    cmpb $0, tg_restored(%rip)
    je 1f
    movb $0, tg_restored(%rip)
    leaq tg_restored_text(%rip), %rsi
    call tg_print
1:  movw $0x3fd, %dx
    inb %dx, %al
    testb $1, %al
    jz tg_idle
    movw $0x3f8, %dx
    inb %dx, %al
    cmpb $'p', %al
    je tg_ping
    cmpb $'c', %al
    je tg_count
    cmpb $'g', %al
    je tg_generation
    cmpb $'k', %al
    je tg_clock
    cmpb $'m', %al
    je tg_cmdline
    cmpb $'i', %al
    je tg_initrd
    cmpb $'w', %al
    je tg_write
    cmpb $'s', %al
    je tg_store
    cmpb $'v', %al
    je tg_value
    cmpb $'h', %al
    je tg_high
    cmpb $'H', %al
    je tg_high_value
    cmpb $'f', %al
    je tg_fill
    cmpb $'+', %al
    je tg_sum
    cmpb $'a', %al
    je tg_second
    cmpb $'A', %al
    je tg_second_answers
    cmpb $'S', %al
    je tg_second_ticks
    cmpb $'b', %al
    je tg_busy
    cmpb $'T', %al
    je tg_ticks
    cmpb $'K', %al
    je tg_kvmclock
    cmpb $'l', %al
    je tg_timer
    cmpb $'L', %al
    je tg_timer_left
    cmpb $'n', %al
    je tg_notices
    cmpb $'t', %al
    je tg_triple
    cmpb $'o', %al
    je tg_off
    cmpb $'r', %al
    je tg_reset
    call tg_putc
    jmp tg_loop
tg_idle:
    sti
    hlt
    jmp tg_loop

tg_ping:
    leaq tg_pong(%rip), %rsi
    call tg_print
    jmp tg_loop
tg_count:
    incb tg_counter(%rip)
    leaq tg_counter_text(%rip), %rsi
    call tg_print
    movb tg_counter(%rip), %al
    addb $'0', %al
    call tg_putc
    jmp tg_newline
tg_generation:
    movq $0x9e000, %rsi
    movl $16, %ecx
    jmp tg_hex
tg_clock:
    movq $0x9f000, %rsi
    movl $112, %ecx
    jmp tg_hex
tg_cmdline:
    movq %r12, %rsi
    call tg_print
    jmp tg_newline
tg_initrd:
    movq %r13, %rsi
    call tg_print
    jmp tg_newline
tg_write:
    movq $SCRATCH, %rdi
    movl $16, %ecx
2:  movb $'w', (%rdi)
    addq $0x100000, %rdi
    decl %ecx
    jnz 2b
    # Touched, and zero all the same.
    movb $0, (%rdi)
    leaq tg_written(%rip), %rsi
    call tg_print
    jmp tg_loop
tg_store:
    call tg_getc
    movb %al, SCRATCH
    leaq tg_stored(%rip), %rsi
    call tg_print
    jmp tg_loop
tg_value:
    leaq tg_value_text(%rip), %rsi
    call tg_print
    movb SCRATCH, %al
    call tg_putc
    jmp tg_newline
tg_high:
    movabsq $0x140000000, %rdi
    movabsq $0x1122334455667788, %rax
    movq %rax, (%rdi)
    leaq tg_stored(%rip), %rsi
    call tg_print
    jmp tg_loop
tg_high_value:
    movabsq $0x140000000, %rsi
    movl $8, %ecx
    jmp tg_hex
# Writes n + 1 to page n from SCRATCH on, of as many pages as the next character says.
tg_fill:
    call tg_getpages
    movq $SCRATCH, %rdi
    movl $1, %eax
10: movq %rax, (%rdi)
    addq $0x1000, %rdi
    incq %rax
    decl %ecx
    jnz 10b
    leaq tg_filled(%rip), %rsi
    call tg_print
    jmp tg_loop
# Adds up what the same pages have, in a scattered order that is always the same, and says the sum. It writes to each
# eighth of them, elsewhere in the page.
tg_sum:
    call tg_getpages
    leal -1(%rcx), %r8d
    xorl %r9d, %r9d
    xorl %ebx, %ebx
11: movl %ebx, %eax
    imull $2654435761, %eax, %eax
    andl %r8d, %eax
    shlq $12, %rax
    addq $SCRATCH, %rax
    addq (%rax), %r9
    testl $7, %ebx
    jnz 12f
    movq %rbx, 8(%rax)
12: incl %ebx
    decl %ecx
    jnz 11b
    movq %r9, tg_total(%rip)
    leaq tg_sum_text(%rip), %rsi
    call tg_print
    leaq tg_total(%rip), %rsi
    movl $8, %ecx
    jmp tg_hex
tg_second:
    leaq tg_trampoline(%rip), %rsi
    movq $TRAMPOLINE, %rdi
    movl $(tg_trampoline_end - tg_trampoline), %ecx
    rep movsb
    # The LAPIC's interrupt command register: INIT, then SIPI, to all but this one.
    movl $0xfee00300, %edi
    movl $0xc4500, (%rdi)
    movl $0xc4608, (%rdi)
4:  pause
    cmpb $1, TRAMPOLINE + 0x800
    jne 4b
    leaq tg_up(%rip), %rsi
    call tg_print
    jmp tg_loop
tg_second_answers:
    movb $1, TRAMPOLINE + 0x801
5:  pause
    cmpb $1, TRAMPOLINE + 0x802
    jne 5b
    leaq tg_second_text(%rip), %rsi
    call tg_print
    jmp tg_loop
# What the second vCPU's time stamp counter was when it answered.
tg_second_ticks:
    movq $(TRAMPOLINE + 0x808), %rsi
    movl $8, %ecx
    jmp tg_hex
# The time stamp counter.
tg_ticks:
    rdtsc
    movl %eax, tg_total(%rip)
    movl %edx, tg_total+4(%rip)
    leaq tg_total(%rip), %rsi
    movl $8, %ecx
    jmp tg_hex
# kvmclock, in nanoseconds: being told where (MSR_KVM_SYSTEM_TIME_NEW), KVM writes it there before it enters again.
tg_kvmclock:
    movl $0x4b564d01, %ecx
    movl $(PVCLOCK + 1), %eax
    xorl %edx, %edx
    wrmsr
    inb $0x80, %al
    movq $(PVCLOCK + 16), %rsi
    movl $8, %ecx
    jmp tg_hex
# The LAPIC's timer: once, without an interrupt, from the largest count, of 128 ns each.
tg_timer:
    movl $0xfee00000, %edi
    movl $0x1ff, 0xf0(%rdi)
    movl $0x10040, 0x320(%rdi)
    movl $0xa, 0x3e0(%rdi)
    movl $0xffffffff, 0x380(%rdi)
    jmp tg_loop
tg_timer_left:
    movl $0xfee00000, %edi
    movl 0x390(%rdi), %eax
    movl %eax, tg_total(%rip)
    movl $0, tg_total+4(%rip)
    leaq tg_total(%rip), %rsi
    movl $8, %ecx
    jmp tg_hex
# How many restore interrupts there were.
tg_notices:
    leaq tg_restores(%rip), %rsi
    movl $8, %ecx
    jmp tg_hex
tg_busy:
    leaq tg_busy_text(%rip), %rsi
    call tg_print
6:  jmp 6b
tg_triple:
    lidt tg_no_idt(%rip)
    ud2
tg_off:
    movw $0x600, %dx
    movb $0x34, %al
    outb %al, %dx
    hlt
tg_reset:
    movb $0xfe, %al
    outb %al, $0x64
    hlt

# %ecx bytes at %rsi in hexadecimal digits, and a new line.
tg_hex:
    movb (%rsi), %al
    shrb $4, %al
    call tg_digit
    movb (%rsi), %al
    andb $15, %al
    call tg_digit
    incq %rsi
    decl %ecx
    jnz tg_hex
tg_newline:
    movb $'\n', %al
    call tg_putc
    jmp tg_loop
tg_digit:
    addb $'0', %al
    cmpb $'9', %al
    jbe tg_putc
    addb $('a' - '9' - 1), %al
tg_putc:
    movw $0x3f8, %dx
    outb %al, %dx
    ret
tg_getc:
    movw $0x3fd, %dx
3:  inb %dx, %al
    testb $1, %al
    jz 3b
    movw $0x3f8, %dx
    inb %dx, %al
    ret
# %ecx pages: 256 for the digit 0, and twice as many for each one more.
tg_getpages:
    call tg_getc
    leal (8 - '0')(%rax), %ecx
    movl $1, %eax
    shll %cl, %eax
    movl %eax, %ecx
    ret
# The text at %rsi, up to a zero.
tg_print:
    movb (%rsi), %al
    testb %al, %al
    jz 7f
    call tg_putc
    incq %rsi
    jmp tg_print
7:  ret
# The interrupt gate at %rdi leads to %rax.
tg_gate:
    movw %ax, (%rdi)
    movw $8, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    shrq $16, %rax
    movw %ax, 6(%rdi)
    movl $0, 8(%rdi)
    ret
tg_irq5:
    movb $1, tg_restored(%rip)
    incq tg_restores(%rip)
tg_irq4:
    pushq %rax
    movb $0x20, %al
    outb %al, $0x20
    popq %rax
    iretq

# The second vCPU: says that it is there, then answers once.
    .code16
tg_trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movb $1, TRAMPOLINE + 0x800
8:  pause
    cmpb $1, TRAMPOLINE + 0x801
    jne 8b
    rdtsc
    movl %eax, TRAMPOLINE + 0x808
    movl %edx, TRAMPOLINE + 0x80c
    movb $1, TRAMPOLINE + 0x802
9:  hlt
    jmp 9b
tg_trampoline_end:
    .code64

tg_total: .quad 0
tg_restores: .quad 0
tg_counter: .byte 0
tg_restored: .byte 0
tg_ready: .asciz "ready\n"
tg_restored_text: .asciz "restored\n"
tg_pong: .asciz "pong\n"
tg_counter_text: .asciz "counter "
tg_filled: .asciz "filled\n"
tg_sum_text: .asciz "sum "
tg_written: .asciz "written\n"
tg_stored: .asciz "kept\n"
tg_value_text: .asciz "value "
tg_up: .asciz "up\n"
tg_second_text: .asciz "second\n"
tg_busy_text: .asciz "busy\n"
    .globl test_guest_end
test_guest_end:
    .popsection
"#,
    options(att_syntax)
);

unsafe extern "C" {
    static test_guest_start: u8;
    static test_guest_end: u8;
}

/// What the guest answers to `+` and the digit when it has all pages that `f` and the digit wrote.
pub(crate) fn sum(digit: u32) -> String {
    let pages = 1_u64 << (digit + 8);
    format!("sum {}\n", hex::encode((pages * (pages + 1) / 2).to_le_bytes()))
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const test_guest_start, &raw const test_guest_end);
    // SAFETY: both are labels in the section above, which is read-only and all between them.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Writes the guest into `directory`.
pub(crate) fn write_elf(directory: &Path) -> PathBuf {
    write(directory, "guest.elf", 18)
}

/// Writes an ELF without a PVH note.
pub(crate) fn write_elf_without_note(directory: &Path) -> PathBuf {
    write(directory, "noteless.elf", 1)
}

/// Writes the guest as a bzImage with these `xloadflags` (Linux, Documentation/arch/x86/boot.rst).
pub(crate) fn write_bzimage(directory: &Path, xloadflags: u16) -> PathBuf {
    // A boot sector and one sector of setup code, both empty but for the header.
    let mut image = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x211, &[1]); // loaded high
    put(0x214, &u32::try_from(LOAD).unwrap().to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &xloadflags.to_le_bytes());
    put(0x258, &LOAD.to_le_bytes());
    put(0x260, &0x20_0000_u32.to_le_bytes());
    image.extend(code());
    let path = directory.join("bzImage");
    fs::write(&path, image).unwrap();
    path
}

fn write(directory: &Path, name: &str, note_type: u32) -> PathBuf {
    const HEADERS: u64 = 64 + 2 * 56;
    let code = code();
    let mut note = Vec::new();
    for word in [
        4,
        4,
        note_type,
        u32::from_le_bytes(*b"Xen\0"),
        u32::try_from(LOAD).unwrap(),
    ] {
        note.extend(word.to_le_bytes());
    }
    let mut elf = Vec::new();
    elf.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version 1
    [LOAD, 64, 0]
        .into_iter()
        .for_each(|word| elf.extend(word.to_le_bytes()));
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let mut header = |kind: u32, offset: u64, address: u64, size: u64| {
        elf.extend(kind.to_le_bytes());
        elf.extend(7_u32.to_le_bytes());
        [offset, address, address, size, size, 4]
            .into_iter()
            .for_each(|word| elf.extend(word.to_le_bytes()));
    };
    header(1, HEADERS + note.len() as u64, LOAD, code.len() as u64);
    header(4, HEADERS, 0, note.len() as u64);
    elf.extend(note);
    elf.extend(code);
    let path = directory.join(name);
    fs::write(&path, elf).unwrap();
    path
}
