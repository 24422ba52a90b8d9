//! Faults: somebody waits for a page, or to write one.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use userfaultfd::FaultKind;

use super::fill::{Fill, unreadable};
use super::{End, Fault, Worker, lock};
use crate::address::{PAGE, PAGE_SIZE, host_size};
use crate::hot_pages::Mark;
use crate::memory::Area;
use crate::source::Extent;

impl Worker<'_> {
    /// Serves every fault that was read, until none is left.
    pub(super) fn serve_all(&mut self) -> Result<(), End> {
        loop {
            if self.shared.is_stopping() {
                return Err(End::Asked);
            }
            let Some(fault) = lock(&self.shared.faults).pop_front() else {
                return Ok(());
            };
            // Faults come from registered memory only.
            if let Some((area, page)) = self.shared.memory.locate(fault.address) {
                match fault.kind {
                    FaultKind::Missing => self.serve(area, page, &fault)?,
                    FaultKind::WriteProtected => self.serve_write(area, page, &fault)?,
                }
                self.shared.tally.took(fault.seen.elapsed());
            }
        }
    }

    /// Somebody waits for a page.
    fn serve(&mut self, area: &Area, page: usize, fault: &Fault) -> Result<(), End> {
        let tally = &self.shared.tally;
        tally.demand_faults.add(1);
        if fault.mark == Mark::Written {
            tally.demand_writes.add(1);
        }
        let this = page..page + 1;
        loop {
            if area.is_unmapped(page) {
                return Ok(());
            }
            let recording = self.shared.is_recording();
            let (pages, fill) = if area.is_discarded(page) {
                (this.clone(), Fill::Zeros)
            } else {
                let around = if recording { 1 } else { self.shared.read_around };
                let first = page - page % around;
                let window = first..(first + around).min(area.mapping.pages());
                self.read_around(area, page, window, fault, recording)?
            };
            let outcome = self.fill(area, pages, fill)?;
            match fill {
                Fill::Copy { .. } => tally.demand_pages.add(outcome.filled),
                Fill::Zeros => tally.zero_pages.add(outcome.filled),
            }
            // If it was discarded while it was read, it is zeros now.
            if area.is_present(page) {
                return Ok(());
            }
        }
    }

    /// Reads `page` and its neighbours of the same kind within `window`. A neighbour that cannot be read does no harm.
    fn read_around(
        &mut self,
        area: &Area,
        page: usize,
        window: Range<usize>,
        fault: &Fault,
        recording: bool,
    ) -> Result<(Range<usize>, Fill), End> {
        let wanted = area.open_around(page, window);
        let found = match self.read_kind(area, page, wanted.clone()) {
            Err(_) if wanted.len() > 1 => self.read_kind(area, page, page..page + 1),
            found => found,
        };
        let (pages, fill) = found.map_err(|source| unreadable(area, page, source))?;
        if recording && matches!(fill, Fill::Copy { .. }) {
            self.shared.record(area.gpa_of(page), fault.mark, fault.seen);
            let protect = fault.mark == Mark::Read && self.shared.memory.userfault.tells_writes();
            return Ok((pages, Fill::Copy { protect }));
        }
        Ok((pages, fill))
    }

    /// The pages of `wanted` that are of one kind with `page`. If they are data, they are in the buffer then.
    fn read_kind(
        &mut self,
        area: &Area,
        page: usize,
        wanted: Range<usize>,
    ) -> io::Result<(Range<usize>, Fill)> {
        let mut first = wanted.start;
        loop {
            let limit = ((wanted.end - first) * PAGE) as u64;
            let (is_data, length) = match self.shared.source.extent(area.offset_of(first), limit)? {
                Extent::Data(length) => (true, length),
                Extent::Zeros(length) => (false, length),
            };
            // A source that answers nothing, or more than was asked, must not send us astray.
            let pages = host_size(length.min(limit) / PAGE_SIZE).max(1);
            if page >= first + pages {
                first += pages;
            } else if is_data {
                self.read(area, first, pages)?;
                return Ok((first..first + pages, Fill::Copy { protect: false }));
            } else {
                return Ok((first..first + pages, Fill::Zeros));
            }
        }
    }

    /// A page that was filled protected is written.
    fn serve_write(&mut self, area: &Area, page: usize, fault: &Fault) -> Result<(), End> {
        self.shared.tally.write_protect_faults.add(1);
        self.shared.record(area.gpa_of(page), Mark::Written, fault.seen);
        self.unprotect_pages(area, page..page + 1)
    }

    /// The first thread that comes by lifts the protection of a recording that closed.
    pub(super) fn unprotect(&mut self) -> Result<(), End> {
        let shared = self.shared;
        if shared.protected.swap(false, Ordering::Relaxed) {
            for area in &shared.memory.areas {
                self.unprotect_pages(area, 0..area.mapping.pages())?;
            }
        }
        Ok(())
    }
}
