//! Guest memory as this process has it mapped.

use std::fmt;
use std::io;
use std::ptr::NonNull;

use rustix::mm::{MprotectFlags, mprotect};

use crate::address::{Gpa, PAGE, PAGE_SIZE, host_size};

/// A mapping cannot be guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MappingError {
    /// It does not consist of whole pages.
    #[error(
        "guest memory of {size} bytes at {gpa}, mapped at {host:#x}, does not consist of whole pages \
         of {PAGE_SIZE} bytes"
    )]
    Unaligned {
        /// Where it begins in the guest.
        gpa: Gpa,
        /// Where it begins in this process.
        host: usize,
        /// Its length in bytes.
        size: usize,
    },
    /// It ends beyond the last address of the guest.
    #[error("guest memory of {size} bytes at {gpa} ends beyond the last address")]
    TooLarge {
        /// Where it begins in the guest.
        gpa: Gpa,
        /// Its length in bytes.
        size: usize,
    },
}

/// A part of guest memory, contiguous in the guest and in this process.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct GuestMapping {
    gpa: Gpa,
    host: NonNull<u8>,
    size: usize,
}

// SAFETY: it is an address and two numbers; whoever made one promised that the memory outlives its use, on any thread.
unsafe impl Send for GuestMapping {}
// SAFETY: as above; nothing is read or written through a shared reference.
unsafe impl Sync for GuestMapping {}

impl GuestMapping {
    /// Guest memory of `size` bytes at `gpa`, which this process has mapped at `host`.
    ///
    /// # Errors
    ///
    /// It does not consist of whole pages.
    ///
    /// # Safety
    ///
    /// From now until the last [`PageServer`](crate::PageServer) or [`populate`](crate::populate()) that it was given
    /// to is gone:
    ///
    /// - `host` to `host + size` is one mapping, private, readable and writable, for this guest alone, and stays at its
    ///   place: it is not remapped (`mremap`), and nothing else is mapped there;
    /// - it may be discarded (`MADV_DONTNEED`) or unmapped, by other threads than the server's;
    /// - no reference to its bytes is held where a server may fill a page or take away all access to the memory:
    ///   it is read and written as memory that somebody else writes too;
    /// - the process is not forked by who expects the memory in the child: the child would read zeros.
    pub unsafe fn new(gpa: Gpa, host: NonNull<u8>, size: usize) -> Result<Self, MappingError> {
        let address = host.addr().get();
        if size == 0 || !gpa.is_aligned() || !address.is_multiple_of(PAGE) || !size.is_multiple_of(PAGE) {
            return Err(MappingError::Unaligned {
                gpa,
                host: address,
                size,
            });
        }
        if gpa.get().checked_add(size as u64).is_none() {
            return Err(MappingError::TooLarge { gpa, size });
        }
        Ok(Self { gpa, host, size })
    }

    /// Where it begins in the guest.
    #[must_use]
    pub const fn gpa(&self) -> Gpa {
        self.gpa
    }

    /// Its length in bytes.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }

    /// Where it begins in this process.
    #[must_use]
    pub const fn host(&self) -> NonNull<u8> {
        self.host
    }

    pub(crate) const fn pages(&self) -> usize {
        self.size / PAGE
    }

    /// Where in the guest its page `page` begins.
    pub(crate) const fn gpa_of(&self, page: usize) -> Gpa {
        self.gpa.plus_pages(page as u64)
    }

    /// Where in this process its page `page` begins.
    pub(crate) fn host_of(&self, page: usize) -> *mut libc::c_void {
        self.host.as_ptr().wrapping_add(page * PAGE).cast()
    }

    /// Its pages among `pages` pages from `gpa` on.
    pub(crate) fn clip(&self, gpa: Gpa, pages: u64) -> std::ops::Range<usize> {
        let begin = self.gpa.get() / PAGE_SIZE;
        let end = begin + self.pages() as u64;
        let first = gpa.get() / PAGE_SIZE;
        let within = |page: u64| host_size(page.clamp(begin, end) - begin);
        within(first)..within(first.saturating_add(pages))
    }

    /// Its pages from host address `start` to `end`.
    pub(crate) fn clip_host(&self, start: usize, end: usize) -> std::ops::Range<usize> {
        let begin = self.host.addr().get();
        let within = |address: usize| address.clamp(begin, begin + self.size) - begin;
        within(start) / PAGE..within(end).div_ceil(PAGE)
    }

    /// Takes away all access to `pages`: who touches them is stopped by the kernel, and reads nothing.
    pub(crate) fn revoke(&self, pages: std::ops::Range<usize>) -> io::Result<()> {
        // SAFETY: the pages are of this mapping, of which the maker promised that no reference to its bytes counts on
        // being able to read them.
        unsafe {
            mprotect(
                self.host_of(pages.start),
                pages.len() * PAGE,
                MprotectFlags::empty(),
            )
        }?;
        Ok(())
    }
}

impl fmt::Debug for GuestMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "GuestMapping({} bytes at {}, mapped at {:p})",
            self.size, self.gpa, self.host
        )
    }
}
