//! Which bytes of memory and of files can be other than zero.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::memory::PAGE;

/// Bits of an entry of /proc/self/pagemap (Linux, Documentation/admin-guide/mm/pagemap.rst): the page is present, or
/// it is swapped out.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;

/// Entries read at once: 256 MiB of memory.
const BATCH: usize = 1 << 16;

/// Byte ranges, sorted, that do not touch each other.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Extents(Vec<Range<u64>>);

impl Extents {
    /// Adds a range that starts where the last one does or later.
    fn push(&mut self, range: Range<u64>) {
        match self.0.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => self.0.push(range),
        }
    }

    /// What is in either.
    pub(crate) fn union(self, other: Self) -> Self {
        let mut all: Vec<_> = self.0.into_iter().chain(other.0).collect();
        all.sort_by_key(|range| range.start);
        let mut merged = Self::default();
        all.into_iter().for_each(|range| merged.push(range));
        merged
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.0.iter().cloned()
    }
}

/// The pages of this process between `start` and `start + length` that exist, as ranges relative to `start`. Both
/// are in bytes, whole pages.
pub(crate) fn touched(start: u64, length: u64) -> io::Result<Extents> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut extents = Extents::default();
    let mut entries = vec![0_u8; BATCH * 8];
    let mut page = 0;
    while page < length / PAGE {
        let left = length / PAGE - page;
        let batch = usize::try_from(left).unwrap_or(BATCH).min(BATCH);
        let buffer = &mut entries[..batch * 8];
        pagemap.read_exact_at(buffer, (start / PAGE + page) * 8)?;
        for (entry, page) in buffer.as_chunks::<8>().0.iter().zip(page..) {
            if u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0 {
                extents.push(page * PAGE..(page + 1) * PAGE);
            }
        }
        page += batch as u64;
    }
    Ok(extents)
}

/// The parts of a file between `range.start` and `range.end` that are no holes, relative to `range.start`, widened to
/// whole pages.
pub(crate) fn file_data(file: impl AsFd, range: &Range<u64>) -> io::Result<Extents> {
    let file = file.as_fd();
    let mut extents = Extents::default();
    let mut at = range.start;
    while at < range.end {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) if data < range.end => data,
            // NXIO: no data from here to the end.
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = seek(file, SeekFrom::Hole(data))?.min(range.end);
        let (from, to) = (data - range.start, hole - range.start);
        extents.push(from / PAGE * PAGE..to.next_multiple_of(PAGE).min(range.end - range.start));
        at = hole;
    }
    Ok(extents)
}

#[cfg(test)]
#[expect(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges are what is compared"
)]
mod tests {
    use super::*;

    #[test]
    fn a_union_joins_what_touches() {
        let left = Extents(vec![0..4096, 16384..20480]);
        let right = Extents(vec![4096..8192, 40960..45056]);
        assert_eq!(left.union(right).0, [0..8192, 16384..20480, 40960..45056]);
    }

    #[test]
    fn only_written_pages_of_a_mapping_are_touched() {
        let region: vm_memory::MmapRegion = vm_memory::MmapRegion::new(64 * 4096).unwrap();
        let start = region.as_ptr().addr() as u64;
        // SAFETY: both addresses are within the mapping.
        unsafe {
            region.as_ptr().add(3 * 4096).write(1);
            region.as_ptr().add(4 * 4096).write(1);
        }
        assert_eq!(touched(start, 64 * 4096).unwrap().0, [3 * 4096..5 * 4096]);
    }

    #[test]
    fn holes_of_a_file_are_left_out() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 64 << 10).unwrap();
        assert_eq!(file_data(&file, &(0..1 << 20)).unwrap().0, [65536..69632]);
        assert_eq!(file_data(&file, &(65536..1 << 20)).unwrap().0, [0..4096]);
        assert_eq!(file_data(&file, &(131_072..1 << 20)).unwrap(), Extents::default());
    }
}
