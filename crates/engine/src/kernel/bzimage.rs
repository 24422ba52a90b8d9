//! What the header of a bzImage says (Linux, Documentation/arch/x86/boot.rst).

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{Kernel, VMM_CMDLINE};

/// Where fields are in the file.
const VERSION: u64 = 0x206;
const CMDLINE_SIZE: u64 = 0x238;
const PREF_ADDRESS: u64 = 0x258;
const INIT_SIZE: u64 = 0x260;

/// The first versions of the protocol that have `cmdline_size`, and that have `pref_address` and `init_size`.
const WITH_CMDLINE_SIZE: u16 = 0x206;
const WITH_INIT_SIZE: u16 = 0x20a;
/// The longest command line of a kernel whose header does not say it, in bytes.
const CMDLINE_BEFORE: u32 = 255;
/// Where VMMs put the kernel.
const LOADED_AT: u64 = 1 << 20;

/// What is known of it. A field that is not there, as in a file that ends before it, is that of an older protocol.
pub(super) fn look_at(file: &File) -> Kernel {
    let version = u16::from_le_bytes(field(file, VERSION).unwrap_or_default());
    let since = |first| (version >= first).then_some(());
    let longest = since(WITH_CMDLINE_SIZE)
        .and_then(|()| field(file, CMDLINE_SIZE))
        .map_or(CMDLINE_BEFORE, u32::from_le_bytes);
    // It unpacks itself to where it prefers to run, and needs so much memory there before it looks what there is.
    let end = since(WITH_INIT_SIZE).and_then(|()| {
        let preferred = u64::from_le_bytes(field(file, PREF_ADDRESS)?);
        let needed = u32::from_le_bytes(field(file, INIT_SIZE)?);
        Some(preferred.max(LOADED_AT).saturating_add(u64::from(needed)))
    });
    Kernel {
        is_linux: true,
        longest_cmdline: usize::try_from(longest).map_or(VMM_CMDLINE, |longest| longest.min(VMM_CMDLINE)),
        end: end.unwrap_or(0),
    }
}

fn field<const SIZE: usize>(file: &File, offset: u64) -> Option<[u8; SIZE]> {
    let mut bytes = [0; SIZE];
    file.read_exact_at(&mut bytes, offset).ok().map(|()| bytes)
}
