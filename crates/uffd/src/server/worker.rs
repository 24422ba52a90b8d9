//! A thread of the server.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{PoisonError, RwLockReadGuard};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use userfaultfd::{Event, EventBuffer, FaultKind, ReadWrite};

use super::Fatal;
use super::shared::{Fault, Shared, lock};
use crate::address::{PAGE, PAGE_SIZE, host_size};
use crate::hot_pages::{Mark, Stretch};
use crate::memory::Area;
use crate::prefetch::{BATCH_PAGES, Prefetcher};
use crate::source::Extent;
use crate::userfault::Filled;

/// Events that are read at once.
const EVENTS: usize = 64;

/// Pages that are fetched ahead, behind a running guest, before the server looks for faults again: a fault waits for
/// them at most.
const SLICE_PAGES: u64 = 64;

/// Why a thread ends.
pub(super) enum End {
    /// It was asked to.
    Asked,
    Fatal(Fatal),
}

/// Serves until the end. The `first` thread also fetches ahead.
pub(super) fn work(shared: &Shared, first: bool) {
    let worker = AssertUnwindSafe(|| {
        let prefetcher = if first {
            lock(&shared.prefetcher).take()
        } else {
            None
        };
        Worker {
            shared,
            buffer: Vec::new(),
            events: EventBuffer::new(EVENTS),
            prefetcher,
        }
        .run()
    });
    match catch_unwind(worker) {
        Ok(Err(End::Fatal(fatal))) => shared.fail(fatal),
        Ok(Ok(()) | Err(End::Asked)) => {}
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            shared.fail(Fatal::Panicked(text.unwrap_or_else(|| "no message".to_owned())));
        }
    }
}

struct Worker<'a> {
    shared: &'a Shared,
    buffer: Vec<u8>,
    events: EventBuffer,
    prefetcher: Option<Prefetcher>,
}

/// What pages are filled with.
#[derive(Clone, Copy)]
enum Fill {
    /// The buffer's beginning. Protected: the first write is told.
    Copy {
        protect: bool,
    },
    Zeros,
}

/// What became of pages that were to be filled.
#[derive(Clone, Copy, Default)]
struct Outcome {
    filled: u64,
    already_there: u64,
    /// They were discarded or unmapped meanwhile.
    displaced: u64,
}

impl<'a> Worker<'a> {
    fn run(mut self) -> Result<(), End> {
        loop {
            self.drain()?;
            self.serve_all()?;
            self.shared.close_if_over();
            self.unprotect()?;
            if !self.fetch_ahead()? {
                self.wait()?;
            }
        }
    }

    /// Reads all events. What was discarded or unmapped is known when this returns, before any fault is served.
    fn drain(&mut self) -> Result<(), End> {
        let shared = self.shared;
        let mut faults = Vec::new();
        let gate = shared.gate.write().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut read = 0;
            let events = |error| End::Fatal(Fatal::Events(std::io::Error::other(error)));
            for event in shared.memory.userfault.events(&mut self.events).map_err(events)? {
                read += 1;
                match event.map_err(events)? {
                    Event::Pagefault { kind, rw, addr, .. } => faults.push(Fault {
                        address: addr.addr(),
                        kind,
                        mark: if rw == ReadWrite::Write {
                            Mark::Written
                        } else {
                            Mark::Read
                        },
                        seen: Instant::now(),
                    }),
                    Event::Remove { start, end } => {
                        let pages = shared.memory.discard(start.addr(), end.addr());
                        shared.tally.discarded_pages.add(pages);
                    }
                    Event::Unmap { start, end } => shared.memory.unmap(start.addr(), end.addr()),
                    // Not asked for.
                    Event::Fork { .. } | Event::Remap { .. } => {}
                }
            }
            if read < EVENTS {
                break;
            }
        }
        drop(gate);
        if !faults.is_empty() {
            let others = (faults.len() as u64).min(shared.threads as u64) - 1;
            lock(&shared.faults).extend(faults);
            if others > 0 {
                shared.call_for_help(others);
            }
        }
        Ok(())
    }

    fn serve_all(&mut self) -> Result<(), End> {
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
    fn serve(&mut self, area: &'a Area, page: usize, fault: &Fault) -> Result<(), End> {
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
    ) -> std::io::Result<(Range<usize>, Fill)> {
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

    /// Reads pages into the buffer's beginning.
    fn read(&mut self, area: &Area, first: usize, pages: usize) -> std::io::Result<()> {
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

    /// A page that was filled protected is written.
    fn serve_write(&mut self, area: &Area, page: usize, fault: &Fault) -> Result<(), End> {
        self.shared.tally.write_protect_faults.add(1);
        self.shared.record(area.gpa_of(page), Mark::Written, fault.seen);
        self.unprotect_pages(area, page..page + 1)
    }

    /// The first thread that comes by lifts the protection of a recording that closed.
    fn unprotect(&mut self) -> Result<(), End> {
        let shared = self.shared;
        if shared.protected.swap(false, Ordering::Relaxed) {
            for area in &shared.memory.areas {
                self.unprotect_pages(area, 0..area.mapping.pages())?;
            }
        }
        Ok(())
    }

    fn unprotect_pages(&mut self, area: &Area, pages: Range<usize>) -> Result<(), End> {
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

    /// Fills pages that are not there. When it returns, each is there, or is no longer what it was to be filled with.
    fn fill(&mut self, area: &Area, pages: Range<usize>, fill: Fill) -> Result<Outcome, End> {
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

    /// Lets who changes memory go on: reads their events, and waits a little.
    fn give_way(&mut self, attempt: &mut u32) -> Result<(), End> {
        self.drain()?;
        if self.shared.is_stopping() {
            return Err(End::Asked);
        }
        *attempt += 1;
        if *attempt < 64 {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    /// Fetches some hot pages. Whether there may be more.
    fn fetch_ahead(&mut self) -> Result<bool, End> {
        let Some(mut prefetcher) = self.prefetcher.take() else {
            return Ok(false);
        };
        let slice = if prefetcher.is_before_resume() {
            BATCH_PAGES
        } else {
            SLICE_PAGES
        };
        let mut fetched = 0;
        while let Some(stretch) = prefetcher.tell() {
            self.tell(stretch);
        }
        while fetched < slice {
            let before = prefetcher.is_before_resume();
            match prefetcher.next() {
                Some(stretch) => {
                    fetched += stretch.pages;
                    self.fetch(stretch)?;
                }
                None if before => self.shared.ready(),
                None => return Ok(false),
            }
        }
        self.prefetcher = Some(prefetcher);
        Ok(true)
    }

    /// Tells the source of pages that will be read soon.
    fn tell(&self, stretch: Stretch) {
        for area in &self.shared.memory.areas {
            let pages = area.mapping.clip(stretch.gpa, stretch.pages);
            if !pages.is_empty() {
                self.shared
                    .source
                    .will_need(area.offset_of(pages.start), (pages.len() * PAGE) as u64);
            }
        }
    }

    /// Fills those of the pages that wait for it. The list has no zero pages, since none was recorded.
    fn fetch(&mut self, stretch: Stretch) -> Result<(), End> {
        let shared = self.shared;
        let tally = &shared.tally;
        for area in &shared.memory.areas {
            let hot = area.mapping.clip(stretch.gpa, stretch.pages);
            let mut page = hot.start;
            while page < hot.end {
                if !area.is_open(page) {
                    tally.prefetch_late.add(u64::from(area.is_present(page)));
                    page += 1;
                    continue;
                }
                let open = (page..hot.end).take_while(|page| area.is_open(*page)).count();
                if let Err(error) = self.read(area, page, open) {
                    return Err(self.first_unreadable(area, page..page + open, error));
                }
                let outcome = self.fill(area, page..page + open, Fill::Copy { protect: false })?;
                tally.prefetch_hits.add(outcome.filled);
                tally
                    .prefetch_waste
                    .add(outcome.already_there + outcome.displaced);
                page += open;
            }
        }
        Ok(())
    }

    /// Which of the pages it is that cannot be read.
    fn first_unreadable(&mut self, area: &Area, pages: Range<usize>, error: std::io::Error) -> End {
        for page in pages.clone() {
            if let Err(error) = self.read(area, page, 1) {
                return unreadable(area, page, error);
            }
        }
        unreadable(area, pages.start, error)
    }

    /// Waits until there is something to do.
    fn wait(&self) -> Result<(), End> {
        let shared = self.shared;
        let left = shared
            .deadline()
            .map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let mut descriptors = [
            PollFd::new(&shared.memory.userfault, PollFlags::IN),
            PollFd::new(&shared.stop, PollFlags::IN),
            PollFd::new(&shared.more, PollFlags::IN),
        ];
        match poll(&mut descriptors, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(End::Fatal(Fatal::Events(error.into()))),
        }
        if !descriptors[2].revents().is_empty() {
            // Another thread may have been quicker.
            let _ = rustix::io::read(&shared.more, &mut [0; 8]);
        }
        Ok(())
    }
}

fn unreadable(area: &Area, page: usize, source: std::io::Error) -> End {
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
