//! The guest's memory, read and written through QEMU's own address space: `/proc/<pid>/mem`.
//!
//! It takes the permission to trace that process, which who started it has, and root; see ptrace(2).

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use stencil_core::ProcessIdentity;

use crate::VmmProcess;

const PAGE: usize = 4096;
const ZEROS: [u8; PAGE] = [0; PAGE];
/// Bytes that are read or written at a time.
const CHUNK: usize = 1 << 20;
/// Entries of the page map that are read at a time: 256 MiB of memory.
const BATCH: u64 = 1 << 16;

/// Bits of an entry of `/proc/<pid>/pagemap` (Linux, Documentation/admin-guide/mm/pagemap.rst): the page is present, or
/// it is swapped out.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;

/// The guest's memory in a QEMU that lives.
#[derive(Debug)]
pub(super) struct GuestMemory {
    memory: File,
    pagemap: File,
    /// Where it begins in QEMU's address space, and how long it is; both in bytes, whole pages.
    start: u64,
    bytes: u64,
}

impl GuestMemory {
    /// That of the QEMU which runs as `process`.
    pub(super) fn of(process: &ProcessIdentity, start: u64, bytes: u64) -> io::Result<Self> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, "the VMM has ended");
        let vmm = VmmProcess::attach(process)
            .map_err(io::Error::other)?
            .ok_or_else(gone)?;
        let root = format!("/proc/{}", process.pid);
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("{root}/mem"))?;
        let pagemap = File::open(format!("{root}/pagemap"))?;
        // It lived after they were opened, so they are its own.
        if vmm.has_exited().is_some() {
            return Err(gone());
        }
        Ok(Self {
            memory,
            pagemap,
            start,
            bytes,
        })
    }

    /// Writes it to a new file, with holes for pages of zeros. Where it is no mapping of a file, pages that the guest never
    /// touched are not looked at.
    pub(super) fn save(&self, path: &Path, is_mapped_file: bool) -> io::Result<()> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        file.set_len(self.bytes)?;
        if is_mapped_file {
            return self.save_range(&file, 0..self.bytes);
        }
        for touched in self.touched()? {
            self.save_range(&file, touched)?;
        }
        Ok(())
    }

    /// Fills it, empty as it is, from a file.
    pub(super) fn load(&self, path: &Path) -> io::Result<()> {
        let file = File::open(path)?;
        if file.metadata()?.len() != self.bytes {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it should have {} bytes", self.bytes),
            ));
        }
        let mut chunk = vec![0; CHUNK];
        let mut from = 0;
        while let Some(data) = next_data(&file, from)? {
            for range in chunks(data.clone()) {
                let chunk = &mut chunk[..length(&range)];
                file.read_exact_at(chunk, range.start)?;
                for run in runs_of_data(chunk) {
                    self.memory
                        .write_all_at(&chunk[run.clone()], self.start + range.start + run.start as u64)?;
                }
            }
            from = data.end;
        }
        Ok(())
    }

    fn save_range(&self, file: &File, range: Range<u64>) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK];
        for range in chunks(range) {
            let chunk = &mut chunk[..length(&range)];
            self.memory.read_exact_at(chunk, self.start + range.start)?;
            for run in runs_of_data(chunk) {
                file.write_all_at(&chunk[run.clone()], range.start + run.start as u64)?;
            }
        }
        Ok(())
    }

    /// The ranges of pages that exist, in bytes from the memory's beginning.
    fn touched(&self) -> io::Result<Vec<Range<u64>>> {
        const ENTRY: usize = size_of::<u64>();
        let page = PAGE as u64;
        let pages = self.bytes / page;
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut first = 0;
        while first < pages {
            let count = BATCH.min(pages - first);
            let mut entries = vec![0; usize::try_from(count).map_err(io::Error::other)? * ENTRY];
            let offset = (self.start / page + first) * ENTRY as u64;
            self.pagemap.read_exact_at(&mut entries, offset)?;
            for (entry, number) in entries.as_chunks::<ENTRY>().0.iter().zip(first..) {
                if u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED == 0 {
                    continue;
                }
                let (start, end) = (number * page, (number + 1) * page);
                match ranges.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => ranges.push(start..end),
                }
            }
            first += count;
        }
        Ok(ranges)
    }
}

/// The next range of a file that is no hole, from `from` on.
fn next_data(file: &File, from: u64) -> io::Result<Option<Range<u64>>> {
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(Some(start..seek(file, SeekFrom::Hole(start))?))
}

/// A range in pieces that fit a buffer.
fn chunks(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    range
        .step_by(CHUNK)
        .map(move |start| start..end.min(start + CHUNK as u64))
}

/// The length of a chunk, which fits.
fn length(chunk: &Range<u64>) -> usize {
    usize::try_from(chunk.end - chunk.start).unwrap_or(CHUNK)
}

/// The ranges of whole pages in which something is not zero.
fn runs_of_data(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (page, start) in bytes.chunks(PAGE).zip((0..).step_by(PAGE)) {
        if page == &ZEROS[..page.len()] {
            continue;
        }
        let end = start + page.len();
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::identity_of;

    const PAGES: usize = 600;

    /// Some pages of this process.
    fn pages() -> (Vec<u8>, Range<usize>) {
        let memory = vec![0; (PAGES + 1) * PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        (memory, start..start + PAGES * PAGE)
    }

    fn guest(memory: &mut [u8]) -> GuestMemory {
        let this = identity_of(std::process::id()).unwrap();
        GuestMemory::of(&this, memory.as_mut_ptr().addr() as u64, memory.len() as u64).unwrap()
    }

    #[tokio::test]
    async fn memory_comes_back_as_it_was_and_pages_of_zeros_take_no_room() {
        let directory = tempfile::tempdir().unwrap();
        let (mut memory, range) = pages();
        let memory = &mut memory[range];
        // The first, the last, some in between; around the end of a chunk; and one that was written with zeros.
        for (page, byte) in [(0, 1), (255, 2), (256, 3), (400, 0), (PAGES - 1, 4)] {
            memory[page * PAGE + 17] = byte;
        }
        for is_mapped_file in [false, true] {
            let path = directory.path().join(is_mapped_file.to_string());
            guest(memory).save(&path, is_mapped_file).unwrap();
            assert!(std::fs::read(&path).unwrap() == memory);
            let file = std::fs::metadata(&path).unwrap();
            let allocated = std::os::unix::fs::MetadataExt::blocks(&file) * 512;
            assert!(allocated <= 4 * PAGE as u64, "{allocated}");

            let (mut other, range) = pages();
            guest(&mut other[range.clone()]).load(&path).unwrap();
            assert!(other[range] == *memory);
        }
    }

    #[tokio::test]
    async fn a_file_of_another_size_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(PAGE as u64).unwrap();
        let (mut memory, range) = pages();
        let refused = guest(&mut memory[range]).load(file.path()).unwrap_err();
        assert_eq!(refused.to_string(), "it should have 2457600 bytes");
    }

    #[tokio::test]
    async fn a_process_that_has_ended_has_no_memory() {
        let this = identity_of(std::process::id()).unwrap();
        let earlier = ProcessIdentity {
            start_time: this.start_time - 1,
            ..this
        };
        let gone = GuestMemory::of(&earlier, 0, 0).unwrap_err();
        assert_eq!(gone.to_string(), "the VMM has ended");
    }
}
