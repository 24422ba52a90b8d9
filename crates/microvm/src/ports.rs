//! The devices outside KVM, as the vCPUs reach them: through I/O ports.

use std::sync::Arc;

use stencil_vmm_api::VmEndKind;

use crate::serial::Serial;

const COM1: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;
/// Command port of the i8042 keyboard controller.
const KEYBOARD: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
/// Cloud Hypervisor's ACPI shutdown device: the sleep type S5 in bits 2..4 with the sleep enable bit 5, or a reset.
const POWER: u16 = 0x600;
const POWER_OFF: u8 = 0x34;
const POWER_RESET: u8 = 1;

/// What the I/O ports lead to.
pub(crate) struct Ports {
    pub(crate) serial: Option<Arc<Serial>>,
}

impl Ports {
    /// The guest reads from `port`: one byte or several, all from the same port. What nobody answers is all ones.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        match (&self.serial, register(port)) {
            (Some(serial), Some(offset)) => data.fill_with(|| serial.read(offset)),
            _ => data.fill(0xff),
        }
    }

    /// The guest writes to `port`: one byte or several, all to the same port. Says whether that ends it.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> Option<VmEndKind> {
        match (port, data) {
            (POWER, [POWER_OFF, ..]) => return Some(VmEndKind::PowerOff),
            (POWER, [POWER_RESET, ..]) | (KEYBOARD, [KEYBOARD_RESET, ..]) => return Some(VmEndKind::Reset),
            _ => {}
        }
        if let (Some(serial), Some(offset)) = (&self.serial, register(port)) {
            data.iter().for_each(|byte| serial.write(offset, *byte));
        }
        None
    }
}

/// The offset of a register of the serial port.
fn register(port: u16) -> Option<u8> {
    if COM1.contains(&port) {
        u8::try_from(port - COM1.start()).ok()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_answers_reads_as_all_ones() {
        let mut data = [0; 4];
        Ports { serial: None }.read(0x3f8, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn power_off_and_both_resets_end_the_guest() {
        let ports = Ports { serial: None };
        assert_eq!(ports.write(0x600, &[0x34]), Some(VmEndKind::PowerOff));
        assert_eq!(ports.write(0x600, &[1]), Some(VmEndKind::Reset));
        assert_eq!(ports.write(0x64, &[0xfe]), Some(VmEndKind::Reset));
        assert_eq!(ports.write(0x600, &[0]), None);
        assert_eq!(ports.write(0x80, &[0]), None);
    }
}
