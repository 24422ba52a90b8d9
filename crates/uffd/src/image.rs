//! The memory file of a snapshot as a source of pages.
//!
//! It is read with `pread` and not through a mapping. Where a mapped file has been cut within a page, the rest of that
//! page reads as zeros, without any error (mmap(2), "Notes"): a guest would get zeros that never were in its memory.
//! `pread` answers with fewer bytes, and where a disk fails with its error. It is no slower: a new mapping of the file
//! pays its page faults instead.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::Errno;
use stencil_core::generation::MemoryGeneration;

use crate::address::{Gpa, PAGE_SIZE};
use crate::ranges::RangeTable;
use crate::source::{Extent, PageSource};

/// A memory file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened or looked at.
    #[error("the memory file {} cannot be opened", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is shorter than its table says.
    #[error("the memory file {} has {length} bytes, and its ranges need {needed}", path.display())]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
        /// The bytes that its table needs.
        needed: u64,
    },
}

/// A memory file, its range table and its generation. The file must not change while it is used.
#[derive(Debug)]
pub struct MemoryImage {
    file: File,
    table: RangeTable,
    generation: MemoryGeneration,
    /// The extents of data that are known, from where each begins to where it ends, in bytes. A file may have very
    /// many, and a restore must not take longer for it: they are asked for as they are come upon.
    known: RwLock<BTreeMap<u64, u64>>,
}

impl MemoryImage {
    /// Opens the file at `path`, which holds `table` and has the memory of `generation`.
    ///
    /// # Errors
    ///
    /// It cannot be opened, or is too short.
    pub fn open(path: &Path, table: RangeTable, generation: MemoryGeneration) -> Result<Self, ImageError> {
        let at = |source| ImageError::Open {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(at)?;
        let length = file.metadata().map_err(at)?.len();
        let needed = table.file_length();
        if length < needed {
            return Err(ImageError::TooShort {
                path: path.to_owned(),
                length,
                needed,
            });
        }
        let known = RwLock::default();
        Ok(Self {
            file,
            table,
            generation,
            known,
        })
    }

    /// Where in the file the byte at `gpa` lies, if the guest has memory there.
    #[must_use]
    pub fn offset_of(&self, gpa: Gpa) -> Option<u64> {
        self.table.offset_of(gpa)
    }

    /// Which guest physical address the byte at `file_offset` belongs to, if any.
    #[must_use]
    pub fn gpa_of(&self, file_offset: u64) -> Option<Gpa> {
        self.table.gpa_of(file_offset)
    }

    /// Where the data at `offset` end, if that is known.
    fn known_data(&self, offset: u64) -> Option<u64> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let (_, &end) = known.range(..=offset).next_back()?;
        (offset < end).then_some(end)
    }

    /// A file that was cut has no data where it ended, and that must not pass for zeros.
    fn check_length(&self) -> io::Result<()> {
        let (length, needed) = (self.file.metadata()?.len(), self.table.file_length());
        if length < needed {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the file has {length} bytes, and its ranges need {needed}: it was cut"),
            ));
        }
        Ok(())
    }
}

impl PageSource for MemoryImage {
    fn table(&self) -> &RangeTable {
        &self.table
    }

    fn generation(&self) -> MemoryGeneration {
        self.generation
    }

    fn extent(&self, offset: u64, limit: u64) -> io::Result<Extent> {
        if let Some(end) = self.known_data(offset) {
            return Ok(Extent::Data(limit.min(end - offset)));
        }
        let begin = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(begin) => begin,
            // No data up to the end of the file.
            Err(Errno::NXIO) => {
                self.check_length()?;
                return Ok(Extent::Zeros(limit));
            }
            Err(error) => return Err(error.into()),
        };
        // A file system's blocks may be smaller than a page: a page with any data is data.
        let first = begin - begin % PAGE_SIZE;
        if first > offset {
            return Ok(Extent::Zeros(limit.min(first - offset)));
        }
        let hole = seek(&self.file, SeekFrom::Hole(begin))?;
        let end = hole.next_multiple_of(PAGE_SIZE);
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        // One entry for each extent: what is known of it from here on says no more than this.
        let inside: Vec<u64> = known.range(offset..end).map(|(begin, _)| *begin).collect();
        for begin in inside {
            known.remove(&begin);
        }
        known.insert(offset, end);
        Ok(Extent::Data(limit.min(end - offset)))
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset).or_else(|error| {
            if error.kind() == io::ErrorKind::UnexpectedEof {
                self.check_length()?;
            }
            Err(error)
        })
    }

    fn will_need(&self, offset: u64, length: u64) {
        // Only advice: a file system that cannot take it reads later.
        let _ = fadvise(
            &self.file,
            offset,
            std::num::NonZeroU64::new(length),
            Advice::WillNeed,
        );
    }
}
