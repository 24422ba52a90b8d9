//! The guest's memory as the pager gives it to Cloud Hypervisor: what is in it already, and in which order the rest comes.
//!
//! Pages are put in by writing to the file, never through a mapping: the guest's userfaultfd tells of pages that are not in
//! the file, and a page that is written is there as a whole or not at all. Pages of zeros that the snapshot knows without
//! reading are only put in when somebody waits for them; the others may stay away for ever.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use stencil_uffd::{Extent, Fatal, Gpa, HotPages, PAGE_SIZE, PageSource};

use super::files::{Files, MemoryError, PAGE, pages_of};
use super::tally::Tally;
use crate::cloud_hypervisor::snapshot::Mapping;

/// Pages that are moved at a time at most, 256 KiB: one that the guest waits for comes after these.
const BATCH: usize = 64;

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
        let files = Files::new(mappings, source)?;
        Ok(Self {
            settled: files
                .regions
                .iter()
                .map(|region| vec![false; region.pages])
                .collect(),
            files: Arc::new(files),
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
                self.files
                    .write_zeros(region, page)
                    .map_err(|why| self.not_filled(region, page, why))?;
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
        self.files
            .write(region, page, bytes)
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
