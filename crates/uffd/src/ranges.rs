//! The range table: which guest physical addresses an image holds, and where in it they lie.

use std::fmt;

use crate::address::{Gpa, PAGE_SIZE};

/// Guest memory that is contiguous both in the guest and in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// Where it begins in the guest. A multiple of [`PAGE_SIZE`].
    pub gpa: Gpa,
    /// Its length in bytes. A multiple of [`PAGE_SIZE`], and not zero.
    pub size: u64,
    /// Where it begins in the image, in bytes. A multiple of [`PAGE_SIZE`].
    pub file_offset: u64,
}

impl MemoryRange {
    const fn gpa_end(&self) -> u64 {
        self.gpa.get() + self.size
    }

    const fn file_end(&self) -> u64 {
        self.file_offset + self.size
    }
}

impl fmt::Display for MemoryRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            gpa,
            size,
            file_offset,
        } = self;
        write!(
            f,
            "the range of {size} bytes at gpa {gpa}, at byte {file_offset} of the file,"
        )
    }
}

/// A range table cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// There is no memory at all.
    #[error("a memory image needs at least one range")]
    Empty,
    /// A range is empty, or does not consist of whole pages.
    #[error("{0} does not consist of whole pages of {PAGE_SIZE} bytes")]
    Unaligned(MemoryRange),
    /// A range ends beyond the last address.
    #[error("{0} ends beyond the last address")]
    TooLarge(MemoryRange),
    /// Two ranges hold the same guest memory.
    #[error("the ranges at {first} and {second} overlap in the guest")]
    GuestOverlap {
        /// Where the first begins.
        first: Gpa,
        /// Where the second begins.
        second: Gpa,
    },
    /// Two ranges lie at the same place in the file.
    #[error("the ranges at {first} and {second} overlap in the file")]
    FileOverlap {
        /// Where the first begins.
        first: Gpa,
        /// Where the second begins.
        second: Gpa,
    },
}

/// Where the memory of a guest lies in its image: at least one range, by rising gpa, none over another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeTable {
    ranges: Vec<MemoryRange>,
    file_length: u64,
}

impl RangeTable {
    /// Checks `ranges`, which may be in any order.
    ///
    /// # Errors
    ///
    /// See [`RangeError`].
    pub fn new(mut ranges: Vec<MemoryRange>) -> Result<Self, RangeError> {
        for range in &ranges {
            let whole = |bytes: u64| bytes.is_multiple_of(PAGE_SIZE);
            if range.size == 0 || !whole(range.gpa.get()) || !whole(range.size) || !whole(range.file_offset) {
                return Err(RangeError::Unaligned(*range));
            }
            // The file's limit is what off_t can say.
            let file_end = range.file_offset.checked_add(range.size);
            if range.gpa.get().checked_add(range.size).is_none()
                || file_end.is_none_or(|end| i64::try_from(end).is_err())
            {
                return Err(RangeError::TooLarge(*range));
            }
        }
        ranges.sort_unstable_by_key(|range| range.file_offset);
        for pair in ranges.windows(2) {
            if pair[0].file_end() > pair[1].file_offset {
                let (first, second) = (pair[0].gpa, pair[1].gpa);
                return Err(RangeError::FileOverlap { first, second });
            }
        }
        let file_length = ranges.last().ok_or(RangeError::Empty)?.file_end();
        ranges.sort_unstable_by_key(|range| range.gpa);
        for pair in ranges.windows(2) {
            if pair[0].gpa_end() > pair[1].gpa.get() {
                let (first, second) = (pair[0].gpa, pair[1].gpa);
                return Err(RangeError::GuestOverlap { first, second });
            }
        }
        Ok(Self { ranges, file_length })
    }

    /// The table of memory whose ranges, each of (gpa, bytes), lie one after the other from the file's beginning.
    ///
    /// # Errors
    ///
    /// See [`RangeError`].
    pub fn packed(ranges: impl IntoIterator<Item = (Gpa, u64)>) -> Result<Self, RangeError> {
        let mut file_offset: u64 = 0;
        let mut packed = Vec::new();
        for (gpa, size) in ranges {
            let range = MemoryRange {
                gpa,
                size,
                file_offset,
            };
            file_offset = file_offset.checked_add(size).ok_or(RangeError::TooLarge(range))?;
            packed.push(range);
        }
        Self::new(packed)
    }

    /// The ranges, by rising gpa.
    #[must_use]
    pub fn ranges(&self) -> &[MemoryRange] {
        &self.ranges
    }

    /// The bytes that a file must have to hold all ranges.
    #[must_use]
    pub const fn file_length(&self) -> u64 {
        self.file_length
    }

    /// Where in the file the byte at `gpa` lies, if the guest has memory there.
    #[must_use]
    pub fn offset_of(&self, gpa: Gpa) -> Option<u64> {
        let range = self.range_at(gpa)?;
        Some(range.file_offset + (gpa.get() - range.gpa.get()))
    }

    /// Which guest physical address the byte at `file_offset` belongs to, if any.
    #[must_use]
    pub fn gpa_of(&self, file_offset: u64) -> Option<Gpa> {
        let range = self
            .ranges
            .iter()
            .find(|range| (range.file_offset..range.file_end()).contains(&file_offset))?;
        Some(Gpa::new(range.gpa.get() + (file_offset - range.file_offset)))
    }

    /// The range that holds `gpa`.
    pub(crate) fn range_at(&self, gpa: Gpa) -> Option<&MemoryRange> {
        let after = self.ranges.partition_point(|range| range.gpa <= gpa);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        (gpa.get() < range.gpa_end()).then_some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(gpa: u64, size: u64, file_offset: u64) -> MemoryRange {
        MemoryRange {
            gpa: Gpa::new(gpa),
            size,
            file_offset,
        }
    }

    #[test]
    fn a_gpa_is_found_in_the_file_and_back() {
        let table = RangeTable::packed([(Gpa::new(0), 0x4000), (Gpa::new(0x1_0000_0000), 0x2000)]).unwrap();
        assert_eq!(table.file_length(), 0x6000);
        for (gpa, offset) in [
            (0, 0),
            (0x3fff, 0x3fff),
            (0x1_0000_0000, 0x4000),
            (0x1_0000_1fff, 0x5fff),
        ] {
            assert_eq!(table.offset_of(Gpa::new(gpa)), Some(offset), "{gpa:#x}");
            assert_eq!(table.gpa_of(offset), Some(Gpa::new(gpa)), "{offset:#x}");
        }
        for hole in [0x4000, 0xffff_ffff, 0x1_0000_2000] {
            assert_eq!(table.offset_of(Gpa::new(hole)), None, "{hole:#x}");
        }
        assert_eq!(table.gpa_of(0x6000), None);
    }

    #[test]
    fn a_table_that_cannot_be_is_refused() {
        assert_eq!(RangeTable::new(vec![]), Err(RangeError::Empty));
        for wrong in [
            range(1, 0x1000, 0),
            range(0, 0x1001, 0),
            range(0, 0x1000, 9),
            range(0, 0, 0),
        ] {
            assert_eq!(RangeTable::new(vec![wrong]), Err(RangeError::Unaligned(wrong)));
        }
        for wrong in [range(u64::MAX - 0xfff, 0x1000, 0), range(0, 0x1000, 1 << 63)] {
            assert_eq!(RangeTable::new(vec![wrong]), Err(RangeError::TooLarge(wrong)));
        }
        let (first, second) = (Gpa::new(0), Gpa::new(0x1000));
        assert_eq!(
            RangeTable::new(vec![range(0x1000, 0x1000, 0x8000), range(0, 0x2000, 0)]),
            Err(RangeError::GuestOverlap { first, second })
        );
        assert_eq!(
            RangeTable::new(vec![range(0x1000, 0x1000, 0), range(0, 0x1000, 0)]).map_err(|e| e.to_string()),
            Err("the ranges at 0x1000 and 0x0 overlap in the file".to_owned())
        );
    }
}
