//! The page cache of one file: filled, emptied, and looked at.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::{io, ptr};

use rustix::fs::{Advice, fadvise};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::param::page_size;

use super::BenchError;

/// A file whose place in the page cache is looked after.
#[derive(Debug)]
pub(super) struct Cached {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Cached {
    pub(super) fn open(path: &Path) -> Result<Self, BenchError> {
        let failed = |source| BenchError::Io {
            what: "open",
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        Ok(Self {
            path: path.to_owned(),
            file,
            length,
        })
    }

    /// Reads all of it.
    pub(super) fn warm(&self) -> Result<(), BenchError> {
        let read = File::open(&self.path).and_then(|mut file| io::copy(&mut file, &mut io::sink()));
        read.map(drop).map_err(self.failed("read"))
    }

    /// Drops it from the page cache; says which share of its pages stayed, from 0 to 1.
    pub(super) fn drop_pages(&self) -> Result<f64, BenchError> {
        // Only clean pages are dropped.
        self.file.sync_all().map_err(self.failed("sync"))?;
        fadvise(&self.file, 0, None, Advice::DontNeed)
            .map_err(|error| self.failed("advise the kernel of")(error.into()))?;
        self.resident()
            .map_err(self.failed("look into the page cache for"))
    }

    /// The share of its pages that are in the page cache.
    fn resident(&self) -> io::Result<f64> {
        let length = usize::try_from(self.length).map_err(io::Error::other)?;
        let mut pages = vec![0_u8; length.div_ceil(page_size())];
        // SAFETY: a new mapping at an address of the kernel's choice, which is never read.
        let mapping = unsafe {
            mmap(
                ptr::null_mut(),
                length,
                ProtFlags::READ,
                MapFlags::SHARED,
                &self.file,
                0,
            )
        }?;
        // SAFETY: the mapping has this length, and `pages` a byte for each page of it.
        let looked = unsafe { libc::mincore(mapping, length, pages.as_mut_ptr()) };
        let error = io::Error::last_os_error();
        // SAFETY: this mapping, which nobody refers to any more.
        unsafe { munmap(mapping, length) }?;
        if looked != 0 {
            return Err(error);
        }
        // mincore(2): only the lowest bit has a meaning.
        let there = pages.iter().filter(|page| **page & 1 == 1).count();
        #[expect(clippy::cast_precision_loss, reason = "far fewer pages than 2^52")]
        Ok(there as f64 / pages.len() as f64)
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> BenchError + use<> {
        let path = self.path.clone();
        move |source| BenchError::Io { what, path, source }
    }
}
