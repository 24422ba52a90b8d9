//! The MP table: tells a guest without ACPI of its vCPUs and of the IOAPIC (Intel MultiProcessor Specification 1.4,
//! chapter 4).

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// The BIOS area, one of the places where the specification has guests look.
pub(crate) const START: u64 = 0xf_0000;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
/// Pins of the IOAPIC that are the interrupt lines of a PC.
const LINES: u8 = 16;

// Kinds of entries.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
// Kinds of interrupts.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
// Flags of processors and IOAPICs.
const ENABLED: u8 = 1;
const BOOT: u8 = 2;
const ALL_APICS: u8 = 0xff;

/// Writes the pointer and the table.
pub(crate) fn write(memory: &GuestMemoryMmap, vcpus: u8) -> Result<(), GuestMemoryError> {
    memory.write_slice(&pointer(), GuestAddress(START))?;
    memory.write_slice(&table(vcpus), GuestAddress(START + 16))
}

/// The floating pointer structure.
fn pointer() -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(b"_MP_");
    bytes[4..8].copy_from_slice(&0xf_0010_u32.to_le_bytes());
    bytes[8] = 1; // length in units of 16 bytes
    bytes[9] = 4; // version 1.4
    bytes[10] = checksum(&bytes);
    bytes
}

fn table(vcpus: u8) -> Vec<u8> {
    let ioapic_id = vcpus;
    let mut entries = Vec::new();
    let mut count = 0_u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[
            PROCESSOR,
            id,
            APIC_VERSION,
            if id == 0 { ENABLED | BOOT } else { ENABLED },
        ]);
        // Family 6 with an APIC; guests ask CPUID for the truth.
        entry[4..8].copy_from_slice(&0x600_u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201_u32.to_le_bytes());
        add(&entry);
    }
    add(&[BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = IO_APIC.to_le_bytes();
    add(&[IOAPIC, ioapic_id, APIC_VERSION, ENABLED, a, b, c, d]);
    for line in 0..LINES {
        // KVM routes line 0, the PIT, to pin 2, as a PC does; line 2 is the cascade and has no pin.
        let pin = match line {
            0 => 2,
            2 => continue,
            line => line,
        };
        add(&[INTERRUPT, INT, 0, 0, 0, line, ioapic_id, pin]);
    }
    add(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, 0, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_APICS, 1]);

    let mut bytes = vec![0; 44];
    bytes[..4].copy_from_slice(b"PCMP");
    let length = u16::try_from(bytes.len() + entries.len()).unwrap_or(u16::MAX);
    bytes[4..6].copy_from_slice(&length.to_le_bytes());
    bytes[6] = 4; // version 1.4
    bytes[8..16].copy_from_slice(b"STENCIL ");
    bytes[16..28].copy_from_slice(b"MICROVM     ");
    bytes[34..36].copy_from_slice(&count.to_le_bytes());
    bytes[36..40].copy_from_slice(&LOCAL_APIC.to_le_bytes());
    bytes.extend(entries);
    bytes[7] = checksum(&bytes);
    bytes
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_structures_add_up_to_zero() {
        assert_eq!(checksum(&pointer()), 0);
        let table = table(2);
        assert_eq!(checksum(&table), 0);
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
    }

    #[test]
    fn each_vcpu_has_an_entry_and_the_first_one_boots() {
        let table = table(2);
        assert_eq!(table[44..48], [PROCESSOR, 0, APIC_VERSION, ENABLED | BOOT]);
        assert_eq!(table[64..68], [PROCESSOR, 1, APIC_VERSION, ENABLED]);
    }
}
