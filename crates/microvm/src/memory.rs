//! Guest memory: where it lies, and how it is mapped.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use stencil_uffd::{Fatal, Gpa, GuestMapping, MappingError};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
    GuestRegionMmap, MmapRegion,
};

use crate::page_service::PageService;
use crate::transfer;

/// Bytes in a page.
pub(crate) const PAGE: u64 = 4096;

/// The same, for offsets into slices.
pub(crate) const PAGE_BYTES: usize = 4096;

/// The hole below 4 GiB, for the IOAPIC, the LAPICs and devices: 3 GiB to 4 GiB. Memory goes on above it.
pub(crate) const HOLE: Range<u64> = 0xC000_0000..0x1_0000_0000;

/// Guest memory that is contiguous in guest physical addresses; all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemoryRange {
    pub(crate) gpa: u64,
    pub(crate) length: u64,
}

/// Where `bytes` of memory lie: up to the hole, and from its end on.
pub(crate) fn layout(bytes: u64) -> Vec<MemoryRange> {
    let low = bytes.min(HOLE.start);
    let mut ranges = vec![MemoryRange { gpa: 0, length: low }];
    if bytes > low {
        ranges.push(MemoryRange {
            gpa: HOLE.end,
            length: bytes - low,
        });
    }
    ranges
}

/// Guest memory cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("{length} bytes of guest memory at {gpa:#x} cannot be mapped")]
    Map {
        gpa: u64,
        length: u64,
        source: MmapRegionError,
    },
    #[error("{length} bytes at {gpa:#x} do not fit the host's address space")]
    TooLarge { gpa: u64, length: u64 },
    #[error("the ranges of guest memory overlap or are out of order")]
    Ranges(#[source] vm_memory::GuestRegionCollectionError),
    #[error("guest memory cannot be made resident")]
    Populate(#[source] io::Error),
}

/// The guest's memory. Fields are dropped from the top: it is unmapped when nobody serves it any more.
pub(crate) struct GuestRam {
    /// Who fills it, page by page, where it is served.
    pub(crate) pages: Option<PageService>,
    pub(crate) mmap: GuestMemoryMmap,
    /// The memory file in which pages are that were not touched yet. Never written.
    pub(crate) base: Option<Arc<File>>,
}

impl GuestRam {
    /// Empty memory. Pages exist from their first use on.
    pub(crate) fn anonymous(ranges: &[MemoryRange]) -> Result<Self, MemoryError> {
        Self::map(ranges, None)
    }

    /// Empty memory, which is to be served from the contents of `file` before anybody touches it.
    pub(crate) fn served(file: File, ranges: &[MemoryRange]) -> Result<Self, MemoryError> {
        let ram = Self::anonymous(ranges)?;
        let base = Some(Arc::new(file));
        Ok(Self { base, ..ram })
    }

    /// The contents of `file`, mapped privately: pages that are only read stay in the page cache. The ranges lie in
    /// the file one after the other.
    pub(crate) fn private_of(file: File, ranges: &[MemoryRange]) -> Result<Self, MemoryError> {
        Self::map(ranges, Some(Arc::new(file)))
    }

    fn map(ranges: &[MemoryRange], base: Option<Arc<File>>) -> Result<Self, MemoryError> {
        let mut regions = Vec::with_capacity(ranges.len());
        let mut offset = 0;
        for &MemoryRange { gpa, length } in ranges {
            let backing = base
                .as_ref()
                .map(|file| FileOffset::from_arc(Arc::clone(file), offset));
            // NORESERVE: a fork of a large VM writes little of it, and must not need swap space for all of it.
            let anonymous = if backing.is_none() { libc::MAP_ANONYMOUS } else { 0 };
            let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | anonymous;
            let too_large = MemoryError::TooLarge { gpa, length };
            let Ok(size) = usize::try_from(length) else {
                return Err(too_large);
            };
            let region = MmapRegion::build(backing, size, libc::PROT_READ | libc::PROT_WRITE, flags)
                .map_err(|source| MemoryError::Map { gpa, length, source })?;
            regions.push(GuestRegionMmap::new(region, GuestAddress(gpa)).ok_or(too_large)?);
            offset += length;
        }
        Ok(Self {
            pages: None,
            mmap: GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Ranges)?,
            base,
        })
    }

    /// Each range with its place in this process, by rising gpa.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = MappedRange<'_>> {
        self.mmap.iter().map(|region| MappedRange {
            range: MemoryRange {
                gpa: region.start_addr().0,
                length: region.len(),
            },
            region,
        })
    }

    /// The same for the page server and for `populate`.
    pub(crate) fn mappings(&self) -> Result<Vec<GuestMapping>, MappingError> {
        self.ranges()
            .filter_map(|mapped| {
                Some((
                    mapped.range.gpa,
                    mapped.region,
                    NonNull::new(mapped.region.as_ptr())?,
                ))
            })
            .map(|(gpa, region, start)| {
                // SAFETY: it is one private mapping, for this guest alone. Who serves it is dropped before it is
                // unmapped, as a field above it; and once it is served it is accessed by the guest and by system calls.
                unsafe { GuestMapping::new(Gpa::new(gpa), start, region.size()) }
            })
            .collect()
    }

    /// Waits until what the guest needs first is there.
    pub(crate) fn make_ready(&self) -> Result<(), Arc<Fatal>> {
        self.pages.as_ref().map_or(Ok(()), PageService::make_ready)
    }

    /// To be called before the guest runs.
    pub(crate) fn resume(&mut self) -> Result<(), Arc<Fatal>> {
        self.pages.as_mut().map_or(Ok(()), PageService::resume)
    }

    /// Why the guest cannot go on, if a page of it cannot be had.
    pub(crate) fn lost(&self) -> Option<Arc<Fatal>> {
        self.pages.as_ref()?.fatal()
    }

    /// Ends the recording of hot pages, if there is one and the guest has run, and writes its list.
    pub(crate) fn save_recording(&mut self) {
        if let Some(pages) = &mut self.pages {
            pages.save_recording();
        }
    }

    /// Writes `bytes` to `gpa`, within one range.
    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        let place = self
            .mmap
            .get_slice(GuestAddress(gpa), bytes.len())
            .map_err(io::Error::other)?;
        // SAFETY: all of it is guest memory, as was just looked up.
        unsafe { transfer::write(place.ptr_guard_mut().as_ptr(), bytes) }
    }

    /// Makes all of it resident: pages of a file as shared copies in the page cache.
    pub(crate) fn populate(&self) -> Result<(), MemoryError> {
        let advice = if self.base.is_some() {
            libc::MADV_POPULATE_READ
        } else {
            libc::MADV_POPULATE_WRITE
        };
        for mapped in self.ranges() {
            let (start, length) = (mapped.region.as_ptr(), mapped.region.size());
            // SAFETY: the range is this mapping, and populating it changes no contents.
            if unsafe { libc::madvise(start.cast(), length, advice) } != 0 {
                return Err(MemoryError::Populate(io::Error::last_os_error()));
            }
        }
        Ok(())
    }
}

/// A range of guest memory and its mapping.
pub(crate) struct MappedRange<'a> {
    pub(crate) range: MemoryRange,
    region: &'a MmapRegion,
}

impl MappedRange<'_> {
    /// Where it starts in this process.
    pub(crate) fn host_address(&self) -> u64 {
        self.region.as_ptr().addr() as u64
    }

    /// Reads what is at byte `offset` of it.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let place = usize::try_from(offset).map_err(io::Error::other)?;
        transfer::read(self.region.as_ptr().wrapping_add(place), buffer)
    }

    /// Its bytes, to be filled.
    ///
    /// # Safety
    ///
    /// No vCPU may run, no device may write guest memory, no page server may serve it, and no other slice of the range
    /// may live while this one does.
    #[expect(
        clippy::mut_from_ref,
        reason = "guest memory is shared by nature; the caller promises to be alone"
    )]
    pub(crate) unsafe fn bytes_mut(&self) -> &mut [u8] {
        // SAFETY: the mapping is writable, as long as the region, and lives as long as `self`; the caller promises the
        // rest.
        unsafe { std::slice::from_raw_parts_mut(self.region.as_ptr(), self.region.size()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_hole() {
        assert_eq!(
            layout(512 << 20),
            [MemoryRange {
                gpa: 0,
                length: 512 << 20
            }]
        );
        assert_eq!(
            layout(3 << 30),
            [MemoryRange {
                gpa: 0,
                length: 3 << 30
            }]
        );
        let around = [
            MemoryRange {
                gpa: 0,
                length: 3 << 30,
            },
            MemoryRange {
                gpa: 4 << 30,
                length: 5 << 30,
            },
        ];
        assert_eq!(layout(8 << 30), around);
    }
}
