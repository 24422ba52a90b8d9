//! The guest's memory as the pager gives it to Cloud Hypervisor: a memfd for each region, filled from the snapshot.
//!
//! Pages are put in by writing to the file, never through a mapping: the guest's userfaultfd tells of pages that are not in
//! the file, and a page that is written is there as a whole or not at all. Pages of zeros that the snapshot knows without
//! reading are only put in when somebody waits for them; the others may stay away for ever.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom, fallocate, ftruncate, memfd_create, seek};
use stencil_uffd::{Extent, Fatal, Gpa, HotPages, PAGE_SIZE, PageSource};

use super::tally::Tally;
use crate::cloud_hypervisor::snapshot::Mapping;

/// Bytes that are moved at a time at most: a page that the guest waits for comes after these.
const BATCH: usize = 64;
const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE, "pages are those of the image");

/// There is no memory to give.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The kernel gives no memfd.
    #[error("memory for the guest cannot be had")]
    Memfd(#[source] io::Error),
    /// Pages could appear that nobody filled.
    #[error(
        "this host puts shared memory in huge pages, which cannot be served page by page; \
         set /sys/kernel/mm/transparent_hugepage/shmem_enabled to never or advise"
    )]
    HugePages,
    /// The VM's memory is not in the snapshot.
    #[error("the guest's memory of {size} bytes at {gpa:#x} is not in the snapshot in one piece")]
    NotInImage {
        /// Where it begins in the guest.
        gpa: u64,
        /// Its length in bytes.
        size: u64,
    },
}

/// A region of guest memory.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) slot: u32,
    pub(super) file: File,
    gpa: u64,
    pages: usize,
    /// Where it begins in the image, in bytes.
    offset: u64,
}

/// The parts that do not change: to be shared with who compares pages.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) regions: Vec<Region>,
    source: Arc<dyn PageSource>,
}

/// All of it.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) files: Arc<Files>,
    /// Of each region, the pages that need nothing of the snapshot any more: they are there, or zeros by right.
    settled: Vec<Vec<bool>>,
    /// What is put in before the rest: hot pages.
    first: VecDeque<(usize, Range<usize>)>,
    /// Before this page, all are settled.
    rest: (usize, usize),
    buffer: Vec<u8>,
    tally: Arc<Tally>,
}

impl Memory {
    /// Empty memory of these mappings, which `source` has.
    pub(super) fn new(
        mappings: &[Mapping],
        source: Arc<dyn PageSource>,
        tally: Arc<Tally>,
    ) -> Result<Self, MemoryError> {
        check_page_size()?;
        let regions = mappings
            .iter()
            .map(|mapping| region(mapping, source.as_ref()))
            .collect::<Result<Vec<_>, _>>()?;
        let settled = mappings
            .iter()
            .map(|mapping| vec![false; pages_of(mapping.size)])
            .collect();
        Ok(Self {
            files: Arc::new(Files { regions, source }),
            settled,
            first: VecDeque::new(),
            rest: (0, 0),
            buffer: vec![0; BATCH * PAGE],
            tally,
        })
    }

    /// How many pages each region has.
    pub(super) fn pages(&self) -> impl Iterator<Item = usize> + '_ {
        self.settled.iter().map(Vec::len)
    }

    /// Region and page of a gpa, if there is memory.
    pub(super) fn locate(&self, gpa: Gpa) -> Option<(usize, usize)> {
        self.files.locate(gpa)
    }

    /// Puts a page in, if it is not of zeros.
    pub(super) fn bring(&mut self, region: usize, page: usize) -> Result<(), Fatal> {
        self.settle(region, page..page + 1).map(drop)
    }

    /// Puts a page in for which somebody waits, and its neighbours in an aligned group of `around`. Says whether it is one
    /// that is read: not one of zeros that are known without reading.
    pub(super) fn serve(&mut self, region: usize, page: usize, around: usize) -> Result<bool, Fatal> {
        let first = page - page % around;
        let group = first..(first + around).min(self.settled[region].len());
        self.settle(region, group.clone())?;
        let extent = self
            .files
            .source
            .extent(self.files.offset(region, page), PAGE_SIZE);
        match extent.map_err(|why| self.unreadable(region, page, why))? {
            Extent::Data(_) => Ok(true),
            Extent::Zeros(_) => {
                self.tally.zero_pages.add(1);
                let place = &self.files.regions[region];
                // Nothing changes if it is there already.
                fallocate(&place.file, FallocateFlags::empty(), place.place(page), PAGE_SIZE)
                    .map_err(|error| self.not_filled(region, page, error.into()))?;
                Ok(false)
            }
        }
    }

    /// Puts the first `budget` bytes of these pages in now, and the others before the rest.
    pub(super) fn prefetch(&mut self, hot: &HotPages, budget: u64) -> Result<(), Fatal> {
        let (now, later) = hot.split_at(budget / PAGE_SIZE);
        let mut runs: Vec<_> = now.runs().to_vec();
        // One call does for neighbours.
        runs.sort_unstable_by_key(|run| run.gpa);
        for (region, pages) in runs
            .iter()
            .filter_map(|run| self.clip(run.gpa, run.pages))
            .collect::<Vec<_>>()
        {
            let came = self.settle(region, pages)?;
            self.tally.prefetched.add(came);
        }
        self.first = later
            .runs()
            .iter()
            .filter_map(|run| self.clip(run.gpa, run.pages))
            .collect();
        Ok(())
    }

    /// Puts in a batch of what is still missing, in the order in which it will be needed; whether something was.
    pub(super) fn go_on(&mut self) -> Result<bool, Fatal> {
        if let Some((region, pages)) = self.first.pop_front() {
            let end = pages.end.min(pages.start + BATCH);
            if end < pages.end {
                self.first.push_front((region, end..pages.end));
            }
            let came = self.settle(region, pages.start..end)?;
            self.tally.prefetched.add(came);
            return Ok(true);
        }
        while let Some(region) = self.settled.get(self.rest.0) {
            match region[self.rest.1..].iter().position(|settled| !settled) {
                None => self.rest = (self.rest.0 + 1, 0),
                Some(missing) => {
                    let begin = self.rest.1 + missing;
                    let end = (begin + BATCH).min(region.len());
                    self.settle(self.rest.0, begin..end)?;
                    self.rest.1 = end;
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Puts in all that is missing.
    pub(super) fn complete(&mut self) -> Result<(), Fatal> {
        while self.go_on()? {}
        Ok(())
    }

    /// Whether nothing is missing. This looks at all pages.
    pub(super) fn is_complete(&self) -> bool {
        self.settled.iter().flatten().all(|settled| *settled)
    }

    /// Puts in those of the pages that are missing; says how many were read.
    fn settle(&mut self, region: usize, pages: Range<usize>) -> Result<u64, Fatal> {
        let mut came = 0;
        let mut page = pages.start;
        while page < pages.end {
            if self.settled[region][page] {
                page += 1;
                continue;
            }
            let missing = self.settled[region][page..pages.end]
                .iter()
                .take_while(|settled| !**settled);
            let most = missing.count().min(BATCH);
            let offset = self.files.offset(region, page);
            let extent = self.files.source.extent(offset, (most * PAGE) as u64);
            let taken = match extent.map_err(|why| self.unreadable(region, page, why))? {
                Extent::Zeros(bytes) => pages_of(bytes),
                Extent::Data(bytes) => {
                    let count = pages_of(bytes);
                    self.copy(region, page, count)?;
                    came += count as u64;
                    count
                }
            };
            self.settled[region][page..page + taken].fill(true);
            page += taken;
        }
        Ok(came)
    }

    fn copy(&mut self, region: usize, page: usize, count: usize) -> Result<(), Fatal> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let bytes = &mut buffer[..count * PAGE];
        self.files
            .source
            .read(self.files.offset(region, page), bytes)
            .map_err(|why| self.unreadable(region, page, why))?;
        let place = &self.files.regions[region];
        place
            .file
            .write_all_at(bytes, place.place(page))
            .map_err(|why| self.not_filled(region, page, why))?;
        self.tally.bytes_read.add(bytes.len() as u64);
        self.tally.copied_pages.add(count as u64);
        self.buffer = buffer;
        Ok(())
    }

    fn clip(&self, gpa: Gpa, pages: u32) -> Option<(usize, Range<usize>)> {
        let (region, page) = self.locate(gpa)?;
        let end = page
            .saturating_add(pages as usize)
            .min(self.settled[region].len());
        Some((region, page..end))
    }

    fn unreadable(&self, region: usize, page: usize, source: io::Error) -> Fatal {
        let (gpa, file_offset) = (self.files.gpa(region, page), self.files.offset(region, page));
        Fatal::Unreadable {
            gpa,
            file_offset,
            source,
        }
    }

    fn not_filled(&self, region: usize, page: usize, source: io::Error) -> Fatal {
        let (gpa, file_offset) = (self.files.gpa(region, page), self.files.offset(region, page));
        Fatal::NotFilled {
            gpa,
            file_offset,
            source,
        }
    }
}

impl Files {
    /// Whether a page, which is there, has other bytes than the snapshot.
    pub(super) fn differs(&self, gpa: Gpa) -> io::Result<bool> {
        let (region, page) = self.locate(gpa).ok_or(io::ErrorKind::NotFound)?;
        let (mut now, mut then) = ([0; PAGE], [0; PAGE]);
        let place = &self.regions[region];
        place.file.read_exact_at(&mut now, place.place(page))?;
        self.source.read(self.offset(region, page), &mut then)?;
        Ok(now != then)
    }

    fn locate(&self, gpa: Gpa) -> Option<(usize, usize)> {
        self.regions.iter().enumerate().find_map(|(index, region)| {
            let page = usize::try_from(gpa.get().checked_sub(region.gpa)? / PAGE_SIZE).ok()?;
            (page < region.pages).then_some((index, page))
        })
    }

    pub(super) fn gpa(&self, region: usize, page: usize) -> Gpa {
        Gpa::new(self.regions[region].gpa + self.regions[region].place(page))
    }

    fn offset(&self, region: usize, page: usize) -> u64 {
        self.regions[region].offset + self.regions[region].place(page)
    }
}

impl Region {
    /// Where in its file a page begins, in bytes.
    const fn place(&self, page: usize) -> u64 {
        page as u64 * PAGE_SIZE
    }
}

fn region(mapping: &Mapping, source: &dyn PageSource) -> Result<Region, MemoryError> {
    let Mapping { gpa, size, slot, .. } = *mapping;
    let not_in_image = MemoryError::NotInImage { gpa, size };
    let last = size.checked_sub(PAGE_SIZE).and_then(|last| gpa.checked_add(last));
    let (Some(last), true) = (
        last,
        gpa.is_multiple_of(PAGE_SIZE) && size.is_multiple_of(PAGE_SIZE),
    ) else {
        return Err(not_in_image);
    };
    let table = source.table();
    let offset = table.offset_of(Gpa::new(gpa)).ok_or(not_in_image)?;
    // In one piece: what lies between them lies between them in the image.
    if table.offset_of(Gpa::new(last)) != offset.checked_add(size - PAGE_SIZE) {
        return Err(MemoryError::NotInImage { gpa, size });
    }
    let file = memfd("guest-memory", size).map_err(MemoryError::Memfd)?;
    let pages = pages_of(size);
    Ok(Region {
        slot,
        file,
        gpa,
        pages,
        offset,
    })
}

fn memfd(name: &str, size: u64) -> io::Result<File> {
    let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
    ftruncate(&file, size)?;
    Ok(file)
}

/// That a page which is written brings no other with it: in a huge page the others would be zeros, there, and never asked for.
fn check_page_size() -> Result<(), MemoryError> {
    let probe = || -> io::Result<bool> {
        let file = memfd("probe", 4 << 20)?;
        file.write_all_at(&[1], 0)?;
        Ok(seek(&file, SeekFrom::Hole(0))? == PAGE_SIZE)
    };
    match probe().map_err(MemoryError::Memfd)? {
        true => Ok(()),
        false => Err(MemoryError::HugePages),
    }
}

const fn pages_of(bytes: u64) -> usize {
    (bytes / PAGE_SIZE) as usize
}
