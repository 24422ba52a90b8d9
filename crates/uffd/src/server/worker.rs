//! A thread of the server: reads events, and decides what is next.

mod ahead;
mod demand;
mod fill;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use userfaultfd::{Event, EventBuffer, ReadWrite};

use super::Fatal;
use super::shared::{Fault, Shared, lock};
use crate::hot_pages::Mark;
use crate::prefetch::Prefetcher;

/// Events that are read at once.
const EVENTS: usize = 64;

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
    /// What was read of the source last.
    buffer: Vec<u8>,
    events: EventBuffer,
    /// What is still to be fetched. The first thread's alone.
    prefetcher: Option<Prefetcher>,
}

impl Worker<'_> {
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
