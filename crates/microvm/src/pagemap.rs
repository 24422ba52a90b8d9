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

    /// What is in this one and not in the other.
    pub(crate) fn minus(&self, other: &Self) -> Self {
        let mut rest = Self::default();
        let mut taken = other.0.iter().peekable();
        for range in &self.0 {
            let mut start = range.start;
            while let Some(next) = taken.peek().filter(|next| next.start < range.end) {
                if start < next.start {
                    rest.0.push(start..next.start);
                }
                start = start.max(next.end);
                if next.end > range.end {
                    break;
                }
                taken.next();
            }
            if start < range.end {
                rest.0.push(start..range.end);
            }
        }
        rest
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
    fn a_difference_has_what_only_the_first_has() {
        let minus = |left: &[Range<u64>], right: &[Range<u64>]| {
            Extents(left.to_vec()).minus(&Extents(right.to_vec())).0
        };
        assert_eq!(minus(&[0..10, 20..30], &[]), [0..10, 20..30]);
        assert_eq!(minus(&[], &[0..10]), []);
        assert_eq!(minus(&[0..10, 20..30], &[0..40]), []);
        assert_eq!(minus(&[0..10, 20..30], &[5..25]), [0..5, 25..30]);
        assert_eq!(minus(&[5..30], &[0..6, 8..9, 29..40]), [6..8, 9..29]);
        assert_eq!(
            minus(&[0..10, 20..30, 40..50], &[10..20, 22..24, 50..60]),
            [0..10, 20..22, 24..30, 40..50]
        );
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
