//! Filling pages that are not there, against everything that changes memory meanwhile.

use std::io;
use std::ops::Range;
use std::sync::{PoisonError, RwLockReadGuard};

use rustix::io::Errno;

use super::{End, Worker};
use crate::address::PAGE;
use crate::memory::Area;
use crate::server::Fatal;
use crate::userfault::Filled;

/// What pages are filled with.
#[derive(Clone, Copy)]
pub(super) enum Fill {
    /// The buffer's beginning. Protected: the first write is told.
    Copy {
        protect: bool,
    },
    Zeros,
}

/// What became of pages that were to be filled.
#[derive(Clone, Copy, Default)]
pub(super) struct Outcome {
    pub(super) filled: u64,
    pub(super) already_there: u64,
    /// They were discarded or unmapped meanwhile.
    pub(super) displaced: u64,
}

impl Worker<'_> {
    /// Reads pages into the buffer's beginning.
    pub(super) fn read(&mut self, area: &Area, first: usize, pages: usize) -> io::Result<()> {
        let length = pages * PAGE;
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
        self.shared
            .source
            .read(area.offset_of(first), &mut self.buffer[..length])?;
        self.shared.tally.bytes_read.add(length as u64);
        Ok(())
    }

    /// Fills pages that are not there. When it returns, each is there, or is no longer what it was to be filled with.
    pub(super) fn fill(&mut self, area: &Area, pages: Range<usize>, fill: Fill) -> Result<Outcome, End> {
        let tally = &self.shared.tally;
        let mut outcome = Outcome::default();
        let (mut page, mut attempt) = (pages.start, 0);
        while page < pages.end {
            let gate = self.shared.gate.read().unwrap_or_else(PoisonError::into_inner);
            let (stretch, filled) = self.fill_some(&gate, area, &pages, page, fill);
            if stretch.is_empty() {
                outcome.displaced += 1;
                page += 1;
                continue;
            }
            let done = filled.bytes / PAGE;
            area.filled(page..page + done);
            page += done;
            outcome.filled += done as u64;
            match filled.stopped {
                None => {}
                Some(Errno::EXIST) => {
                    area.filled(page..page + 1);
                    // Who came between the kernel's look and ours would wait for ever.
                    let _ = self
                        .shared
                        .memory
                        .userfault
                        .wake(area.mapping.host_of(page), PAGE);
                    outcome.already_there += 1;
                    page += 1;
                }
                Some(Errno::AGAIN) if done > 0 => {}
                // Memory is being changed: events wait, or who caused them has not gone on yet.
                Some(Errno::AGAIN) => {
                    drop(gate);
                    tally.retries.add(1);
                    self.give_way(&mut attempt)?;
                }
                Some(error) => {
                    drop(gate);
                    // Unmapped, and the event may just be on its way.
                    self.drain()?;
                    if !area.is_unmapped(page) {
                        return Err(not_filled(area, page, error));
                    }
                }
            }
        }
        tally.already_there.add(outcome.already_there);
        Ok(outcome)
    }

    /// One call for the pages from `page` on that may still be filled so: none, if `page` itself may not.
    fn fill_some(
        &self,
        _gate: &RwLockReadGuard<'_, ()>,
        area: &Area,
        pages: &Range<usize>,
        page: usize,
        fill: Fill,
    ) -> (Range<usize>, Filled) {
        let may = |page: &usize| match fill {
            Fill::Copy { .. } => area.is_of_source(*page),
            Fill::Zeros => !area.is_unmapped(*page),
        };
        let stretch = page..page + (page..pages.end).take_while(may).count();
        if stretch.is_empty() {
            return (
                stretch,
                Filled {
                    bytes: 0,
                    stopped: None,
                },
            );
        }
        let (to, size) = (area.mapping.host_of(page), stretch.len() * PAGE);
        let userfault = &self.shared.memory.userfault;
        let filled = match fill {
            Fill::Copy { protect } => {
                let from = (page - pages.start) * PAGE;
                // SAFETY: the pages are of a mapping that is registered.
                unsafe { userfault.copy(to, &self.buffer[from..from + size], protect) }
            }
            // SAFETY: as above.
            Fill::Zeros => unsafe { userfault.zero(to, size) },
        };
        (stretch, filled)
    }

    pub(super) fn unprotect_pages(&mut self, area: &Area, pages: Range<usize>) -> Result<(), End> {
        let mut attempt = 0;
        loop {
            let (start, size) = (area.mapping.host_of(pages.start), pages.len() * PAGE);
            match self.shared.memory.userfault.unprotect(start, size) {
                Ok(()) => return Ok(()),
                Err(Errno::AGAIN) => self.give_way(&mut attempt)?,
                // Some of it was unmapped. What is still there is unprotected when it is written.
                Err(Errno::NOENT) => return Ok(()),
                Err(error) => return Err(not_filled(area, pages.start, error)),
            }
        }
    }
}

pub(super) fn unreadable(area: &Area, page: usize, source: io::Error) -> End {
    let (gpa, file_offset) = (area.gpa_of(page), area.offset_of(page));
    End::Fatal(Fatal::Unreadable {
        gpa,
        file_offset,
        source,
    })
}

fn not_filled(area: &Area, page: usize, error: Errno) -> End {
    let (gpa, file_offset) = (area.gpa_of(page), area.offset_of(page));
    End::Fatal(Fatal::NotFilled {
        gpa,
        file_offset,
        source: error.into(),
    })
}
