//! Hot pages on disk.
//!
//! A header of 64 bytes, then the runs of 16 bytes each; numbers are little-endian. The checksum is the CRC-32 of the
//! whole file with the checksum itself as zero: it finds every error that is confined to four bytes.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use stencil_core::generation::MemoryGeneration;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::runs::ByAddress;
use super::{HotPages, HotRun, Mark};
use crate::address::{Gpa, PAGE_SIZE};

const MAGIC: [u8; 8] = *b"STENCILH";
const VERSION: u32 = 1;
const FILE_PAGE_SIZE: u32 = 4096;
const _: () = assert!(
    FILE_PAGE_SIZE as u64 == PAGE_SIZE,
    "the format says which pages it counts"
);

/// A list has at most so many runs: a file of 64 MiB. More are a file that was not written here.
const MAX_RUNS: u64 = 1 << 22;

/// No guest physical address has more bits (Intel SDM, volume 3, 4.1.4: MAXPHYADDR).
const GPA_BITS: u32 = 52;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    page_size: U32,
    generation: [u8; 16],
    runs: U64,
    pages: U64,
    checksum: U32,
    reserved: [u8; 12],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Run {
    gpa: U64,
    pages: U32,
    /// 0: read, 1: written.
    mark: U32,
}

const HEADER: usize = size_of::<Header>();
const RUN: usize = size_of::<Run>();

/// A list of hot pages cannot be used. A restore goes on without it.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It cannot be read.
    #[error("the list of hot pages cannot be read")]
    Read(#[source] io::Error),
    /// It is something else.
    #[error("the file is no list of hot pages")]
    Foreign,
    /// It is of another version of the format.
    #[error("the list of hot pages has format {found}, and only {VERSION} is known")]
    Version {
        /// The version that it says.
        found: u32,
    },
    /// It has not the length that it says it has: it was cut, or something was added.
    #[error("the list of hot pages has {length} bytes, and its header asks for {needed}")]
    Length {
        /// Its length in bytes.
        length: u64,
        /// What it should be.
        needed: u64,
    },
    /// It is longer than any list.
    #[error("the list of hot pages has {runs} runs, and at most {MAX_RUNS} are read")]
    TooLong {
        /// The runs that it says it has.
        runs: u64,
    },
    /// Its bytes are not those that were written.
    #[error("the list of hot pages is corrupt: its checksum is {found:#010x} and should be {expected:#010x}")]
    Checksum {
        /// What its bytes give.
        found: u32,
        /// What it says.
        expected: u32,
    },
    /// It counts pages of another size.
    #[error("the list of hot pages is for pages of {found} bytes, and this host's have {PAGE_SIZE}")]
    PageSize {
        /// The size that it says.
        found: u32,
    },
    /// It is of another memory.
    #[error("the list of hot pages is stale: it is of memory {found}, and this is {expected}")]
    Stale {
        /// The generation that it says.
        found: MemoryGeneration,
        /// The one that was asked for.
        expected: MemoryGeneration,
    },
    /// Its checksum is right, and no list can be like that.
    #[error("the list of hot pages is wrong at run {run}: {what}")]
    Run {
        /// Which one, from 0.
        run: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// A page is in it twice.
    #[error("the list of hot pages has the page at {gpa} twice")]
    Twice {
        /// The page.
        gpa: Gpa,
    },
    /// Its runs have another number of pages than it says.
    #[error("the list of hot pages has {found} pages, and its header says {expected}")]
    Pages {
        /// The pages of the runs.
        found: u64,
        /// What the header says.
        expected: u64,
    },
}

/// A list of hot pages cannot be written. What was there before is still there.
#[derive(Debug, thiserror::Error)]
#[error("the list of hot pages cannot be written to {}", path.display())]
pub struct SaveError {
    /// Where it was to be.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl HotPages {
    /// Reads the list of `generation` at `path`.
    ///
    /// # Errors
    ///
    /// It cannot be read, is no list, is damaged, or is of another memory. Whatever it holds, no more memory is used
    /// than a small multiple of its length.
    pub fn load(path: &Path, generation: MemoryGeneration) -> Result<Self, LoadError> {
        let mut file = File::open(path).map_err(LoadError::Read)?;
        let mut header = Vec::with_capacity(HEADER);
        (&mut file)
            .take(HEADER as u64)
            .read_to_end(&mut header)
            .map_err(LoadError::Read)?;
        let mut bytes = header;
        let needed = check_header(&bytes)?;
        // One byte more than is right, to see that there is none.
        let rest = (needed - bytes.len() as u64).saturating_add(1);
        file.take(rest).read_to_end(&mut bytes).map_err(LoadError::Read)?;
        Self::from_bytes(&bytes, generation)
    }

    /// Reads the list of `generation` from what [`to_bytes`](Self::to_bytes) made.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    pub fn from_bytes(bytes: &[u8], generation: MemoryGeneration) -> Result<Self, LoadError> {
        let needed = check_header(bytes)?;
        if bytes.len() as u64 != needed {
            return Err(LoadError::Length {
                length: bytes.len() as u64,
                needed,
            });
        }
        let Ok((header, runs)) = Header::ref_from_prefix(bytes) else {
            return Err(LoadError::Foreign);
        };
        let (found, expected) = (checksum(*header, runs), header.checksum.get());
        if found != expected {
            return Err(LoadError::Checksum { found, expected });
        }
        if header.page_size.get() != FILE_PAGE_SIZE {
            return Err(LoadError::PageSize {
                found: header.page_size.get(),
            });
        }
        let found = MemoryGeneration::from_bytes(header.generation);
        if found != generation {
            return Err(LoadError::Stale {
                found,
                expected: generation,
            });
        }
        let Ok(runs) = <[Run]>::ref_from_bytes(runs) else {
            return Err(LoadError::Length {
                length: bytes.len() as u64,
                needed,
            });
        };
        let mut list = Self::empty(generation);
        list.runs.reserve_exact(runs.len());
        for (number, run) in runs.iter().enumerate() {
            list.push(run.check().map_err(|what| LoadError::Run { run: number, what })?);
        }
        if list.pages != header.pages.get() {
            return Err(LoadError::Pages {
                found: list.pages,
                expected: header.pages.get(),
            });
        }
        match ByAddress::new(&list.runs).overlap() {
            Some((_, second)) => Err(LoadError::Twice { gpa: second.gpa }),
            None => Ok(list),
        }
    }

    /// The list as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let runs: Vec<Run> = self.runs.iter().map(Run::of).collect();
        let mut header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            page_size: FILE_PAGE_SIZE.into(),
            generation: *self.generation.as_bytes(),
            runs: (runs.len() as u64).into(),
            pages: self.pages.into(),
            checksum: 0.into(),
            reserved: [0; 12],
        };
        header.checksum = checksum(header, runs.as_bytes()).into();
        [header.as_bytes(), runs.as_bytes()].concat()
    }

    /// Writes the list to `path`, through a file beside it that is synced and then renamed: at each moment the old list
    /// is there, or the new one. The directory must exist.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), SaveError> {
        let write = || {
            let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let directory = directory.unwrap_or(Path::new("."));
            let mut file = tempfile::NamedTempFile::new_in(directory)?;
            file.write_all(&self.to_bytes())?;
            file.as_file().sync_all()?;
            file.persist(path).map_err(|error| error.error)?;
            File::open(directory)?.sync_all()
        };
        write().map_err(|source| SaveError {
            path: path.to_owned(),
            source,
        })
    }
}

/// The length that the file must have, if its header is one of ours.
fn check_header(bytes: &[u8]) -> Result<u64, LoadError> {
    let known = bytes.len().min(MAGIC.len());
    if bytes[..known] != MAGIC[..known] || bytes.is_empty() {
        return Err(LoadError::Foreign);
    }
    let Ok((header, _)) = Header::ref_from_prefix(bytes) else {
        return Err(LoadError::Length {
            length: bytes.len() as u64,
            needed: HEADER as u64,
        });
    };
    if header.version.get() != VERSION {
        return Err(LoadError::Version {
            found: header.version.get(),
        });
    }
    let runs = header.runs.get();
    if runs > MAX_RUNS {
        return Err(LoadError::TooLong { runs });
    }
    Ok(HEADER as u64 + runs * RUN as u64)
}

fn checksum(header: Header, runs: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(
        Header {
            checksum: 0.into(),
            ..header
        }
        .as_bytes(),
    );
    hasher.update(runs);
    hasher.finalize()
}

impl Run {
    fn of(run: &HotRun) -> Self {
        let mark = match run.mark {
            Mark::Read => 0,
            Mark::Written => 1,
        };
        Self {
            gpa: run.gpa.get().into(),
            pages: run.pages.into(),
            mark: mark.into(),
        }
    }

    fn check(&self) -> Result<HotRun, &'static str> {
        let (gpa, pages) = (Gpa::new(self.gpa.get()), self.pages.get());
        let mark = match self.mark.get() {
            0 => Mark::Read,
            1 => Mark::Written,
            _ => return Err("its mark is neither read nor written"),
        };
        if !gpa.is_aligned() {
            return Err("it does not begin at a page");
        }
        if pages == 0 {
            return Err("it has no page");
        }
        if gpa.get() >> GPA_BITS != 0 || (gpa.get() + u64::from(pages) * PAGE_SIZE) >> GPA_BITS != 0 {
            return Err("it ends beyond the last address");
        }
        Ok(HotRun { gpa, pages, mark })
    }
}
