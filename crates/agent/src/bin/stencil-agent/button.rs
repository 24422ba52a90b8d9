//! The machine's power button, by which a VMM asks a guest to power off.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

const INPUTS: &str = "/sys/class/input";
/// The name that the ACPI button driver gives it (Linux, drivers/acpi/button.c).
const NAME: &str = "Power Button";
/// `struct input_event` on 64-bit machines: a time of 16 bytes, then type, code and value; and a key that is pressed (Linux,
/// include/uapi/linux/input.h and input-event-codes.h).
const EVENT: usize = 24;
const TIME: usize = 16;
const KEY_POWER_PRESSED: [u8; 8] = [1, 0, 116, 0, 1, 0, 0, 0];

/// The button.
#[derive(Debug)]
pub(crate) struct Button(File);

impl Button {
    /// The first one of this machine, if it has one.
    pub(crate) fn find() -> Option<Self> {
        let inputs = fs::read_dir(INPUTS).ok()?.flatten();
        let mut buttons = inputs.filter(|input| {
            fs::read_to_string(input.path().join("device/name")).is_ok_and(|name| name.trim() == NAME)
                && input.file_name().to_string_lossy().starts_with("event")
        });
        let device = Path::new("/dev/input").join(buttons.next()?.file_name());
        File::open(device).ok().map(Self)
    }

    /// What to poll for reading.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Reads what happened to it, when something did; whether it was pressed.
    pub(crate) fn is_pressed(&mut self) -> bool {
        let mut events = [0; 64 * EVENT];
        let length = self.0.read(&mut events).unwrap_or(0);
        let mut events = events[..length].chunks_exact(EVENT);
        events.any(|event| event[TIME..] == KEY_POWER_PRESSED)
    }
}
