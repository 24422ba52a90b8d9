//! The recorder: who touches which page first, when and how, for a while.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use stencil_core::generation::MemoryGeneration;

use crate::address::Gpa;
use crate::hot_pages::{HotPages, Mark};

/// How long touches are recorded. Whichever bound is reached first closes the recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// How long after [`PageServer::before_resume`](crate::PageServer::before_resume).
    pub duration: Duration,
    /// How many pages, before and after it.
    pub pages: usize,
}

impl Window {
    /// What is recorded of a template's first fork.
    ///
    /// A fork is ready, and has answered its first request, well within this time; what comes later is the work of that one
    /// guest, and of no use to the next. But it is slow while each of its pages is a fault: 40 to 190 us a page, up to 3 s for
    /// 64 MiB. 65536 pages are 256 MiB: a guest that touches more in that time sweeps its memory, and to prefetch that would
    /// be to restore it by copying.
    pub const OF_A_FORK: Self = Self {
        duration: Duration::from_secs(5),
        pages: 65536,
    };
}

/// The first touch of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Where the page begins.
    pub gpa: Gpa,
    /// What was done to it within the window.
    pub mark: Mark,
    /// When it was first touched, after `before_resume`; zero before that.
    pub at: Duration,
}

/// Why a recording closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// Its time was over.
    Time,
    /// It had as many pages as it may have.
    Pages,
    /// It was taken.
    Taken,
}

/// A closed recording. Pages that are zeros in the image are not in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recording {
    /// The memory of which the pages are.
    pub generation: MemoryGeneration,
    /// The touches, in their order.
    pub touches: Vec<Touch>,
    /// Why it closed.
    pub closed: Closed,
    /// Whether the kernel told of pages that were read first and written later. Where it did not, those are marked as
    /// read.
    pub saw_later_writes: bool,
}

impl Recording {
    /// Marks as read the written pages that `is_changed` denies.
    ///
    /// KVM fetches a page that is not there behind the vCPU (its asynchronous page faults), and asks for it as if to
    /// write, whatever the guest does (Linux, `virt/kvm/async_pf.c`). So of a vCPU's first touch userfaultfd knows
    /// only that there was one; whether the page was written, its bytes tell.
    pub fn keep_written(&mut self, mut is_changed: impl FnMut(Gpa) -> bool) {
        for touch in &mut self.touches {
            if touch.mark == Mark::Written && !is_changed(touch.gpa) {
                touch.mark = Mark::Read;
            }
        }
    }

    /// The list that is kept of it.
    #[must_use]
    pub fn hot_pages(&self) -> HotPages {
        HotPages::from_touches(
            self.generation,
            self.touches.iter().map(|touch| (touch.gpa, touch.mark)),
        )
    }
}

/// A recording that is open. [`PageServer`](crate::PageServer) has one of its own; this is for who serves pages otherwise.
#[derive(Debug)]
pub struct Recorder {
    window: Window,
    began: Option<Instant>,
    touches: Vec<Touch>,
    /// The place of each page among the touches.
    places: HashMap<Gpa, usize>,
}

impl Recorder {
    /// One without touches, whose clock does not run.
    #[must_use]
    pub fn new(window: Window) -> Self {
        Self {
            window,
            began: None,
            touches: Vec::new(),
            places: HashMap::new(),
        }
    }

    /// The clock starts, if it does not run.
    pub fn begin(&mut self, now: Instant) {
        self.began.get_or_insert(now);
    }

    /// When its time is over; `None` while its clock does not run.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.began?.checked_add(self.window.duration)
    }

    /// A page was touched. A new one is left out when there are as many as may be.
    pub fn touch(&mut self, gpa: Gpa, mark: Mark, now: Instant) {
        let next = self.touches.len();
        if next >= self.window.pages && !self.places.contains_key(&gpa) {
            return;
        }
        let place = *self.places.entry(gpa).or_insert(next);
        if let Some(touch) = self.touches.get_mut(place) {
            touch.mark = touch.mark.max(mark);
        } else {
            let at = self
                .began
                .map_or(Duration::ZERO, |began| now.saturating_duration_since(began));
            self.touches.push(Touch { gpa, mark, at });
        }
    }

    /// Why it must close now, if it must.
    #[must_use]
    pub fn is_over(&self, now: Instant) -> Option<Closed> {
        if self.touches.len() >= self.window.pages {
            return Some(Closed::Pages);
        }
        self.deadline()
            .filter(|deadline| *deadline <= now)
            .map(|_| Closed::Time)
    }

    /// Closes it: touches of the memory of `generation`. `saw_later_writes` is kept as [`Recording::saw_later_writes`].
    #[must_use]
    pub fn close(self, generation: MemoryGeneration, closed: Closed, saw_later_writes: bool) -> Recording {
        Recording {
            generation,
            touches: self.touches,
            closed,
            saw_later_writes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Gpa = Gpa::new(0x5000);
    const B: Gpa = Gpa::new(0x1000);

    #[test]
    fn the_first_touch_gives_the_place_and_any_write_the_mark() {
        let began = Instant::now();
        let mut recorder = Recorder::new(Window {
            duration: Duration::from_secs(1),
            pages: 9,
        });
        recorder.touch(A, Mark::Read, began);
        recorder.begin(began);
        recorder.touch(B, Mark::Written, began + Duration::from_millis(2));
        recorder.touch(A, Mark::Written, began + Duration::from_millis(3));
        recorder.touch(B, Mark::Read, began + Duration::from_millis(4));
        let generation = MemoryGeneration::random();
        let recording = recorder.close(generation, Closed::Taken, true);
        let (mark, at) = (Mark::Written, Duration::from_millis(2));
        assert_eq!(
            recording.touches,
            [
                Touch {
                    gpa: A,
                    mark,
                    at: Duration::ZERO
                },
                Touch { gpa: B, mark, at }
            ]
        );
        assert_eq!(recording.hot_pages().pages(), 2);
    }

    #[test]
    fn it_closes_by_time_from_the_beginning_or_by_pages() {
        let began = Instant::now();
        let mut recorder = Recorder::new(Window {
            duration: Duration::from_millis(5),
            pages: 2,
        });
        let later = began + Duration::from_millis(5);
        assert_eq!(recorder.is_over(later), None);
        recorder.begin(began);
        assert_eq!(recorder.is_over(began), None);
        assert_eq!(recorder.is_over(later), Some(Closed::Time));
        recorder.touch(A, Mark::Read, began);
        recorder.touch(A, Mark::Read, began);
        assert_eq!(recorder.is_over(began), None);
        recorder.touch(B, Mark::Read, began);
        assert_eq!(recorder.is_over(began), Some(Closed::Pages));
    }
}
