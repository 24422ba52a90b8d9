//! Guest physical addresses, and the page in which everything here is counted.

use std::fmt;

/// Bytes in a page. Everything here is in pages of this size; a host with another is refused.
pub const PAGE_SIZE: u64 = 4096;

/// [`PAGE_SIZE`], for memory of this process.
pub(crate) const PAGE: usize = host_size(PAGE_SIZE);

/// A guest physical address, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(u64);

impl Gpa {
    /// The address that is `bytes` from the beginning of guest memory.
    #[must_use]
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// Its distance from the beginning of guest memory, in bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address so many pages on; the caller knows that there is memory.
    pub(crate) const fn plus_pages(self, pages: u64) -> Self {
        Self(self.0 + pages * PAGE_SIZE)
    }

    pub(crate) const fn is_aligned(self) -> bool {
        self.0.is_multiple_of(PAGE_SIZE)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

const _: () = assert!(
    usize::BITS == 64,
    "guest memory needs a host with 64-bit addresses"
);

/// A size that the host can map.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the host has 64-bit addresses, asserted above"
)]
pub(crate) const fn host_size(bytes: u64) -> usize {
    bytes as usize
}
